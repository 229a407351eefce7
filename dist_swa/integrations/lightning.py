"""Weight averaging in Lightning's Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.distributed.tensor import DTensor

from dist_swa import SWA, checkpoint
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

_KEY = "dist_swa"  # of the average in Lightning's checkpoints


class SWACallback(Callback):
    """Averages the weights that a Trainer trains: ``Trainer(callbacks=[SWACallback(swa_start="0.7dur")])``.

    For one device, `DDPStrategy`, `FSDPStrategy` and `ModelParallelStrategy`. Every optimizer step that
    ``trainer.global_step`` counts is a step of the schedule; the average is in the model after ``fit``, with BatchNorm
    recalibrated from the training dataloader. Checkpoints carry the average, sharded where Lightning's are, and
    ``fit(ckpt_path=...)`` resumes it on any number of ranks. Their ``state_dict`` is the trained weights, so of a
    `ModelCheckpoint` that monitors a validation of averages, the best one's average counts. The average is `swa`, from
    the start of ``fit`` on.

    With `schedule_swa_lr`, the phase has the last word on the learning rate: it is set after Lightning has stepped its
    schedulers. (What a ReduceLROnPlateau writes after a validation holds for one step.)

    Args:
        evaluate: the weights that validation sees from `swa_start` on: "averaged" (with the BatchNorm statistics of
            the last update), or "trained".
        finalize_options: of `recalibrate_batch_norm`, as ``{"forward": function}`` where the module's own ``forward``
            does not take the first element of a batch.
        options: of `SWA`; by default every step from `swa_start` to the end counts. `max_duration` is that of the
            Trainer, `steps_per_epoch` follows from its batches; without it (manual optimization, loaders without a
            length, a GradientAccumulationScheduler) epochs count when they end. Schedules in samples and tokens are
            not taken.

    Raises RuntimeError for a second `SWACallback` and ValueError for any other strategy when ``fit`` starts; what
    `SWA` raises. A checkpoint that is saved inside of a validation of averages, as on a signal of SLURM, ends the look
    at them: what is left of that validation sees trained weights, with a warning (but of ``save_weights_only``
    Lightning does not tell: there it is the average that is saved). Every rank saves checkpoints
    together, as Lightning demands; one that is no folder costs an all-gather of the average, and its memory on the
    first rank.
    """

    def __init__(
        self, *, evaluate: str = "averaged", finalize_options: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        if evaluate not in ("averaged", "trained"):
            raise ValueError(f"evaluate needs to be 'averaged' or 'trained', got evaluate={evaluate!r}; choose one")
        self.swa: SWA | None = None
        self._evaluates_average = evaluate == "averaged"
        self._finalize_options = dict(finalize_options or {})
        self._options = {"swa_end": None, "update_interval": "1ba", **options}
        self._swap, self._is_looking = ExitStack(), False
        self._saved: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if (num_callbacks := sum(isinstance(one, SWACallback) for one in _callbacks(trainer))) > 1:
            raise RuntimeError(
                f"a Trainer needs one SWACallback, got {num_callbacks=}; pass several averages as rule={{...}} of one"
            )
        works = (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)
        if not isinstance(trainer.strategy, works) or isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "SWACallback needs weights that torch itself shards or replicates, got strategy="
                f"{type(trainer.strategy).__name__}; use one of {', '.join(one.__name__ for one in works)}"
            )
        if stage == "fit":
            self.swa = self._saved = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get(_KEY)  # the average is built later, when the model is wrapped

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers = trainer.optimizers
        if self._options.get("schedule_swa_lr") and len(optimizers) != 1:
            raise ValueError(
                f"schedule_swa_lr needs one optimizer, got num_optimizers={len(optimizers)}; leave it out and set the"
                " rates in the module"
            )
        model = cast(nn.Module, trainer.model)
        has_norms = any(getattr(module, "running_mean", None) is not None for module in model.modules())
        if has_norms and "forward" not in self._finalize_options and not is_overridden("forward", pl_module):
            warnings.warn(
                f"unless all of it is frozen, BatchNorm needs a forward at the end, got {type(pl_module).__name__}"
                ' without one; write it, or pass finalize_options={"forward": lambda module, batch: ...}',
                stacklevel=2,
            )
        options = _length(trainer, pl_module) | self._options
        self._counts_epochs = options.get("steps_per_epoch") is None
        self.swa = SWA(model, optimizers[0] if len(optimizers) == 1 else None, **options)
        self._num_steps = trainer.global_step
        if trainer.ckpt_path is not None:
            self._resume(self.swa, trainer)
        if self.swa.schedule.now.batches == 0:  # no average was there; the fit may go on all the same
            self.swa.reset(batches=trainer.global_step, epochs=trainer.current_epoch)

    def _resume(self, swa: SWA, trainer: Trainer) -> None:
        path = Path(str(trainer.ckpt_path))
        if path.is_dir():
            part = "model" if isinstance(trainer.strategy, FSDPStrategy) else "state_dict"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* was not written by dist_swa.checkpoint")  # but by Lightning
                checkpoint.load({f"{part}.{_KEY}": swa}, path)
        elif self._saved is not None:
            load_full_state_dict(swa, self._saved)
        else:
            warnings.warn(f"{path} has no averaging state: averaging starts anew", stacklevel=2)
        self._saved = None

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        swa = cast(SWA, self.swa)
        for _ in range(trainer.global_step - self._num_steps):  # none while gradients accumulate
            swa.step()
        self._num_steps = trainer.global_step
        if self._counts_epochs and trainer.is_last_batch:
            swa.end_epoch()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.swa is None and trainer.ckpt_path is not None:  # nothing was left to train, so nothing has started
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        num_batches = trainer.num_training_batches
        options = {"max_batches": int(num_batches) if math.isfinite(num_batches) else None, **self._finalize_options}
        with trainer.precision_plugin.forward_context():
            cast(SWA, self.swa).finalize(_batches(trainer), **options)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        swa = self.swa if trainer.state.fn == TrainerFn.FITTING else None  # None: before the first step, too
        if swa is not None and self._evaluates_average and swa.started and not swa.completed:
            self._swap.enter_context(swa.swapped_in())
            self._swap.callback(setattr, self, "_is_looking", False)
            self._is_looking = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap.close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.swa is None:
            return
        if self._is_looking:  # as on a signal of SLURM; the rest of the validation sees trained weights
            warnings.warn("a checkpoint inside of a validation of averages ends the look at them", stacklevel=2)
            self._swap.close()
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        weights = checkpoint["state_dict"]
        if any(isinstance(value, DTensor) or hasattr(value, "local_shards") for value in weights.values()):
            weights[_KEY] = self.swa.state_dict()  # Lightning writes this part by DCP, every rank its shards
        else:
            checkpoint[_KEY] = full_state_dict(self.swa)


def _length(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return `max_duration` and, where it is known and the same in every epoch, `steps_per_epoch`."""
    num_batches, max_epochs, max_steps = trainer.num_training_batches, trainer.max_epochs or -1, trainer.max_steps
    has_equal_epochs = not any(isinstance(one, GradientAccumulationScheduler) for one in _callbacks(trainer))
    steps_per_epoch = None
    if pl_module.automatic_optimization and has_equal_epochs and math.isfinite(num_batches):
        steps_per_epoch = math.ceil(num_batches / trainer.accumulate_grad_batches)
    if steps_per_epoch and max_epochs > 0 and max_steps > 0:
        max_steps = min(max_steps, steps_per_epoch * max_epochs)
    durations = [f"{max_steps}ba"] * (max_steps > 0) + [f"{max_epochs}ep"] * (max_epochs > 0) + [None]
    return {"max_duration": durations[0], "steps_per_epoch": steps_per_epoch}


def _batches(trainer: Trainer) -> Iterator[Any]:
    """Yield the training batches as the module gets them."""
    for batch, _, _ in CombinedLoader(trainer.train_dataloader, "max_size_cycle"):  # of one loader or several
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]
