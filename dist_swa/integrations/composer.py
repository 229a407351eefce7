"""Weight averaging in Composer's Trainer, in place of ``composer.algorithms.SWA``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import dist_swa
from dist_swa.integrations.full_state_dict import full_state_dict, load_full_state_dict

try:
    from composer.core import Algorithm, Event, State, get_precision_context
except ImportError as error:
    raise ImportError(
        f"dist_swa.integrations.composer needs Composer, got {error}; pip install --no-deps mosaicml==0.32.1, and what"
        " that imports: it asks for an older torch"
    ) from error

_KEY = "dist_swa"  # of the average in the state of this algorithm
_EVENTS = (
    Event.INIT,
    Event.FIT_START,
    Event.BATCH_END,
    Event.EPOCH_END,
    Event.EVAL_START,
    Event.EVAL_END,
    Event.FIT_END,
)


class SWA(Algorithm):  # type: ignore[misc]
    """Averages the weights that a Trainer trains: ``Trainer(..., algorithms=[SWA(swa_start="1ep", swa_end="2ep")])``.

    Arguments, defaults and the updates that follow from them are those of Composer's own SWA. Beyond it: times in any
    unit, `swa_lr` as it was given, averages split over the ranks, and resumption on any number of them. At `swa_end`
    the average goes into the model, and training goes on from it; where `swa_end` is None, or a part of a run that
    stops early, the average is in the model after ``fit``. BatchNorm is recalibrated from the training dataloader
    then: at the end of that epoch or of ``fit``. Any other `swa_end` may come in a further ``fit``; until then the
    model keeps its trained weights, with a warning. The average is `swa`, from the start of ``fit`` on.

    With `schedule_swa_lr`, the phase has the last word on the learning rate: it is set after Composer has stepped its
    schedulers. `swa_lr` without it is ignored, with a warning.

    Args:
        evaluate: the weights that evaluation sees between `swa_start` and `swa_end`: "averaged" (with the BatchNorm
            statistics of the last update), or "trained", as with Composer's own.
        finalize_options: of `recalibrate_batch_norm`, as ``{"max_batches": 100}``.
        options: further ones of `dist_swa.SWA`, as `rule`.

    For one process and DDP. Raises RuntimeError for a second one in a Trainer, ValueError for FSDP and tensor
    parallelism, and what `dist_swa.SWA` raises when ``fit`` starts. Checkpoints cost an all-gather of the average, and
    its memory on the first rank.
    """

    def __init__(
        self,
        swa_start: str = "0.7dur",
        swa_end: str | None = "0.97dur",
        update_interval: str = "1ep",
        schedule_swa_lr: bool = False,
        anneal_strategy: str = "linear",
        anneal_steps: int = 10,
        swa_lr: float | None = None,
        *,
        evaluate: str = "averaged",
        finalize_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if evaluate not in ("averaged", "trained"):
            raise ValueError(f"evaluate needs to be 'averaged' or 'trained', got evaluate={evaluate!r}; choose one")
        if swa_lr is not None and not schedule_swa_lr:
            warnings.warn(f"swa_lr={swa_lr} is ignored without schedule_swa_lr=True", stacklevel=2)
            swa_lr = None
        self.swa: dist_swa.SWA | None = None
        self._options = options | {
            "swa_start": swa_start,
            "swa_end": swa_end,
            "update_interval": update_interval,
            "schedule_swa_lr": schedule_swa_lr,
            "anneal_strategy": anneal_strategy.lower(),
            "anneal_steps": anneal_steps,
            "swa_lr": swa_lr,
        }
        self._evaluates_average = evaluate == "averaged"
        self._finalize_options = {"forward": lambda module, batch: module(batch), **(finalize_options or {})}
        self._is_recalibrated = False
        self._swap = ExitStack()
        self._saved: Mapping[str, Any] | None = None

    def match(self, event: Event, state: State) -> bool:
        return event in _EVENTS

    def apply(self, event: Event, state: State, logger: Any) -> None:
        if event == Event.INIT and (num_algorithms := sum(isinstance(one, SWA) for one in state.algorithms)) > 1:
            raise RuntimeError(
                f"a Trainer needs one SWA of dist_swa, got {num_algorithms=}; pass several averages as rule={{...}} of"
                " one"
            )
        if event in (Event.FIT_START, Event.EVAL_END):
            self._swap.close()  # at FIT_START: what an evaluation that raised has left
        if event == Event.FIT_START:
            if self.swa is None:
                self.swa = self._attached(state)
            else:
                self.swa.schedule.reopen_if_not_over()  # the end of the last fit was not yet that of the averaging
        if self.swa is not None:
            self._follow(self.swa, event, state)

    def _attached(self, state: State) -> dist_swa.SWA:
        if state.fsdp_config is not None or state.tp_config is not None:
            raise ValueError(
                "SWA needs a model in DDP or one process, got parallelism_config for FSDP or tensor parallelism; leave"
                " it out, the average is split over the ranks of DDP"
            )
        optimizer = state.optimizers[0] if len(state.optimizers) == 1 else None
        swa = dist_swa.SWA(state.model, optimizer, max_duration=str(state.max_duration), **self._options)
        if self._saved:
            load_full_state_dict(swa, self._saved)
        elif state.load_path is not None:
            warnings.warn(f"{state.load_path} has no averaging state: averaging starts anew", stacklevel=2)
            now = state.timestamp
            swa.reset(batches=int(now.batch), epochs=int(now.epoch), samples=int(now.sample), tokens=int(now.token))
        self._saved = None
        return swa

    def _follow(self, swa: dist_swa.SWA, event: Event, state: State) -> None:
        if event == Event.BATCH_END:
            now, before = state.timestamp, state.previous_timestamp
            swa.step(samples=int(now.sample - before.sample), tokens=int(now.token - before.token))
        elif event == Event.EPOCH_END:
            swa.end_epoch()
        elif event == Event.EVAL_START and self._evaluates_average and swa.started and not swa.completed:
            self._swap.enter_context(swa.swapped_in())
        if event == Event.FIT_END and not swa.completed and swa.schedule.end and swa.schedule.end.unit != "dur":
            warnings.warn(
                f"swa_end={swa.schedule.end} has not come in {swa.schedule.now.batches} steps: the model keeps its"
                " trained weights, for a further fit; or call swa.finalize",
                stacklevel=2,
            )
        elif event == Event.FIT_END and not swa.completed:
            with get_precision_context(state.precision, state.precision_config):
                swa.finalize(_batches(state), **self._finalize_options)
            self._is_recalibrated = True
        elif event in (Event.EPOCH_END, Event.FIT_END) and swa.completed and not self._is_recalibrated:
            with get_precision_context(state.precision, state.precision_config):
                dist_swa.recalibrate_batch_norm(state.model, _batches(state), **self._finalize_options)
            self._is_recalibrated = True

    def state_dict(self) -> dict[str, Any]:
        saved = self._saved if self.swa is None else full_state_dict(self.swa)
        return {**super().state_dict(), "is_recalibrated": self._is_recalibrated, _KEY: saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state.get(_KEY)  # the average is built later, when the model is wrapped
        self._is_recalibrated = state.get("is_recalibrated", False)


def _batches(state: State) -> Iterator[Any]:
    """Yield the training batches as the model gets them."""
    for batch in state.train_dataloader:
        yield state.device.batch_to_device(batch)
