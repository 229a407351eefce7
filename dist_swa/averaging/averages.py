"""Averages: the averages of one model by one or several rules, which are updated together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from dist_swa.averaging.format import check_keys
from dist_swa.averaging.lerp import lerp, plan
from dist_swa.averaging.rules import Elapsed, Rule
from dist_swa.averaging.state import AverageState
from dist_swa.collectives import fingerprint
from dist_swa.sharding.model import ModelShards
from dist_swa.sharding.shard import LocalShard

_UNNAMED = ""  # the key of a single average, which has no name


class Averages:
    """An `AverageState` for each of `rules`, by name. All have averaged the same models."""

    def __init__(
        self,
        rules: Mapping[str, Rule],
        shards: ModelShards,
        dtype: torch.dtype,
        device: torch.device | str | None,
        is_averaged: Callable[[LocalShard], bool],
    ) -> None:
        self._shards = shards
        self._states = {name: AverageState(rule, shards, dtype, device, is_averaged) for name, rule in rules.items()}
        self._planned: list[LocalShard] = []
        self._plan_updates()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._states if name != _UNNAMED)

    @property
    def num_averaged(self) -> int:
        return next(iter(self._states.values())).num_averaged

    @property
    def num_bytes(self) -> int:
        """Bytes of all averages on this rank."""
        return sum(state.num_bytes for state in self._states.values())

    def get(self, action: str, name: str | None) -> AverageState:
        """Return the average `name`, or the only one; ValueError where `action` needs another name."""
        return self._states[checked_name(action, name, self._states)]

    def metrics(self, distance: bool) -> dict[str, float]:
        """Return the weight of the last model in each average and, if asked, the distance of the model from it."""
        found = {}
        for name, state in self._states.items():
            prefix = f"{name}/" if name else ""
            found[f"{prefix}weight"] = state.last_weight
            if distance:
                found[f"{prefix}distance"] = self._shards.distance(state.averages())
        return found

    def averaged_shards(self) -> list[LocalShard]:
        """Return the shards of what is averaged: parameters, and buffers where they are averaged."""
        return [*self._shards.averaged, *self.averaged_buffers()]

    def averaged_buffers(self) -> list[LocalShard]:
        return next(iter(self._states.values())).averaged_buffers()

    def broadcast_buffers(self, process_group: dist.ProcessGroup | None) -> None:
        for state in self._states.values():
            for buffer in state.persistent_buffers():
                dist.broadcast(buffer, group=process_group, group_src=0)

    def plain_fingerprints(self, with_others: bool) -> dict[str, int]:
        """Return a hash of each plain parameter's averages and, `with_others`, of those that are not averaged."""
        slots = [slot for state in self._states.values() for slot in state.slots]
        stored = {shard: [slot[i] for slot in slots] for i, shard in enumerate(self._shards.averaged)}
        stored |= {shard: shard.plain_tensors() for shard in self._shards.others if with_others}
        hashes = {}
        for shard, tensors in stored.items():
            if shard.layout is None:
                hashes[shard.name] = 0
                for tensor in tensors:
                    hashes[shard.name] = fingerprint(tensor, str(hashes[shard.name]))
        return hashes

    def update(self, elapsed: Elapsed) -> None:
        """Move all averages towards the model, in one pass over its shards. Local."""
        states = self._states.values()
        units = {state.rule.unit for state in states if state.rule.unit is not None}
        if len(units) > 1 and not isinstance(elapsed, Mapping):
            raise ValueError(
                f"update of half-lives in several units needs a mapping of {sorted(units)}, got {elapsed=}; pass"
                ' update(elapsed={"ba": 1, "tok": 4096})'
            )
        weights = [state.rule.weight(state.num_averaged + 1, elapsed) for state in states]
        if not self._shards.parameters_unchanged():
            self._shards.refresh()
        joined = self._shards.select_trainable(may_leave=self.num_averaged == 0)
        self._plan_updates()
        if joined and self.num_averaged:
            warnings.warn(
                "parameters that were frozen are averaged from now on, and their averages start from their current"
                f" values: {', '.join(joined)}",
                stacklevel=3,
            )
        slots, first = [], 0
        for state in states:
            slots.append(first + state.num_averaged % state.rule.num_slots)
            first += state.rule.num_slots
        self._shards.note_writes()
        lerp(self._groups, dict(zip(slots, weights, strict=True)))
        for state, weight in zip(states, weights, strict=True):
            state.advance(weight)

    def reset(self) -> None:
        for state in self._states.values():
            state.reset()

    def select_before_first_update(self) -> None:
        """Average what is trainable now, if nothing was averaged yet."""
        if self.num_averaged == 0:
            self._shards.select_trainable(may_leave=True)
            self._plan_updates()

    def state_dict(self) -> dict[str, Any]:
        states = {name: state.state_dict() for name, state in self._states.items()}
        return states.get(_UNNAMED, states)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load all averages, or raise ValueError before any of them has changed."""
        check_keys(state_dict, self.names)
        saved = {name: state_dict if name == _UNNAMED else state_dict[name] for name in self._states}
        parts = {name: state.local_tensors_of(saved[name]) for name, state in self._states.items()}
        counts = {name: int(state["num_averaged"]) for name, state in saved.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"load_state_dict needs averages that were updated together, got num_averaged={counts}; pass the"
                " averages of one checkpoint"
            )
        for name, state in self._states.items():
            state.load(saved[name], parts[name])

    def check_saved(self, saved: Mapping[str, Any]) -> set[str]:
        """Raise ValueError where `saved`, by its keys and format version, does not fit; return keys it may lack."""
        optional: set[str] = set()
        for name, state in self._states.items():
            prefix = f"{name}." if name else ""
            state.check_saved({key.removeprefix(prefix): key for key in saved if key.startswith(prefix)}, saved)
            optional |= {prefix + key for key in state.optional_keys()}
        return optional

    def _plan_updates(self) -> None:
        """Group shards and averages for `lerp`, where `ModelShards` has other ones than before."""
        if self._planned is self._shards.averaged:
            return
        self._planned = self._shards.averaged
        for state in self._states.values():
            state.match_shards()
        slots = [slot for state in self._states.values() for slot in state.slots]
        self._groups = plan(slots, [shard.local for shard in self._planned])


def checked_name(action: str, name: str | None, averages: Iterable[str]) -> str:
    """Return `name`, or that of the only average; ValueError where `action` needs another one."""
    names = list(averages)
    if name is None and len(names) == 1:
        return names[0]
    if name is None or name == _UNNAMED or name not in names:
        advice = "leave it out, the average has no name" if names == [_UNNAMED] else f"pass one of {', '.join(names)}"
        raise ValueError(f"{action} needs the name of an average, got name={name!r}; {advice}")
    return name


def named_rules(rule: Rule | Mapping[str, Rule]) -> dict[str, Rule]:
    """Return the rules by the names of their averages."""
    rules = dict(rule) if isinstance(rule, Mapping) else {_UNNAMED: rule}
    for name, one in rules.items():
        if not isinstance(one, Rule):
            raise TypeError(f"ShardedAverage needs a rule, got rule={one!r}; pass Equal(), EMA(decay=0.999), ...")
        if isinstance(rule, Mapping) and not (isinstance(name, str) and name.isidentifier() and name != "schedule"):
            raise ValueError(
                f"averages need names of letters, digits and _, other than 'schedule', got name={name!r}; the names are"
                " keys of checkpoints"
            )
    if not rules:
        raise ValueError("ShardedAverage needs at least one rule, got rule={}; Equal() is the default")
    return rules
