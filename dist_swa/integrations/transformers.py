"""Hugging Face Trainer: a callback that averages, evaluates the average, and leaves it in the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dist_swa.integrations.transformers needs transformers, got no {error.name}; pip install"
        " 'dist_swa[transformers]'",
        name=error.name,
    ) from error

from dist_swa import recalibrate_batch_norm
from dist_swa.integrations.accelerate import AcceleratedSWA, prepare_swa

_CHOICES = ("averaged", "trained", "both")


class SWACallback(TrainerCallback):
    """Averages the weights that a `Trainer` trains, under DDP, FSDP2 or none, and ends with the average.

    Every optimizer step counts; the Trainer tells how long the run and an epoch are. A checkpoint has the average in
    ``checkpoint-N/dist_swa``, and ``train(resume_from_checkpoint=...)`` goes on with it, on any number of ranks (one
    warning where it is not there). After the last step the average goes into the model, its BatchNorm statistics
    recalibrated on the training data, so that ``save_model`` saves it. `swa` is the `SWA`, from then on, too.

    Args:
        evaluate: what ``Trainer.evaluate`` looks at once models are averaged and until training ends: "averaged"
            weights, with metrics named ``eval_swa_*``, "trained" ones, or "both". `metric_for_best_model` (of early
            stopping, say, or of a plateau) has to be one that every evaluation has, of trained weights. (With "both",
            EarlyStoppingCallback warns after each that it is disabled; it is not.)
        finalize_options: of `recalibrate_batch_norm`, as ``{"forward": lambda module, batch: ...}`` where a Trainer
            computes its loss in a way of its own.
        options: of `prepare_swa`, as `swa_start`, `rule`, `num_processes`.

    Raises ValueError for another `evaluate`; when training begins ValueError for ``load_best_model_at_end``, which the
    average would overwrite, for schedules in samples or tokens, and for what `prepare_swa` does not take; RuntimeError
    for a second SWACallback. Memory: as `SWA`. With BatchNorm each evaluation of the average costs a pass over the
    training data.
    """

    def __init__(
        self, *, evaluate: str = "both", finalize_options: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        if evaluate not in _CHOICES:
            raise ValueError(f"evaluate needs one of {', '.join(_CHOICES)}, got {evaluate=}; 'both' is the default")
        self.swa: AcceleratedSWA
        self._trainer: Any  # its types do not know that training has prepared model and optimizer
        self._choice = evaluate
        self._options = options
        self._finalize_options = dict(finalize_options or {})
        self._evaluate_trained: Callable[..., dict[str, float]]  # the Trainer's own methods
        self._save_trained: Callable[..., None]
        self._is_evaluating = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if hasattr(self, "_trainer"):
            self._detach()  # from one whose training raised
        self._trainer, checkpoint = _calling_trainer()
        previous = getattr(vars(self._trainer).get("_save_checkpoint"), "__self__", None)
        if isinstance(previous, SWACallback):
            previous._detach()  # one whose training raised, and which then was removed
        callbacks = [one for one in self._trainer.callback_handler.callbacks if isinstance(one, SWACallback)]
        if len(callbacks) > 1:
            raise RuntimeError(
                f"a Trainer needs one SWACallback, got {len(callbacks)}; give one several averages, rule={{name: rule}}"
            )
        if args.load_best_model_at_end:
            raise ValueError(
                "SWACallback needs load_best_model_at_end=False, got True; at the end the average goes into the model"
            )
        length = {"max_duration": f"{state.max_steps}ba", "steps_per_epoch": _steps_per_epoch(args, **kwargs)}
        best = str(args.metric_for_best_model or "")
        if best and (self._choice == "averaged" or best.removeprefix("eval_").startswith("swa_")):
            raise ValueError(
                "SWACallback needs a metric_for_best_model that every evaluation has, got metric_for_best_model="
                f"{best!r} with evaluate={self._choice!r}; take one of trained weights, and evaluate='both'"
            )
        self.swa = prepare_swa(
            self._trainer.accelerator, self._trainer.model_wrapped, self._trainer.optimizer, **(length | self._options)
        )
        # No event comes before an evaluation; on_save comes when older checkpoints are gone, and not on a SIGTERM.
        self._save_trained, self._trainer._save_checkpoint = self._trainer._save_checkpoint, self._save
        if self._choice != "trained":
            self._evaluate_trained, self._trainer.evaluate = self._trainer.evaluate, self._evaluate
        if units := sorted(self.swa.schedule.units & {"sp", "tok"}):
            raise ValueError(f"SWACallback needs a schedule in ep, ba or dur, got {units=}; write '500ba' or '0.7dur'")
        if checkpoint is not None and not self.swa.load(Path(checkpoint, "dist_swa")):
            self.swa.reset(batches=state.global_step, epochs=int(state.epoch or 0))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        state = self._trainer.state
        if state.global_step <= state.max_steps:  # resumed at the end, within an epoch, the Trainer makes one more
            self.swa.step()  # the scheduler has stepped

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.swa.schedule.steps_per_epoch is None:
            self.swa.end_epoch()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._detach()
        self.swa.finalize(self._batches(), **self._finalize_options)

    def _save(self, model: Any, trial: Any) -> None:
        """``Trainer._save_checkpoint``, the average first."""
        self.on_step_end()  # on a signal, which may be heard before ours, it is this step's turn; else nothing is new
        folder = f"checkpoint-{self._trainer.state.global_step}"
        self.swa.save(Path(self._trainer._get_output_dir(trial=trial), folder, "dist_swa"))
        self._save_trained(model, trial)
        self.swa.forget_idle_steps()

    def _evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """``Trainer.evaluate``, or what overrides it, of the weights that were asked for."""

        def evaluate(prefix: str) -> dict[str, float]:
            return self._evaluate_trained(
                eval_dataset=eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=prefix, **kwargs
            )

        if self._is_evaluating or not self.swa.started or self.swa.completed:
            return evaluate(metric_key_prefix)
        self._is_evaluating = True  # of several datasets, each comes back here
        try:
            metrics = evaluate(metric_key_prefix) if self._choice == "both" else {}
            with self.swa.swapped_in():
                recalibrate_batch_norm(self._trainer.model, self._batches(), **self._finalize_options)
                return metrics | evaluate(f"{metric_key_prefix}_swa")
        finally:
            self._is_evaluating = False

    def _batches(self) -> Iterator[Any]:
        loader = self._trainer.get_train_dataloader()  # a new one: that of the run has a place in its epoch
        loaders = self._trainer.accelerator._dataloaders
        loaders[:] = [one for one in loaders if one is not loader]  # accelerate would keep it, with its workers
        yield from loader

    def _detach(self) -> None:
        own = {"evaluate": self._evaluate, "_save_checkpoint": self._save}
        for name in [name for name, method in own.items() if vars(self._trainer).get(name) == method]:
            before = self._evaluate_trained if name == "evaluate" else self._save_trained
            delattr(self._trainer, name)
            if getattr(self._trainer, name) != before:  # it was put there, too
                setattr(self._trainer, name, before)
        if hasattr(self, "swa"):
            self.swa.detach()


def _calling_trainer() -> tuple[Any, str | None]:
    """Return the Trainer that is at work, and the checkpoint that it resumes from; no event tells of either."""
    frame = inspect.currentframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer) and "resume_from_checkpoint" in frame.f_locals:
            return trainer, frame.f_locals["resume_from_checkpoint"]
        frame = frame.f_back
    raise RuntimeError("SWACallback needs to be called by Trainer.train, got another caller; pass it to a Trainer")


def _steps_per_epoch(args: TrainingArguments, train_dataloader: Any, **kwargs: Any) -> int | None:
    """Return the optimizer steps of an epoch, where the loader has a length."""
    try:
        return max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
    except TypeError:
        return None
