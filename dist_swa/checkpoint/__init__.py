"""Atomic checkpoints with checksums, which are read without running code and load on any number of ranks.

A checkpoint is a folder of torch.distributed.checkpoint (DCP); plain dcp.load reads it as well:

| file | content |
| --- | --- |
| `__<rank>_0.distcp` | the tensors and values that a rank wrote |
| `.metadata` | DCP's index: the file and the offset of each tensor |
| `dist_swa.json` | after a merge: the paths, steps and weights of its sources |
| `SHA256SUMS` | the checksums of all other files; `sha256sum --check SHA256SUMS` |

An average, such as the entry "swa" of ``{"swa": swa}``, has only tensors. Its keys, version 1 of the format:

| key | dtype and shape | content |
| --- | --- | --- |
| `swa.format_version` | int64 | 1; a newer version is refused |
| `swa.num_averaged` | int64 | number of models in the average |
| `swa.num_parameters` | int64 | number of averaged parameters |
| `swa.num_others` | int64 | number of parameters that are not averaged: frozen, or not selected |
| `swa.rule.<class>` | uint8[256] | the rule as text, such as "PowerEMA(sigma_rel=0.05)", padded with zeros |
| `swa.slots.<i>.<name>` | the average's, the parameter's | a slot; the average is the mean of the first \
``min(num_averaged, slots)`` slots. Averaged buffers have slots, too |
| `swa.buffers.<name>` | the buffer's | a persistent buffer of the averaged model |
| `swa.ties.<name>` | uint8 | a JSON list of the other names of a tied parameter or buffer |
| `swa.schedule.now`, `.first_update`, `.last_update` | int64[4] | batches, samples, tokens, ended epochs; -1: never |
| `swa.schedule.completed`, `.num_skipped` | int64 | whether averaging is over; number of refused updates |
| `swa.schedule.frozen` | bool | which normalisation layers were frozen at the last update in training mode |
| `swa.schedule.start_lrs` | float64 | the learning rate of each group at `swa_start`; NaN before |

Several averages are stored by name (``swa.<average>.slots`` and so on) beside one ``swa.schedule``. A `ShardedAverage`
has no schedule. Names are those of the unwrapped model. A parameter is one entry of its full shape, stored in shards:
any wrapper on any number of ranks can read and write it.

Checksums detect damage, not attacks: an attacker can write new checksums. Reading a file never runs code: classes in
`.metadata` must be on a list, and all other values are read with ``weights_only=True``.
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
