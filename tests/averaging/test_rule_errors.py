"""Invalid arguments of rules raise one clear error."""

import math
import re
from typing import Any

import numpy as np
import pytest

from dist_swa import EMA, DecayShaped, Polynomial, PowerEMA, Rule, Window


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (Polynomial, {"eta": -0.5}, "a finite eta >= 0, got eta=-0.5; eta=0 weighs all models alike"),
        (Polynomial, {"eta": math.nan}, "a finite eta >= 0, got eta=nan; "),
        (Polynomial, {"eta": math.inf}, "a finite eta >= 0, got eta=inf; "),
        (EMA, {}, "either decay or half_life, got decay=None, half_life=None; give one"),
        (
            EMA,
            {"decay": 0.9, "half_life": "5ba"},
            "either decay or half_life, got decay=0.9, half_life='5ba'; give one",
        ),
        (EMA, {"decay": 1.0}, "decay in [0, 1), got decay=1.0; 0.999 is a usual value"),
        (EMA, {"decay": -0.1}, "decay in [0, 1), got decay=-0.1; "),
        (EMA, {"decay": math.nan}, "decay in [0, 1), got decay=nan; "),
        (EMA, {"half_life": "5ba", "warmup": True}, "decay for warmup=True, got half_life='5ba'; leave warmup out"),
        (PowerEMA, {"sigma_rel": 0.0}, "sigma_rel in (0, 0.2886), got sigma_rel=0.0; 0.05 and 0.10 are usual"),
        (PowerEMA, {"sigma_rel": 0.289}, "sigma_rel in (0, 0.2886), got sigma_rel=0.289; "),
        (PowerEMA, {"sigma_rel": math.nan}, "sigma_rel in (0, 0.2886), got sigma_rel=nan; "),
        (
            DecayShaped,
            {"shape": "sqrt", "total": 5},
            "a shape of linear, minus_sqrt, cosine, got shape='sqrt'; choose one",
        ),
        (DecayShaped, {"shape": "linear", "total": 0}, "at least one model, got total=0; pass how many it averages"),
        (Window, {"size": 0}, "at least one model, got size=0; pass how many it averages"),
    ],
)
def test_invalid_arguments(rule: type[Rule], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{rule.__name__} needs {message}")):
        rule(**arguments)


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (DecayShaped, {"shape": "linear", "total": 5.0}, "a whole number of models, got total=5.0; pass an int"),
        (Window, {"size": True}, "a whole number of models, got size=True; pass an int"),
        (Window, {"size": np.float64(5)}, "a whole number of models, got size=np.float64(5.0); pass an int"),
        (Polynomial, {"eta": "1"}, "a number, got eta='1'; pass a float"),
        (EMA, {"decay": "0.9"}, "a number, got decay='0.9'; pass a float"),
        (PowerEMA, {"sigma_rel": True}, "a number, got sigma_rel=True; pass a float"),
    ],
)
def test_arguments_of_a_wrong_type(rule: type[Rule], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"{rule.__name__} needs {message}")):
        rule(**arguments)


@pytest.mark.parametrize(
    "half_life",
    [
        "2000",
        "ba",
        "0ba",
        "0.0ba",
        "-5ba",
        "5dur",
        "5 ba",
        "1.2.3ba",
        ".ba",
        "1e999ba",
        "1e-999ba",
        "nanba",
        "٣ba",
        "infba",
        20,
    ],
)
def test_invalid_half_lives(half_life: str) -> None:
    message = f"EMA needs a half_life above 0 in ba, sp, tok or ep, got half_life={half_life!r}; write '2000ba'"
    with pytest.raises(ValueError, match=re.escape(message)):
        EMA(half_life=half_life)


def test_coefficients_of_more_than_total_models() -> None:
    with pytest.raises(RuntimeError, match="DecayShaped needs at most total=3 models, got n=4; raise total"):
        DecayShaped("linear", total=3).coefficients(4)
