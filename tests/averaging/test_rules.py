"""Each rule weighs models as its closed form says, in `coefficients` and in a real average."""

import dataclasses
import math
import pickle
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_swa import EMA, SWA, DecayShaped, Equal, Polynomial, PowerEMA, ShardedAverage, Window
from dist_swa.averaging.rules import Rule
from reference import closed_form, power_gamma, weighted_sum

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


class Vector(nn.Module):
    """A model that is one vector."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())

    @torch.no_grad()
    def put(self, values: Tensor) -> None:
        self.values.copy_(values)


def averaged(average: ShardedAverage) -> Tensor:
    full = average.full_state_dict()["values"]
    assert isinstance(full, Tensor)
    return full


def one_hot_coefficients(rule: Rule, num_models: int, gaps: Sequence[float] = ()) -> list[float]:
    """What the library makes of models that are the unit vectors: its coefficients."""
    models = torch.eye(num_models, dtype=torch.float64)
    model = Vector(torch.full_like(models[0], math.nan))
    average = ShardedAverage(model, rule, dtype=torch.float64)
    for row, gap in zip(models, [0.0, *gaps] if gaps else [None] * num_models, strict=True):
        model.put(row)
        average.update(gap)
    assert average.num_averaged == num_models
    return [float(value) for value in averaged(average)]


def close(values: Sequence[float]) -> object:
    return pytest.approx(list(values), rel=1e-10, abs=1e-14)


# Against the closed form


@pytest.mark.parametrize("num_models", COUNTS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_coefficients_are_the_closed_form(rule: Rule, num_models: int) -> None:
    coefficients = rule.coefficients(num_models)
    assert coefficients == close(closed_form(rule, num_models))
    assert math.fsum(coefficients) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("num_models", COUNTS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_hot_models_read_out_the_closed_form(rule: Rule, num_models: int) -> None:
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


def test_reference_gamma_has_the_width() -> None:
    for sigma_rel in (0.01, 0.05, 0.10, 0.28):
        gamma = power_gamma(sigma_rel)
        assert math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3) == pytest.approx(sigma_rel, rel=1e-10)
        assert PowerEMA(sigma_rel).gamma == pytest.approx(gamma, rel=1e-9)
    assert PowerEMA(0.05).gamma == pytest.approx(16.97, abs=0.005)  # the paper's table
    assert PowerEMA(0.10).gamma == pytest.approx(6.94, abs=0.005)


# Invariants


def test_some_rules_are_equal() -> None:
    equal = Equal().coefficients(57)
    assert equal == close([1 / 57] * 57)
    for rule in (Polynomial(0), DecayShaped("linear", total=57), Window(57)):
        assert rule.coefficients(57) == close(equal)


def test_minus_sqrt_weighs_the_oldest_most() -> None:
    coefficients = DecayShaped("minus_sqrt", total=20).coefficients(20)
    assert coefficients == sorted(coefficients, reverse=True)
    assert coefficients[0] == pytest.approx(20**-0.5)


def test_later_models_weigh_more() -> None:
    for rule in (Polynomial(1), PowerEMA(0.1), EMA(0.4)):
        coefficients = rule.coefficients(20)
        assert coefficients == sorted(coefficients)
        assert coefficients[0] < coefficients[-1]


def test_window_is_the_last_models_only() -> None:
    assert one_hot_coefficients(Window(3), 8) == close([0, 0, 0, 0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert Window(3).num_slots == 3


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_first_model_is_copied(rule: Rule) -> None:
    values = torch.tensor([0.1, -3.7e30, math.inf])
    average = ShardedAverage(Vector(values), rule)
    average.update()
    assert torch.equal(averaged(average), values)


def test_model_beyond_total_is_refused_and_changes_nothing() -> None:
    model = Vector(torch.ones(3))
    average = ShardedAverage(model, DecayShaped("cosine", total=2))
    average.update()
    average.update()
    model.put(torch.zeros(3))
    with pytest.raises(RuntimeError, match="DecayShaped needs at most total=2 models, got n=3; raise total"):
        average.update()
    assert average.num_averaged == 2
    assert torch.equal(averaged(average), torch.ones(3))


# Half-lives through the controller, which knows the progress


def test_half_life_follows_the_samples_of_a_run() -> None:
    samples = [3, 50, 1, 20, 8, 0, 100, 7, 7]
    model = Vector(torch.zeros(5, dtype=torch.float64))
    rule = EMA(half_life="30sp")
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="2ba", rule=rule, dtype=torch.float64)
    for step, count in enumerate(samples):
        model.put(torch.eye(5, dtype=torch.float64)[step // 2])
        assert swa.step(samples=count) is (step % 2 == 0)
    expected = closed_form(rule, 5, [51.0, 28.0, 100.0, 14.0])
    assert averaged(swa.average).tolist() == close(expected)


@pytest.mark.parametrize("unit", ["sp", "tok"])
def test_half_life_needs_what_it_counts(unit: str) -> None:
    """Without an error the progress stays 0, and the average the first model."""
    rule = EMA(half_life=f"10{unit}")
    with pytest.raises(ValueError, match="needs"):
        _run_of_three_steps(rule)


def test_half_life_in_epochs_needs_to_know_where_they_end() -> None:
    with pytest.warns(UserWarning, match="read epochs, and no epoch ended in 3 steps"):
        _run_of_three_steps(EMA(half_life="2ep"))


def _run_of_three_steps(rule: Rule) -> None:
    swa = SWA(Vector(torch.ones(2)), swa_start="1ba", swa_end=None, update_interval="1ba", rule=rule)
    for _ in range(3):
        swa.step()
    swa.finalize()


# In floating point


def test_float32_equal_average_is_as_exact_as_rounding_allows() -> None:
    """Step n adds an error of 12**-0.5 ulp, of which n/N is left: an rms of 0.289 ulp sqrt(N/3)."""
    num_models, size = 300, 20_000
    generator = torch.Generator().manual_seed(0)
    models = [torch.rand(size, generator=generator) + 1 for _ in range(num_models)]
    model = Vector(models[0])
    average = ShardedAverage(model)
    for values in models:
        model.put(values)
        average.update()
    truth = weighted_sum(closed_form(Equal(), num_models), [{"values": values} for values in models])["values"]
    rms = float((averaged(average) - truth).square().mean().sqrt())
    expected = 12**-0.5 * 2**-23 * math.sqrt(num_models / 3)
    assert rms == pytest.approx(expected, rel=6 / math.sqrt(2 * size))


def test_bfloat16_average_never_moves_and_the_default_does() -> None:
    model = Vector(torch.ones(4, dtype=torch.bfloat16))
    low = ShardedAverage(model, EMA(0.999), dtype=torch.bfloat16)
    default = ShardedAverage(model, EMA(0.999))
    for step in range(201):
        if step == 1:
            model.put(torch.full((4,), 1.5))
        low.update()
        default.update()
    assert torch.equal(averaged(low), torch.ones(4, dtype=torch.bfloat16))
    assert averaged(default).dtype == torch.float32
    assert averaged(default).tolist() == pytest.approx([1.5 - 0.5 * 0.999**200] * 4, rel=1e-5)


def test_averaging_helps_on_a_noisy_quadratic() -> None:
    """SGD at a constant rate is AR(1) there; the variance of its mean over W steps is known."""
    lr, curvature, steps, size = 0.1, 2.0, 60, 50_000
    phi = 1 - lr * curvature
    generator = torch.Generator().manual_seed(0)
    model = Vector(torch.randn(size, generator=generator) * lr / math.sqrt(1 - phi**2))  # stationary
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    average = ShardedAverage(model)
    for _ in range(steps):
        noise = torch.randn(size, generator=generator)
        optimizer.zero_grad()
        (curvature / 2 * model.values.square() + noise * model.values).sum().backward()
        optimizer.step()
        average.update()
    ratio = float(averaged(average).square().mean() / model.values.detach().square().mean())
    bias = 2 * phi * (1 - phi**steps) / (steps * (1 - phi)) ** 2
    expected = (1 + phi) / ((1 - phi) * steps) - bias
    assert ratio == pytest.approx(expected, rel=6 * math.sqrt(4 / size))
    assert expected < 0.15


# As values


@pytest.mark.parametrize("rule", [*RULES, EMA(half_life="2000ba")], ids=str)
def test_rules_are_values(rule: Rule) -> None:
    copy = pickle.loads(pickle.dumps(rule))
    assert copy == rule
    assert hash(copy) == hash(rule)
    assert eval(repr(rule)) == rule
    assert [other == rule for other in RULES].count(True) == (rule in RULES)
    for name in [field.name for field in dataclasses.fields(rule)] or ["anything"]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rule, name, 1)


def test_rules_print_what_was_given() -> None:
    assert str(EMA(decay=0.9, warmup=True)) == "EMA(decay=0.9, half_life=None, warmup=True)"
    assert str(DecayShaped("cosine", 5)) == "DecayShaped(shape='cosine', total=5)"
    assert str(Equal()) == "Equal()"


def test_numbers_become_pythons() -> None:
    """Their text is saved, and read again."""
    cases: list[tuple[type[Rule], dict[str, Any]]] = [
        (Polynomial, {"eta": np.float64(1.5)}),
        (Polynomial, {"eta": np.int64(2)}),
        (EMA, {"decay": np.float64(0.9)}),
        (PowerEMA, {"sigma_rel": np.float32(0.125)}),
        (DecayShaped, {"shape": "cosine", "total": np.int64(5)}),
        (Window, {"size": np.int32(5)}),
    ]
    for rule, arguments in cases:
        plain = rule(**{name: np.asarray(value).tolist() for name, value in arguments.items()})
        assert str(rule(**arguments)) == str(plain)


# Bad input


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
def test_bad_arguments(rule: type[Rule], arguments: dict[str, Any], message: str) -> None:
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
def test_arguments_of_a_wrong_kind(rule: type[Rule], arguments: dict[str, Any], message: str) -> None:
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
        "infba",
        20,
    ],
)
def test_bad_half_lives(half_life: str) -> None:
    message = f"EMA needs a half_life above 0 in ba, sp, tok or ep, got half_life={half_life!r}; write '2000ba'"
    with pytest.raises(ValueError, match=re.escape(message)):
        EMA(half_life=half_life)


@pytest.mark.parametrize("elapsed", [None, -1.0, math.nan, {}, {"ba": 5.0}, {"tok": -1.0}])
def test_half_life_needs_elapsed_training(elapsed: float | dict[str, float] | None) -> None:
    model = Vector(torch.ones(2))
    average = ShardedAverage(model, EMA(half_life="10tok"))
    average.update()  # the first model is copied, whatever came before it
    message = f"needs the training since the last update in 'tok', got elapsed={elapsed}; pass update(elapsed="
    with pytest.raises(ValueError, match=re.escape(message)):
        average.update(elapsed)
    assert average.num_averaged == 1


@pytest.mark.parametrize(
    ("rule", "arguments"), [(Polynomial, {"eta": "1"}), (EMA, {"decay": "0.9"}), (PowerEMA, {"sigma_rel": "0.1"})]
)
def test_numbers_are_no_strings(rule: type[Rule], arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        rule(**arguments)


def test_averages_are_of_at_most_total_models() -> None:
    with pytest.raises(RuntimeError, match="DecayShaped needs at most total=3 models, got n=4; raise total"):
        DecayShaped("linear", total=3).coefficients(4)
