"""Adapters for trainers, one file each: a trainer's events in, calls of `dist_swa.SWA` out."""
