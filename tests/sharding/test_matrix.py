"""Every row of the table in tests/README.md: each way to shard and wrap, with each rule, against the float64 reference.

One launch of ranks averages a trajectory of known weights, swaps, saves and trains on. Another launch, with another
number of ranks, loads what the first one saved, also under other wrappers. The tests compare what they return.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from cases import CASES, PARTNERS, average_group, read
from dist_swa import EMA, Equal, ShardedAverage, Window
from dist_swa.averaging.rules import Rule
from models import same_bits, train, trajectory, write
from ranks import run_on_ranks
from reference import closed_form, weighted_sum

RULES: dict[str, Rule] = {"equal": Equal(), "ema": EMA(decay=0.7), "window": Window(3)}
NUM_MODELS, NUM_SAVED = 7, 4
Found = dict[str, Any]


class Results(NamedTuple):
    name: str
    saved: list[Found]  # by rank
    loaded: list[Found]  # by pair of wrappers
    trained: dict[str, Tensor]


def partner_of(name: str) -> str:
    """Return the wrapper that exchanges checkpoints with a case."""
    names = list(CASES)
    others = [partner for partner in PARTNERS if partner != name]
    return others[names.index(name) % len(others)]


def averaged(name: str, build_of: str) -> tuple[nn.Module, ShardedAverage]:
    """Return the model of one case in the wrapper of another, and its averages."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.wrap(CASES[build_of].build())
    return model, ShardedAverage(model, RULES, process_group=average_group(case))


def average_all(model: nn.Module, average: ShardedAverage, models: list[dict[str, Tensor]]) -> None:
    for values in models:
        write(model, values)
        average.update()


def after_ten_steps(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model after ten training steps."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, optimizer, 10)
    buffers = {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return read(model) | buffers


def saved_on_rank(name: str, folder: Path) -> Found:
    case = CASES[name]
    models = trajectory(NUM_MODELS, case.build())
    for wrapper in (partner_of(name), name):
        model, average = averaged(wrapper, name)
        average_all(model, average, models[:NUM_SAVED])
        save_checkpoint({"swa": average}, checkpoint_id=folder / wrapper)
    average_all(model, average, models[NUM_SAVED:])
    found: Found = {"update": {rule: average.full_state_dict(rule) for rule in RULES}}
    found |= {"swap": {}, "after swap": {}, "transfer": {}}
    for rule in RULES:
        with average.swapped_in(rule):
            found["swap"][rule] = read(model)
            model.eval()
            with torch.no_grad():
                model(torch.ones(2, 4))
        average.state_dict()  # reshards the model
        found["after swap"][rule] = read(model)
    found["ten steps"] = after_ten_steps(model)
    twin, _ = averaged(name, name)
    write(twin, models[-1])
    found["ten steps without swaps"] = after_ten_steps(twin)
    for rule in RULES:
        average.transfer(rule)
        found["transfer"][rule] = read(model)
    return found


def loaded_on_rank(name: str, folder: Path) -> list[Found]:
    case = CASES[name]
    models = trajectory(NUM_MODELS, case.build())
    found = []
    for source, target in ((name, name), (name, partner_of(name)), (partner_of(name), name)):
        model, average = averaged(target, name)
        load_checkpoint({"swa": average}, checkpoint_id=folder / source)
        assert average.num_averaged == NUM_SAVED
        average_all(model, average, models[NUM_SAVED:])
        found.append({rule: average.full_state_dict(rule) for rule in RULES})
    return found


def is_close(found: dict[str, Tensor], oracle: dict[str, Tensor]) -> bool:
    ulps = 2**-24 * math.sqrt(NUM_MODELS) * 8
    return all(torch.allclose(found[name].double(), oracle[name], rtol=ulps, atol=ulps) for name in oracle)


def oracle_of(name: str, rule: str) -> dict[str, Tensor]:
    return weighted_sum(closed_form(RULES[rule], NUM_MODELS), trajectory(NUM_MODELS, CASES[name].build()))


@pytest.fixture(scope="module", params=CASES)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    name: str = request.param
    folder = tmp_path_factory.mktemp("matrix")
    saved = run_on_ranks(saved_on_rank, CASES[name].saving_ranks, name, folder)
    loaded = run_on_ranks(loaded_on_rank, CASES[name].loading_ranks, name, folder)[0]
    return Results(name, saved, loaded, trajectory(NUM_MODELS, CASES[name].build())[-1])


@pytest.mark.parametrize("rule", RULES)
def test_update_averages_as_the_reference_does(results: Results, rule: str) -> None:
    full = results.saved[0]["update"][rule]
    assert is_close(full, oracle_of(results.name, rule))
    model = CASES[results.name].build()
    assert set(full) == set(model.state_dict())
    model.load_state_dict(full, strict=True)


@pytest.mark.parametrize("rule", RULES)
def test_swapped_in_gives_the_model_the_average_and_then_its_own_weights(results: Results, rule: str) -> None:
    for found in results.saved:
        assert found["swap"][rule].keys() == results.trained.keys()
        assert same_bits(found["swap"][rule], results.saved[0]["update"][rule], results.trained)
        assert same_bits(found["after swap"][rule], results.trained)


@pytest.mark.parametrize("rule", RULES)
def test_transfer_gives_the_model_the_average(results: Results, rule: str) -> None:
    for found in results.saved:
        assert same_bits(found["transfer"][rule], results.saved[0]["update"][rule], results.trained)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pair", range(3), ids=["same wrapper", "into another wrapper", "from another wrapper"])
def test_loading_on_another_number_of_ranks_continues_with_the_same_bits(
    results: Results, pair: int, rule: str
) -> None:
    assert same_bits(results.loaded[pair][rule], results.saved[0]["update"][rule])


def test_training_after_swaps_has_the_same_bits(results: Results) -> None:
    for found in results.saved:
        assert not same_bits(found["ten steps"], results.trained, results.trained)
        assert same_bits(found["ten steps"], found["ten steps without swaps"])
