"""Weight averaging in Lightning's Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.distributed.tensor import DTensor

from dist_swa import SWA, checkpoint
from dist_swa.batch_norm.frozen import skipping
from dist_swa.batch_norm.layers import batch_norm_layers
from dist_swa.integrations.full_state_dict import full_state_dict, load_full_state_dict

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
    )
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities import CombinedLoader
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise ImportError(
        f"dist_swa.integrations.lightning needs lightning, got {error}; pip install 'dist_swa[lightning]'"
    ) from error

_KEY = "dist_swa"  # of the average in a checkpoint


class SWACallback(Callback):
    """Average the weights that a Trainer trains: ``Trainer(callbacks=[SWACallback(swa_start="0.7dur")])``.

    Works with one device, `DDPStrategy`, `FSDPStrategy` and `ModelParallelStrategy`. Every optimizer step that
    ``trainer.global_step`` counts is a step of the schedule. After ``fit`` the model has the averaged weights, and its
    BatchNorm statistics are recalibrated on the training dataloader. The `swa` attribute is the `SWA`, from the start
    of ``fit`` on.

    Checkpoints contain the average, and ``fit(ckpt_path=...)`` resumes it on any number of ranks. All ranks save
    together, as Lightning requires. In a checkpoint folder the average is sharded; a checkpoint in one file costs an
    all-gather of the average, and its memory on the first rank. The ``state_dict`` of a checkpoint has the trained
    weights: if a `ModelCheckpoint` monitors a validation of averaged weights, use the average of its best checkpoint.

    A checkpoint that is saved during a validation of averaged weights, for example on a signal from SLURM, ends their
    evaluation: the rest of that validation uses the trained weights, with a warning. With ``save_weights_only`` such a
    checkpoint has the averaged weights, because Lightning does not call the callback.

    With `schedule_swa_lr`, each optimizer step from `swa_start` on uses the rate of `SWA`, and not that of a scheduler.

    Args:
        evaluate: the weights that validation uses from `swa_start` on: "averaged" (with the BatchNorm statistics of
            the last update) or "trained".
        finalize_options: options of `recalibrate_batch_norm`, for example ``{"forward": function}`` if the module's
            ``forward`` does not take the first element of a batch.
        options: options of `SWA`. `max_duration` and `steps_per_epoch` default to those of the Trainer. If the number
            of steps per epoch is unknown or changes (manual optimization, loaders without a length, a
            GradientAccumulationScheduler), an epoch counts when it ends, and "dur" is the part of the batches that
            ``max_epochs`` allows, or of ``max_steps`` if that is larger. Schedules in samples or tokens raise.

    When ``fit`` starts, raises RuntimeError for a second `SWACallback`, ValueError for any other strategy, and what
    `SWA` raises.

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
        self, *, evaluate: str = "averaged", finalize_options: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        if evaluate not in ("averaged", "trained"):
            raise ValueError(f"evaluate needs to be 'averaged' or 'trained', got evaluate={evaluate!r}; choose one")
        self.swa: SWA | None = None
        self._evaluates_average = evaluate == "averaged"
        self._finalize_options = dict(finalize_options or {})
        self._options = options
        self._num_steps = 0
        self._estimates_duration = False
        self._swap, self._is_swapped_in = ExitStack(), False
        self._saved: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if (num_callbacks := sum(isinstance(one, SWACallback) for one in _callbacks(trainer))) > 1:
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
            self.swa = self._saved = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get(_KEY)  # loaded in on_train_start, after the model is wrapped

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model, optimizers = cast(nn.Module, trainer.model), trainer.optimizers
        if self._options.get("schedule_swa_lr") and len(optimizers) != 1:
            raise ValueError(
                f"schedule_swa_lr needs one optimizer, got num_optimizers={len(optimizers)}; leave it out and set the"
                " rates in the module"
            )
        optimizer = optimizers[0] if len(optimizers) == 1 else None
        length = _run_length(trainer, pl_module)
        self.swa = SWA(model, optimizer, **(length | self._options))
        self._check_forward(pl_module, self.swa)
        # The Trainer ends each epoch. A run that is resumed in a validation takes more steps than it says.
        self.swa.schedule.told |= {"epochs"} | ({"max_duration"} - self._options.keys())
        self._estimates_duration = length["steps_per_epoch"] is None and length.keys().isdisjoint(self._options)
        self._estimate_duration(trainer)
        self._num_steps = trainer.global_step
        position = {"batches": trainer.global_step, "epochs": trainer.current_epoch}
        if trainer.ckpt_path is None:
            self.swa.reset(**position)  # a Trainer may have trained before
        else:
            self._resume(self.swa, Path(str(trainer.ckpt_path)), trainer, position)

    def _check_forward(self, pl_module: LightningModule, swa: SWA) -> None:
        has_forward = "forward" in self._finalize_options or is_overridden("forward", pl_module)
        if not has_forward and not all(map(swa.average.averages_statistics, batch_norm_layers(pl_module))):
            warnings.warn(
                f"unless all of it is frozen, BatchNorm needs a forward at the end, got {type(pl_module).__name__}"
                ' without one; write it, or pass finalize_options={"forward": lambda module, batch: ...}',
                stacklevel=3,
            )

    def _resume(self, swa: SWA, path: Path, trainer: Trainer, position: Mapping[str, int]) -> None:
        if path.is_dir():
            part = "model" if isinstance(trainer.strategy, FSDPStrategy) else "state_dict"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* was not written by dist_swa.checkpoint")  # Lightning wrote it
                checkpoint.load({f"{part}.{_KEY}": swa}, path, position=position)
        elif self._saved is not None:
            load_full_state_dict(swa, self._saved)
        else:
            start = swa.reset_to(position)
            warnings.warn(f"{path} has no averaging state: averaging starts anew; {start}", stacklevel=2)
        self._saved = None

    def _estimate_duration(self, trainer: Trainer, later: int = 0, num_steps: int = 1) -> None:
        """Estimate the steps of the run, where the Trainer knows batches or the limit of steps only.

        The estimate holds for the step before the `later` last ones of the `num_steps` of this batch.
        """
        step = trainer.global_step - later
        num_batches = trainer.num_training_batches * max(0, trainer.max_epochs or 0)
        if not self._estimates_duration or step == 0:
            return
        done = Fraction(max(0, step), trainer.max_steps) if trainer.max_steps > 0 else Fraction(0)
        if 0 < num_batches < math.inf:
            batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1 - Fraction(later, num_steps)
            done = max(done, batches / int(num_batches))
        if done > 0:
            cast(SWA, self.swa).schedule.estimate_duration(step, done)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        swa = cast(SWA, self.swa)
        num_steps = trainer.global_step - self._num_steps  # 0 while gradients accumulate
        for later in reversed(range(num_steps)):
            self._estimate_duration(trainer, later, num_steps)
            swa.step()
        self._num_steps = trainer.global_step
        if swa.schedule.steps_per_epoch is None and trainer.is_last_batch:
            self._estimate_duration(trainer)
            swa.end_epoch()  # before the validation at the end of the epoch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        num_batches = trainer.num_training_batches
        options = {"max_batches": int(num_batches) if math.isfinite(num_batches) else None, **self._finalize_options}
        swa = cast(SWA, self.swa)
        with trainer.precision_plugin.forward_context():
            swa.finalize(_batches(trainer, pl_module), **skipping(swa.average.averages_statistics, options))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.swa is None and trainer.ckpt_path is not None:  # with no step left Lightning calls neither of these
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        swa = self.swa if trainer.state.fn == TrainerFn.FITTING else None
        if swa is not None and self._evaluates_average and swa.started and not swa.completed:
            self._swap.enter_context(swa.swapped_in())
            self._is_swapped_in = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap_out()

    def _swap_out(self) -> None:
        self._swap.close()
        self._is_swapped_in = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.swa is None:
            return
        if self._is_swapped_in:
            warnings.warn(
                "a checkpoint during a validation of averaged weights ends their evaluation: the rest of it uses the"
                " trained weights",
                stacklevel=2,
            )
            self._swap_out()
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        weights = checkpoint["state_dict"]
        # ShardedTensor, which FSDP1 may save, has no public name.
        if any(isinstance(value, DTensor) or hasattr(value, "local_shards") for value in weights.values()):
            weights[_KEY] = self.swa.state_dict()  # the part that Lightning writes with torch.distributed.checkpoint
        else:
            checkpoint[_KEY] = full_state_dict(self.swa)


def _run_length(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return `max_duration`, and `steps_per_epoch` if it is known and the same for all epochs."""
    num_batches, max_epochs = trainer.num_training_batches, trainer.max_epochs or -1
    num_steps: float = trainer.max_steps
    steps_per_epoch = None
    accumulation_changes = any(isinstance(one, GradientAccumulationScheduler) for one in _callbacks(trainer))
    if pl_module.automatic_optimization and not accumulation_changes and math.isfinite(num_batches):
        steps_per_epoch = math.ceil(num_batches / trainer.accumulate_grad_batches)
        num_steps = trainer.estimated_stepping_batches
    max_duration = None
    if 0 < num_steps < math.inf:
        max_duration = f"{num_steps}ba"
    elif max_epochs > 0:
        max_duration = f"{max_epochs}ep"
    return {"max_duration": max_duration, "steps_per_epoch": steps_per_epoch}


def _batches(trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
    """Yield the training batches as ``training_step`` gets them."""
    for batch, _, _ in CombinedLoader(trainer.train_dataloader, "max_size_cycle"):  # of one loader or several
        batch = trainer.precision_plugin.convert_input(batch)
        for owner in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
            if owner is not None:
                batch = owner.on_before_batch_transfer(batch, 0)
        yield trainer.strategy.batch_to_device(batch)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]
