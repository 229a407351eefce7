"""SWA: the controller that a training loop calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_swa.averaging.average import ShardedAverage
from dist_swa.averaging.averages import checked_name, named_rules
from dist_swa.averaging.format import check_keys
from dist_swa.averaging.rules import Equal, Rule
from dist_swa.batch_norm.frozen import FrozenLayers, skipping
from dist_swa.lr_phase import LRPhase, SwaLr
from dist_swa.schedule import UNITS, Decision, Progress, Schedule
from dist_swa.sharding.fqn import NamePattern


class SWA:
    """Averages the weights of `model` on a schedule, and puts the average into the model at the end.

    Build it on every rank after the model was wrapped. Call `step` once after every optimizer step, on every rank, and
    `finalize` at the end. It is a torch.distributed.checkpoint ``Stateful``: save and load it beside model and
    optimizer, on any number of ranks. Times are strings: "3ep" (epochs), "500ba" (batches, that is optimizer steps),
    "1e6sp" (samples), "2e9tok" (tokens), and "0.7dur" (a fraction of `max_duration`). Units may be mixed.

    Args:
        model: the wrapped module.
        optimizer: needed for the learning-rate phase. Pass it also to a run that may be resumed with one.
        max_duration: length of the run, needed where a time is in "dur".
        steps_per_epoch: optimizer steps in an epoch. Without it, `end_epoch` counts epochs.
        swa_start: models are averaged from here on.
        swa_end: at this time the average goes into the model, and training goes on from it. None: the average goes into
            the model in `finalize`. A few steps after an earlier `swa_end` undo most of what averaging gained.
        update_interval: from one update to the next.
        schedule_swa_lr: whether the learning rate is set from `swa_start` on: to `swa_lr`, in `anneal_steps` updates
            along `anneal_strategy` ("linear" or "cosine"); with ``swa_lr=None`` it stays at the rate of `swa_start`. A
            list has a rate for each param group. Each optimizer step of the phase uses these rates, whatever a
            scheduler has set.
        rule, parameters, dtype, device, buffers, process_group: see `ShardedAverage`, also for the memory.
        transfer: the name of the average that goes into the model, where `rule` has several.
        skip_nonfinite: whether an update is skipped, on all ranks, while any rank's shard has NaN or inf. The update
            stays due at the next step. The first skip warns, and `num_skipped` counts them. Each update then reads the
            shards once more and makes a small all-reduce for each axis of the mesh.

    Attributes:
        average: the `ShardedAverage`, for `full_state_dict` and the like.
        schedule: the times, and the position in the run: ``schedule.now.batches``.
        num_skipped: the updates that `skip_nonfinite` refused.

    Raises ValueError or TypeError for arguments that do not fit together. A collective where `ShardedAverage` is. The
    method is that of arXiv:1803.05407, section 3.

    Warns once, as soon as it can be known: that `swa_start` comes too late for `max_duration` (here or in the first
    `step`), that `max_duration` is over (in a later `step`), and that the schedule reads epochs which nobody has
    counted (in the first `step` from a `swa_start` above 0 on; `steps_per_epoch` is the remedy).

    Example:

    >>> import torch
    >>> from dist_swa import SWA
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> swa = SWA(model, max_duration="10ba", swa_start="0.5dur")
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 4)).square().mean().backward()
    ...     optimizer.step()
    ...     updated = swa.step()
    >>> swa.num_averaged
    6
    >>> swa.finalize()  # the average is in the model
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        max_duration: str | None = None,
        steps_per_epoch: int | None = None,
        swa_start: str = "0.7dur",
        swa_end: str | None = None,
        update_interval: str = "1ba",
        schedule_swa_lr: bool = False,
        swa_lr: SwaLr = None,
        anneal_strategy: str = "linear",
        anneal_steps: int = 10,
        rule: Rule | Mapping[str, Rule] = Equal(),
        transfer: str | None = None,
        parameters: NamePattern | None = None,
        skip_nonfinite: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        buffers: NamePattern = "copy",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.schedule = checked_schedule(
            max_duration=max_duration,
            steps_per_epoch=steps_per_epoch,
            swa_start=swa_start,
            swa_end=swa_end,
            update_interval=update_interval,
            rule=rule,
            transfer=transfer,
        )
        for message in self.schedule.unmet():
            warnings.warn(message, stacklevel=2)
        self._lr_phase = LRPhase(optimizer, schedule_swa_lr, swa_lr, anneal_strategy, anneal_steps)
        self.average = ShardedAverage(
            model,
            rule,
            parameters=parameters,
            dtype=dtype,
            device=device,
            buffers=buffers,
            process_group=process_group,
        )
        self.num_skipped = 0
        self._transferred = transfer
        self._skips_nonfinite = skip_nonfinite
        self._frozen = FrozenLayers(model)

    def __repr__(self) -> str:
        schedule = self.schedule
        return (
            f"SWA(step={schedule.now.batches}, epoch={schedule.now.epochs}, swa_start={schedule.start},"
            f" swa_end={schedule.end}, update_interval={schedule.interval}, completed={self.completed},"
            f" average={self.average!r})"
        )

    @property
    def started(self) -> bool:
        """Whether a model was averaged."""
        return self.schedule.first_update is not None

    @property
    def completed(self) -> bool:
        """Whether averaging has ended. Not so in a resumed run whose schedule ends later."""
        return self.schedule.completed

    @property
    def num_averaged(self) -> int:
        """Models in the average."""
        return self.average.num_averaged

    def step(self, *, samples: int | None = None, tokens: int | None = None) -> bool:
        """Count one optimizer step; update, anneal and complete as the schedule says. True if it updated.

        Call it on every rank after every optimizer step. `samples` and `tokens` of this step are sums over all ranks.
        Local, except for the step that completes. Raises ValueError where the schedule needs `samples` or `tokens` and
        they are missing, and RuntimeError inside `swapped_in`.
        """
        self.average.require_trained_weights("step")

        def count() -> Decision:
            before = self.schedule.now
            decision = self.schedule.step(samples=samples, tokens=tokens)
            for message in self.schedule.unmet(before):
                warnings.warn(message, stacklevel=4)
            return decision

        return self._advance(count)

    def end_epoch(self) -> bool:
        """Count one epoch, after its last `step`, where `steps_per_epoch` was not given. True if it updated.

        Call it on every rank. Raises RuntimeError where `steps_per_epoch` was given, and inside `swapped_in`.
        """
        self.average.require_trained_weights("end_epoch")
        return self._advance(self.schedule.end_epoch)

    def swapped_in(self, name: str | None = None) -> AbstractContextManager[None]:
        """`ShardedAverage.swapped_in`. `name`: one of several averages; default: the one that `finalize` uses."""
        return self.average.swapped_in(self._transferred if name is None else name)

    def finalize(self, batches: Iterable[Any] | None = None, **options: Any) -> None:
        """Put the average into the model for good, and recalibrate its BatchNorm statistics over all ranks.

        Call it on every rank, with `batches` on all ranks or on none. It is a collective of a replicated or sharded
        model, and with `batches`. `batches` and `options` are those of `recalibrate_batch_norm`. A model without
        BatchNorm needs none of them, and without `batches` averaged statistics are kept (see `buffers`). Layers that
        were frozen at the last update in training mode keep their statistics. Memory: as `swapped_in`.

        With nothing averaged it warns, with the reason, and the model keeps its trained weights. It also warns where
        the schedule reads epochs and none was counted. Raises ValueError for a model with other BatchNorm layers
        without `batches`, RuntimeError where the ranks averaged other numbers of models, and what
        `recalibrate_batch_norm` raises. Nothing has changed after an error.
        """
        self.average.require_same_models()
        if self.num_averaged == 0:
            warnings.warn(
                f"no model was averaged in {self.schedule.now.batches} steps: {self.schedule.why_no_update()}; the"
                " model keeps its trained weights",
                stacklevel=2,
            )
            return
        if self.schedule.epochs_unknown:
            warnings.warn(f"schedule or rule read epochs, and {self.schedule.why_no_update()}", stacklevel=2)
        if not self._is_average_finite():
            return
        with self.swapped_in():  # the statistics become the average's, and nothing has changed if this fails
            if batches is None:  # averaged statistics need none
                options = skipping(self.average.averages_statistics, options)
            self._frozen.recalibrate(batches, **options)
        self.average.transfer(self._transferred)
        self.schedule.completed = True
        self._lr_phase.end()

    def metrics(self, *, distance: bool = False) -> dict[str, float]:
        """`ShardedAverage.metrics`, with its `distance`, and `num_skipped`: a flat dict for any logger."""
        return {**self.average.metrics(distance=distance), "num_skipped": self.num_skipped}

    def reset(self, *, batches: int = 0, epochs: int | None = None, samples: int = 0, tokens: int = 0) -> None:
        """Forget the average, and set the position in the run. Local; RuntimeError inside `swapped_in`.

        `batches` are the optimizer steps made so far, `epochs` the ended epochs, `samples` and `tokens` sums over all
        ranks. `epochs` follows from `batches` where `steps_per_epoch` was given, and is 0 by default otherwise.
        """
        self.average.reset()
        if epochs is None:
            epochs = batches // self.schedule.steps_per_epoch if self.schedule.steps_per_epoch else 0
        self.schedule.reset(Progress(batches=batches, epochs=epochs, samples=samples, tokens=tokens))
        self._lr_phase.reset()
        self._frozen.names = set()
        self.num_skipped = 0

    def reset_to(self, position: Mapping[str, int]) -> str:
        """`reset` with what is known of `position`, the arguments of `reset`; return a text that says so."""
        self.reset(**position)
        text = f"the schedule starts at step {self.schedule.now.batches}"
        read = {"batches", *(UNITS[unit] for unit in self.schedule.units)}
        if self.schedule.steps_per_epoch is not None:
            read.discard("epochs")
        if read <= position.keys():
            return text
        arguments = ", ".join(f"{name}={position.get(name, '...')}" for name in sorted(read))
        return f"{text}; if training has done more, call swa.reset({arguments})"

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the position in the schedule. Local; RuntimeError inside `swapped_in`."""
        return {**self.average.state_dict(), "schedule": self._schedule_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. Who calls it, and errors: as `ShardedAverage.load_state_dict`.

        The average and the position in the schedule come from `state_dict`. Start, end, interval and rates stay as
        constructed.
        """
        self.average.require_trained_weights("load_state_dict")
        check_keys(state_dict, ["schedule"])
        schedule = {key: value.tolist() for key, value in state_dict["schedule"].items()}
        check_keys(schedule, self._schedule_state())
        start_lrs = self._lr_phase.checked(schedule.get("start_lrs", []))
        frozen = self._frozen.names_of(schedule.get("frozen", []))
        self.average.load_state_dict({key: value for key, value in state_dict.items() if key != "schedule"})
        self.schedule.load_state_dict(schedule)
        self.num_skipped = schedule["num_skipped"]
        self._lr_phase.reset()
        if self.started:
            self._lr_phase.start_lrs = start_lrs
        self._frozen.names = frozen
        if self.schedule.reopen_if_not_over() and not self.schedule.started:
            self.reset(**asdict(self.schedule.now))
        if self.started and not self.completed:
            self._lr_phase.resume(self.num_averaged)

    def check_ranks(self, process_group: dist.ProcessGroup | None = None) -> None:
        """`ShardedAverage.check_ranks` of `process_group`."""
        self.average.check_ranks(process_group)

    def check_saved(self, saved: Mapping[str, Any]) -> set[str]:
        """`ShardedAverage.check_saved` of `saved`; the schedule of any run fits."""
        return self.average.check_saved(saved)

    def _advance(self, count: Callable[[], Decision]) -> bool:
        """Call `count`, and do what the schedule decides. After an error nothing is counted."""
        position = self.schedule.state_dict()
        try:
            self._lr_phase.check_groups()
            decision = count()
            if decision.update and self._skips_nonfinite and not self.average.is_model_finite():
                decision = self._skip(decision, position)
            if decision.update:
                self.average.update(decision.elapsed)
                self._frozen.refresh()
        except Exception:
            self.schedule.load_state_dict(position)
            raise
        if self.started and (decision.complete or not self.completed):
            self._lr_phase.advance(self.num_averaged)
        if decision.complete:
            self._lr_phase.end()
        if decision.complete and self._is_average_finite():
            self.average.transfer(self._transferred)
        return decision.update

    def _is_average_finite(self) -> bool:
        """Whether the average may replace the trained weights. If it has NaN or inf, warn once on every rank."""
        is_finite = self.average.is_finite(self._transferred)
        if not is_finite:
            warnings.warn(
                f"the average of {self.num_averaged} models has NaN or inf; the model keeps its trained weights. Pass"
                " skip_nonfinite=True to leave such models out",
                stacklevel=4,
            )
        return is_finite

    def _skip(self, decision: Decision, position: Mapping[str, list[int]]) -> Decision:
        """Undo an update that is due, and keep it due. Completing does not wait for it."""
        self.schedule.undo_update(position)
        self.num_skipped += 1
        if self.num_skipped == 1:
            warnings.warn(
                f"a model with NaN or inf was not averaged, at step {self.schedule.now.batches}; further ones are"
                " counted in num_skipped",
                stacklevel=4,
            )
        return Decision(complete=decision.complete and self.schedule.completed)

    def _schedule_state(self) -> dict[str, torch.Tensor]:
        state = {key: torch.tensor(value) for key, value in self.schedule.state_dict().items()}
        state["num_skipped"] = torch.tensor(self.num_skipped)
        if lrs := self._lr_phase.saved_lrs():
            state["start_lrs"] = torch.tensor(lrs, dtype=torch.float64)
        if frozen := self._frozen.saved():
            state["frozen"] = torch.tensor(frozen)
        return state


def checked_schedule(
    *,
    max_duration: str | None,
    steps_per_epoch: int | None,
    swa_start: str,
    swa_end: str | None,
    update_interval: str,
    rule: Rule | Mapping[str, Rule],
    transfer: str | None,
    is_length_known: bool = True,
    **others: Any,
) -> Schedule:
    """Return the schedule of an `SWA` with these arguments, or raise what it raises for them."""
    rules = named_rules(rule)
    checked_name("SWA(transfer=...)", transfer, rules)
    return Schedule(
        start=swa_start,
        end=swa_end,
        interval=update_interval,
        max_duration=max_duration,
        steps_per_epoch=steps_per_epoch,
        rule_units=[unit for one in rules.values() if (unit := one.unit)],
        is_length_known=is_length_known,
    )
