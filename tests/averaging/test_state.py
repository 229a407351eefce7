"""Several averages of one model, averaged buffers, and what a checkpoint says of each average."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from dist_swa import EMA, DecayShaped, Equal, Polynomial, PowerEMA, ShardedAverage, Window
from dist_swa.averaging.rules import Rule
from models import build, group_of, same_bits, trajectory, wrap, write
from ranks import on_ranks, run_on_ranks
from reference import closed_form

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a checkpoint of one process
RULES: dict[str, Rule] = {
    "equal": Equal(),
    "window": Window(3),
    "polynomial": Polynomial(2.0),
    "ema": EMA(decay=0.9),
    "power": PowerEMA(0.1),
    "shaped": DecayShaped("minus_sqrt", 7),
    "short": EMA(half_life="3ba"),
    "long": EMA(half_life="100tok"),
}
ELAPSED = {"ba": 2, "tok": 64}


def follow(average: ShardedAverage, model: nn.Module, models: list[dict[str, Tensor]]) -> None:
    for values in models:
        write(model, values)
        average.update(ELAPSED)


@on_ranks(1, 3)
def test_several_averages_have_the_bits_of_single_ones() -> None:
    for wrapper in ("plain", "group", "ddp", "fsdp1", "fsdp2"):
        for dtype in (torch.float32, torch.bfloat16) if wrapper != "fsdp1" else (torch.float32,):
            model, models = wrap(build().to(dtype), wrapper), trajectory(7, build())
            together = ShardedAverage(model, RULES, process_group=group_of(wrapper))
            singles = {name: ShardedAverage(model, r, process_group=group_of(wrapper)) for name, r in RULES.items()}
            for values in models:
                write(model, values)
                for average in (together, *singles.values()):
                    average.update(ELAPSED)
            assert together.num_averaged == 7
            for name, single in singles.items():
                assert same_bits(together.full_state_dict(name), single.full_state_dict()), (wrapper, dtype, name)


def test_each_average_swaps_transfers_and_keeps_its_own_buffers() -> None:
    linear, norm = nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1)
    model = nn.Sequential(linear, norm)
    average = ShardedAverage(model, {"equal": Equal(), "last": EMA(0.0)})
    for value in (1.0, 3.0):
        nn.init.constant_(linear.weight, value)
        average.update()
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    for name, weight, statistic in (("equal", 2.0, 5.0), ("last", 3.0, 7.0)):
        with average.swapped_in(name):
            assert linear.weight.eq(weight).all()
            assert mean.eq(0).all()
            mean.fill_(statistic)
    for name, weight, statistic in (("equal", 2.0, 5.0), ("last", 3.0, 7.0)):
        full = average.full_state_dict(name)
        assert full["0.weight"].eq(weight).all()
        assert full["1.running_mean"].eq(statistic).all()
        with average.swapped_in("equal" if name == "last" else "last"):  # of another one: its own all the same
            assert same_bits(average.full_state_dict(name), full)
    average.transfer("equal")
    assert linear.weight.eq(2).all()
    assert mean.eq(5).all()


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({}, ValueError, r"needs at least one rule, got rule=\{\}; Equal\(\)"),
        ({"a": Equal(), "b": "ema"}, TypeError, r"needs a rule, got rule='ema'; pass Equal\(\)"),
        ({"a.b": Equal()}, ValueError, r"need names of letters, digits and _, .* got name='a.b'; the names are"),
        ({"": Equal()}, ValueError, r"need names of letters, digits and _, .* got name=''; the names are"),
        ({3: Equal()}, ValueError, r"need names of letters, digits and _, .* got name=3; the names are"),
        ({"schedule": Equal()}, ValueError, r"need names .* other than 'schedule', got name='schedule'; the names"),
    ],
)
def test_rules_that_make_no_averages(rule: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ShardedAverage(nn.Linear(2, 2), rule)


def test_a_wrong_name_is_refused() -> None:
    several = ShardedAverage(nn.Linear(2, 2), {"swa": Equal(), "ema": EMA(0.9)})
    single = ShardedAverage(nn.Linear(2, 2))
    named = ShardedAverage(nn.Linear(2, 2), {"swa": Equal()})
    for average in (several, single, named):
        average.update()
    for name in (None, "lawa"):
        for action in (several.full_state_dict, several.transfer, lambda name: several.swapped_in(name).__enter__()):
            with pytest.raises(
                ValueError, match=rf"needs the name of an average, got name={name!r}; pass one of swa, "
            ):
                action(name)
    with pytest.raises(ValueError, match=r"got name='swa'; leave it out, the average has no name"):
        single.full_state_dict("swa")
    assert same_bits(named.full_state_dict(), named.full_state_dict("swa"))
    assert (several.names, single.names, named.names) == (("swa", "ema"), (), ("swa",))


def test_half_lives_in_several_units_need_a_mapping() -> None:
    average = ShardedAverage(nn.Linear(2, 2), {"a": EMA(half_life="3ba"), "b": EMA(half_life="9tok")})
    with pytest.raises(ValueError, match=r"in several units needs a mapping of \['ba', 'tok'\], got elapsed=1; pass"):
        average.update(1)
    average.update(ELAPSED)
    with pytest.raises(ValueError, match=r"training since the last update in 'tok', got elapsed=\{'ba': 1\}"):
        average.update({"ba": 1})
    assert average.num_averaged == 1


def test_an_update_that_one_rule_refuses_changes_none() -> None:
    model = nn.Linear(2, 2)
    average = ShardedAverage(model, {"a": Equal(), "b": DecayShaped("linear", 1)})
    average.update()
    before = average.full_state_dict("a")
    nn.init.ones_(model.weight)
    with pytest.raises(RuntimeError, match="needs at most total=1 models, got n=2"):
        average.update()
    assert same_bits(average.full_state_dict("a"), before)
    assert average.num_averaged == 1


def save_halfway(folder: Path, wrapper: str) -> dict[str, dict[str, Tensor]]:
    model = wrap(build(), wrapper)
    average = ShardedAverage(model, RULES, process_group=group_of(wrapper))
    follow(average, model, trajectory(7, build())[:4])
    save_checkpoint({"swa": average}, checkpoint_id=folder / wrapper)
    follow(average, model, trajectory(7, build())[4:])
    return {name: average.full_state_dict(name) for name in RULES}


def load_halfway(folder: Path, wrapper: str, source: str) -> dict[str, dict[str, Tensor]]:
    model = wrap(build(), wrapper)
    average = ShardedAverage(model, RULES, process_group=group_of(wrapper))
    load_checkpoint({"swa": average}, checkpoint_id=folder / source)
    assert average.num_averaged == 4
    follow(average, model, trajectory(7, build())[4:])
    return {name: average.full_state_dict(name) for name in RULES}


def test_every_rule_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    expected = run_on_ranks(save_halfway, 2, tmp_path, "fsdp2")[0]
    for num_ranks, wrapper in ((2, "fsdp2"), (3, "ddp"), (1, "plain")):
        found = run_on_ranks(load_halfway, num_ranks, tmp_path, wrapper, "fsdp2")[0]
        assert found.keys() == RULES.keys()
        assert [name for name in found if not same_bits(found[name], expected[name])] == []


def test_each_average_is_an_entry_of_its_own() -> None:
    model = build()
    average = ShardedAverage(model, {"swa": Equal(), "ema": EMA(0.9)})
    average.update()
    state = average.state_dict()
    assert list(state) == ["swa", "ema"]
    single = ShardedAverage(model, EMA(0.9))
    single.load_state_dict(state["ema"])
    assert same_bits(single.full_state_dict(), average.full_state_dict("ema"))
    state["ema"]["num_averaged"] = torch.tensor(5)
    with pytest.raises(ValueError, match=r"updated together, got num_averaged=\{'swa': 1, 'ema': 5\}; pass"):
        average.load_state_dict(state)
    with pytest.raises(ValueError, match=r"needs what state_dict returns, got missing=\['ema'\]; pass all of it"):
        average.load_state_dict({"swa": state["swa"]})


@on_ranks(2)
def test_ties_are_written_down() -> None:
    for wrapper in ("plain", "ddp", "fsdp1", "fsdp1 flat", "fsdp2", "tp"):
        ties = ShardedAverage(wrap(build(), wrapper)).state_dict()["ties"]
        others = {name: json.loads(bytes(encoded.tolist())) for name, encoded in ties.items()}
        assert others == {"tied.weight": ["again.weight"]}, wrapper


class Statistics(nn.Module):
    """Buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.mean = nn.Buffer(torch.zeros(3))
        self.small = nn.Buffer(torch.zeros(3, dtype=torch.bfloat16))
        self.wave = nn.Buffer(torch.zeros(2, dtype=torch.complex64))
        self.count = nn.Buffer(torch.tensor(0))
        self.passing = nn.Buffer(torch.zeros(1), persistent=False)
        self.late: Tensor | None
        self.register_buffer("late", None)

    def fill(self, value: float) -> None:
        for name, buffer in self.named_buffers():
            buffer.fill_(1j * value if name == "wave" else value)


NUM_FILLS = 7


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.unit is None], ids=str)
def test_averaged_buffers_follow_the_closed_form(rule: Rule) -> None:
    model = Statistics()
    average = ShardedAverage(model, rule, buffers="average")
    values = [float(value) for value in torch.randn(NUM_FILLS, generator=torch.Generator().manual_seed(0))]
    for value in values:
        model.fill(value)
        average.update()
    oracle = sum(c * v for c, v in zip(closed_form(rule, NUM_FILLS), values, strict=True))
    full = average.full_state_dict()
    torch.testing.assert_close(full["mean"], torch.full((3,), oracle), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(full["wave"], torch.full((2,), 1j * oracle), rtol=1e-5, atol=1e-6)
    rounded = [torch.tensor(value).bfloat16().item() for value in values]
    of_rounded = sum(c * v for c, v in zip(closed_form(rule, NUM_FILLS), rounded, strict=True))
    # Averaged in float32, and rounded once.
    torch.testing.assert_close(full["small"], torch.full((3,), of_rounded).bfloat16(), rtol=2**-8, atol=0)
    assert full["count"] == int(values[-1])
    with average.swapped_in():
        assert model.mean.equal(full["mean"])
        assert model.passing.item() == pytest.approx(oracle, abs=1e-6)
    assert model.mean.eq(values[-1]).all()
    model.fill(9)
    assert same_bits(average.full_state_dict(), full)  # never aliased


def test_what_is_written_into_averaged_buffers_stays_until_the_next_update() -> None:
    model = Statistics()
    average = ShardedAverage(model, buffers="average")
    for value in (1.0, 2.0):
        model.fill(value)
        average.update()
    with average.swapped_in():
        assert model.mean.eq(1.5).all()
        model.mean.fill_(8)
    assert average.full_state_dict()["mean"].eq(8).all()
    assert average.state_dict()["buffers"]["mean"].eq(8).all()
    model.fill(3)
    average.update()
    assert average.full_state_dict()["mean"].eq(2).all()


def test_averaged_buffers_go_on_from_a_state_dict() -> None:
    for rule in (EMA(0.5), Window(2)):
        averages = []
        for first in (1.0, 5.0):
            model = Statistics()
            averages.append((model, ShardedAverage(model, rule, buffers="average")))
            for value in (first, first + 1):
                model.fill(value)
                averages[-1][1].update()
        (_, saved), (_, loaded) = averages
        loaded.load_state_dict(saved.state_dict())
        for model, average in averages:
            model.fill(9)
            average.update()
        assert same_bits(loaded.full_state_dict(), saved.full_state_dict()), rule


@pytest.mark.parametrize("rule", [Equal(), Window(3)], ids=str)
def test_averaged_buffers_that_come_and_change_their_shape(rule: Rule) -> None:
    model = Statistics()
    average = ShardedAverage(model, rule, buffers="average")
    seen: list[Any] = []
    for late in (None, torch.ones(2), torch.ones(2) * 4, torch.ones(4), torch.ones(4) * 3, None):
        model.late = late
        if late is None:
            model.fill(2)
        model.mean.fill_(2)
        average.update()
        full = average.full_state_dict()
        assert full["mean"].eq(2).all()
        seen.append(full["late"].tolist() if "late" in full else None)
    assert seen[0] is None
    assert seen[1] == [1, 1]
    assert 1 < seen[2][0] < 4
    assert seen[3] == [1, 1, 1, 1]
    assert 1 < seen[4][0] < 3
    assert seen[5] is None


def averaged_buffers_survive(folder: Path, wrapper: str) -> bool:
    found = []
    for rule in (Equal(), Window(2)):
        averages = []
        for _ in range(2):
            net = Statistics()
            model = wrap(net, wrapper)
            averages.append(ShardedAverage(model, rule, buffers="average"))
            for value in (1.0, 2.0):
                net.fill(value + 10 * torch.distributed.get_rank())
                averages[-1].update()
        saved, loaded = averages
        with loaded.swapped_in():
            net.fill(77)
        path = folder / f"{wrapper} {rule.num_slots}"
        save_checkpoint({"swa": saved}, checkpoint_id=path)
        load_checkpoint({"swa": loaded}, checkpoint_id=path)
        with loaded.swapped_in():
            found.append(bool(net.mean.eq(1.5).all()) and int(net.count) == 2)  # rank 0's, on every rank
        net.fill(3)
        loaded.update()
        expected = 2.5 if rule.num_slots == 2 else 2.0
        found.append(bool(loaded.state_dict()["buffers"]["mean"].as_subclass(Tensor).eq(expected).all()))
    return all(found)


def test_averaged_buffers_go_through_a_checkpoint(tmp_path: Path) -> None:
    for wrapper in ("ddp", "fsdp2"):
        assert all(run_on_ranks(averaged_buffers_survive, 2, tmp_path, wrapper)), wrapper
