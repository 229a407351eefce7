"""What `metrics` returns: the weight of the last model, and the distance between trained and averaged weights."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_swa import EMA, SWA, Equal, ShardedAverage, checkpoint
from models import ALL_WRAPPERS, build, group_of, trajectory, wrap, write
from ranks import on_ranks


@pytest.mark.parametrize("wrapper", ALL_WRAPPERS)
@on_ranks(1, 2, 3, 4)
def test_distance_is_that_of_the_full_tensors_under_every_wrapper(wrapper: str) -> None:
    model, models = wrap(build(), wrapper), trajectory(3, build())
    average = ShardedAverage(model, {"mean": Equal(), "ema": EMA(0.9)}, process_group=group_of(wrapper))
    for values in models:
        write(model, values)
        average.update()
    trained = {name: value.double() for name, value in models[-1].items()}
    mean = {name: sum(one[name].double() for one in models) / 3 for name in trained}
    ema = {name: 0.81 * models[0][name] + 0.09 * models[1][name] + 0.1 * models[2][name] for name in trained}
    found = average.metrics(distance=True)
    assert found["num_averaged"] == 3
    assert [found[f"{name}/weight"] for name in ("mean", "ema")] == pytest.approx([1 / 3, 0.1])
    for name, expected in (("mean", mean), ("ema", ema)):
        squares = sum(float((trained[one] - expected[one]).square().sum()) for one in trained)
        assert found[f"{name}/distance"] == pytest.approx(math.sqrt(squares), rel=1e-5)


def linear() -> tuple[nn.Linear, SWA]:
    model = nn.Linear(2, 2)
    return model, SWA(model, swa_start="1ba", rule=EMA(0.5), skip_nonfinite=True)


def test_metrics_of_a_run() -> None:
    model, swa = linear()
    assert swa.metrics() == {"num_averaged": 0, "weight": 0.0, "num_skipped": 0}
    swa.step()
    assert swa.metrics(distance=True) == {"num_averaged": 1, "weight": 1.0, "distance": 0.0, "num_skipped": 0}
    swa.step()
    nn.init.constant_(model.weight, math.nan)
    with pytest.warns(UserWarning, match="NaN or inf was not averaged"):
        swa.step()
    assert swa.metrics() == {"num_averaged": 2, "weight": 0.5, "num_skipped": 1}
    swa.reset()
    assert swa.metrics() == {"num_averaged": 0, "weight": 0.0, "num_skipped": 0}


@pytest.mark.parametrize(("rule", "weight"), [(Equal(), 1 / 3), (EMA(half_life="2ba"), math.nan)], ids=repr)
def test_metrics_of_a_resumed_run(tmp_path: Path, rule: Equal | EMA, weight: float) -> None:
    model = nn.Linear(2, 2)
    swa, again = (SWA(model, swa_start="1ba", rule=rule) for _ in range(2))
    for _ in range(3):
        swa.step()
    checkpoint.save({"swa": swa}, tmp_path / "saved")
    checkpoint.load({"swa": again}, tmp_path / "saved")
    assert again.metrics()["weight"] == pytest.approx(weight, nan_ok=True)
    again.step()
    swa.step()
    assert again.metrics(distance=True) == swa.metrics(distance=True)


def test_distance_needs_an_average_and_the_trained_weights() -> None:
    _, swa = linear()
    with pytest.raises(RuntimeError, match=r"metrics\(distance=True\) needs an average, got num_averaged=0"):
        swa.metrics(distance=True)
    swa.step()
    with swa.swapped_in():
        assert swa.metrics()["weight"] == 1
        with pytest.raises(RuntimeError, match="needs the model to have its trained weights"):
            swa.metrics(distance=True)


@on_ranks(2)
def test_distance_of_complex_and_low_precision_weights() -> None:
    model = nn.ParameterList([torch.zeros(3, dtype=torch.complex64), torch.zeros(5, dtype=torch.bfloat16)])
    average = ShardedAverage(model, process_group=dist.group.WORLD)
    average.update()
    with torch.no_grad():
        model[0].add_(3 + 4j)
        model[1].add_(2)
    assert average.metrics(distance=True)["distance"] == pytest.approx(math.sqrt(3 * 25 + 5 * 4))
