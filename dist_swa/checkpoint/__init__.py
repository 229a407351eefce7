"""Checkpoints that appear when they are whole, are read without running code, and load on any number of ranks.

A checkpoint is a folder by torch.distributed.checkpoint (DCP), which plain dcp.load reads as well:

| file | content |
| --- | --- |
| `__<rank>_0.distcp` | the tensors and values that a rank has written |
| `.metadata` | DCP's: which tensor lies where |
| `SHA256SUMS` | the checksums of all of them; `sha256sum --check SHA256SUMS` |

An average, the entry "swa" of ``{"swa": swa}``, consists of tensors only. Its keys, version 1 of the format:

| key | dtype and shape | content |
| --- | --- | --- |
| `swa.format_version` | int64 | 1; a newer one is refused |
| `swa.num_averaged` | int64 | models in the average |
| `swa.num_parameters` | int64 | parameters that are averaged |
| `swa.num_others` | int64 | parameters that are not: frozen, or not selected |
| `swa.rule.<class>` | uint8[256] | the rule as text, as "PowerEMA(sigma_rel=0.05)", and zeros |
| `swa.slots.<i>.<name>` | the average's, the parameter's | a stored copy; the average is the mean of the first \
``min(num_averaged, slots)``. With ``buffers="average"`` of floating buffers as well |
| `swa.buffers.<name>` | the buffer's | a persistent buffer, as it is deployed |
| `swa.ties.<name>` | uint8 | the other names of a tied parameter or buffer, a JSON list |
| `swa.schedule.now`, `.first_update`, `.last_update` | int64[4] | batches, samples, tokens, ended epochs; -1: never |
| `swa.schedule.completed`, `.num_skipped` | int64 | whether it is over; updates refused |
| `swa.schedule.frozen` | bool | which normalisation layers were frozen at the last update in training mode |
| `swa.schedule.start_lrs` | float64 | the learning rate of each group at `swa_start`, NaN before |

Several averages stand below their names, ``swa.<average>.slots`` and so on, beside one ``swa.schedule``; a
`ShardedAverage` has no schedule. Names are those of the unwrapped model. A parameter has one entry of its whole shape,
of which DCP stores shards: any wrapper on any number of ranks reads it, and writes it.

Checksums find damage. They are no defence against an attacker, who writes new ones; against that one, reading runs no
code: `.metadata` through a list of classes, all else with ``weights_only=True``.
"""

from dist_swa.checkpoint.export import export
from dist_swa.checkpoint.merge import merge
from dist_swa.checkpoint.synthesize import synthesize
from dist_swa.storage.folder import CheckpointFolder
from dist_swa.storage.reader import CheckpointError, CheckpointReader, open_checkpoint
from dist_swa.storage.save_load import load, save

__all__ = [
    "CheckpointError",
    "CheckpointFolder",
    "CheckpointReader",
    "export",
    "load",
    "merge",
    "open_checkpoint",
    "save",
    "synthesize",
]
