"""The optimizer steps of a Lightning Trainer: how many a run has, and how many it has made."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from torch.optim import Optimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
except ImportError as error:
    raise ImportError(
        f"dist_swa.integrations.lightning needs lightning, got {error}; pip install 'dist_swa[lightning]'"
    ) from error


class StepCounter:
    """Counts the steps of `optimizer`, or of all optimizers of `trainer` if it is None."""

    def __init__(self, trainer: Trainer, optimizer: Optimizer | None) -> None:
        self.trainer, self._steps, self._taken = trainer, 0, trainer.global_step
        self._hook = None
        if optimizer is not None:
            self._taken = 0
            self._hook = optimizer.register_step_post_hook(self._note_step)

    def take(self) -> int:
        """Return the number of steps since the last call."""
        steps = self.trainer.global_step if self._hook is None else self._steps
        taken, self._taken = self._taken, steps
        return steps - taken

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _note_step(self, *args: Any) -> None:
        self._steps += 1


def run_length(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return `max_duration`, and `steps_per_epoch` if it is known and the same for all epochs."""
    num_batches, max_epochs = trainer.num_training_batches, trainer.max_epochs or -1
    num_steps: float = trainer.max_steps
    steps_per_epoch = None
    accumulation_changes = any(isinstance(one, GradientAccumulationScheduler) for one in callbacks_of(trainer))
    if pl_module.automatic_optimization and not accumulation_changes and math.isfinite(num_batches):
        steps_per_epoch = math.ceil(num_batches / trainer.accumulate_grad_batches)
        num_steps = trainer.estimated_stepping_batches
    max_duration = None
    if 0 < num_steps < math.inf:
        max_duration = f"{num_steps}ba"
    elif max_epochs > 0:
        max_duration = f"{max_epochs}ep"
    return {"max_duration": max_duration, "steps_per_epoch": steps_per_epoch}


def part_done(trainer: Trainer, later: int = 0, num_steps: int = 1) -> Fraction:
    """Return the part of the run that is done, by its batches or by ``max_steps``, or 0 where it has no end.

    `later` of the `num_steps` of this batch do not count.
    """
    num_batches = trainer.num_training_batches * max(0, trainer.max_epochs or 0)
    done = Fraction(0)
    if trainer.max_steps > 0:
        done = Fraction(max(0, trainer.global_step - later), trainer.max_steps)
    if 0 < num_batches < math.inf:
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1 - Fraction(later, num_steps)
        done = max(done, batches / int(num_batches))
    return done


def callbacks_of(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]
