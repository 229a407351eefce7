"""AverageState: what is stored of one average, and its state dict."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_swa.averaging.format import FORMAT_VERSION, check_header, check_version, encode, encode_rule, local_tensors
from dist_swa.averaging.lerp import lerp, mean, plan
from dist_swa.averaging.rules import Rule
from dist_swa.sharding.model import ModelShards
from dist_swa.sharding.shard import LocalShard, checkpoint_view, copy_unless_expanded


class AverageState:
    """The average by one rule: `slots` has a list of local tensors per slot, in the order of the averaged shards.

    `buffers` are those of the average, in the model's dtypes. `_buffer_slots` has the floating ones for which
    `is_averaged` is True in the average's dtype, one dict per slot. Buffers are stored by name, since they may come
    and go.
    """

    def __init__(
        self,
        rule: Rule,
        shards: ModelShards,
        dtype: torch.dtype,
        device: torch.device | str | None,
        is_averaged: Callable[[LocalShard], bool],
    ) -> None:
        self.rule = rule
        self.num_averaged = 0
        self._last_weight: float | None = 0.0
        self._shards = shards
        self._dtype, self._device = dtype, device
        self._is_averaged = is_averaged
        self.buffers: dict[str, Tensor] = {}
        self._buffer_slots: list[dict[str, Tensor]] = [{} for _ in range(rule.num_slots)]
        self.slots: list[list[Tensor]] = [[] for _ in range(rule.num_slots)]
        self._names: list[str] = []  # of the tensors in each slot
        self.match_shards()
        self._renew_buffers()

    @property
    def num_bytes(self) -> int:
        """Bytes of the average on this rank."""
        slots = [*self.slots, *(slot.values() for slot in self._buffer_slots), self.buffers.values()]
        return sum(tensor.nbytes for slot in slots for tensor in slot)

    def match_shards(self) -> None:
        """Keep tensors for the shards that are averaged now. One that joins starts from the model's value."""
        shards = self._shards.averaged
        with torch.inference_mode(False), torch.no_grad():
            for i, slot in enumerate(self.slots):
                stored = dict(zip(self._names, slot, strict=True))
                self.slots[i] = [
                    stored[shard.name] if shard.name in stored else self._new_slot(shard.local) for shard in shards
                ]
        self._names = [shard.name for shard in shards]

    @property
    def last_weight(self) -> float:
        """How much the last model weighed; NaN where a loaded average does not say it, as by a half-life."""
        if self._last_weight is None and self.rule.unit is None:
            return self.rule.weight(self.num_averaged, None) if self.num_averaged else 0.0
        return math.nan if self._last_weight is None else self._last_weight

    def reset(self) -> None:
        self.num_averaged, self._last_weight = 0, 0.0

    def averages(self) -> list[Tensor]:
        """Return the averaged shards: the only slot in use, or the mean of several, which is a copy."""
        return mean(self.slots[: self.num_averaged])

    def tensors(self) -> list[Tensor]:
        """Return this rank's averaged parameters, and its averaged buffers."""
        return [*self.averages(), *(self.buffers[name] for name in self._buffer_slots[0])]

    def averaged_buffers(self) -> list[LocalShard]:
        return [shard for shard in self._shared_buffers() if shard.name in self._buffer_slots[0]]

    def persistent_buffers(self) -> list[Tensor]:
        return [self.buffers[shard.name] for shard in self._persistent_buffers()]

    def advance(self, weight: float) -> None:
        """Count a model that the slots were moved to, and copy or average its buffers."""
        shared = self._shared_buffers()
        if not len(shared) == len(self._shards.buffers) == len(self.buffers):
            self._renew_buffers()
        slot = self.num_averaged % len(self.slots)
        self.num_averaged, self._last_weight = self.num_averaged + 1, weight
        self.copy_buffers_from_model()
        used = self._buffer_slots[: self.num_averaged]
        if names := list(used[0]):
            values = {shard.name: shard.local_tensor for shard in self._shards.buffers}
            lerp(plan([list(self._buffer_slots[slot].values())], [values[name] for name in names]), {0: weight})
            for name, average in zip(names, mean([list(slot.values()) for slot in used]), strict=True):
                self.buffers[name].copy_(average)

    def copy_buffers_from_model(self) -> None:
        for shard in self._shared_buffers():
            self.buffers[shard.name].copy_(shard.local_tensor)

    def copy_buffers_to_model(self) -> None:
        for shard in self._shared_buffers():
            copy_unless_expanded(shard.local_tensor, self.buffers[shard.name])

    def state_dict(self) -> dict[str, Any]:
        """Return tensors only, on the storage of the average (under FSDP1 copies, and a collective)."""
        shards, persistent = self._shards, self._persistent_buffers()
        return {
            "format_version": torch.tensor(FORMAT_VERSION),
            "num_averaged": torch.tensor(self.num_averaged),
            "num_parameters": torch.tensor(len(shards.averaged)),
            "num_others": torch.tensor(len(shards.others)),
            "rule": {type(self.rule).__name__: encode_rule(self.rule)},
            "slots": {
                str(i): self._views(zip(self._stored_shards(i), self._stored(i), strict=True))
                for i in range(len(self.slots))
            },
            "buffers": self._views((shard, self.buffers[shard.name]) for shard in persistent),
            "ties": {
                shard.name: encode(json.dumps(shard.names[1:]))
                for shard in shards.everything
                if len(shard.names) > 1 and shard.is_persistent
            },
        }

    def check_saved(self, keys: Mapping[str, str], saved: Mapping[str, Any]) -> None:
        """Raise ValueError where `saved` has a newer format, or slots that model and rule do not have.

        `keys` maps the keys of this average to those of `saved`.
        """
        if "format_version" in keys:
            check_version(saved[keys["format_version"]])
        expected = {f"slots.{i}.{shard.name}" for i in range(len(self.slots)) for shard in self._stored_shards(i)}
        for key in keys:
            if key.startswith("slots.") and key not in expected:
                raise ValueError(
                    f"load needs the model and rule that the checkpoint was averaged with, got {keys[key]}, which they"
                    " do not have; build them as they were"
                )

    def optional_keys(self) -> set[str]:
        """Return the keys of `state_dict` that `load` does not need: of buffers. Averaged ones also have slots."""
        return {f"{part}.{shard.name}" for shard in self._persistent_buffers() for part in ("buffers", "ties")}

    def local_tensors_of(self, state: Mapping[str, Any]) -> list[Tensor]:
        """Return this rank's part of each tensor in `state`, for `load`; ValueError where `state` does not fit."""
        check_header(state, self.rule)
        parts: list[Tensor] = []
        for i in range(len(self.slots)):
            parts += local_tensors(state["slots"][str(i)], self._stored_shards(i))
        buffers = self._buffers_in(state)
        parts += local_tensors({shard.name: state["buffers"][shard.name] for shard in buffers}, buffers)
        num_parameters = int(state["num_parameters"])
        if num_parameters != len(self._shards.averaged):  # DCP does not read what the state dict has no key for
            raise ValueError(
                f"load_state_dict needs a checkpoint of {len(self._shards.averaged)} averaged parameters, got"
                f" {num_parameters=}; load it into the model that it was averaged from"
            )
        return parts

    def load(self, state: Mapping[str, Any], parts: Sequence[Tensor]) -> None:
        """Copy `parts`, which `local_tensors_of` returned for `state`, into the average."""
        targets = [tensor for i in range(len(self.slots)) for tensor in self._stored(i)]
        buffers = self._buffers_in(state)
        targets += [self.buffers[shard.name] for shard in buffers]
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part)
        for shard in self._persistent_buffers():
            if shard not in buffers:
                self.buffers[shard.name].copy_(shard.local_tensor)
        self.num_averaged, self._last_weight = int(state["num_averaged"]), None

    def _stored_shards(self, slot: int) -> list[LocalShard]:
        """Return the shards of a slot in a checkpoint: averaged parameters, then averaged buffers."""
        buffers = (shard for shard in self._persistent_buffers() if shard.name in self._buffer_slots[slot])
        return [*self._shards.averaged, *buffers]

    def _stored(self, slot: int) -> list[Tensor]:
        """Return the tensors of a slot, in the order of `_stored_shards`."""
        averaged = len(self._shards.averaged)
        return [*self.slots[slot], *(self._buffer_slots[slot][s.name] for s in self._stored_shards(slot)[averaged:])]

    def _views(self, tensors: Iterable[tuple[LocalShard, Tensor]]) -> dict[str, Tensor]:
        is_first = self._shards.is_first_rank
        return {shard.name: checkpoint_view(shard, local, is_first) for shard, local in tensors}

    def _new_slot(self, local: Tensor) -> Tensor:
        slot = self._zeros_like(local)
        return slot.copy_(local) if self.num_averaged else slot

    def _zeros_like(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype.to_complex() if tensor.is_complex() else self._dtype
        return torch.zeros_like(tensor, dtype=dtype, device=self._device)

    def _renew_buffers(self) -> None:
        """Give the average the buffers that the model has now. An averaged buffer that still fits keeps its average."""
        kept = {shard.name for shard in self._shared_buffers()}
        with torch.inference_mode(False):
            self.buffers = {shard.name: shard.local_tensor.clone() for shard in self._shards.buffers}
            averaged = {shard.name for shard in self._shards.buffers if self._is_averaged(shard)}
            for i, slot in enumerate(self._buffer_slots):
                self._buffer_slots[i] = {
                    name: slot[name] if name in kept else self._zeros_like(value).copy_(value)
                    for name, value in self.buffers.items()
                    if name in averaged and (value.is_floating_point() or value.is_complex())
                }

    def _shared_buffers(self) -> list[LocalShard]:
        """Return the buffers that model and average both have, of one shape. A cache may have grown in one of them."""
        return [
            shard
            for shard in self._shards.buffers
            if shard.name in self.buffers
            and shard.owner.get(shard.key) is not None
            and shard.local_tensor.shape == self.buffers[shard.name].shape
        ]

    def _buffers_in(self, state: Mapping[str, Any]) -> list[LocalShard]:
        return [shard for shard in self._persistent_buffers() if shard.name in state["buffers"]]

    def _persistent_buffers(self) -> list[LocalShard]:
        return [shard for shard in self._shards.buffers if shard.is_persistent and shard.name in self.buffers]
