"""Adapters for trainers, each in a file of its own that imports its framework; nothing is imported here."""
