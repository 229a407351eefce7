"""The average itself: each rank keeps, updates and swaps in the average of its own shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_swa.foreach import lerp, plan
from dist_swa.rules import Elapsed, Equal, Rule
from dist_swa.shards import LocalShard, ModelShards

_FORMAT_VERSION = 1
_RULE_BYTES = 256  # a fixed size, so that other parameters of a rule do not change a checkpoint's shapes


class ShardedAverage:
    """Keeps the average of the weights of `model`, sharded as they are, and without communication.

    Build it on every rank, after the model was wrapped (fully_shard, parallelize_module, DDP, or none of them) and
    before or after the optimizer. Parameters that require a gradient are averaged; frozen ones are read from the
    model. Under DDP, and for a plain module with a `process_group` of ranks that hold the same weights,
    construction is a collective of the group, and each rank keeps 1/world of the average; a plain module without
    a group is averaged on its own.

    Args:
        rule: how much each model weighs, see `dist_swa.rules`.
        dtype: of the average; anything below float32 loses small updates (an EMA in bfloat16 never moves).
        device: of the average; default: where the parameters are.
        buffers: "copy": the average has the buffers of the model at the last update.

    Memory per rank: the local shards in `dtype`, once per slot of the rule, under DDP 1/world of them; a copy of the
    buffers; 4 MiB where `dtype` or `device` is not the parameters'.
    Raises ValueError or TypeError for arguments and models that cannot be averaged, on every rank alike.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule = Equal(),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        buffers: str = "copy",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(rule, Rule):
            raise TypeError(f"ShardedAverage needs a rule, got rule={rule!r}; pass Equal(), EMA(decay=0.999), ...")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"ShardedAverage needs a torch.dtype, got dtype={dtype!r}; torch.float32 is the default")
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"ShardedAverage needs a floating dtype, got dtype={dtype}; torch.float32 is the default")
        if device is not None and torch.device(device).type == "meta":
            raise ValueError("ShardedAverage needs a device with memory, got device='meta'; leave it out")
        if buffers != "copy":
            raise ValueError(f"ShardedAverage needs buffers='copy', got buffers={buffers!r}; leave it out")
        self.rule = rule
        self.num_averaged = 0
        self.is_swapped_in = False
        self._shards = ModelShards(model, process_group)
        with torch.inference_mode(False):
            self._slots = [
                [_zeros_like(shard.local, dtype, device) for shard in self._shards.averaged]
                for _ in range(rule.num_slots)
            ]
        self._renew_buffers()
        self._plan_updates()

    @torch.no_grad()
    def update(self, elapsed: Elapsed = None) -> None:
        """Average the model as it is now, whenever called. Local; moves 12 bytes per local float32 parameter.

        `elapsed` is the training since the last update, where the rule has a half-life: a number in its unit, or a
        mapping such as ``{"ba": 1, "tok": 4096}``. Raises RuntimeError inside `swapped_in`, and ValueError where the
        model has other parameters than the average.
        """
        self.require("update", outside_of_a_swap=True)
        weight = self.rule.weight(self.num_averaged + 1, elapsed)
        if not self._shards.is_current():
            self._shards.follow()
            self._plan_updates()
        lerp(self._updates[self.num_averaged % self.rule.num_slots], weight)
        if len(self._shared_buffers()) == len(self._shards.buffers) == len(self._buffers):
            self._take_buffers()
        else:
            self._renew_buffers()
        self.num_averaged += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model carry the averaged weights and buffers inside the ``with``, and exactly its own after it.

        Entering is a collective under DDP; leaving is local, also on an error. What is written into buffers inside
        (a recalibration) stays with the average. torch's random state, of the CPU and the model's device, is given
        back as well. Memory: a copy of the trained weights that this rank holds, and of the buffers. Raises
        RuntimeError before the first update and inside another ``swapped_in``, ValueError where the model has other
        parameters than the average.
        """
        self.require("swapped_in", outside_of_a_swap=True, updated=True)
        with self._shards.all_agree():
            self._shards.follow()
        with torch.no_grad():
            trained = [shard.held.clone() for shard in self._shards.averaged]
            trained_buffers = [shard.held.clone() for shard in self._shards.buffers]
        owners = [(part._buffers, dict(part._buffers)) for part in self._shards.module.modules()]
        try:
            with self._kept_random_state(), self._shards.kept_ddp_state():
                self.is_swapped_in = True
                self._write()
                yield
        finally:
            self.is_swapped_in = False
            self._shards.reshard()
            torch.clear_autocast_cache()
            with torch.no_grad():
                for shard, weights in zip(self._shards.averaged, trained, strict=True):
                    shard.held.copy_(weights)
                self._take_buffers()
                for buffers, before in owners:  # a forward may have put other tensors there
                    buffers.clear()
                    buffers.update(before)
                for shard, values in zip(self._shards.buffers, trained_buffers, strict=True):
                    _write(shard.held, values)

    def transfer(self) -> None:
        """Put the averaged weights and buffers into the model, for good. A collective under DDP.

        Raises RuntimeError before the first update and inside `swapped_in`, ValueError where the model has other
        parameters than the average.
        """
        self.require("transfer", outside_of_a_swap=True, updated=True)
        with self._shards.all_agree():
            self._shards.follow()
        self._write()

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Any]:
        """Return whole averaged tensors on the CPU on the first rank, and {} elsewhere; copies.

        A collective where the model is sharded or replicated over ranks; a plain module without a group returns
        the dict on every rank. Loads into the unwrapped model with ``strict=True``: parameters in the average's
        dtype under all their names, frozen ones and persistent buffers in their own. Memory: one whole parameter
        at a time on every rank, the whole model on the first. Raises RuntimeError before the first update.
        """
        self.require("full_state_dict", updated=True)
        shards, is_first = self._shards, self._shards.is_first_rank
        shards.follow()
        buffers = {s.name: s.held for s in shards.buffers} if self.is_swapped_in else self._buffers
        full: dict[str, Any] = {}
        for shard, local in chain(
            zip(shards.averaged, self._averages(), strict=True),
            ((shard, shard.local) for shard in shards.frozen),
            ((s, buffers[s.name]) for s in shards.buffers if s.is_persistent and s.name in buffers),
        ):
            whole = shard.held if shard in shards.frozen and shard.rows is not None else shard.gathered(local)
            if is_first:
                copy = whole.to("cpu", copy=True)
                full |= dict.fromkeys(shard.names, copy)
        return full | shards.extra_state() if is_first else full

    def state_dict(self) -> dict[str, Any]:
        """Return the average for torch.distributed.checkpoint: tensors on its own storage. Local, no copy.

        (Under FSDP1 a copy, and one all-reduce for each parameter, here and in `load_state_dict`.)

        Keys: format_version, num_averaged, num_parameters, rule.<class>, slots.<i>.<parameter>, buffers.<buffer>;
        a parameter is a DTensor of its whole shape. Call it on every rank, or let dcp.save and dcp.load do so.
        Raises RuntimeError inside `swapped_in`, where the model's own state dict would be the average as well.
        """
        self.require("state_dict", outside_of_a_swap=True)
        self._shards.follow()
        return {
            "format_version": torch.tensor(_FORMAT_VERSION),
            "num_averaged": torch.tensor(self.num_averaged),
            "num_parameters": torch.tensor(len(self._shards.averaged)),
            "rule": {type(self.rule).__name__: _encoded(self.rule)},
            "slots": {
                str(i): {
                    shard.name: shard.whole(local) for shard, local in zip(self._shards.averaged, slot, strict=True)
                }
                for i, slot in enumerate(self._slots)
            },
            "buffers": {
                shard.name: self._shards.written_once(shard, self._buffers[shard.name])
                for shard in self._shards.buffers
                if shard.is_persistent and shard.name in self._buffers
            },
        }

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
        self._check_header(state_dict)
        parts = [self._parts(state_dict["slots"][str(i)], self._shards.averaged) for i in range(self.rule.num_slots)]
        persistent = [s for s in self._shards.buffers if s.is_persistent and s.name in self._buffers]
        buffers = self._parts(state_dict["buffers"], persistent)
        num_parameters = int(state_dict["num_parameters"])
        if num_parameters != len(self._shards.averaged):  # torch.distributed.checkpoint leaves out what it is not asked
            raise ValueError(
                f"load_state_dict needs a checkpoint of {len(self._shards.averaged)} averaged parameters, got"
                f" {num_parameters=}; load it into the model that it was averaged from"
            )
        for mine, theirs in zip(chain(*self._slots), chain(*parts), strict=True):
            mine.copy_(theirs)
        for shard, value in zip(persistent, buffers, strict=True):
            self._buffers[shard.name].copy_(value)
        self.num_averaged = int(state_dict["num_averaged"])

    def require(self, action: str, *, outside_of_a_swap: bool = False, updated: bool = False) -> None:
        """Raise RuntimeError where `action` was called in a wrong order."""
        if outside_of_a_swap and self.is_swapped_in:
            raise RuntimeError(
                f"{action} needs the model to carry its trained weights, got a call inside swapped_in; leave it first"
            )
        if updated and self.num_averaged == 0:
            raise RuntimeError(f"{action} needs an average, got num_averaged=0; call update first")

    def _plan_updates(self) -> None:
        """Pair averages with shards, once: in lists that foreach takes, split and staged where dtypes differ."""
        shards = [shard.local for shard in self._shards.averaged]
        self._updates = [plan(slot, shards) for slot in self._slots]

    def _averages(self) -> list[Tensor]:
        used = self._slots[: self.num_averaged]
        if len(used) == 1:
            return used[0]
        total = [average.clone() for average in used[0]]
        for slot in used[1:]:
            torch._foreach_add_(total, slot)
        torch._foreach_div_(total, len(used))
        return total

    @torch.no_grad()
    def _write(self) -> None:
        torch.clear_autocast_cache()  # it may hold casts of the trained weights
        for shard in self._shared_buffers():
            _write(shard.held, self._buffers[shard.name])
        self._shards.write(self._averages())

    def _shared_buffers(self) -> list[LocalShard]:
        """Return the buffers that model and average both have; others (caches that grew) stay with their side."""
        return [
            shard
            for shard in self._shards.buffers
            if shard.name in self._buffers
            and shard.owner.get(shard.key) is not None
            and shard.held.shape == self._buffers[shard.name].shape
        ]

    def _take_buffers(self) -> None:
        for shard in self._shared_buffers():
            self._buffers[shard.name].copy_(shard.held)

    def _renew_buffers(self) -> None:
        """Let the average have the buffers that the model has."""
        with torch.inference_mode(False):
            self._buffers = {shard.name: shard.held.clone() for shard in self._shards.buffers}

    def _kept_random_state(self) -> Any:
        device = self._shards.averaged[0].held.device
        return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)

    def _check_header(self, state_dict: Mapping[str, Any]) -> None:
        check_format(state_dict, _FORMAT_VERSION, ("num_averaged", "num_parameters", "rule", "slots", "buffers"))
        name, encoded = next(iter(state_dict["rule"].items()))
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
            warnings.warn(f"the checkpoint was averaged with {saved}; going on with {self.rule!r}", stacklevel=3)

    def _parts(self, saved: Mapping[str, Tensor], shards: Sequence[LocalShard]) -> list[Tensor]:
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
        return [shard.part_of(saved[shard.name]) for shard in shards]


def _zeros_like(shard: Tensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    return torch.zeros_like(shard, dtype=dtype.to_complex() if shard.is_complex() else dtype, device=device)


def _write(target: Tensor, values: Tensor) -> None:
    if not torch.equal(target, values):  # an expanded buffer cannot be written, and need not
        target.copy_(values)


def check_format(state_dict: Mapping[str, Any], newest: int, keys: Iterable[str]) -> None:
    """Raise ValueError unless `state_dict` has `keys` and a format that is not newer than `newest`."""
    missing = sorted({"format_version", *keys} - set(state_dict))
    if missing:
        raise ValueError(f"load_state_dict needs what state_dict returns, got {missing=}; pass all of it")
    version = int(state_dict["format_version"])
    if version > newest:
        raise ValueError(f"load_state_dict needs format_version <= {newest}, got {version=}; update dist_swa")


def _encoded(rule: Rule) -> Tensor:
    text = repr(rule).encode()
    return torch.tensor(list(text.ljust(_RULE_BYTES, b"\0")), dtype=torch.uint8)
