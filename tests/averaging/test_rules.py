"""The weights of every rule equal its closed form, in `coefficients` and in an average."""

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from dist_swa import EMA, DecayShaped, Equal, Polynomial, PowerEMA, Rule, ShardedAverage, Window
from reference import closed_form, power_gamma
from vector_model import Vector, averaged, close, one_hot_coefficients

COUNTS = [1, 2, 3, 10, 57]
RULES: list[Rule] = [
    Equal(),
    Polynomial(0),
    Polynomial(1),
    Polynomial(7.5),
    EMA(0.0),
    EMA(0.5),
    EMA(0.999),
    EMA(0.9999, warmup=True),
    EMA(0.3, warmup=True),
    PowerEMA(0.05),
    PowerEMA(0.10),
    PowerEMA(0.28),
    DecayShaped("linear", total=57),
    DecayShaped("minus_sqrt", total=57),
    DecayShaped("cosine", total=57),
    Window(1),
    Window(4),
    Window(100),
]
SHAPES = ["linear", "minus_sqrt", "cosine"]


# Against the closed form


@pytest.mark.parametrize("num_models", COUNTS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_coefficients_equal_the_closed_form(rule: Rule, num_models: int) -> None:
    coefficients = rule.coefficients(num_models)
    assert coefficients == close(closed_form(rule, num_models))
    assert math.fsum(coefficients) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("num_models", COUNTS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_average_of_unit_vectors_equals_the_closed_form(rule: Rule, num_models: int) -> None:
    assert one_hot_coefficients(rule, num_models) == close(closed_form(rule, num_models))


@pytest.mark.parametrize("num_models", COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decay_shaped_of_all_its_models(shape: str, num_models: int) -> None:
    rule = DecayShaped(shape, total=num_models)
    assert rule.coefficients(num_models) == close(closed_form(rule, num_models))
    assert one_hot_coefficients(rule, num_models) == close(closed_form(rule, num_models))


@pytest.mark.parametrize("num_models", COUNTS)
@pytest.mark.parametrize("half_life", ["2000ba", "1.5ep", "3e2sp", ".5tok"])
def test_half_life_of_even_gaps(half_life: str, num_models: int) -> None:
    rule = EMA(half_life=half_life)
    expected = closed_form(rule, num_models, [700.0] * (num_models - 1))
    assert rule.coefficients(num_models, 700) == close(expected)


def test_half_life_of_uneven_gaps() -> None:
    gaps = [5.0, 100.0, 0.0, 40.0, 1e6, 3.0]
    rule = EMA(half_life="40tok")
    assert one_hot_coefficients(rule, 7, gaps) == close(closed_form(rule, 7, gaps))


def test_half_life_halves_what_was_there() -> None:
    assert EMA(half_life="2000ba").coefficients(2, {"ba": 2000, "tok": 7}) == [0.5, 0.5]


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.28])
def test_gamma_has_the_width_sigma_rel(sigma_rel: float) -> None:
    gamma = power_gamma(sigma_rel)
    assert math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3) == pytest.approx(sigma_rel, rel=1e-10)
    assert PowerEMA(sigma_rel).gamma == pytest.approx(gamma, rel=1e-9)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_gamma_is_that_of_the_papers_table(sigma_rel: float, gamma: float) -> None:
    assert PowerEMA(sigma_rel).gamma == pytest.approx(gamma, abs=0.005)


# Invariants


@pytest.mark.parametrize("rule", [Equal(), Polynomial(0), DecayShaped("linear", total=57), Window(57)], ids=str)
def test_these_rules_are_equal_averages(rule: Rule) -> None:
    assert rule.coefficients(57) == close([1 / 57] * 57)


def test_minus_sqrt_gives_the_oldest_model_the_largest_weight() -> None:
    coefficients = DecayShaped("minus_sqrt", total=20).coefficients(20)
    assert coefficients == sorted(coefficients, reverse=True)
    assert coefficients[0] == pytest.approx(20**-0.5)


@pytest.mark.parametrize("rule", [Polynomial(1), PowerEMA(0.1), EMA(0.4)], ids=str)
def test_later_models_have_larger_weights(rule: Rule) -> None:
    coefficients = rule.coefficients(20)
    assert coefficients == sorted(coefficients)
    assert coefficients[0] < coefficients[-1]


def test_a_window_averages_the_last_models_only() -> None:
    assert one_hot_coefficients(Window(3), 8) == close([0, 0, 0, 0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert Window(3).num_slots == 3


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_first_model_is_copied(rule: Rule) -> None:
    values = torch.tensor([0.1, -3.7e30, math.inf])
    average = ShardedAverage(Vector(values), rule)
    average.update()
    assert torch.equal(averaged(average), values)


def test_a_model_beyond_total_raises_and_changes_nothing() -> None:
    model = Vector(torch.ones(3))
    average = ShardedAverage(model, DecayShaped("cosine", total=2))
    average.update()
    average.update()
    model.put(torch.zeros(3))
    with pytest.raises(RuntimeError, match="DecayShaped needs at most total=2 models, got n=3; raise total"):
        average.update()
    assert average.num_averaged == 2
    assert torch.equal(averaged(average), torch.ones(3))


# Rules are values


@pytest.mark.parametrize("rule", [*RULES, EMA(half_life="2000ba")], ids=str)
def test_rules_pickle_compare_and_are_frozen(rule: Rule) -> None:
    copy = pickle.loads(pickle.dumps(rule))
    assert copy == rule
    assert hash(copy) == hash(rule)
    assert eval(repr(rule)) == rule
    assert [other == rule for other in RULES].count(True) == (rule in RULES)
    for name in [field.name for field in dataclasses.fields(rule)] or ["anything"]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rule, name, 1)


def test_the_repr_of_rules() -> None:
    assert str(EMA(decay=0.9, warmup=True)) == "EMA(decay=0.9, half_life=None, warmup=True)"
    assert str(DecayShaped("cosine", 5)) == "DecayShaped(shape='cosine', total=5)"
    assert str(Equal()) == "Equal()"


@pytest.mark.parametrize(
    ("rule", "arguments", "expected"),
    [
        (Polynomial, {"eta": np.float64(1.5)}, Polynomial(1.5)),
        (Polynomial, {"eta": np.int64(2)}, Polynomial(2)),
        (EMA, {"decay": np.float64(0.9)}, EMA(0.9)),
        (PowerEMA, {"sigma_rel": np.float32(0.125)}, PowerEMA(0.125)),
        (DecayShaped, {"shape": "cosine", "total": np.int64(5)}, DecayShaped("cosine", 5)),
        (Window, {"size": np.int32(5)}, Window(5)),
    ],
)
def test_numpy_numbers_become_python_numbers(rule: type[Rule], arguments: dict[str, Any], expected: Rule) -> None:
    """Checkpoints store the repr."""
    assert repr(rule(**arguments)) == repr(expected)
