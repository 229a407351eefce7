"""The averaged model as a whole: averaged parameters, the other parameters, buffers, and what modules keep besides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dist_swa.averaging.state import AverageState
from dist_swa.sharding.model import ModelShards
from dist_swa.sharding.shard import LocalShard, checkpoint_view


class AveragedModel:
    """The state dicts of the model that an average stands for.

    `has_average`: whether the model itself has the buffers of this average now, inside `swapped_in`. `only`:
    "averaged" leaves out all but the averaged parameters. Raises ValueError for another one.
    """

    def __init__(self, shards: ModelShards, state: AverageState, has_average: bool, only: str | None) -> None:
        check_only(only)
        self._shards, self._only = shards, only
        # With this rank's part of the average. None: the model has the values.
        self._parts: list[tuple[LocalShard, Tensor | None]] = [*zip(shards.averaged, state.averages(), strict=True)]
        if only is None:
            buffers = {s.name: s.local_tensor for s in shards.buffers} if has_average else state.buffers
            self._parts += [(shard, None) for shard in shards.others if not shard.is_opaque]
            self._parts += [(s, buffers[s.name]) for s in shards.buffers if s.is_persistent and s.name in buffers]

    def full_state_dict(self) -> dict[str, Any]:
        """Return copies on the CPU, on the first rank. A collective of a sharded or replicated model."""
        full: dict[str, Any] = {}
        for shard, local in self._parts:
            whole = shard.full_tensor_of_model() if local is None else shard.full_tensor(local)
            if self._shards.is_first_rank:
                full |= dict.fromkeys(shard.names, whole.to("cpu", copy=True))
        if self._only is None and self._shards.is_first_rank:
            for key, value in self._shards.extra_state().items():
                full[key] = value.to("cpu", copy=True) if type(value) is Tensor else value
        return full

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return tensors for torch.distributed.checkpoint. A collective under FSDP1."""
        state: dict[str, Any] = {}
        for shard, local in self._parts:
            local = shard.local if local is None else local
            state |= dict.fromkeys(shard.names, checkpoint_view(shard, local, self._shards.is_first_rank))
        return state if self._only else state | self._shards.extra_state()


def check_only(only: Any) -> None:
    """Raise ValueError unless `only` is None or "averaged"."""
    if only not in (None, "averaged"):
        raise ValueError(f"only needs to be None or 'averaged', got only={only!r}; 'averaged' leaves out the rest")
