"""Weight averaging in Lightning's Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_swa import SWA, recalibrate_batch_norm
from dist_swa.batch_norm.frozen import skipping
from dist_swa.batch_norm.layers import batch_norm_layers
from dist_swa.checkpoint.entries import TRAINED
from dist_swa.integrations.full_state_dict import full_state_dict, load_full_state_dict
from dist_swa.integrations.lightning_steps import StepCounter, callbacks_of, part_done, run_length
from dist_swa.integrations.lightning_weights import (
    KEY,
    ModuleWeights,
    entry_in_folder,
    load_from_folder,
    load_trained,
)
from dist_swa.options import check_finalize_options, check_options_of_trainer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
    )
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise ImportError(
        f"dist_swa.integrations.lightning needs lightning, got {error}; pip install 'dist_swa[lightning]'"
    ) from error

_STEPS_KEY = f"{KEY}_steps"  # of the number of steps that were counted, in a checkpoint


class SWACallback(Callback):
    """Average the weights that a Trainer trains: ``Trainer(callbacks=[SWACallback(swa_start="0.7dur")])``.

    Works with one device, `DDPStrategy`, `FSDPStrategy` and `ModelParallelStrategy`. Every optimizer step that
    ``trainer.global_step`` counts is a step of the schedule. After ``fit`` the model has the averaged weights, and its
    BatchNorm statistics are recalibrated on the training dataloader. The `swa` attribute is the `SWA`, from the start
    of ``fit`` on.

    Checkpoints contain the average, and ``fit(ckpt_path=...)`` resumes it on any number of ranks. All ranks save
    together, as Lightning requires. In a checkpoint folder the average is sharded; a checkpoint in one file costs an
    all-gather of the average, and its memory on the first rank.

    Where validation uses the average, the ``state_dict`` of each checkpoint has it, too, with the same buffers. So
    ``load_from_checkpoint`` and ``test(ckpt_path="best")`` load the model that was monitored. This holds from the first
    update until ``fit`` ends or `swa_end` is reached, also with ``save_weights_only``. The trained values of what was
    averaged are in ``checkpoint["dist_swa"]["trained"]`` (in a folder, beside the sharded average), and
    ``fit(ckpt_path=...)`` goes on from them. Without the callback it would go on from the average. Memory of a save:
    two copies of the trained weights of this rank.

    With `schedule_swa_lr`, each optimizer step from `swa_start` on uses the rate of `SWA`, and not that of a scheduler.

    Args:
        evaluate: the weights that validations and checkpoints have from `swa_start` on: "averaged" or "trained".
        optimizer: the index of the optimizer whose steps are counted, where ``configure_optimizers`` returns several,
            as for a GAN. None: the steps of all of them, as ``trainer.global_step`` does.
        recalibrate_on: batches, such as a DataLoader of its own, on which the BatchNorm statistics are recalibrated
            before each validation of averaged weights. None: validation has the statistics of the last update.
        finalize_options: options of `recalibrate_batch_norm`, for example ``{"forward": function}`` if the module's
            ``forward`` does not take the first element of a batch.
        options: options of `SWA`. `max_duration` and `steps_per_epoch` default to those of the Trainer. If the number
            of steps per epoch is unknown or changes (manual optimization, loaders without a length, a
            GradientAccumulationScheduler), an epoch counts when it ends, and "dur" is the part of the batches that
            ``max_epochs`` allows, or of ``max_steps`` if that is larger.

    Raises what `SWA` raises for its options, and ValueError for a schedule in samples or tokens. When ``fit`` starts,
    raises RuntimeError for a second `SWACallback`, ValueError for any other strategy or an `optimizer` that does not
    exist, and what depends on the model. One callback may be used in several Trainers, one after the other.

    Example:

    >>> import lightning.pytorch as pl
    >>> import torch
    >>> from dist_swa.integrations.lightning import SWACallback
    >>> class Module(pl.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(2, 1)
    ...
    ...     def training_step(self, batch, batch_idx):
    ...         return self.layer(batch).square().mean()
    ...
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> module, callback = Module(), SWACallback(swa_start="0.5dur")
    >>> loader = torch.utils.data.DataLoader(torch.randn(32, 2), batch_size=8)
    >>> options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    >>> options |= {"enable_model_summary": False, "enable_checkpointing": False}
    >>> trainer = pl.Trainer(max_epochs=2, callbacks=[callback], **options)
    >>> trainer.fit(module, loader)  # the module is the average afterwards
    >>> callback.swa.num_averaged
    5
    """

    def __init__(
        self,
        *,
        evaluate: str = "averaged",
        optimizer: int | None = None,
        recalibrate_on: Iterable[Any] | None = None,
        finalize_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if evaluate not in ("averaged", "trained"):
            raise ValueError(f"evaluate needs to be 'averaged' or 'trained', got evaluate={evaluate!r}; choose one")
        if optimizer is not None and (not isinstance(optimizer, int) or isinstance(optimizer, bool) or optimizer < 0):
            raise ValueError(
                f"SWACallback needs the index of an optimizer, got {optimizer=}; 0 is the first that"
                " configure_optimizers returns"
            )
        check_finalize_options(finalize_options or {})
        is_read_again = isinstance(recalibrate_on, Iterable) and not isinstance(recalibrate_on, Iterator)
        if recalibrate_on is not None and not is_read_again:
            raise TypeError(
                f"recalibrate_on needs batches that can be read again, got {recalibrate_on=}; pass a DataLoader or a"
                " list"
            )
        check_options_of_trainer("SWACallback", options)
        self.swa: SWA | None = None
        self._evaluates_average = evaluate == "averaged"
        self._optimizer_index = optimizer
        self._finalize_options = dict(finalize_options or {})
        self._recalibrate_on = recalibrate_on
        self._options = options
        self._num_steps = 0  # that were counted, in all fits of a Trainer
        self._estimates_duration = False
        self._weights: ModuleWeights | None = None
        self._saved: Mapping[str, Any] | Path | None = None  # the average of a checkpoint, or where it is
        self._counter: StepCounter | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if (num_callbacks := sum(isinstance(one, SWACallback) for one in callbacks_of(trainer))) > 1:
            raise RuntimeError(
                f"a Trainer needs one SWACallback, got {num_callbacks=}; pass several averages as rule={{...}} of one"
            )
        supported = (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)
        if not isinstance(trainer.strategy, supported) or isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "SWACallback needs weights that torch itself shards or replicates, got strategy="
                f"{type(trainer.strategy).__name__}; use one of {', '.join(one.__name__ for one in supported)}"
            )
        if stage == "fit":
            self._detach()  # from a fit that raised
            self.swa = self._saved = None
            is_same = self._counter is not None and self._counter.trainer is trainer
            self._num_steps = self._num_steps if is_same and trainer.global_step else 0
            self._weights = ModuleWeights(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._detach()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # the module is meant to have what ``state_dict`` has
            return
        saved = checkpoint.get(KEY, Path(str(trainer.ckpt_path)))
        load_trained(trainer, pl_module, checkpoint, saved)
        self._num_steps = checkpoint.get(_STEPS_KEY, 0)
        # What was saved before training started, as by a LearningRateFinder, says nothing about averages.
        if saved != {} and self.swa is None:
            self._saved = saved  # loaded in on_train_start, after the model is wrapped

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = self._choose_optimizer(trainer.optimizers)
        length = run_length(trainer, pl_module)
        self.swa = SWA(cast(nn.Module, trainer.model), optimizer, **(length | self._options))
        self._check_forward(pl_module, self.swa)
        # The Trainer ends each epoch. A run that is resumed in a validation takes more steps than it says.
        self.swa.schedule.told |= {"epochs"} | ({"max_duration"} - self._options.keys())
        self._estimates_duration = length["steps_per_epoch"] is None and length.keys().isdisjoint(self._options)
        if self._optimizer_index is None:
            self._num_steps = trainer.global_step
        self._estimate_duration(trainer)
        self._start(self.swa, trainer)
        self._counter = StepCounter(trainer, None if self._optimizer_index is None else optimizer)
        if self._evaluates_average:
            cast(ModuleWeights, self._weights).swa = self.swa

    def _choose_optimizer(self, optimizers: list[Optimizer]) -> Optimizer | None:
        """Return the optimizer that is counted, or None where there are several."""
        index, num_optimizers = self._optimizer_index, len(optimizers)
        if index is not None and index >= num_optimizers:
            raise ValueError(
                f"SWACallback needs the index of an optimizer, got optimizer={index} with {num_optimizers=}; 0 is the"
                " first that configure_optimizers returns"
            )
        if index is not None or num_optimizers == 1:
            return optimizers[index or 0]
        if self._options.get("schedule_swa_lr"):
            raise ValueError(
                f"schedule_swa_lr needs one optimizer, got {num_optimizers=}; leave it out and set the rates in the"
                " module, or pass SWACallback(optimizer=0)"
            )
        if num_optimizers > 1:
            rank_zero_info(
                f"SWACallback counts the steps of all {num_optimizers} optimizers, as trainer.global_step does;"
                " SWACallback(optimizer=0) counts those of the first"
            )
        return None

    def _start(self, swa: SWA, trainer: Trainer) -> None:
        """Load the average and the position in the run, or set the position."""
        saved, self._saved = self._saved, None
        position = {"batches": self._num_steps, "epochs": trainer.current_epoch}
        if isinstance(saved, Path) and self._optimizer_index is not None and not self._num_steps:
            del position["batches"]  # of one of several optimizers the Trainer does not know it
        if isinstance(saved, Path) and saved.is_dir():
            load_from_folder({entry_in_folder(trainer): swa}, saved, position=position)
        elif isinstance(saved, Path):
            start = swa.reset_to(position)
            warnings.warn(f"{saved} has no averaging state: averaging starts anew; {start}", stacklevel=2)
        elif saved is not None:
            load_full_state_dict(swa, {key: value for key, value in saved.items() if key != TRAINED})
        else:
            swa.reset(**position)  # a Trainer may have trained before
        self._num_steps = swa.schedule.now.batches

    def _check_forward(self, pl_module: LightningModule, swa: SWA) -> None:
        has_forward = "forward" in self._finalize_options or is_overridden("forward", pl_module)
        if not has_forward and not all(map(swa.average.averages_statistics, batch_norm_layers(pl_module))):
            warnings.warn(
                f"unless all of it is frozen, BatchNorm needs a forward at the end, got {type(pl_module).__name__}"
                ' without one; write it, or pass finalize_options={"forward": lambda module, batch: ...}',
                stacklevel=3,
            )

    def _estimate_duration(self, trainer: Trainer, later: int = 0, num_steps: int = 1) -> None:
        """Estimate the steps of the run, where the Trainer knows batches or the limit of steps only."""
        if self._estimates_duration and self._num_steps and (done := part_done(trainer, later, num_steps)):
            cast(SWA, self.swa).schedule.estimate_duration(self._num_steps, done)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        cast(StepCounter, self._counter).take()  # a save may have made steps that change nothing

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        swa, num_steps = cast(SWA, self.swa), cast(StepCounter, self._counter).take()  # 0 while gradients accumulate
        for later in reversed(range(num_steps)):
            self._num_steps += 1
            self._estimate_duration(trainer, later, num_steps)
            swa.step()
        if swa.schedule.steps_per_epoch is None and trainer.is_last_batch:
            self._estimate_duration(trainer)
            swa.end_epoch()  # before the validation at the end of the epoch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        num_batches = trainer.num_training_batches
        options = {"max_batches": int(num_batches) if math.isfinite(num_batches) else None, **self._finalize_options}
        swa = cast(SWA, self.swa)
        batches = CombinedLoader(trainer.train_dataloader, "max_size_cycle")  # of one loader or several
        with trainer.precision_plugin.forward_context():
            swa.finalize(
                _prepared((batch for batch, _, _ in batches), trainer, pl_module),
                **skipping(swa.average.averages_statistics, options),
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.swa is None and trainer.ckpt_path is not None:  # with no step left Lightning calls neither of these
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        weights = cast(ModuleWeights, self._weights)
        weights.put_in_model(averaged=True)
        if self.swa is not None and weights.are_averaged and self._recalibrate_on is not None:
            options = skipping(self.swa.average.averages_statistics, self._finalize_options)
            with trainer.precision_plugin.forward_context():
                batches = _prepared(self._recalibrate_on, trainer, pl_module)
                recalibrate_batch_norm(cast(nn.Module, trainer.model), batches, **options)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            cast(ModuleWeights, self._weights).put_in_model(averaged=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._weights is not None:
            self._weights.put_in_model(averaged=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        weights, model = checkpoint["state_dict"], self._weights
        checkpoint[_STEPS_KEY] = self._num_steps
        if self.swa is None or model is None:
            if trainer.state.fn == TrainerFn.FITTING:
                checkpoint[KEY] = {}
            return
        # ShardedTensor, which FSDP1 may save, has no public name.
        is_sharded = any(isinstance(value, DTensor) or hasattr(value, "local_shards") for value in weights.values())
        with model.in_model(averaged=False):
            state = self.swa.state_dict() if is_sharded else full_state_dict(self.swa)
            trained = model.trained() if model.are_averaged else {}
        if changed := model.difference(trained, weights):
            state[TRAINED] = changed
        # In a folder, ``state_dict`` is the part that Lightning writes with torch.distributed.checkpoint.
        (weights if is_sharded else checkpoint)[KEY] = state

    def _detach(self) -> None:
        if self._weights is not None:
            self._weights.detach()
        if self._counter is not None:
            self._counter.detach()


def _prepared(batches: Iterable[Any], trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
    """Yield `batches` as ``training_step`` gets them."""
    for batch in batches:
        batch = trainer.precision_plugin.convert_input(batch)
        for owner in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
            if owner is not None:
                batch = owner.on_before_batch_transfer(batch, 0)
        yield trainer.strategy.batch_to_device(batch)
