"""The averages of a model: each rank keeps, updates and swaps in those of its own shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_swa.averaging.lerp import lerp, plan
from dist_swa.averaging.rules import Elapsed, Equal, Rule
from dist_swa.averaging.state import AverageState, check_keys
from dist_swa.sharding.fqn import NamePattern
from dist_swa.sharding.model import ModelShards
from dist_swa.sharding.shard import LocalShard

_UNNAMED = ""  # the key of the only average, where it was given no name


class ShardedAverage:
    """Keeps averages of the weights of `model`, sharded as they are, and without communication.

    Build it on every rank, after the model was wrapped (fully_shard, parallelize_module, DDP, or none of them) and
    before or after the optimizer. Parameters that require a gradient are averaged; all others are read from the
    model. Under DDP, and for a plain module with a `process_group` of ranks that hold the same weights,
    construction is a collective of the group, and each rank keeps 1/world of the average; a plain module without
    a group is averaged on its own.

    Args:
        rule: how much each model weighs, see `Rule`; or several averages, as ``{"swa": Equal(), "ema":
            EMA(decay=0.999)}``: they are updated together, in one walk over the parameters, and the methods below
            take the `name` of one of them.
        parameters: which of the trainable parameters are averaged: a pattern of FQNs as "head.*" (see `fnmatch`), a
            function of the FQN, or several. The others stay trained ones when the average is swapped in.
        dtype: of the average; anything below float32 loses small updates (an EMA in bfloat16 never moves).
        device: of the average; default: where the parameters are.
        buffers: "copy": the average has the buffers of the model at the last update. "average": it has their average
            by the same rule, but copies those that are not floating; one that comes later, or changes its shape, is
            averaged from then on.

    Memory per rank: the local shards in `dtype`, once per average and slot of its rule, under DDP 1/world of them; a
    copy of the buffers per average, and with "average" one more per slot in `dtype`; 1 MiB where `dtype` or `device`
    is not the parameters'. Raises ValueError or TypeError for arguments and models that cannot be averaged, on every
    rank alike.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule | Mapping[str, Rule] = Equal(),
        *,
        parameters: NamePattern | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        buffers: str = "copy",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        rules = named_rules(rule)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"ShardedAverage needs a torch.dtype, got dtype={dtype!r}; torch.float32 is the default")
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"ShardedAverage needs a floating dtype, got dtype={dtype}; torch.float32 is the default")
        if device is not None and torch.device(device).type == "meta":
            raise ValueError("ShardedAverage needs a device with memory, got device='meta'; leave it out")
        if buffers not in ("copy", "average"):
            raise ValueError(f"buffers needs to be 'copy' or 'average', got buffers={buffers!r}; 'copy' is the default")
        self.rule = rule
        self.averages_buffers = buffers == "average"
        self._shards = ModelShards(model, process_group, parameters)
        self._tracks = {
            name: AverageState(rule, self._shards, dtype, device, self.averages_buffers) for name, rule in rules.items()
        }
        self._swapped_in: AverageState | None = None
        self._plan_updates()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages; none where there is only one that was given none."""
        return tuple(name for name in self._tracks if name != _UNNAMED)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same weights, under DDP or as given; None for all ranks."""
        return self._shards.group

    @property
    def num_averaged(self) -> int:
        """Models in the average; the same number in each, where there are several."""
        return next(iter(self._tracks.values())).num_averaged

    @torch.no_grad()
    def update(self, elapsed: Elapsed = None) -> None:
        """Average the model as it is now, after whichever step. Local; moves 12 bytes per local float32 parameter.

        `elapsed` is the training since the last update, where a rule has a half-life: a number in its unit, or a
        mapping such as ``{"ba": 1, "tok": 4096}``. Raises RuntimeError inside `swapped_in` and, of a sharded model,
        inside a backward, and ValueError where the model has other parameters than the average; nothing has changed
        then. (Not between the forward of a part of an FSDP2 group and its backward, which it would end.)
        """
        self.require("update", outside_of_a_swap=True)
        tracks = self._tracks.values()
        units = {track.rule.unit for track in tracks if track.rule.unit is not None}
        if len(units) > 1 and not isinstance(elapsed, Mapping):
            raise ValueError(
                f"update of half-lives in several units needs a mapping of {sorted(units)}, got {elapsed=}; pass"
                ' update(elapsed={"ba": 1, "tok": 4096})'
            )
        weights = [track.rule.weight(track.num_averaged + 1, elapsed) for track in tracks]
        if not self._shards.parameters_unchanged():
            self._shards.follow()
        if self._planned is not self._shards.averaged:
            self._plan_updates()
        slots, first = [], 0
        for track in tracks:
            slots.append(first + track.num_averaged % track.rule.num_slots)
            first += track.rule.num_slots
        lerp(self._updates, dict(zip(slots, weights, strict=True)))
        for track, weight in zip(tracks, weights, strict=True):
            track.count(weight)

    def reset(self) -> None:
        """Forget what was averaged; the next update is the first. Local. Raises RuntimeError inside `swapped_in`."""
        self.require("reset", outside_of_a_swap=True)
        for track in self._tracks.values():
            track.num_averaged = 0

    @contextmanager
    def swapped_in(self, name: str | None = None) -> Iterator[None]:
        """Let the model carry the averaged weights and buffers inside the ``with``, and exactly its own after it.

        Entering is a collective under DDP; leaving is local, also on an error. What is written into buffers inside
        (a recalibration) stays with the average. torch's random state, of the CPU and the model's device, is given
        back as well. Memory: a copy of the trained weights that this rank holds, and of the buffers. Raises
        RuntimeError before the first update and inside another ``swapped_in``, ValueError where the model has other
        parameters than the average.
        """
        track = self.track("swapped_in", name)
        self.require("swapped_in", outside_of_a_swap=True, updated=True)
        with self._shards.raise_on_replicas():
            self._shards.follow()
        with self._kept_random_state(), self._shards.preserve_state():
            try:
                self._swapped_in = track
                self._write(track)
                yield
            finally:
                self._swapped_in = None
                torch.clear_autocast_cache()
                with torch.no_grad():
                    track.copy_buffers_from_model()

    def transfer(self, name: str | None = None) -> None:
        """Put the averaged weights and buffers into the model, for good. A collective under DDP.

        Raises RuntimeError before the first update and inside `swapped_in`, ValueError where the model has other
        parameters than the average.
        """
        track = self.track("transfer", name)
        self.require("transfer", outside_of_a_swap=True, updated=True)
        with self._shards.raise_on_replicas():
            self._shards.follow()
        self._write(track)

    def is_model_finite(self) -> bool:
        """Whether no rank's shard of the averaged parameters holds NaN or inf. The same answer on every rank.

        A collective where the model is sharded or replicated: one all-reduce of an integer for each axis of its
        meshes. Reads the local shards once.
        """
        return self._shards.is_finite()

    @torch.no_grad()
    def full_state_dict(self, name: str | None = None) -> dict[str, Any]:
        """Return whole averaged tensors on the CPU on the first rank, and {} elsewhere; copies.

        A collective where the model is sharded or replicated over ranks; a plain module without a group returns
        the dict on every rank. Loads into the unwrapped model with ``strict=True``: parameters in the average's
        dtype under all their names, others and persistent buffers in their own. Memory: one whole parameter
        at a time on every rank, the whole model on the first. Raises RuntimeError before the first update.
        """
        shards, is_first = self._shards, self._shards.is_first_rank
        deployed = self._deployed("full_state_dict", name)
        held = {
            shard.name: shard.local_tensor for shard in shards.others if shard.rows is not None
        }  # whole on every rank
        full: dict[str, Any] = {}
        for shard, local in deployed:
            whole = held[shard.name] if shard.name in held else shard.full_tensor(local)
            if is_first:
                full |= dict.fromkeys(shard.names, whole.to("cpu", copy=True))
        return full | shards.extra_state() if is_first else full

    @torch.no_grad()
    def sharded_state_dict(self, name: str | None = None) -> dict[str, Any]:
        """Return what `full_state_dict` does, but on every rank and sharded: DTensors for torch.distributed.checkpoint.

        They lie on the storage of average and model (under FSDP1, and for a `Window`, on a copy). Local, but a
        collective under FSDP1. Raises RuntimeError before the first update.
        """
        state: dict[str, Any] = {}
        for shard, local in self._deployed("sharded_state_dict", name):
            state |= dict.fromkeys(shard.names, self._shards.checkpoint_view(shard, local))
        return state | self._shards.extra_state()

    def state_dict(self) -> dict[str, Any]:
        """Return the averages for torch.distributed.checkpoint: tensors on their own storage. Local, no copy.

        (Under FSDP1 a copy, and one all-reduce for each parameter, here and in `load_state_dict`.)
        Keys: see `dist_swa.checkpoint`; a parameter is a DTensor of its whole shape.
        Call it on every rank, or let dcp.save and dcp.load do so. Raises RuntimeError inside `swapped_in`, where the
        model's own state dict would be the average as well.
        """
        self.require("state_dict", outside_of_a_swap=True)
        self._shards.follow()
        states = {name: track.state_dict() for name, track in self._tracks.items()}
        return states.get(_UNNAMED, states)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, here or in another run through torch.distributed.checkpoint.

        Local (but see `state_dict`); every rank calls it. The rule stays the constructor's: another class, and another
        size of a `Window`, raise ValueError, other parameters of the same class give one warning. ValueError, too,
        for other parameters of the model, which names the first that differs, and for a newer format; RuntimeError
        inside `swapped_in`. Nothing has changed then.
        """
        self.require("load_state_dict", outside_of_a_swap=True)
        self._shards.follow()
        check_keys(state_dict, self.names)
        states = {name: state_dict if name == _UNNAMED else state_dict[name] for name in self._tracks}
        parts = {name: track.parts_of(states[name]) for name, track in self._tracks.items()}
        counts = {name: int(state["num_averaged"]) for name, state in states.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"load_state_dict needs averages that were updated together, got num_averaged={counts}; pass the"
                " averages of one checkpoint"
            )
        for name, track in self._tracks.items():
            track.load(states[name], parts[name])

    def check_saved(self, saved: Mapping[str, Any]) -> None:
        """Raise, before anything is read, what `load_state_dict` would raise when model and average have changed.

        `saved` maps the keys of a checkpoint's entry, such as "slots.0.weight", to values that are read on access.
        Empty: the checkpoint has nothing, and `reset` follows. Local. (`dist_swa.storage.save_load.Checked`)
        """
        self.require("load", outside_of_a_swap=True)
        for name, track in self._tracks.items():
            prefix = f"{name}." if name else ""
            track.check_saved({key.removeprefix(prefix): key for key in saved if key.startswith(prefix)}, saved)

    def track(self, action: str, name: str | None) -> AverageState:
        """Return the average of that name, or the only one; ValueError where `action` needs another name."""
        if name is None and len(self._tracks) == 1:
            (track,) = self._tracks.values()
            return track
        if name is None or name not in self.names:
            names = f"pass one of {', '.join(self.names)}" if self.names else "leave it out, the average has no name"
            raise ValueError(f"{action} needs the name of an average, got name={name!r}; {names}")
        return self._tracks[name]

    def require(self, action: str, *, outside_of_a_swap: bool = False, updated: bool = False) -> None:
        """Raise RuntimeError where `action` was called in a wrong order."""
        if outside_of_a_swap and self._swapped_in is not None:
            raise RuntimeError(
                f"{action} needs the model to carry its trained weights, got a call inside swapped_in; leave it first"
            )
        if updated and self.num_averaged == 0:
            raise RuntimeError(f"{action} needs an average, got num_averaged=0; call update first")

    def _plan_updates(self) -> None:
        """Pair averages with shards, once: in lists that foreach takes, split and staged where dtypes differ."""
        self._planned = self._shards.averaged  # another list after each `follow`, whoever called that
        slots = [slot for track in self._tracks.values() for slot in track.slots]
        self._updates = plan(slots, [shard.local for shard in self._planned])

    def _deployed(self, action: str, name: str | None) -> list[tuple[LocalShard, Tensor]]:
        """Return each parameter and persistent buffer of the averaged model, with this rank's part of it."""
        track = self.track(action, name)
        self.require(action, updated=True)
        shards = self._shards
        shards.follow()
        buffers = {s.name: s.local_tensor for s in shards.buffers} if self._swapped_in is track else track.buffers
        return [
            *zip(shards.averaged, track.averages(), strict=True),
            *((shard, shard.local) for shard in shards.others),
            *((s, buffers[s.name]) for s in shards.buffers if s.is_persistent and s.name in buffers),
        ]

    @torch.no_grad()
    def _write(self, track: AverageState) -> None:
        torch.clear_autocast_cache()  # it may hold casts of the trained weights
        track.copy_buffers_to_model()
        self._shards.write(track.averages())

    def _kept_random_state(self) -> Any:
        device = self._shards.averaged[0].local_tensor.device
        return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


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
