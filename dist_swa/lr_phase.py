"""The learning-rate phase of SWA: anneal the rate of each param group from its value at `swa_start` to `swa_lr`."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

ANNEAL_STRATEGIES = {"linear": "linear", "lin": "linear", "cosine": "cosine", "cos": "cosine"}


SwaLr: TypeAlias = float | Sequence[float] | None
"""One rate for all param groups, or one for each. None keeps the rates of `swa_start`."""


def check_phase(is_scheduled: bool, swa_lr: SwaLr, anneal_strategy: str, anneal_steps: int) -> None:
    """Raise TypeError or ValueError unless the arguments describe a learning-rate phase, or none."""
    for lr in swa_lr if isinstance(swa_lr, Sequence) else [] if swa_lr is None else [swa_lr]:
        if not isinstance(lr, Real) or isinstance(lr, bool):
            raise TypeError(f"swa_lr needs a number, got swa_lr={swa_lr!r}; pass a float, or one for each param group")
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(
                f"swa_lr needs a finite number >= 0, got swa_lr={swa_lr}; None holds the rate of swa_start"
            )
    if anneal_strategy not in list(ANNEAL_STRATEGIES):
        raise ValueError(
            f"anneal_strategy needs one of {', '.join(ANNEAL_STRATEGIES)}, got anneal_strategy={anneal_strategy!r}"
            "; choose one"
        )
    if not isinstance(anneal_steps, int) or isinstance(anneal_steps, bool):
        raise TypeError(f"anneal_steps needs a whole number, got anneal_steps={anneal_steps!r}; 10 is the default")
    if anneal_steps < 1:
        raise ValueError(f"anneal_steps needs a whole number >= 1, got anneal_steps={anneal_steps}; 10 is the default")
    if swa_lr is not None and not is_scheduled:
        raise ValueError(f"swa_lr needs schedule_swa_lr=True, got swa_lr={swa_lr}; set it, or leave swa_lr out")


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

    The rates are set after each update, so that logs show them. A step pre-hook of the optimizer sets them again, which
    overrides a scheduler. Without `is_scheduled` the object only knows the rates of `swa_start`, for a run that is
    resumed with a phase.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None,
        is_scheduled: bool,
        swa_lr: SwaLr,
        anneal_strategy: str,
        anneal_steps: int,
    ) -> None:
        needed = ("param_groups", "register_step_pre_hook")
        if optimizer is not None and not all(hasattr(optimizer, name) for name in needed):
            raise TypeError(
                f"SWA needs a torch optimizer, got optimizer={optimizer!r}; pass the one that steps the model"
            )
        check_phase(is_scheduled, swa_lr, anneal_strategy, anneal_steps)
        if is_scheduled and optimizer is None:
            raise ValueError("schedule_swa_lr needs an optimizer, got optimizer=None; pass the optimizer")
        self._optimizer = optimizer
        if isinstance(swa_lr, Sequence) and len(swa_lr) != len(self._groups):
            raise ValueError(
                f"swa_lr needs a rate for each of {len(self._groups)} param groups, got swa_lr={swa_lr}; pass as many"
            )
        self._is_scheduled = is_scheduled
        self._swa_lr = swa_lr
        self._anneal = (anneal_strategy, anneal_steps)
        self._rates: list[float] = []  # of the phase, now; empty outside of it
        self.start_lrs: list[float] = []  # of each param group at `swa_start`; empty before
        if is_scheduled and optimizer is not None:
            optimizer.register_step_pre_hook(_pre_step_hook(weakref.ref(self)))

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """The param groups now: a state dict that is loaded replaces the list."""
        return [] if self._optimizer is None else self._optimizer.param_groups

    def check_groups(self) -> None:
        """Raise RuntimeError unless the optimizer has as many param groups as at `swa_start`."""
        if self._groups and self.start_lrs and len(self.start_lrs) != len(self._groups):
            raise RuntimeError(
                f"the learning-rate phase needs the {len(self.start_lrs)} param groups of swa_start, got"
                f" num_groups={len(self._groups)}; add groups before swa_start"
            )

    def advance(self, num_averaged: int) -> None:
        """Set the rates after `num_averaged` updates. The first call takes those of the optimizer as `start_lrs`."""
        self.start_lrs = self.start_lrs or [float(group["lr"]) for group in self._groups]
        self.resume(num_averaged)
        self._write()

    def resume(self, num_averaged: int) -> None:
        """Compute the rates after `num_averaged` updates, for the next step of the optimizer."""
        if self._is_scheduled:
            ends = self._swa_lr if isinstance(self._swa_lr, Sequence) else [self._swa_lr] * len(self.start_lrs)
            strategy, steps = self._anneal
            self._rates = [
                phase_lr(start, end, strategy, num_averaged / steps)
                for start, end in zip(self.start_lrs, ends, strict=True)
            ]

    def end(self) -> None:
        """Stop setting the rates."""
        self._rates = []

    def reset(self) -> None:
        """Return to the state before `swa_start`."""
        self._rates, self.start_lrs = [], []

    def pre_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the rates for a step of `optimizer`; not for the lr=0 step that DCP makes to initialise its state."""
        if optimizer.state or any(group["lr"] for group in optimizer.param_groups) or _has_gradient(optimizer):
            self._write()

    def _write(self) -> None:
        self.check_groups()
        for group, lr in zip(self._groups, self._rates, strict=bool(self._rates)):
            if isinstance(group["lr"], Tensor):  # of a capturable or compiled optimizer
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def saved_lrs(self) -> list[float]:
        """Return the rates at `swa_start` for a checkpoint: NaN before `swa_start`, none without an optimizer."""
        return self.start_lrs or [math.nan] * len(self._groups)

    def checked(self, saved_lrs: list[float]) -> list[float]:
        """Return the rates of a checkpoint for this optimizer; ValueError for another number of param groups."""
        num_groups = len(self._groups)
        if num_groups and len(saved_lrs) != num_groups:
            raise ValueError(
                f"load_state_dict needs the {len(saved_lrs)} param groups of the checkpoint, got {num_groups=}; build"
                " the optimizer as it was"
            )
        return saved_lrs if num_groups else []


def _has_gradient(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient is not zero. DCP initialises the state with gradients of zero."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return any(bool(gradient.count_nonzero()) for gradient in gradients)


def _pre_step_hook(phase: weakref.ref[LRPhase]) -> Callable[..., None]:
    """Return a hook that does not keep `phase` alive: the optimizer may be used by another `SWA` later."""

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if (alive := phase()) is not None:
            alive.pre_step(optimizer)

    return hook
