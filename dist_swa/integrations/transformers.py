"""Hugging Face Trainer: average the weights during training, evaluate the average, and end with it in the model."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dist_swa.integrations.transformers needs transformers, got no {error.name}; pip install"
        " 'dist_swa[transformers]'",
        name=error.name,
    ) from error

from dist_swa.batch_norm.frozen import skipping
from dist_swa.integrations.accelerate import AcceleratedSWA, prepare_swa
from dist_swa.integrations.trainer_metrics import Names, Recorded, is_of_average, merged, recorded
from dist_swa.integrations.trainer_options import check_trainer, existing

_FOLDER = "dist_swa"  # inside checkpoint-N


class SWAMixin(Trainer):
    """A `Trainer` that averages the weights it trains: ``class MyTrainer(SWAMixin, Trainer)``.

    It runs in one process, under DDP and under FSDP2. By default every optimizer step from `swa_start` on is averaged;
    the Trainer gives the length of the run and of an epoch. Each checkpoint contains the average, in
    ``checkpoint-N/dist_swa``, and ``train(resume_from_checkpoint=...)`` loads it on any number of ranks. If it is
    missing, one warning says so, and the schedule starts at the step of the checkpoint. When training ends, the average
    replaces the weights of the model, with BatchNorm statistics recalibrated on the training data, so that
    ``save_model`` saves the average. ``on_train_end`` of all callbacks comes after that.

    With ``load_best_model_at_end`` the model ends as the best checkpoint was evaluated. For a `metric_for_best_model`
    of the average, such as "swa_loss", it gets the average in that checkpoint, with the statistics that were evaluated,
    or its trained weights if no model was averaged by then. For a metric of the trained weights it gets these. If the
    average of the best checkpoint is missing, the model gets that of the last step, with a warning.

    `swa` is the `SWA` of the last call of `train`. It has the average that went into the model; for a best model with
    trained weights, the average of the last step.

    Args:
        swa_options: the arguments of `add_swa`, as a dict. All other arguments go to `Trainer`.

    Raises what `add_swa` raises. When training begins, raises what `prepare_swa` raises.

    Example:

    >>> import torch
    >>> from transformers import Trainer, TrainingArguments
    >>> from dist_swa.integrations.transformers import SWAMixin
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(2, 1)
    ...
    ...     def forward(self, x, labels):
    ...         return {"loss": (self.layer(x) - labels).square().mean()}
    >>> data = [{"x": torch.randn(2), "labels": torch.ones(1)} for _ in range(32)]
    >>> arguments = TrainingArguments("run", max_steps=4, use_cpu=True, report_to="none")
    >>> class MyTrainer(SWAMixin, Trainer):
    ...     pass
    >>> options = {"swa_start": "0.5dur"}
    >>> trainer = MyTrainer(Model(), arguments, train_dataset=data, swa_options=options)
    >>> _ = trainer.train()
    {...
    >>> trainer.swa.num_averaged
    3
    """

    swa: AcceleratedSWA
    _swa_checkpoint: str | None = None
    _swa_is_evaluating = False
    # Whose metrics those of the model are outside of training; None while the model trains.
    _swa_metrics_of_model: str | None = "both"

    def __init__(self, *args: Any, swa_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up_swa(**(swa_options or {}))

    def _set_up_swa(
        self, *, evaluate: str = "both", finalize_options: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        finalize_options = {} if finalize_options is None else finalize_options
        check_trainer(self, evaluate, finalize_options, options)
        self._swa_evaluate, self._swa_options, self._swa_finalize_options = evaluate, options, finalize_options
        # First in the list, because other callbacks may save a checkpoint after a step, or the model after the last.
        self.callback_handler.callbacks.insert(0, _SWAEvents(self))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """Evaluate the trained weights, the averaged weights, or both. Metrics of the average are ``eval_swa_*``.

        All metrics are in one log entry and one ``on_evaluate`` event, for each dataset. Where the averaged weights are
        those of the model, before the first update and outside of training, one pass gives both metrics.
        """
        evaluate = functools.partial(super().evaluate, eval_dataset=eval_dataset, ignore_keys=ignore_keys, **kwargs)
        if self._swa_is_evaluating:  # with several datasets, Trainer.evaluate calls this method for each of them
            return evaluate(metric_key_prefix=metric_key_prefix)
        metrics: dict[str, float] = {}
        passes: list[Recorded] = []
        self._swa_is_evaluating = True
        try:
            for uses_average, weights in self._swa_passes():
                names = Names(metric_key_prefix, weights)
                average = self._swa_swapped_in() if uses_average else nullcontext()
                with average, recorded(self, names) as found:
                    metrics |= names.apply(evaluate(metric_key_prefix=names.prefix_of_pass))
                passes.append(found)
        finally:
            self._swa_is_evaluating = False
        for logs in merged([one.on_log for one in passes]):
            Trainer.log(self, logs)  # an override of `log` was called in each pass
        for of_event in merged([one.on_evaluate for one in passes]):
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, of_event)
        return metrics

    def _swa_passes(self) -> list[tuple[bool, str]]:
        """Return for each pass of an evaluation whether the average is swapped in, and whose metrics it gives."""
        of_model = "trained" if self._swa_evaluate == "trained" else self._swa_metrics_of_model
        if of_model is not None:
            return [(False, of_model)]
        has_average = self.swa.num_averaged > 0
        if self._swa_evaluate == "averaged":
            return [(has_average, "averaged")]
        return [(False, "trained"), (True, "averaged")] if has_average else [(False, "both")]

    @contextmanager
    def _swa_swapped_in(self) -> Iterator[None]:
        with self.swa.swapped_in():
            self.swa.recalibrate(self._swa_batches(), **self._swa_recalibration_options())
            yield

    def _swa_end(self) -> None:
        """Give the model its final weights. The Trainer may have loaded the trained weights of the best checkpoint."""
        swa, options = self.swa, self._swa_recalibration_options()
        swa.detach()
        takes_best = self.args.load_best_model_at_end and swa.num_averaged > 0
        best = None if self.state.best_model_checkpoint is None else Path(self.state.best_model_checkpoint)
        if takes_best and not is_of_average(str(self.args.metric_for_best_model)) and existing(best):
            self._swa_metrics_of_model = "trained"
            return
        has_best = takes_best and swa.load_existing(best and best / _FOLDER)
        if has_best:
            options = {"skip": lambda layer: True}  # the statistics were evaluated, and stay
        elif takes_best:
            warnings.warn(
                "load_best_model_at_end needs the best checkpoint, with the average that was scored, got"
                f" best_model_checkpoint={self.state.best_model_checkpoint!r}; the model gets the average of the last"
                " step",
                stacklevel=2,
            )
        if swa.num_averaged or not has_best:  # the best checkpoint may be older than the first update
            swa.finalize(self._swa_batches(), **options)
        self._swa_metrics_of_model = "trained" if swa.num_averaged and not swa.completed else "both"

    def _swa_recalibration_options(self) -> dict[str, Any]:
        return skipping(self.swa.average.averages_statistics, self._swa_finalize_options)

    # Private, because train() resolves resume_from_checkpoint=True, and an override of train() may choose another one.
    def _inner_training_loop(
        self, batch_size: Any = None, args: Any = None, resume_from_checkpoint: Any = None, *more: Any, **kwargs: Any
    ) -> Any:
        self._swa_checkpoint = resume_from_checkpoint
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, *more, **kwargs)

    # Private, because on_save comes after older checkpoints were deleted, and does not come on SIGTERM.
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_folder = self._get_output_dir(trial)  # private: the only place that knows the folder of a trial
        self.swa.save(Path(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", _FOLDER))
        super()._save_checkpoint(model, trial)
        self.swa.discard_zero_lr_steps()

    def _swa_batches(self) -> Iterator[Any]:
        """Yield the training data. A new loader, because the one of the run has a position in its epoch."""
        loader = self.get_train_dataloader()
        loaders = self.accelerator._dataloaders  # private: no public call removes one loader, with its workers
        loaders[:] = [one for one in loaders if one is not loader]
        yield from loader


def add_swa(
    trainer: Trainer, *, evaluate: str = "both", finalize_options: Mapping[str, Any] | None = None, **options: Any
) -> SWAMixin:
    """Make `trainer` average the weights it trains, and return it. Its class becomes one with `SWAMixin`.

    Call it before ``trainer.train()``, on every rank, with the same arguments.

    Args:
        evaluate: what ``trainer.evaluate`` evaluates during training: "averaged" weights, with metrics ``eval_swa_*``,
            "trained" weights, or "both". `metric_for_best_model`, as early stopping and ReduceLROnPlateau use it, may
            be any of these metrics. Before the first update, the metrics of the average are those of the trained
            weights.
        finalize_options: arguments of `recalibrate_batch_norm`, as ``{"forward": lambda module, batch: ...}`` for a
            Trainer with its own ``compute_loss``.
        options: arguments of `prepare_swa`, as `swa_start`, `rule`, `num_processes`.

    Raises TypeError if `trainer` is no Trainer, RuntimeError if it has an average already or has trained. Raises
    TypeError or ValueError for options that no model fits, for a `metric_for_best_model` that `evaluate` never gives,
    for schedules in samples or tokens, and for methods that were replaced on the trainer itself. When training begins,
    raises what `prepare_swa` raises. Memory: as `SWA`. With BatchNorm, each evaluation of the average runs forwards
    over the training data.

    Example:

    >>> import torch
    >>> from transformers import Trainer, TrainingArguments
    >>> from dist_swa.integrations.transformers import add_swa
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(2, 1)
    ...
    ...     def forward(self, x, labels):
    ...         return {"loss": (self.layer(x) - labels).square().mean()}
    >>> data = [{"x": torch.randn(2), "labels": torch.ones(1)} for _ in range(32)]
    >>> arguments = TrainingArguments("run", max_steps=4, use_cpu=True, report_to="none")
    >>> trainer = add_swa(Trainer(Model(), arguments, train_dataset=data), swa_start="0.5dur")
    >>> _ = trainer.train()
    {...
    >>> trainer.save_model("averaged")  # the model is the average now
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"add_swa needs a transformers.Trainer, got {trainer=}; use prepare_swa or SWA in other loops")
    if isinstance(trainer, SWAMixin):
        raise RuntimeError(
            f"add_swa needs a Trainer without an average, got a {type(trainer).__name__}; for several averages pass"
            " rule={name: rule}"
        )
    if trainer.is_in_train or trainer.state.global_step:
        raise RuntimeError(
            f"add_swa needs a Trainer before train(), got is_in_train={trainer.is_in_train} at"
            f" global_step={trainer.state.global_step}; call it first"
        )
    with_swa = cast(SWAMixin, trainer)
    SWAMixin._set_up_swa(with_swa, evaluate=evaluate, finalize_options=finalize_options, **options)
    with_swa.__class__ = _class_with_swa(type(trainer))
    return with_swa


def _class_with_swa(cls: type[Trainer]) -> type[SWAMixin]:
    def reduce(self: Trainer, protocol: Any) -> Any:  # pickle does not find a class that was made at run time
        return _new_with_swa, (cls,), vars(self)

    return type(f"SWA{cls.__name__}", (SWAMixin, cls), {"__reduce_ex__": reduce})


def _new_with_swa(cls: type[Trainer]) -> SWAMixin:
    with_swa = _class_with_swa(cls)
    return with_swa.__new__(with_swa)


class _SWAEvents(TrainerCallback):
    """Build the average when training begins, count steps, and finalize when training ends."""

    def __init__(self, trainer: SWAMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        trainer = self.trainer
        if hasattr(trainer, "swa"):
            trainer.swa.detach()  # from a training that raised
            del trainer.swa  # frees its memory
            trainer._swa_metrics_of_model = "both"
        check_trainer(trainer, trainer._swa_evaluate, trainer._swa_finalize_options, trainer._swa_options)
        length: dict[str, Any] = {"max_duration": f"{state.max_steps}ba"}
        if has_length(train_dataloader):
            num_batches = len(train_dataloader)
            length["steps_per_epoch"] = max(1, math.ceil(num_batches / args.gradient_accumulation_steps))
        options = length | trainer._swa_options
        trainer.swa = swa = prepare_swa(trainer.accelerator, trainer.model_wrapped, optimizer, **options)
        trainer._swa_metrics_of_model = None
        swa.schedule.told.add("epochs")  # they are counted where they end
        if trainer._swa_checkpoint is not None:
            position = {"batches": state.global_step, "epochs": int(state.epoch or 0)}
            swa.load(Path(trainer._swa_checkpoint, _FOLDER), position)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step <= state.max_steps:  # resumed at its last step within an epoch, a Trainer makes one more
            self.trainer.swa.step()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.swa.schedule.steps_per_epoch is None:
            self.trainer.swa.end_epoch()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._swa_end()
