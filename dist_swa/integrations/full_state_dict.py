"""An average inside a checkpoint that is one file: whole tensors, which the first rank writes and every rank reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_swa import SWA


def full_state_dict(swa: SWA) -> dict[str, Any]:
    """Return the state with whole tensors on the CPU, copies, on the first rank, and an empty dict elsewhere.

    A collective where the average is sharded. Memory: a whole parameter at a time, and all of it on the first rank.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    state = _gathered(swa.state_dict(), is_first)
    return state if is_first else {}


def load_full_state_dict(swa: SWA, saved: Mapping[str, Any]) -> None:
    """Take over what `full_state_dict` returned on the first rank, in a run on any number of ranks.

    Every rank calls it, with the same state. Local, but under FSDP1. Raises what `SWA.load_state_dict` does.
    """
    swa.load_state_dict(_laid_out(saved, swa.state_dict()))


def _gathered(state: Mapping[str, Any], is_wanted: bool) -> dict[str, Any]:
    gathered: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            gathered[key] = _gathered(value, is_wanted)
        else:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            gathered[key] = whole.to("cpu", copy=True) if is_wanted else None
    return gathered


def _laid_out(saved: Any, mine: Any) -> Any:
    if isinstance(saved, Mapping):
        return {key: _laid_out(value, mine.get(key, {})) for key, value in saved.items()}
    if isinstance(mine, DTensor):
        return distribute_tensor(saved, mine.device_mesh, mine.placements, src_data_rank=None)
    return saved
