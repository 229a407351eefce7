"""ShardedAverage: the averages of a model, of which each rank updates and swaps in its own shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_swa.averaging.averaged_model import AveragedModel
from dist_swa.averaging.averages import Averages, named_rules
from dist_swa.averaging.buffers import buffer_filter
from dist_swa.averaging.checks import check_counts, check_equal, check_keeps_all_ranks, check_ranks, check_storage
from dist_swa.averaging.rules import Elapsed, Equal, Rule
from dist_swa.averaging.state import AverageState
from dist_swa.sharding.fqn import NamePattern, clean_name
from dist_swa.sharding.model import ModelShards


class ShardedAverage:
    """Averages the weights of `model`. Each rank keeps and updates the average of its own shard, without communication.

    Build it on every rank, after the model was wrapped (fully_shard, parallelize_module, DDP, or none of them), before
    or after the optimizer. Parameters that require a gradient are averaged. Others are read from the model. A parameter
    that is unfrozen after the first update is added, with its value at that update; one that is frozen later remains.
    Under DDP, and for a plain module with a `process_group`, construction is a collective of the group, and each rank
    keeps 1/world of the average. A plain module without a group is averaged on its own.

    Args:
        model: the wrapped module.
        rule: how much each model weighs (`Rule`). A dict of rules, such as ``{"swa": Equal(), "ema":
            EMA(decay=0.999)}``, keeps several averages. One `update` reads the parameters once for all of them. The
            methods below then take the `name` of one average.
        parameters: which trainable parameters are averaged: a pattern of FQNs such as "head.*" (see `fnmatch`), a
            function of the FQN, or a list of both. The others keep their trained values when the average is swapped in.
        dtype: of the average. With a dtype below float32 small updates are lost: an EMA in bfloat16 never moves.
        device: of the average; default: that of the parameters.
        buffers: "copy": the average has the buffers that the model had at the last update. "average": floating buffers
            are averaged by the same rule. The others are copied, and so are the vectors of spectral normalisation. Or
            the names of the floating buffers that are averaged, as for `parameters`. A buffer that is added later, or
            changes its shape, is averaged from then on.
        process_group: the ranks that hold the same weights as this one, for a plain module.

    Memory per rank: the local shards in `dtype`, once for each average and slot of its rule (under DDP 1/world of it).
    A copy of the buffers for each average, and of averaged ones another copy per slot in `dtype`. 1 MiB where `dtype`
    or `device` is not that of the parameters. Raises ValueError or TypeError, on every rank alike, for arguments and
    models that cannot be averaged.

    Example:

    >>> import torch
    >>> from dist_swa import EMA, ShardedAverage
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> average = ShardedAverage(model, EMA(decay=0.9))
    >>> for value in (1.0, 2.0):
    ...     _ = torch.nn.init.constant_(model.weight, value)  # a training step
    ...     average.update()
    >>> with average.swapped_in():
    ...     print(f"{model.weight.item():.2f}")
    1.10
    >>> model.weight.item()
    2.0
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule | Mapping[str, Rule] = Equal(),
        *,
        parameters: NamePattern | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        buffers: NamePattern = "copy",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        rules = named_rules(rule)
        check_storage(dtype, device)
        self.rule = rule
        self._shards = ModelShards(model, process_group, parameters)
        parameters_found = [*self._shards.averaged, *self._shards.others]
        is_averaged = buffer_filter(buffers, self._shards.buffers, parameters_found)
        self._averages = Averages(rules, self._shards, dtype, device, is_averaged)
        self._swapped_in: AverageState | None = None

    def __repr__(self) -> str:
        return (
            f"ShardedAverage(rule={self.rule!r}, num_averaged={self.num_averaged},"
            f" num_parameters={len(self._shards.averaged)}, bytes_on_this_rank={self._averages.num_bytes})"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages. Empty for a single average without a name."""
        return self._averages.names

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same weights: DDP's group, or the one that was given. Otherwise None."""
        return self._shards.group

    @property
    def num_averaged(self) -> int:
        """Models in the average. Several averages have the same number."""
        return self._averages.num_averaged

    @torch.no_grad()
    def update(self, elapsed: Elapsed = None) -> None:
        """Average the model as it is now. Local, and reads and writes 12 bytes per local float32 parameter.

        `elapsed`: the training since the last update, for a rule with a half-life: a number in the unit of the rule, or
        a mapping such as ``{"ba": 1, "tok": 4096}``. Raises RuntimeError inside `swapped_in` and, for a sharded model,
        inside a backward. Raises ValueError where the model has other parameters than the average. Nothing has changed
        then. Do not call it between the forward of some modules of an FSDP2 group and their backward: it ends that
        pass.
        """
        self.require_trained_weights("update")
        self._averages.update(elapsed)

    def reset(self) -> None:
        """Forget the average: the next update is the first. Local. Raises RuntimeError inside `swapped_in`."""
        self.require_trained_weights("reset")
        self._averages.reset()

    def reset_to(self, position: Mapping[str, int]) -> str:
        """`reset`, for `checkpoint.load`: an average has no `position` in the run, and nothing to say about it."""
        self.reset()
        return ""

    @contextmanager
    def swapped_in(self, name: str | None = None) -> Iterator[None]:
        """Put the averaged weights and buffers into the model inside the ``with``, and restore its own on exit.

        `name`: one of several averages. Every rank calls it. Entering is a collective under DDP. Leaving is local, also
        on an error. Buffers that are written inside, as by a recalibration, stay with the average. torch's random
        state, of the CPU and of the model's device, is restored as well. What is taken inside by reference, as by
        ``model.state_dict()``, `torch.export.export` or `torch.jit.trace`, has the trained weights again when the block
        ends: copy it inside with `copy.deepcopy`, or take `full_state_dict`. Memory: a copy of the trained weights of
        this rank, and of the buffers. Raises RuntimeError before the first update and inside another ``swapped_in``,
        and ValueError where the model has other parameters than the average.
        """
        state = self._checked_state("swapped_in", name)
        with self._preserve_random_state(), self._shards.preserve_state():
            try:
                self._swapped_in = state
                self._write(state)
                yield
            finally:
                self._swapped_in = None
                torch.clear_autocast_cache()
                with torch.no_grad():
                    state.copy_buffers_from_model()

    def transfer(self, name: str | None = None) -> None:
        """Put the averaged weights and buffers into the model, permanently. A collective under DDP.

        `name`: one of several averages. Raises RuntimeError before the first update and inside `swapped_in`, and
        ValueError where the model has other parameters than the average.
        """
        self._write(self._checked_state("transfer", name))

    def is_model_finite(self) -> bool:
        """Whether no rank's part of what is averaged has NaN or inf in the model. Returns the same on every rank.

        For a sharded or replicated model a collective: one all-reduce of an integer for each axis of its meshes.
        """
        self._shards.reshard()
        return self._shards.are_finite([shard.local for shard in self._averages.averaged_shards()])

    def is_finite(self, name: str | None = None) -> bool:
        """As `is_model_finite`, of the average; `name`: one of several."""
        return self._shards.are_finite(self._averages.get("is_finite", name).tensors())

    @torch.no_grad()
    def metrics(self, *, distance: bool = False) -> dict[str, float]:
        """Return numbers for a logger: `num_averaged`, and the `weight` of the last model in the average.

        With several averages the keys are ``name/weight``. `weight` is 0 before the first update, and NaN for a
        half-life right after a load. `distance` adds the L2 norm of the trained minus the averaged weights, over all
        averaged parameters and ranks: then a collective of a sharded or replicated model, and RuntimeError before the
        first update and inside `swapped_in`. Local otherwise. Memory: of `distance`, the largest local shard twice.
        """
        if distance:
            self.require_trained_weights("metrics(distance=True)")
            self._require_average("metrics(distance=True)")
            self._shards.refresh()
        return {"num_averaged": self.num_averaged, **self._averages.metrics(distance)}

    @property
    def swapped_names(self) -> set[str]:
        """The FQNs of the parameters and buffers that `swapped_in` writes."""
        return {name for shard in [*self._shards.averaged, *self._shards.buffers] for name in shard.names}

    @torch.no_grad()
    def broadcast_buffers(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Give every rank the first rank's persistent buffers of the average, which are those of a checkpoint.

        A collective of `process_group` (default: all ranks). Without SyncBatchNorm, the ranks have other statistics.
        Raises RuntimeError inside `swapped_in`.
        """
        self.require_trained_weights("broadcast_buffers")
        if dist.is_initialized():
            self._averages.broadcast_buffers(process_group)

    def averages_statistics(self, layer: str) -> bool:
        """Whether the running mean and variance of the layer with the FQN `layer` are averaged. Local.

        ``recalibrate_batch_norm(..., skip=average.averages_statistics)`` keeps the averaged statistics.
        """
        averaged = {name for shard in self._averages.averaged_buffers() for name in shard.names}
        return {clean_name(f"{layer}.{buffer}") for buffer in ("running_mean", "running_var")} <= averaged

    def check_ranks(self, process_group: dist.ProcessGroup | None = None, *, with_others: bool = False) -> None:
        """Raise on every rank unless the ranks of `process_group` (default: all) averaged one model. A collective.

        RuntimeError where they averaged other numbers of models. ValueError where a plain parameter of one name has
        other values on other ranks, or is missing on some: a checkpoint and an export would have those of one rank
        only. `with_others`: also parameters that are not averaged.
        """
        fingerprints = self._averages.plain_fingerprints(with_others)
        check_ranks(self.num_averaged, fingerprints, process_group, self._shards.device)

    @torch.no_grad()
    def full_state_dict(self, name: str | None = None, *, only: str | None = None) -> dict[str, Any]:
        """Return copies of the whole averaged tensors on the CPU, on the first rank, and {} on other ranks.

        `name`: one of several averages. A collective for a model that is sharded or replicated; for a plain module
        without a group every rank gets the dict. It loads into the unwrapped model with ``strict=True``: parameters in
        the dtype of the average, under all their names if they are tied, and other parameters and persistent buffers in
        their own dtypes. What only a module can give, such as a quantised weight and its scales, is as in its own
        ``state_dict()``. With ``only="averaged"`` the dict has the averaged parameters only. Memory: one whole
        parameter at a time on every rank, all of them on the first. Raises RuntimeError before the first update, and
        on all ranks that share the model where one has averaged another number of models; ValueError for another
        `only`.
        """
        self.require_same_models()
        return self._averaged_model("full_state_dict", name, only).full_state_dict()

    @torch.no_grad()
    def sharded_state_dict(self, name: str | None = None, *, only: str | None = None) -> dict[str, Any]:
        """Return the averaged model, sharded, for torch.distributed.checkpoint. Every rank calls it.

        `name`, `only`, keys and values are those of `full_state_dict`. Parameters are DTensors on the storage of
        average and model (under FSDP1, and for a `Window`, copies). Local, except under FSDP1, where it is a
        collective. Raises RuntimeError before the first update.
        """
        return self._averaged_model("sharded_state_dict", name, only).sharded_state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the averages for torch.distributed.checkpoint, as tensors on their own storage. Local, without a copy.

        Call it on every rank, or let dcp.save and dcp.load call it. A parameter is a DTensor of its whole shape; the
        keys are listed in `dist_swa.checkpoint`. Under FSDP1 it makes copies, and this and `load_state_dict` make one
        all-reduce per parameter. Raises RuntimeError inside `swapped_in`, where the model has the averaged weights, and
        where a saver that keeps the first rank's part only, as ``fabric.save``, calls it for a sharded average.
        """
        self.require_trained_weights("state_dict")
        self._require_whole_checkpoint()
        self._refresh()
        return self._averages.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, in this run or, through torch.distributed.checkpoint, in another one.

        Every rank calls it. Local, except under FSDP1. The rule stays that of the constructor: other parameters of the
        same class give one warning; another class, and a `Window` of another size, raise ValueError. ValueError, too,
        for a newer format, and for a model with other parameters (it names the first). RuntimeError inside
        `swapped_in`. Nothing has changed after an error. Where buffers are copied, a buffer that the model does not
        have is ignored, and one that `state_dict` does not have gets the model's current value.
        """
        self.require_trained_weights("load_state_dict")
        self._require_whole_checkpoint()
        self._refresh()
        self._averages.load_state_dict(state_dict)

    def check_saved(self, saved: Mapping[str, Any]) -> set[str]:
        """Raise what `load_state_dict` would raise for `saved`, whose values are read on access. Local.

        Returns the keys of `state_dict` that `load_state_dict` does not need: buffers that are copied from the model.
        """
        self.require_trained_weights("load")
        self._refresh()
        return self._averages.check_saved(saved)

    def require_trained_weights(self, action: str) -> None:
        """Raise RuntimeError where `action` was called inside `swapped_in`."""
        if self._swapped_in is not None:
            raise RuntimeError(
                f"{action} needs the model to have its trained weights, got a call inside swapped_in; leave it first"
            )

    def require_same_models(self) -> None:
        """Raise on all ranks that share the model where one has averaged other models. A collective of them."""
        if self._shards.group is None:
            highest, lowest = self._shards.all_reduce_max([self.num_averaged, -self.num_averaged])
            check_equal(-lowest, highest)
        self._check_replicas()

    def _check_replicas(self) -> None:
        """Raise on all replicas where one has averaged other models or parameters. A collective of them."""
        if self._shards.group is not None:
            names = [shard.name for shard in self._shards.averaged]
            check_counts(self.num_averaged, names, self._shards.group, self._shards.device)

    def _checked_state(self, action: str, name: str | None) -> AverageState:
        """Return an average that may be put into the model, or raise on all replicas. A collective of them."""
        with self._shards.raise_on_replicas():
            state = self._averages.get(action, name)
            self.require_trained_weights(action)
            self._require_average(action)
            self._shards.refresh()
        self._check_replicas()
        return state

    def _refresh(self) -> None:
        self._shards.refresh()
        self._averages.select_before_first_update()

    def _require_whole_checkpoint(self) -> None:
        if any(shard.layout is not None and shard.layout.mesh.size() > 1 for shard in self._shards.averaged):
            check_keeps_all_ranks()

    def _require_average(self, action: str) -> None:
        if self.num_averaged == 0:
            raise RuntimeError(f"{action} needs an average, got num_averaged=0; call update first")

    def _averaged_model(self, action: str, name: str | None, only: str | None) -> AveragedModel:
        state = self._averages.get(action, name)
        self._require_average(action)
        self._shards.refresh()
        return AveragedModel(self._shards, state, self._swapped_in is state, only)

    @torch.no_grad()
    def _write(self, state: AverageState) -> None:
        torch.clear_autocast_cache()  # it may have casts of the trained weights
        state.copy_buffers_to_model()
        self._shards.write(state.averages())

    def _preserve_random_state(self) -> AbstractContextManager[None]:
        device = self._shards.averaged[0].local_tensor.device
        return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
