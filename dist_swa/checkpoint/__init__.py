"""Checkpoints that appear when they are whole, are read without running code, and load on any number of ranks.

A checkpoint is a folder by torch.distributed.checkpoint (DCP), which plain dcp.load reads as well:

| file | content |
| --- | --- |
| `__<rank>_0.distcp` | the tensors and values that a rank has written |
| `.metadata` | DCP's: which tensor lies where |
| `SHA256SUMS` | the checksums of all of them; `sha256sum --check SHA256SUMS` |

Checksums find damage. They are no defence against an attacker, who writes new ones; against that one, reading runs no
code: `.metadata` through a list of classes, all else with ``weights_only=True``.
"""

from dist_swa.checkpoint.folder import CheckpointFolder
from dist_swa.checkpoint.reader import CheckpointError, CheckpointReader, open_checkpoint
from dist_swa.checkpoint.storage import load, save

__all__ = ["CheckpointError", "CheckpointFolder", "CheckpointReader", "load", "open_checkpoint", "save"]
