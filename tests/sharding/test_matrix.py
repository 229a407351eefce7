"""Every cell of the README's table: each way to shard and wrap, each rule, against the float64 reference.

One launch of ranks follows a trajectory of known weights, looks, saves and trains on; another one, on another number
of ranks, loads what the first one saved, also under other wrappers. A subtest for each cell compares what they found.
"""

import math
from pathlib import Path
from typing import Any

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


def partner_of(name: str) -> str:
    """Return the wrapper that the checkpoints of a case are exchanged with."""
    names = list(CASES)
    others = [partner for partner in PARTNERS if partner != name]
    return others[names.index(name) % len(others)]


def averaged(name: str, build_of: str) -> tuple[nn.Module, ShardedAverage]:
    """Return the model of one case in the wrapper of another, and its averages."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.wrap(CASES[build_of].build())
    return model, ShardedAverage(model, RULES, process_group=average_group(case))


def follow(model: nn.Module, average: ShardedAverage, models: list[dict[str, Tensor]]) -> None:
    for values in models:
        write(model, values)
        average.update()


def ten_steps(model: nn.Module) -> dict[str, Tensor]:
    """Return all that ten further steps make of a model."""
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
        follow(model, average, models[:NUM_SAVED])
        save_checkpoint({"swa": average}, checkpoint_id=folder / wrapper)
    follow(model, average, models[NUM_SAVED:])
    found: Found = {"update": {rule: average.full_state_dict(rule) for rule in RULES}}
    found |= {"swap": {}, "back": {}, "transfer": {}}
    for rule in RULES:
        with average.swapped_in(rule):
            found["swap"][rule] = read(model)
            model.eval()
            with torch.no_grad():
                model(torch.ones(2, 4))
        average.state_dict()  # reshards
        found["back"][rule] = read(model)
    found["ten steps"] = ten_steps(model)
    twin, _ = averaged(name, name)
    write(twin, models[-1])
    found["ten steps unseen"] = ten_steps(twin)
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
        follow(model, average, models[NUM_SAVED:])
        found.append({rule: average.full_state_dict(rule) for rule in RULES})
    return found


def is_close(found: dict[str, Tensor], oracle: dict[str, Tensor]) -> bool:
    ulps = 2**-24 * math.sqrt(NUM_MODELS) * 8
    return all(torch.allclose(found[name].double(), oracle[name], rtol=ulps, atol=ulps) for name in oracle)


def oracle_of(name: str, rule: str) -> dict[str, Tensor]:
    return weighted_sum(closed_form(RULES[rule], NUM_MODELS), trajectory(NUM_MODELS, CASES[name].build()))


@pytest.mark.parametrize("name", CASES)
def test_matrix(name: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    saved = run_on_ranks(saved_on_rank, CASES[name].saving_ranks, name, tmp_path)
    loaded = run_on_ranks(loaded_on_rank, CASES[name].loading_ranks, name, tmp_path)
    trained = trajectory(NUM_MODELS, CASES[name].build())[-1]
    for rule in RULES:
        full = saved[0]["update"][rule]
        with subtests.test("update", rule=rule):
            assert is_close(full, oracle_of(name, rule))
            assert set(full) == set(CASES[name].build().state_dict())
            CASES[name].build().load_state_dict(full, strict=True)
        with subtests.test("swap", rule=rule):
            for found in saved:
                assert found["swap"][rule].keys() == trained.keys()
                assert same_bits(found["swap"][rule], full, trained)
                assert same_bits(found["back"][rule], trained)
        with subtests.test("transfer", rule=rule):
            for found in saved:
                assert same_bits(found["transfer"][rule], full, trained)
        with subtests.test("save and load", rule=rule):
            assert len(loaded[0]) == 3
            for found in loaded[0]:
                assert same_bits(found[rule], full)
    with subtests.test("ten more training steps"):
        for found in saved:
            assert not same_bits(found["ten steps"], trained, trained)
            assert same_bits(found["ten steps"], found["ten steps unseen"])
