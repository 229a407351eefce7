"""Checkpoints that survive a crash, are read without running code, and load on any number of ranks."""

from dist_swa.checkpoint.folder import CheckpointFolder
from dist_swa.checkpoint.reader import CheckpointError, CheckpointReader, open_checkpoint
from dist_swa.checkpoint.storage import load, save

__all__ = ["CheckpointError", "CheckpointFolder", "CheckpointReader", "load", "open_checkpoint", "save"]
