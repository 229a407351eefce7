"""The learning-rate phase of SWA: anneal the rate of each param group from its value at `swa_start` to `swa_lr`."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

ANNEAL_STRATEGIES = {"linear": "linear", "lin": "linear", "cosine": "cosine", "cos": "cosine"}


def check_phase(swa_lr: float | None, anneal_strategy: str, anneal_steps: int) -> None:
    """Raise TypeError or ValueError unless the arguments describe a learning-rate phase."""
    if swa_lr is not None and (not isinstance(swa_lr, Real) or isinstance(swa_lr, bool)):
        raise TypeError(f"swa_lr needs a number, got swa_lr={swa_lr!r}; pass a float")
    if swa_lr is not None and not (math.isfinite(swa_lr) and swa_lr >= 0):
        raise ValueError(f"swa_lr needs a finite number >= 0, got swa_lr={swa_lr}; None holds the rate of swa_start")
    if anneal_strategy not in list(ANNEAL_STRATEGIES):
        raise ValueError(
            f"anneal_strategy needs one of {', '.join(ANNEAL_STRATEGIES)}, got anneal_strategy={anneal_strategy!r}"
            "; choose one"
        )
    if not isinstance(anneal_steps, int) or isinstance(anneal_steps, bool):
        raise TypeError(f"anneal_steps needs a whole number, got anneal_steps={anneal_steps!r}; 10 is the default")
    if anneal_steps < 1:
        raise ValueError(f"anneal_steps needs a whole number >= 1, got anneal_steps={anneal_steps}; 10 is the default")


def phase_lr(lr: float, swa_lr: float | None, anneal_strategy: str, fraction: float) -> float:
    """Return the rate of a param group after `fraction` of the annealing, which ends at 1.

    `lr` is the rate of the group at `swa_start`. ``swa_lr=None`` keeps it.
    """
    if swa_lr is None:
        return lr
    if fraction >= 1:
        return swa_lr
    if ANNEAL_STRATEGIES[anneal_strategy] == "cosine":
        fraction = (1 - math.cos(math.pi * fraction)) / 2
    return lr + (swa_lr - lr) * fraction


class LRPhase:
    """The learning-rate phase of one optimizer. It knows the rates of `swa_start`, and sets those of the phase.

    Without `is_scheduled` it only knows the rates, for a run that is resumed with a phase.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None,
        is_scheduled: bool,
        swa_lr: float | None,
        anneal_strategy: str,
        anneal_steps: int,
    ) -> None:
        if optimizer is not None and not hasattr(optimizer, "param_groups"):
            raise TypeError(
                f"SWA needs a torch optimizer, got optimizer={optimizer!r}; pass the one that steps the model"
            )
        check_phase(swa_lr, anneal_strategy, anneal_steps)
        if swa_lr is not None and not is_scheduled:
            raise ValueError(f"swa_lr needs schedule_swa_lr=True, got swa_lr={swa_lr}; set it, or leave swa_lr out")
        if is_scheduled and optimizer is None:
            raise ValueError("schedule_swa_lr needs an optimizer, got optimizer=None; pass the optimizer")
        self._optimizer = optimizer
        self._is_scheduled = is_scheduled
        self._swa_lr = swa_lr
        self._anneal = (anneal_strategy, anneal_steps)
        self.start_lrs: list[float] = []  # of each param group at `swa_start`; empty before

    def check_groups(self) -> None:
        """Raise RuntimeError unless the optimizer has as many param groups as at `swa_start`."""
        if self._optimizer is not None and self.start_lrs and len(self.start_lrs) != len(self._optimizer.param_groups):
            raise RuntimeError(
                f"the learning-rate phase needs the {len(self.start_lrs)} param groups of swa_start, got"
                f" num_groups={len(self._optimizer.param_groups)}; add groups before swa_start"
            )

    def write(self, num_averaged: int) -> None:
        """Set the rates after `num_averaged` updates. The first call takes those of the optimizer as `start_lrs`."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        self.start_lrs = self.start_lrs or [float(group["lr"]) for group in groups]
        if not self._is_scheduled:
            return
        strategy, steps = self._anneal
        for group, start_lr in zip(groups, self.start_lrs, strict=True):
            lr = phase_lr(start_lr, self._swa_lr, strategy, num_averaged / steps)
            if isinstance(group["lr"], Tensor):  # of a capturable or compiled optimizer
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def saved_lrs(self) -> list[float]:
        """Return the rates at `swa_start` for a checkpoint: NaN before `swa_start`, none without an optimizer."""
        num_groups = 0 if self._optimizer is None else len(self._optimizer.param_groups)
        return self.start_lrs or [math.nan] * num_groups

    def checked(self, saved_lrs: list[float]) -> list[float]:
        """Return the rates of a checkpoint for this optimizer; ValueError for another number of param groups."""
        if self._optimizer is None:
            return []
        num_groups = len(self._optimizer.param_groups)
        if len(saved_lrs) != num_groups:
            raise ValueError(
                f"load_state_dict needs the {len(saved_lrs)} param groups of the checkpoint, got {num_groups=}; build"
                " the optimizer as it was"
            )
        return saved_lrs
