"""Averaging rules: the weight of each model in the average.

An average follows ``avg_1 = model_1; avg_n = avg_{n-1} + w_n (model_n - avg_{n-1})``. A rule returns ``w_n``. A rule
that is not such a recursion (`Window`) uses several slots with ``w_n = 1``; the average is the mean of the used slots.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real

Elapsed = float | Mapping[str, float] | None
"""Training since the last update: a number in the unit of the rule, or by unit, as ``{"ba": 1, "tok": 4096}``."""


@dataclass(frozen=True)
class Rule(ABC):
    """Base class of averaging rules. Subclass it to define your own.

    A subclass is a frozen dataclass of plain values that implements `weight`. It has no state: all ranks must get the
    same weights, also after a resume. A checkpoint stores the class name and the ``repr``. Loading it into another
    class raises, and other values warn. A rule that reads `elapsed` overrides `unit`. `Window` has several slots.

    Example: an EMA that starts as an equal average.

    >>> from dataclasses import dataclass
    >>> from dist_swa import Rule
    >>> @dataclass(frozen=True)
    ... class LateEMA(Rule):
    ...     decay: float = 0.99
    ...
    ...     def weight(self, n, elapsed=None):
    ...         return max(1 / n, 1 - self.decay)
    >>> LateEMA(decay=0.5).coefficients(3)
    [0.25, 0.25, 0.5]
    """

    @property
    def num_slots(self) -> int:
        """The number of copies of the local shards that the average stores."""
        return 1

    @property
    def unit(self) -> str | None:
        """The unit of `elapsed`: "ba", "ep", "sp" or "tok". None if `weight` does not read `elapsed`."""
        return None

    @abstractmethod
    def weight(self, n: int, elapsed: Elapsed = None) -> float:
        """Return ``w_n`` for model n, counted from 1; ``w_1`` must be 1. `elapsed`: the training since model n-1."""

    def coefficients(self, num_models: int, elapsed: Elapsed = None) -> list[float]:
        """Return the weights of `num_models` models in their average, oldest first; `elapsed` lies between any two."""
        coefficients, rest = [], 1.0
        for n in range(num_models, 0, -1):
            weight = self.weight(n, elapsed)
            coefficients.append(weight * rest)
            rest *= 1 - weight
        return coefficients[::-1]


@dataclass(frozen=True)
class Equal(Rule):
    """SWA: all N models have the weight 1/N. arXiv:1803.05407, section 3.2.

    Example:

    >>> from dist_swa import Equal
    >>> Equal().coefficients(4)
    [0.25, 0.25, 0.25, 0.25]
    """

    def weight(self, n: int, elapsed: Elapsed = None) -> float:
        return 1 / n


@dataclass(frozen=True)
class Polynomial(Rule):
    """Polynomial decay: weights grow like ``i**eta``; ``eta=0`` is `Equal`. arXiv:1212.1824, section 4.

    Raises ValueError unless `eta` is a finite number >= 0.

    Example:

    >>> from dist_swa import Polynomial
    >>> [round(weight, 3) for weight in Polynomial(eta=1).coefficients(3)]
    [0.167, 0.333, 0.5]
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

    arXiv:2411.18704 studies it. Pass either `decay`, in [0, 1), or `half_life`, a time string in ``ba``, ``sp``,
    ``tok`` or ``ep`` ("2000ba"): the weight of a model halves in this amount of training, at any update interval.
    `warmup` limits `decay` to ``(1 + n) / (10 + n)``, with n models averaged before. Raises ValueError for any other
    combination.

    Example:

    >>> from dist_swa import EMA
    >>> [round(weight, 3) for weight in EMA(decay=0.9).coefficients(3)]
    [0.81, 0.09, 0.1]
    >>> EMA(half_life="100ba").weight(2, elapsed=100)
    0.5
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
        number = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
        match = re.fullmatch(rf"({number})(ba|sp|tok|ep)", str(self.half_life).strip(), re.ASCII)
        value = float(match[1]) if match else 0.0
        if not match or not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"EMA needs a half_life above 0 in ba, sp, tok or ep, got half_life={self.half_life!r}; write '2000ba'"
            )
        return value, match[2]


@dataclass(frozen=True)
class PowerEMA(Rule):
    """EMA whose width is a constant fraction `sigma_rel` of the run so far. arXiv:2312.02696, section 3.1.

    ``w_n = 1 - (1 - 1/n)**(gamma + 1)`` with the gamma of ``sigma_rel = (gamma+1)^.5 (gamma+2)^-1 (gamma+3)^-.5``.
    Raises ValueError unless `sigma_rel` is in (0, 12**-0.5). The paper uses 0.05 and 0.10.

    Example:

    >>> from dist_swa import PowerEMA
    >>> [round(weight, 3) for weight in PowerEMA(sigma_rel=0.10).coefficients(4)]
    [0.0, 0.004, 0.098, 0.898]
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
        """The exponent: coefficients are about proportional to ``(i / N)**gamma``."""
        low, high = 0.0, 2 / self.sigma_rel  # the width decreases with gamma and is below 1/gamma
        for _ in range(100):
            middle = (low + high) / 2
            is_wider = math.sqrt(middle + 1) / ((middle + 2) * math.sqrt(middle + 3)) > self.sigma_rel
            low, high = (middle, high) if is_wider else (low, middle)
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
    """Emulates a learning-rate decay: averages a run at a constant rate. WSM, arXiv:2507.17634, section 3.

    `shape` is "minus_sqrt" (the oldest model has the largest weight), "linear" (the same as `Equal`) or "cosine".
    `total` is the number of models to average. One more raises RuntimeError.

    Example:

    >>> from dist_swa import DecayShaped
    >>> [round(weight, 3) for weight in DecayShaped("minus_sqrt", total=4).coefficients(4)]
    [0.5, 0.207, 0.159, 0.134]
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

    Memory: `size` copies of the local shards, and one more while the average is swapped in or exported.

    Example:

    >>> from dist_swa import Window
    >>> Window(size=2).coefficients(4)
    [0.0, 0.0, 0.5, 0.5]
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
    """Convert the argument to a Python number, because checkpoints store the repr. TypeError if it is not a number."""
    value = getattr(rule, name)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{type(rule).__name__} needs a number, got {name}={value!r}; pass a float")
    object.__setattr__(rule, name, int(value) if isinstance(value, Integral) else float(value))


def _require_count(rule: Rule, name: str) -> None:
    """Convert the argument to an int. Raises TypeError or ValueError unless it is a number of models."""
    value, what = getattr(rule, name), type(rule).__name__
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{what} needs a whole number of models, got {name}={value!r}; pass an int")
    if value < 1:
        raise ValueError(f"{what} needs at least one model, got {name}={value}; pass how many it averages")
    object.__setattr__(rule, name, int(value))


def _in_unit(elapsed: Elapsed, unit: str) -> float:
    value = elapsed.get(unit) if isinstance(elapsed, Mapping) else elapsed
    if not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(
            f"update of a half-life needs the training since the last update in {unit!r}, got elapsed={elapsed}"
            f"; pass update(elapsed={{{unit!r}: ...}})"
        )
    return float(value)
