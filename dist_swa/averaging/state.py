"""One average of a model's shards: what is stored of it, and what it looks like in a checkpoint."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_swa.averaging.lerp import lerp, mean, plan
from dist_swa.averaging.rules import Rule
from dist_swa.sharding.model import ModelShards
from dist_swa.sharding.shard import LocalShard, write_into

FORMAT_VERSION = 1
_RULE_BYTES = 256  # a fixed size, so that other parameters of a rule do not change a checkpoint's shapes
_KEYS = ("format_version", "num_averaged", "num_parameters", "num_others", "rule", "slots", "buffers", "ties")


class AverageState:
    """The average by one rule: plain local tensors, in the order of the averaged shards, once per slot of the rule.

    `buffers` are what the average has, in the dtypes of the model's. Where they are averaged, `_sums` holds, for each
    slot, the floating ones in the average's dtype; they are named, since buffers may come and go.
    """

    def __init__(
        self,
        rule: Rule,
        shards: ModelShards,
        dtype: torch.dtype,
        device: torch.device | str | None,
        averages_buffers: bool,
    ) -> None:
        self.rule = rule
        self.num_averaged = 0
        self._shards = shards
        self._dtype, self._device = dtype, device
        self._averages_buffers = averages_buffers
        self.buffers: dict[str, Tensor] = {}
        self._sums: list[dict[str, Tensor]] = [{} for _ in range(rule.num_slots)]
        with torch.inference_mode(False):
            self.slots = [[self._new(shard.local) for shard in shards.averaged] for _ in self._sums]
        self._renew_buffers()

    def averages(self) -> list[Tensor]:
        """Return the averaged shards: the only slot in use, or the mean of several, a copy."""
        return mean(self.slots[: self.num_averaged])

    def count(self, weight: float) -> None:
        """Count a model that has moved the slots, and let its buffers follow: copied, or averaged with its weight."""
        shared = self._shared_buffers()
        if not len(shared) == len(self._shards.buffers) == len(self.buffers):
            self._renew_buffers()
        slot = self.num_averaged % len(self.slots)
        self.num_averaged += 1
        self.copy_buffers_from_model()
        sums = self._sums[: self.num_averaged]
        if names := list(sums[0]):
            held = {shard.name: shard.local_tensor for shard in self._shards.buffers}
            lerp(plan([list(self._sums[slot].values())], [held[name] for name in names]), {0: weight})
            for name, average in zip(names, mean([list(slot.values()) for slot in sums]), strict=True):
                self.buffers[name].copy_(average)

    def copy_buffers_from_model(self) -> None:
        """Copy the buffers that model and average share from the model."""
        for shard in self._shared_buffers():
            self.buffers[shard.name].copy_(shard.local_tensor)

    def copy_buffers_to_model(self) -> None:
        """Copy the buffers that model and average share into the model."""
        for shard in self._shared_buffers():
            write_into(shard.local_tensor, self.buffers[shard.name])

    def state_dict(self) -> dict[str, Any]:
        """Return tensors only, on the average's own storage (but see `LocalShard.as_dtensor`)."""
        persistent = self._persistent_buffers()
        return {
            "format_version": torch.tensor(FORMAT_VERSION),
            "num_averaged": torch.tensor(self.num_averaged),
            "num_parameters": torch.tensor(len(self._shards.averaged)),
            "num_others": torch.tensor(len(self._shards.others)),
            "rule": {type(self.rule).__name__: _encoded(repr(self.rule).ljust(_RULE_BYTES, "\0"))},
            "slots": {
                str(i): {
                    shard.name: self._shards.checkpoint_view(shard, local)
                    for shard, local in [
                        *zip(self._shards.averaged, slot, strict=True),
                        *((shard, sums[shard.name]) for shard in persistent if shard.name in sums),
                    ]
                }
                for i, (slot, sums) in enumerate(zip(self.slots, self._sums, strict=True))
            },
            "buffers": {
                shard.name: self._shards.checkpoint_view(shard, self.buffers[shard.name]) for shard in persistent
            },
            "ties": {
                shard.name: _encoded(json.dumps(shard.names[1:]))
                for shard in self._shards.everything
                if len(shard.names) > 1 and shard.is_persistent
            },
        }

    def check_saved(self, keys: Mapping[str, str], saved: Mapping[str, Any]) -> None:
        """Raise ValueError where `saved` is of a newer format, or has slots that model and rule do not have.

        `keys` maps the keys of this average to those of `saved`.
        """
        if "format_version" in keys and (version := int(saved[keys["format_version"]])) > FORMAT_VERSION:
            raise ValueError(
                f"load needs format_version <= {FORMAT_VERSION}, got {keys['format_version']}={version}; update"
                " dist_swa"
            )
        names = {shard.name for shard in [*self._shards.averaged, *self._persistent_buffers()]}
        for key in keys:
            parent, _, rest = key.partition(".")
            slot, _, name = rest.partition(".")
            if parent == "slots" and not (slot.isdecimal() and int(slot) < len(self.slots) and name in names):
                raise ValueError(
                    f"load needs the model and rule that the checkpoint was averaged with, got {keys[key]}, which they"
                    " do not have; build them as they were"
                )

    def parts_of(self, state: Mapping[str, Any]) -> list[Tensor]:
        """Return this rank's part of each tensor in `state`, which `load` takes; ValueError for what does not fit."""
        self._check_header(state)
        averaged, persistent = self._shards.averaged, self._persistent_buffers()
        parts: list[Tensor] = []
        for i, sums in enumerate(self._sums):
            saved = state["slots"][str(i)]
            parts += _parts(saved, [*averaged, *(shard for shard in persistent if shard.name in sums)])
        parts += _parts(state["buffers"], persistent)
        num_parameters = int(state["num_parameters"])
        if num_parameters != len(averaged):  # torch.distributed.checkpoint leaves out what it is not asked for
            raise ValueError(
                f"load_state_dict needs a checkpoint of {len(averaged)} averaged parameters, got {num_parameters=};"
                " load it into the model that it was averaged from"
            )
        return parts

    def load(self, state: Mapping[str, Any], parts: Sequence[Tensor]) -> None:
        """Take over `state`, whose `parts` were found to fit."""
        names = [shard.name for shard in self._persistent_buffers()]
        mine: list[Tensor] = []
        for slot, sums in zip(self.slots, self._sums, strict=True):
            mine += [*slot, *(sums[name] for name in names if name in sums)]
        mine += [self.buffers[name] for name in names]
        for tensor, part in zip(mine, parts, strict=True):
            tensor.copy_(part)
        self.num_averaged = int(state["num_averaged"])

    def _new(self, like: Tensor) -> Tensor:
        dtype = self._dtype.to_complex() if like.is_complex() else self._dtype
        return torch.zeros_like(like, dtype=dtype, device=self._device)

    def _renew_buffers(self) -> None:
        """Let the average have the buffers that the model has; what was averaged of one that still fits is kept."""
        kept = {shard.name for shard in self._shared_buffers()}
        with torch.inference_mode(False):
            self.buffers = {shard.name: shard.local_tensor.clone() for shard in self._shards.buffers}
            floating = [
                s for s in self._shards.buffers if s.local_tensor.is_floating_point() or s.local_tensor.is_complex()
            ]
            for i, sums in enumerate(self._sums):
                self._sums[i] = {
                    shard.name: sums[shard.name]
                    if shard.name in kept
                    else self._new(shard.local_tensor).copy_(shard.local_tensor)
                    for shard in floating
                    if self._averages_buffers
                }

    def _shared_buffers(self) -> list[LocalShard]:
        """Return the buffers that model and average both have; others (caches that grew) stay with their side."""
        return [
            shard
            for shard in self._shards.buffers
            if shard.name in self.buffers
            and shard.owner.get(shard.key) is not None
            and shard.local_tensor.shape == self.buffers[shard.name].shape
        ]

    def _persistent_buffers(self) -> list[LocalShard]:
        return [shard for shard in self._shards.buffers if shard.is_persistent and shard.name in self.buffers]

    def _check_header(self, state: Mapping[str, Any]) -> None:
        check_keys(state, _KEYS)
        version = int(state["format_version"])
        if version > FORMAT_VERSION:
            raise ValueError(
                f"load_state_dict needs format_version <= {FORMAT_VERSION}, got {version=}; update dist_swa"
            )
        name, encoded = next(iter(state["rule"].items()))
        if name != type(self.rule).__name__:
            raise ValueError(
                f"load_state_dict needs a checkpoint of rule={type(self.rule).__name__}, got rule={name}; build the"
                " average with the rule of the checkpoint"
            )
        saved = bytes(encoded.tolist()).rstrip(b"\0").decode()
        if saved != repr(self.rule) and self.rule.num_slots > 1:
            raise ValueError(
                f"load_state_dict needs as many slots as the checkpoint has, got {self.rule!r} for {saved}; build the"
                " average with the rule of the checkpoint"
            )
        if saved != repr(self.rule):
            warnings.warn(f"the checkpoint was averaged with {saved}; going on with {self.rule!r}", stacklevel=4)


def check_keys(state: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise ValueError unless `state` has `keys`."""
    missing = sorted(set(keys) - set(state))
    if missing:
        raise ValueError(f"load_state_dict needs what state_dict returns, got {missing=}; pass all of it")


def _encoded(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _parts(saved: Mapping[str, Tensor], shards: Sequence[LocalShard]) -> list[Tensor]:
    """Return this rank's part of each tensor in `saved`, or name the first that `shards` does not match."""
    mine = {shard.name: shard for shard in shards}
    for name in [*mine, *saved]:
        shape = tuple(saved[name].shape) if name in saved else None
        expected = tuple(mine[name].shape) if name in mine else None
        if shape != expected:
            raise ValueError(
                f"load_state_dict needs {name} of shape {expected}, got shape={shape}; load the checkpoint into the"
                " model that it was averaged from"
            )
    return [shard.local_of(saved[shard.name]) for shard in shards]
