"""SWA: the controller that a training loop talks to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_swa.averaging.average import ShardedAverage, named_rules
from dist_swa.averaging.rules import Equal, Rule
from dist_swa.averaging.state import check_keys
from dist_swa.batch_norm.layers import batch_norm_layers
from dist_swa.batch_norm.recalibrate import recalibrate_batch_norm
from dist_swa.lr_phase import check_groups, check_phase, get_lrs, phase_lr, set_lrs
from dist_swa.schedule import Decision, Progress, Schedule
from dist_swa.sharding.fqn import NamePattern
from dist_swa.sharding.shard import unwrap


class SWA:
    """Averages the weights of `model` by a schedule, and puts the average into it at the end.

    Build it on every rank after the model was wrapped; call `step` once after every real optimizer step, on every
    rank alike, and `finalize` at the end. It is a torch.distributed.checkpoint ``Stateful``: save and load it beside
    model and optimizer, on any number of ranks.

    Times are strings: "3ep" epochs, "500ba" batches (optimizer steps), "1e6sp" samples, "2e9tok" tokens, "0.7dur"
    a fraction of `max_duration`; units may be mixed.

    Args:
        optimizer: needed for the learning-rate phase, and remembered for one after a resume.
        max_duration: length of the run, where "dur" is used.
        steps_per_epoch: optimizer steps in an epoch; without it, `end_epoch` counts epochs.
        swa_start: from the first check at or after it, models are averaged.
        swa_end: at the first check at or after it, the average goes into the model and training goes on from there;
            None averages to the end. Prefer None: a few further steps undo most of what averaging gained.
        update_interval: from one update to the next.
        schedule_swa_lr: whether the learning rate is set from `swa_start` on: to `swa_lr`, in `anneal_steps` updates
            along `anneal_strategy` ("linear", "cosine"), or, with ``swa_lr=None``, held where it is.
        rule, parameters, dtype, device, buffers, process_group: see `ShardedAverage`, also for the memory they take.
        transfer: the name of the average that goes into the model, where `rule` gives several.
        skip_nonfinite: whether an update is refused, on all ranks alike, while any rank's shard holds NaN or inf. It
            stays due, so the next check asks again; the first refusal warns, `num_skipped` counts them. Costs one
            more read of the shards and one small all-reduce (two under HSDP, and FSDP2 with TP) per update.

    Raises ValueError or TypeError for arguments that do not fit together. A collective where `ShardedAverage` is.
    The method: arXiv:1803.05407, section 3.
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
        swa_lr: float | None = None,
        anneal_strategy: str = "linear",
        anneal_steps: int = 10,
        rule: Rule | Mapping[str, Rule] = Equal(),
        transfer: str | None = None,
        parameters: NamePattern | None = None,
        skip_nonfinite: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        buffers: str = "copy",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.schedule = Schedule(
            start=swa_start,
            end=swa_end,
            interval=update_interval,
            max_duration=max_duration,
            steps_per_epoch=steps_per_epoch,
            rule_units=[unit for one in named_rules(rule).values() if (unit := one.unit)],
        )
        if optimizer is not None and not hasattr(optimizer, "param_groups"):
            raise TypeError(
                f"SWA needs a torch optimizer, got optimizer={optimizer!r}; pass the one that steps the model"
            )
        check_phase(swa_lr, anneal_strategy, anneal_steps)
        if swa_lr is not None and not schedule_swa_lr:
            raise ValueError(f"swa_lr needs schedule_swa_lr=True, got swa_lr={swa_lr}; set it, or leave swa_lr out")
        if schedule_swa_lr and optimizer is None:
            raise ValueError("schedule_swa_lr needs an optimizer, got optimizer=None; pass the optimizer")
        self.average = ShardedAverage(
            model,
            rule,
            parameters=parameters,
            dtype=dtype,
            device=device,
            buffers=buffers,
            process_group=process_group,
        )
        self.average.track("SWA(transfer=...)", transfer)
        self.num_skipped = 0
        self._transferred = transfer
        self._skips_nonfinite = skip_nonfinite
        self._model = model
        self._optimizer = optimizer
        self._schedules_lr = schedule_swa_lr
        self._swa_lr = swa_lr
        self._anneal = (anneal_strategy, anneal_steps)
        self._start_lrs: list[float] = []
        self._norms = batch_norm_layers(unwrap(model)[0])
        self._frozen: set[str] = set()  # those that did not train at the last update in training mode

    @property
    def started(self) -> bool:
        """Whether a model was averaged."""
        return self.schedule.first_update is not None

    @property
    def completed(self) -> bool:
        """Whether the average went into the model for good; no more updates.

        A checkpoint of a run that ended goes on where the new schedule has not come to its end: there may be more
        steps, and another `finalize`. The average starts anew there if it lies before the new `swa_start`.
        """
        return self.schedule.completed

    @property
    def num_averaged(self) -> int:
        """Models in the average."""
        return self.average.num_averaged

    def step(self, *, samples: int | None = None, tokens: int | None = None) -> bool:
        """Count one optimizer step; update, anneal and complete as the schedule says. True if it updated.

        `samples` and `tokens` of this step are sums over all ranks; ValueError where the schedule needs one that is
        missing. Call it on every rank after every real optimizer step, and after any LR scheduler's step. Local, but
        for the step that completes under DDP.
        """
        self.average.require("step", outside_of_a_swap=True)
        return self._follow(lambda: self.schedule.step(samples=samples, tokens=tokens))

    def end_epoch(self) -> bool:
        """Count one epoch, after its last `step`, where `steps_per_epoch` was not given. True if it updated.

        Every rank calls it. Raises RuntimeError where `steps_per_epoch` was given.
        """
        self.average.require("end_epoch", outside_of_a_swap=True)
        return self._follow(self.schedule.end_epoch)

    def swapped_in(self, name: str | None = None) -> AbstractContextManager[None]:
        """Let the model carry the average inside the ``with``: `ShardedAverage.swapped_in`.

        `name`: of one of several averages; default: of the one that goes into the model.
        """
        return self.average.swapped_in(self._transferred if name is None else name)

    def finalize(self, batches: Iterable[Any] | None = None, **options: Any) -> None:
        """Put the average into the model, for good, and recalibrate its BatchNorm statistics over all ranks.

        `batches` and `options` are those of `recalibrate_batch_norm`; a model without BatchNorm needs none of them.
        Layers that were frozen at the last update in training mode keep their statistics, whatever mode the model is
        in now. Every rank calls it: a collective under DDP, and where it recalibrates. Memory: as `swapped_in`. With
        nothing averaged the model stays as it is, with one warning. Raises ValueError for a model with BatchNorm and
        no `batches` (with ``buffers="average"`` it then keeps the averaged statistics), what `recalibrate_batch_norm`
        raises, and RuntimeError where the schedule counts epochs in a run that told of none; nothing has changed then.
        """
        if self.schedule.epochs_unknown:
            raise RuntimeError(
                "a schedule in epochs needs to know where they end, got steps_per_epoch=None and no end_epoch call"
                "; pass steps_per_epoch, or call end_epoch after each"
            )
        if self.num_averaged == 0:
            warnings.warn(
                f"no model was averaged in {self.schedule.now.batches} steps, swa_start={self.schedule.start};"
                " the model keeps its trained weights",
                stacklevel=2,
            )
            return
        skip = options.pop("skip", None)
        options["skip"] = [self._frozen.__contains__, *([] if skip is None else [skip])]
        with self.swapped_in():  # the statistics are the average's, and nothing has changed if this fails
            if batches is not None or not self.average.averages_buffers:
                recalibrate_batch_norm(self._model, _NoBatches() if batches is None else batches, **options)
        self.average.transfer(self._transferred)
        self.schedule.completed = True

    def reset(self, *, batches: int = 0, epochs: int = 0, samples: int = 0, tokens: int = 0) -> None:
        """Forget what was averaged, and be that far into the run. Local; every rank calls it. No memory is freed.

        Raises RuntimeError inside `swapped_in`.
        """
        self.average.reset()
        self.schedule.reset(Progress(batches=batches, epochs=epochs, samples=samples, tokens=tokens))
        self.num_skipped, self._start_lrs, self._frozen = 0, [], set()

    def state_dict(self) -> dict[str, Any]:
        """Return the average, the position in the schedule, the rates at `swa_start` and frozen layers. Local.

        Raises RuntimeError inside `swapped_in`.
        """
        return {**self.average.state_dict(), "schedule": self._schedule_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the average and the position in the schedule; start, end, interval and rates stay as constructed.

        Local; every rank calls it. Raises as `ShardedAverage.load_state_dict` does, with nothing changed then.
        """
        self.average.require("load_state_dict", outside_of_a_swap=True)
        check_keys(state_dict, ["schedule"])
        schedule = {key: value.tolist() for key, value in state_dict["schedule"].items()}
        check_keys(schedule, self._schedule_state())
        start_lrs: list[float] = []
        if self._optimizer is not None:
            start_lrs = schedule["start_lrs"]
            num_groups = len(self._optimizer.param_groups)
            if len(start_lrs) != num_groups:
                raise ValueError(
                    f"load_state_dict needs the {len(start_lrs)} param groups of the checkpoint, got {num_groups=};"
                    " build the optimizer as it was"
                )
        frozen = schedule.get("frozen", [])
        if len(frozen) != len(self._norms):
            raise ValueError(
                f"load_state_dict needs the {len(frozen)} normalisation layers of the checkpoint, got"
                f" num_layers={len(self._norms)}; build the model as it was"
            )
        self.average.load_state_dict({key: value for key, value in state_dict.items() if key != "schedule"})
        self.schedule.load_state_dict(schedule)
        self.num_skipped = schedule["num_skipped"]
        self._start_lrs = start_lrs if self.started else []
        self._frozen = {name for name, is_frozen in zip(self._norms, frozen, strict=True) if is_frozen}
        if self.completed:
            self.schedule.reopen_if_not_over()
            if not self.completed and not self.schedule.started:
                self.reset(**asdict(self.schedule.now))

    def check_saved(self, saved: Mapping[str, Any]) -> None:
        """Raise what `load_state_dict` would raise when it has changed model and average: see `ShardedAverage`."""
        self.average.check_saved(saved)

    def _follow(self, check: Callable[[], Decision]) -> bool:
        """Do what the schedule says after `check`; where that fails, nothing was counted."""
        position = self.schedule.state_dict()
        try:
            if self._optimizer is not None and self._start_lrs:
                check_groups(self._optimizer, self._start_lrs)
            decision = check()
            if decision.update and self._skips_nonfinite and not self.average.is_model_finite():
                decision = self._skip(decision, position)
            if decision.update:
                self.average.update(decision.elapsed)
                if unwrap(self._model)[0].training:
                    self._frozen = {name for name, layer in self._norms.items() if not layer.training}
        except Exception:
            self.schedule.load_state_dict(position)
            raise
        if self._optimizer is not None and self.started and (decision.complete or not self.completed):
            self._start_lrs = self._start_lrs or get_lrs(self._optimizer)
            self._write_lrs()
        if decision.complete:
            self.average.transfer(self._transferred)
        return decision.update

    def _write_lrs(self) -> None:
        """Give the optimizer the rates of the phase, whatever a scheduler has written."""
        if self._optimizer is not None and self._schedules_lr:
            strategy, steps = self._anneal
            fraction = self.num_averaged / steps
            set_lrs(self._optimizer, [phase_lr(lr, self._swa_lr, strategy, fraction) for lr in self._start_lrs])

    def _skip(self, decision: Decision, position: Mapping[str, list[int]]) -> Decision:
        """Refuse an update that is due; it stays due, and what completes does so without it."""
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
        if self._optimizer is not None:  # rates at `swa_start`; before it, as many that are not a number
            lrs = self._start_lrs or [float("nan")] * len(self._optimizer.param_groups)
            state["start_lrs"] = torch.tensor(lrs, dtype=torch.float64)
        if self._norms:
            state["frozen"] = torch.tensor([name in self._frozen for name in self._norms])
        return state


class _NoBatches:
    def __iter__(self) -> Iterator[Any]:
        """Raise when asked for a batch: the pass then tells all ranks."""
        raise ValueError(
            "finalize needs batches for a model with BatchNorm, got batches=None; pass the training loader, or call"
            " average.transfer() to keep the statistics of the last update"
        )
