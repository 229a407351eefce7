"""Weight averaging in Composer's Trainer, in place of ``composer.algorithms.SWA``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import dist_swa
from dist_swa.batch_norm.frozen import skipping
from dist_swa.integrations.full_state_dict import full_state_dict, load_full_state_dict
from dist_swa.options import check_finalize_options, check_options

try:
    from composer.core import Algorithm, Event, State, get_precision_context
except ImportError as error:
    raise ImportError(
        f"dist_swa.integrations.composer needs Composer, got {error}; pip install --no-deps mosaicml==0.32.1, and what"
        " it imports (its own requirements pin an older torch)"
    ) from error

_KEY = "dist_swa"  # of the average in the state of the algorithm


class SWA(Algorithm):  # type: ignore[misc]
    """Average the weights that a Trainer trains: ``Trainer(..., algorithms=[SWA(swa_start="1ep", swa_end="2ep")])``.

    Arguments, defaults and updates are those of ``composer.algorithms.SWA``. In addition, times may have any unit,
    `swa_lr` is used as given, the average is split over the ranks, and it resumes on any number of them. The `swa`
    attribute is the `dist_swa.SWA`, from the start of ``fit`` on, or from an evaluation of a loaded checkpoint.

    At `swa_end` the model gets the averaged weights, and training continues from them. If `swa_end` is None, or a
    fraction of a run that ends early, the model gets them at the end of ``fit``. BatchNorm statistics are recalibrated
    on the training dataloader at the end of that epoch or of ``fit``. Any other `swa_end` may be reached in a further
    ``fit``; until then the model keeps its trained weights, with a warning. It also keeps them, with a warning, if no
    model was averaged, for example because no epoch has ended.

    One model is averaged in each `update_interval`. With `schedule_swa_lr`, each optimizer step from `swa_start` on
    uses the rate of `SWA`, and not that of Composer's schedulers: `swa_lr`, reached along `anneal_strategy` in
    `anneal_steps` updates. Without it, `swa_lr` is ignored, with a warning.

    Args:
        evaluate: the weights that evaluation uses between `swa_start` and `swa_end`, also of a checkpoint that was
            loaded: "averaged" (with the BatchNorm statistics of the last update on the first rank) or "trained", as in
            ``composer.algorithms.SWA``. A checkpoint has the trained weights as its model.
        finalize_options: options of `recalibrate_batch_norm`, for example ``{"max_batches": 100}``. Transforms of a
            ``DataSpec`` are not applied to the batches; pass a ``forward`` that applies them.
        options: further options of `dist_swa.SWA`, for example `rule`.

    Works with DDP or one process. Raises RuntimeError for a second one in a Trainer. When ``fit`` starts, raises
    ValueError for FSDP and tensor parallelism, and what `dist_swa.SWA` raises. A checkpoint costs an all-gather of the
    average, and its memory on the first rank.

    Example:

    >>> import torch
    >>> from composer import ComposerModel, Trainer
    >>> from dist_swa.integrations.composer import SWA
    >>> class Model(ComposerModel):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(2, 1)
    ...
    ...     def forward(self, batch):
    ...         return self.layer(batch)
    ...
    ...     def loss(self, outputs, batch):
    ...         return outputs.square().mean()
    >>> model, swa = Model(), SWA(swa_start="1ep", swa_end=None, update_interval="1ba")
    >>> trainer = Trainer(
    ...     model=model,
    ...     optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
    ...     train_dataloader=torch.utils.data.DataLoader(torch.randn(32, 2), batch_size=8),
    ...     max_duration="2ep",
    ...     device="cpu",
    ...     algorithms=[swa],
    ... )
    >>> trainer.fit()  # the model is the average afterwards
    >>> swa.swa.num_averaged
    4
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
        check_options(self._options)
        check_finalize_options(finalize_options or {})
        self._evaluates_average = evaluate == "averaged"
        self._finalize_options = {"forward": lambda module, batch: module(batch), **(finalize_options or {})}
        self._is_recalibrated = False
        self._swap = ExitStack()
        self._saved: Mapping[str, Any] | None = None
        self._handlers: dict[Event, Callable[[State], None]] = {
            Event.INIT: self._init,
            Event.FIT_START: self._fit_start,
            Event.BATCH_END: self._batch_end,
            Event.EPOCH_END: self._epoch_end,
            Event.EVAL_START: self._eval_start,
            Event.EVAL_END: self._eval_end,
            Event.FIT_END: self._fit_end,
        }

    def match(self, event: Event, state: State) -> bool:
        return event in self._handlers

    def apply(self, event: Event, state: State, logger: Any) -> None:
        self._handlers[event](state)

    def state_dict(self) -> dict[str, Any]:
        saved = self._saved if self.swa is None or self._saved else full_state_dict(self.swa)
        return {**super().state_dict(), "is_recalibrated": self._is_recalibrated, _KEY: saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state.get(_KEY)  # loaded at FIT_START, after the model is wrapped, or to be evaluated before
        self._is_recalibrated = state.get("is_recalibrated", False)

    def _init(self, state: State) -> None:
        if (num_algorithms := sum(isinstance(one, SWA) for one in state.algorithms)) > 1:
            raise RuntimeError(
                f"a Trainer needs one SWA of dist_swa, got {num_algorithms=}; pass several averages as rule={{...}} of"
                " one"
            )

    def _fit_start(self, state: State) -> None:
        self._swap.close()  # after an evaluation that raised
        if self.swa is None or self._saved:
            self.swa = self._attach(state)
        else:
            self.swa.schedule.reopen_if_not_over()  # the previous fit may have ended before swa_end
        self._is_recalibrated = self._is_recalibrated and self.swa.completed

    def _attach(self, state: State) -> dist_swa.SWA:
        if state.fsdp_config is not None or state.tp_config is not None:
            raise ValueError(
                "SWA needs a model in DDP or one process, got parallelism_config for FSDP or tensor parallelism; leave"
                " it out, the average is split over the ranks of DDP"
            )
        optimizer = state.optimizers[0] if len(state.optimizers) == 1 else None
        swa = dist_swa.SWA(state.model, optimizer, max_duration=str(state.max_duration), **self._options)
        swa.schedule.told |= {"epochs", "max_duration"}  # the Trainer ends each epoch; a further fit is longer
        if self._saved:
            load_full_state_dict(swa, self._saved)
        elif state.load_path is not None:
            now = state.timestamp
            position = {"batches": now.batch, "epochs": now.epoch, "samples": now.sample, "tokens": now.token}
            start = swa.reset_to({name: int(time) for name, time in position.items()})
            warnings.warn(f"{state.load_path} has no averaging state: averaging starts anew; {start}", stacklevel=2)
        self._saved = None
        return swa

    def _batch_end(self, state: State) -> None:
        now, before = state.timestamp, state.previous_timestamp
        self._attached.step(samples=int(now.sample - before.sample), tokens=int(now.token - before.token))

    def _epoch_end(self, state: State) -> None:
        self._attached.end_epoch()
        self._recalibrate_once(state)

    def _eval_start(self, state: State) -> None:
        if self.swa is None and self._saved:
            self.swa = self._load_to_evaluate(state, self._saved)
        swa = self.swa  # None in an evaluation before fit without a checkpoint
        if swa is not None and self._evaluates_average and swa.started and not swa.completed:
            swa.average.broadcast_buffers()  # without DDP's broadcast, as Composer evaluates, each rank has other ones
            self._swap.enter_context(swa.swapped_in())

    def _load_to_evaluate(self, state: State, saved: Mapping[str, Any]) -> dist_swa.SWA:
        """Return the average of a checkpoint that no fit has resumed. The Trainer may have no duration or optimizer."""
        schedule = {"swa_start": "0ba", "swa_end": None, "update_interval": "1ba", "schedule_swa_lr": False}
        swa = dist_swa.SWA(state.model, **(self._options | schedule | {"swa_lr": None}))
        load_full_state_dict(swa, saved)
        swa.schedule.completed = bool(saved["schedule"]["completed"])  # the model has the average, or trains on from it
        return swa

    def _eval_end(self, state: State) -> None:
        self._swap.close()

    def _fit_end(self, state: State) -> None:
        swa = self._attached
        end = swa.schedule.end
        if swa.completed:
            self._recalibrate_once(state)
        elif end is None or end.unit == "dur":
            with get_precision_context(state.precision, state.precision_config):
                swa.finalize(_batches(state), **skipping(swa.average.averages_statistics, self._finalize_options))
            self._is_recalibrated = swa.completed
        else:
            warnings.warn(
                f"swa_end={end} was not reached in {swa.schedule.now.batches} steps: the model keeps its trained"
                " weights, for a further fit; or call swa.finalize",
                stacklevel=2,
            )

    def _recalibrate_once(self, state: State) -> None:
        if self._attached.completed and not self._is_recalibrated:
            with get_precision_context(state.precision, state.precision_config):
                options = skipping(self._attached.average.averages_statistics, self._finalize_options)
                dist_swa.recalibrate_batch_norm(state.model, _batches(state), **options)
            self._is_recalibrated = True

    @property
    def _attached(self) -> dist_swa.SWA:
        assert self.swa is not None  # since FIT_START
        return self.swa


def _batches(state: State) -> Iterator[Any]:
    """Yield the training batches on the device."""
    for batch in state.train_dataloader:
        yield state.device.batch_to_device(batch)
