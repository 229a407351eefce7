"""The state of an `SWA` with full tensors on the first rank, for checkpoints that are one file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_swa import SWA

# torch.distributed.checkpoint.state_dict gathers and distributes models and optimizers only, not nested state dicts.


def full_state_dict(swa: SWA) -> dict[str, Any]:
    """Return ``swa.state_dict()`` with full tensors, as copies on the CPU, on the first rank, and {} on the others.

    Every rank calls it: a collective if the average is sharded. Memory: one full parameter at a time, and all of them
    on the first rank.
    """
    swa.average.require_same_models()
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    state = _to_full(swa.state_dict(), is_first)
    return state if is_first else {}


def load_full_state_dict(swa: SWA, saved: Mapping[str, Any]) -> None:
    """Load what `full_state_dict` returned on the first rank, on any number of ranks.

    Every rank calls it with the same `saved`: a collective under FSDP1, local otherwise. Raises what
    `SWA.load_state_dict` raises.
    """
    swa.load_state_dict(_distribute(saved, swa.state_dict()))


def _to_full(state: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    full: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            full[key] = _to_full(value, keep)
        else:
            tensor = value.full_tensor() if isinstance(value, DTensor) else value
            full[key] = tensor.to("cpu", copy=True) if keep else None
    return full


def _distribute(saved: Any, like: Any) -> Any:
    """Return `saved` with the layout of `like`, as far as that has the same keys."""
    if isinstance(saved, Mapping):
        return {key: _distribute(value, like.get(key, {})) for key, value in saved.items()}
    if isinstance(like, DTensor):
        return distribute_tensor(saved, like.device_mesh, like.placements, src_data_rank=None)
    return saved
