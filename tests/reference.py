"""The expected averages: coefficients from the closed form of each rule, not from the library's recursion."""

import math
import string
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from dist_swa.averaging.rules import EMA, DecayShaped, Equal, Polynomial, PowerEMA, Rule, Window


def closed_form(rule: Rule, num_models: int, gaps: Sequence[float] = ()) -> list[float]:
    """Return the coefficients of `num_models` models, oldest first.

    `gaps` is the training between consecutive models in the unit of a half-life: ``num_models - 1`` numbers.
    """
    models = range(1, num_models + 1)
    match rule:
        case Equal():
            return [1 / num_models for _ in models]
        case Polynomial(eta):
            return [_polynomial(eta, i, num_models) for i in models]
        case EMA(half_life=str(half_life)):
            return _half_life(float(half_life.rstrip(string.ascii_letters)), num_models, gaps)
        case EMA(decay=float(decay), warmup=warmup):
            # Before model i, i - 1 models were averaged.
            decays = [min(decay, i / (9 + i)) if warmup else decay for i in models]
            return [(1 - decays[i - 1] if i > 1 else 1.0) * math.prod(decays[i:]) for i in models]
        case PowerEMA(sigma_rel):
            power = power_gamma(sigma_rel) + 1
            return [(i**power - (i - 1) ** power) / num_models**power for i in models]
        case DecayShaped(shape, total):
            rates = [_learning_rate(shape, i / total) for i in range(total + 1)]
            drops = [rates[i - 1] - rates[i] for i in models]
            return [drop / sum(drops) for drop in drops]
        case Window(size):
            return [1 / min(size, num_models) if i > num_models - size else 0.0 for i in models]
    raise NotImplementedError(f"no closed form for {rule}")


def weighted_sum(coefficients: Sequence[float], models: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the float64 sum of `models`, full tensors by name, with `coefficients`."""
    weights = torch.tensor(coefficients, dtype=torch.float64)
    names = models[0].keys()
    if any(model.keys() != names for model in models):
        raise ValueError("models have different names")
    return {
        name: torch.tensordot(weights, torch.stack([model[name].detach().cpu().double() for model in models]), dims=1)
        for name in names
    }


def power_gamma(sigma_rel: float) -> float:
    """Return the positive root of sigma_rel^2 (g+2)^2 (g+3) = g+1."""
    square = sigma_rel**2
    roots = np.roots([square, 7 * square, 16 * square - 1, 12 * square - 1])
    return max(float(root.real) for root in roots if abs(root.imag) < 1e-9)


def _polynomial(eta: float, i: int, num_models: int) -> float:
    log = math.lgamma(num_models) + math.lgamma(i + eta) - math.lgamma(i) - math.lgamma(num_models + eta + 1)
    return (eta + 1) * math.exp(log)


def _half_life(half_life: float, num_models: int, gaps: Sequence[float]) -> list[float]:
    if len(gaps) != num_models - 1:
        raise ValueError(f"{num_models} models have {num_models - 1} gaps, got {len(gaps)}")
    times = list(accumulate(gaps, initial=0.0))
    remaining = [0.5 ** ((times[-1] - time) / half_life) for time in times]
    # The weight of a model is the decay of the average since the previous model, itself decayed since then.
    return [now - before for now, before in zip(remaining, [0.0, *remaining], strict=False)]


def _learning_rate(shape: str, fraction: float) -> float:
    """Return the learning rate of the emulated decay, from 1 at the start to 0 at the end."""
    if shape == "linear":
        return 1 - fraction
    if shape == "minus_sqrt":
        return 1 - math.sqrt(fraction)
    return math.cos(math.pi * fraction / 2) ** 2
