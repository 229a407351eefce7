"""The learning-rate phase of SWA: anneal the rate of each param group from its value at `swa_start` to `swa_lr`."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def check_groups(optimizer: torch.optim.Optimizer, lrs: Sequence[float]) -> None:
    """Raise RuntimeError unless `optimizer` has one param group for each of `lrs`."""
    if len(lrs) != len(optimizer.param_groups):
        raise RuntimeError(
            f"the learning-rate phase needs the {len(lrs)} param groups of swa_start, got"
            f" num_groups={len(optimizer.param_groups)}; add groups before swa_start"
        )


def get_lrs(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rate of every param group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_lrs(optimizer: torch.optim.Optimizer, lrs: Sequence[float]) -> None:
    """Set the learning rate of every param group. Rates that are tensors (capturable, compiled) are set in place."""
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
