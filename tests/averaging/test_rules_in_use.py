"""Rules in averages: half-lives, rounding, and a rule that a user defines."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dist_swa import EMA, SWA, Equal, Rule, ShardedAverage
from dist_swa.averaging.rules import Elapsed
from reference import closed_form, weighted_sum
from vector_model import Vector, averaged, close, one_hot_coefficients

# Half-lives in SWA, which counts the elapsed training


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
    """Without an error the elapsed training would be 0, and the average would stay the first model."""
    rule = EMA(half_life=f"10{unit}")
    with pytest.raises(ValueError, match="needs"):
        _run_of_three_steps(rule)


def test_half_life_in_epochs_needs_their_ends() -> None:
    with pytest.warns(UserWarning, match="read epochs, and no epoch has ended"):
        _run_of_three_steps(EMA(half_life="2ep"))


@pytest.mark.parametrize("elapsed", [None, -1.0, math.nan, {}, {"ba": 5.0}, {"tok": -1.0}])
def test_half_life_needs_elapsed_training(elapsed: float | dict[str, float] | None) -> None:
    model = Vector(torch.ones(2))
    average = ShardedAverage(model, EMA(half_life="10tok"))
    average.update()  # the first model is copied and needs no elapsed training
    message = f"needs the training since the last update in 'tok', got elapsed={elapsed}; pass update(elapsed="
    with pytest.raises(ValueError, match=re.escape(message)):
        average.update(elapsed)
    assert average.num_averaged == 1


def _run_of_three_steps(rule: Rule) -> None:
    swa = SWA(Vector(torch.ones(2)), swa_start="1ba", swa_end=None, update_interval="1ba", rule=rule)
    for _ in range(3):
        swa.step()
    swa.finalize()


# In floating point


def test_float32_equal_average_is_as_exact_as_rounding_allows() -> None:
    """Update n adds an error of 12**-0.5 ulp, and n/N of it remains: in total an rms of 0.289 ulp sqrt(N/3)."""
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


def test_a_bfloat16_average_never_moves_but_the_default_dtype_does() -> None:
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
    """SGD at a constant rate is an AR(1) process there. The variance of its mean over W steps is known."""
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


# A rule of a user


@dataclasses.dataclass(frozen=True)
class LateEMA(Rule):
    """An EMA that starts as an equal average."""

    decay: float = 0.99

    def weight(self, n: int, elapsed: Elapsed = None) -> float:
        return max(1 / n, 1 - self.decay)


def test_a_users_rule_averages_as_it_says() -> None:
    assert LateEMA(0.99).coefficients(4) == close([1 / 4] * 4)
    assert one_hot_coefficients(LateEMA(0.7), 5) == close([0.7**2 / 3] * 3 + [0.7 * 0.3, 0.3])


@pytest.mark.filterwarnings("ignore:.*single process:UserWarning")
def test_a_users_rule_survives_a_checkpoint(tmp_path: Path) -> None:
    models = torch.eye(6, dtype=torch.float64)
    model = Vector(models[0])
    average = ShardedAverage(model, LateEMA(0.7), dtype=torch.float64)
    for i in range(3):
        model.put(models[i])
        average.update()
    save({"average": average}, checkpoint_id=tmp_path)

    resumed = ShardedAverage(model, LateEMA(0.7), dtype=torch.float64)
    load({"average": resumed}, checkpoint_id=tmp_path)
    for i in range(3, 6):
        model.put(models[i])
        resumed.update()
    assert resumed.num_averaged == 6
    assert averaged(resumed).tolist() == one_hot_coefficients(LateEMA(0.7), 6)


def test_a_users_rule_does_not_load_into_another_class() -> None:
    state = ShardedAverage(Vector(torch.ones(2)), LateEMA()).state_dict()
    with pytest.raises(ValueError, match="needs a checkpoint of rule=Equal, got rule=LateEMA"):
        ShardedAverage(Vector(torch.ones(2)), Equal()).load_state_dict(state)


def test_a_users_rule_with_other_values_loads_with_a_warning() -> None:
    state = ShardedAverage(Vector(torch.ones(2)), LateEMA(0.7)).state_dict()
    with pytest.warns(
        UserWarning, match=re.escape("averaged with LateEMA(decay=0.7); continuing with LateEMA(decay=0")
    ):
        ShardedAverage(Vector(torch.ones(2)), LateEMA(0.8)).load_state_dict(state)
