"""How much does each model weigh in the average?

Every rule is the recursion ``avg_1 = model_1; avg_n = avg_{n-1} + w_n (model_n - avg_{n-1})``: a rule says
what ``w_n`` is. A rule that is no such recursion (`Window`) stores several slots, each with ``w_n = 1``, and the
average is the mean of the slots in use.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real

Elapsed = float | Mapping[str, float] | None
"""Training since the last update: a number in the unit of the rule, or ``{"ba": 1, "tok": 4096}``."""


@dataclass(frozen=True)
class Rule(ABC):
    """Gives the weight ``w_n`` of the n-th model; subclasses are frozen dataclasses of plain values."""

    @property
    def num_slots(self) -> int:
        """Copies of the local shards that the average stores."""
        return 1

    @property
    def unit(self) -> str | None:
        """The unit of the elapsed training that `weight` asks for, if it does."""
        return None

    @abstractmethod
    def weight(self, n: int, elapsed: Elapsed = None) -> float:
        """Return ``w_n`` for the n-th model (from 1); ``w_1`` is 1. `elapsed`: training since model n-1."""

    def coefficients(self, num_models: int, elapsed: Elapsed = None) -> list[float]:
        """Return what each of `num_models` models, oldest first, weighs in their average; they sum to 1.

        `elapsed` is the training between any two models, where the rule asks for it.
        """
        coefficients, rest = [], 1.0
        for n in range(num_models, 0, -1):
            weight = self.weight(n, elapsed)
            coefficients.append(weight * rest)
            rest *= 1 - weight
        return coefficients[::-1]


@dataclass(frozen=True)
class Equal(Rule):
    """SWA: every model weighs the same, 1/N. arXiv:1803.05407, section 3.2."""

    def weight(self, n: int, elapsed: Elapsed = None) -> float:
        return 1 / n


@dataclass(frozen=True)
class Polynomial(Rule):
    """Later models weigh more, as ``i**eta``; ``eta=0`` is `Equal`. arXiv:1212.1824, section 4.

    Raises ValueError unless `eta` is a finite number >= 0.
    """

    eta: float

    def __post_init__(self) -> None:
        _require_number(self, "eta")
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"Polynomial needs a finite eta >= 0, got eta={self.eta}; eta=0 weighs all models alike")

    def weight(self, n: int, elapsed: Elapsed = None) -> float:
        return (self.eta + 1) / (n + self.eta)


@dataclass(frozen=True)
class EMA(Rule):
    """Exponential moving average: the first model is copied, then ``avg += (1 - decay) (model - avg)``.

    Exactly one of `decay`, in [0, 1), and `half_life` is given. A half-life is a time string in ``ba``, ``sp``,
    ``tok`` or ``ep`` ("2000ba"): a model's weight then follows the training since the last update, and halves in
    that time. `warmup` lowers the decay of the early updates to ``(1 + n) / (10 + n)``, n models averaged before.
    Raises ValueError for anything else.
    """

    decay: float | None = None
    half_life: str | None = None
    warmup: bool = False

    def __post_init__(self) -> None:
        if (self.decay is None) == (self.half_life is None):
            raise ValueError(
                f"EMA needs either decay or half_life, got decay={self.decay}, half_life={self.half_life!r}; give one"
            )
        if self.decay is not None:
            _require_number(self, "decay")
            if not 0 <= self.decay < 1:
                raise ValueError(f"EMA needs decay in [0, 1), got decay={self.decay}; 0.999 is a usual value")
        if self.half_life is not None:
            if self.warmup:
                raise ValueError(f"EMA needs decay for warmup=True, got half_life={self.half_life!r}; leave warmup out")
            self._parsed_half_life()

    @property
    def unit(self) -> str | None:
        return None if self.half_life is None else self._parsed_half_life()[1]

    def weight(self, n: int, elapsed: Elapsed = None) -> float:
        if n == 1:
            return 1.0
        if self.decay is None:
            half_life, unit = self._parsed_half_life()
            return -math.expm1(-math.log(2) * _in_unit(elapsed, unit) / half_life)
        return 1 - (min(self.decay, n / (9 + n)) if self.warmup else self.decay)

    def _parsed_half_life(self) -> tuple[float, str]:
        match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]{1,3})?)(ba|sp|tok|ep)", str(self.half_life).strip())
        try:
            value = float(match[1]) if match else 0.0
        except ValueError:
            value = 0.0
        if not match or not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"EMA needs a half_life above 0 in ba, sp, tok or ep, got half_life={self.half_life!r}; write '2000ba'"
            )
        return value, match[2]


@dataclass(frozen=True)
class PowerEMA(Rule):
    """EMA whose memory grows with the run: its relative width `sigma_rel` stays. arXiv:2312.02696, section 3.1.

    ``w_n = 1 - (1 - 1/n)**(gamma + 1)`` with the gamma of ``sigma_rel = (gamma+1)^.5 (gamma+2)^-1 (gamma+3)^-.5``.
    Raises ValueError unless `sigma_rel` lies in (0, 12**-0.5); the paper uses 0.05 and 0.10.
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        _require_number(self, "sigma_rel")
        if not 0 < self.sigma_rel < 12**-0.5:
            raise ValueError(
                f"PowerEMA needs sigma_rel in (0, 0.2886), got sigma_rel={self.sigma_rel}; 0.05 and 0.10 are usual"
            )

    @property
    def gamma(self) -> float:
        """The exponent: coefficients fall off as ``(i / N)**gamma``."""
        low, high = 0.0, 2 / self.sigma_rel  # the width falls with gamma, and is below 1/gamma
        for _ in range(100):
            middle = (low + high) / 2
            wide = math.sqrt(middle + 1) / ((middle + 2) * math.sqrt(middle + 3)) > self.sigma_rel
            low, high = (middle, high) if wide else (low, middle)
        return (low + high) / 2

    def weight(self, n: int, elapsed: Elapsed = None) -> float:
        return 1.0 if n == 1 else -math.expm1((self.gamma + 1) * math.log1p(-1 / n))


_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@dataclass(frozen=True)
class DecayShaped(Rule):
    """The average of a constant-LR run that stands for an LR decay of this shape. WSM, arXiv:2507.17634, section 3.

    `shape` is "minus_sqrt", "linear" or "cosine"; `total` is the number of models that will be averaged: one more
    raises RuntimeError. Under "minus_sqrt" the oldest model weighs most; "linear" is `Equal`.
    """

    shape: str
    total: int

    def __post_init__(self) -> None:
        if self.shape not in list(_DECAYS):
            raise ValueError(f"DecayShaped needs a shape of {', '.join(_DECAYS)}, got shape={self.shape!r}; choose one")
        _require_count(self, "total")

    def weight(self, n: int, elapsed: Elapsed = None) -> float:
        if n > self.total:
            raise RuntimeError(f"DecayShaped needs at most total={self.total} models, got n={n}; raise total")
        decay = _DECAYS[self.shape]
        before, after = decay((n - 1) / self.total), decay(n / self.total) if n < self.total else 0.0
        return (before - after) / (1 - after)


@dataclass(frozen=True)
class Window(Rule):
    """LAWA: the equal average of the last `size` models. arXiv:2209.14981, section 3.

    Stores `size` copies of the local shards, and one more while they are swapped in or exported.
    """

    size: int

    def __post_init__(self) -> None:
        _require_count(self, "size")

    @property
    def num_slots(self) -> int:
        return self.size

    def weight(self, n: int, elapsed: Elapsed = None) -> float:
        return 1.0

    def coefficients(self, num_models: int, elapsed: Elapsed = None) -> list[float]:
        used = min(num_models, self.size)
        return [0.0] * (num_models - used) + [1 / used] * used


def _require_number(rule: Rule, name: str) -> None:
    """Make a plain float or int of the argument, whose text is saved; TypeError unless it is a number."""
    value = getattr(rule, name)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{type(rule).__name__} needs a number, got {name}={value!r}; pass a float")
    object.__setattr__(rule, name, int(value) if isinstance(value, Integral) else float(value))


def _require_count(rule: Rule, name: str) -> None:
    """Make a plain int of the argument; TypeError or ValueError unless it is a number of models."""
    value = getattr(rule, name)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{type(rule).__name__} needs a whole number of models, got {name}={value!r}; pass an int")
    if value < 1:
        raise ValueError(
            f"{type(rule).__name__} needs at least one model, got {name}={value}; pass how many it averages"
        )
    object.__setattr__(rule, name, int(value))


def _in_unit(elapsed: Elapsed, unit: str) -> float:
    value = elapsed.get(unit) if isinstance(elapsed, Mapping) else elapsed
    if not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(
            f"update of a half-life needs the training since the last update in {unit!r}, got elapsed={elapsed}"
            f"; pass update(elapsed={{{unit!r}: ...}})"
        )
    return float(value)
