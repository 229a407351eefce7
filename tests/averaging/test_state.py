"""Several averages of one model, averaged buffers, and their state dicts and checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from dist_swa import EMA, DecayShaped, Equal, Polynomial, PowerEMA, ShardedAverage, Window
from dist_swa.averaging.rules import Rule
from models import build, group_of, same_bits, trajectory, wrap, write
from ranks import on_ranks, run_on_ranks
from reference import closed_form

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process saves and loads
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


def average_all(average: ShardedAverage, model: nn.Module, models: list[dict[str, Tensor]]) -> None:
    for values in models:
        write(model, values)
        average.update(ELAPSED)


LAYOUTS = [(wrapper, torch.float32) for wrapper in ("plain", "group", "ddp", "fsdp1", "fsdp2")]
LAYOUTS += [(wrapper, torch.bfloat16) for wrapper in ("plain", "group", "ddp", "fsdp2")]


@pytest.mark.parametrize(("wrapper", "dtype"), LAYOUTS, ids=str)
@on_ranks(1, 3)
def test_several_averages_have_the_bits_of_single_ones(wrapper: str, dtype: torch.dtype) -> None:
    model, group = wrap(build().to(dtype), wrapper), group_of(wrapper)
    several = ShardedAverage(model, RULES, process_group=group)
    singles = {name: ShardedAverage(model, rule, process_group=group) for name, rule in RULES.items()}
    for values in trajectory(7, build()):
        write(model, values)
        for average in (several, *singles.values()):
            average.update(ELAPSED)
    assert several.num_averaged == 7
    found = {name: same_bits(several.full_state_dict(name), singles[name].full_state_dict()) for name in RULES}
    assert found == dict.fromkeys(RULES, True)


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
        with average.swapped_in("equal" if name == "last" else "last"):  # the other average
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
def test_wrong_rules_raise(rule: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ShardedAverage(nn.Linear(2, 2), rule)


@pytest.mark.parametrize("name", [None, "lawa"])
@pytest.mark.parametrize("action", ["full_state_dict", "transfer", "swapped_in"])
def test_an_unknown_name_raises(action: str, name: str | None) -> None:
    average = ShardedAverage(nn.Linear(2, 2), {"swa": Equal(), "ema": EMA(0.9)})
    average.update()
    actions: dict[str, Callable[[], Any]] = {
        "full_state_dict": lambda: average.full_state_dict(name),
        "transfer": lambda: average.transfer(name),
        "swapped_in": lambda: average.swapped_in(name).__enter__(),
    }
    with pytest.raises(ValueError, match=rf"needs the name of an average, got name={name!r}; pass one of swa, "):
        actions[action]()


def test_a_name_for_an_average_without_one_raises() -> None:
    average = ShardedAverage(nn.Linear(2, 2))
    average.update()
    with pytest.raises(ValueError, match=r"got name='swa'; leave it out, the average has no name"):
        average.full_state_dict("swa")


def test_the_name_of_a_single_average_may_be_left_out() -> None:
    average = ShardedAverage(nn.Linear(2, 2), {"swa": Equal()})
    average.update()
    assert same_bits(average.full_state_dict(), average.full_state_dict("swa"))


def test_names_are_those_of_the_rules() -> None:
    assert ShardedAverage(nn.Linear(2, 2)).names == ()
    assert ShardedAverage(nn.Linear(2, 2), {"swa": Equal(), "ema": EMA(0.9)}).names == ("swa", "ema")


def test_half_lives_in_several_units_need_a_mapping() -> None:
    average = ShardedAverage(nn.Linear(2, 2), {"a": EMA(half_life="3ba"), "b": EMA(half_life="9tok")})
    with pytest.raises(ValueError, match=r"in several units needs a mapping of \['ba', 'tok'\], got elapsed=1; pass"):
        average.update(1)
    average.update(ELAPSED)
    with pytest.raises(ValueError, match=r"training since the last update in 'tok', got elapsed=\{'ba': 1\}"):
        average.update({"ba": 1})
    assert average.num_averaged == 1


def test_an_update_that_raises_for_one_rule_changes_no_average() -> None:
    model = nn.Linear(2, 2)
    average = ShardedAverage(model, {"a": Equal(), "b": DecayShaped("linear", 1)})
    average.update()
    before = average.full_state_dict("a")
    nn.init.ones_(model.weight)
    with pytest.raises(RuntimeError, match="needs at most total=1 models, got n=2"):
        average.update()
    assert same_bits(average.full_state_dict("a"), before)
    assert average.num_averaged == 1


def averages_after_a_checkpoint(folder: Path, wrapper: str, saves: bool) -> dict[str, dict[str, Tensor]]:
    """Average four models and save, or load; then average three more."""
    model, models = wrap(build(), wrapper), trajectory(7, build())
    average = ShardedAverage(model, RULES, process_group=group_of(wrapper))
    if saves:
        average_all(average, model, models[:4])
        save_checkpoint({"swa": average}, checkpoint_id=folder)
    else:
        load_checkpoint({"swa": average}, checkpoint_id=folder)
    assert average.num_averaged == 4
    average_all(average, model, models[4:])
    return {name: average.full_state_dict(name) for name in RULES}


@pytest.fixture(scope="module")
def saved_averages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("averages")
    return folder, run_on_ranks(averages_after_a_checkpoint, 2, folder, "fsdp2", saves=True)[0]


@pytest.mark.parametrize(("num_ranks", "wrapper"), [(2, "fsdp2"), (3, "ddp"), (1, "plain")])
def test_every_rule_continues_from_a_checkpoint_with_the_same_bits(
    saved_averages: tuple[Path, dict[str, dict[str, Tensor]]], num_ranks: int, wrapper: str
) -> None:
    folder, expected = saved_averages
    found = run_on_ranks(averages_after_a_checkpoint, num_ranks, folder, wrapper, saves=False)[0]
    assert found.keys() == RULES.keys()
    assert [name for name in found if not same_bits(found[name], expected[name])] == []


def test_a_state_dict_has_one_entry_per_average() -> None:
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


@pytest.mark.parametrize("wrapper", ["plain", "ddp", "fsdp1", "fsdp1 flat", "fsdp2", "tp"])
@on_ranks(2)
def test_a_state_dict_lists_tied_names(wrapper: str) -> None:
    ties = ShardedAverage(wrap(build(), wrapper)).state_dict()["ties"]
    assert {name: json.loads(bytes(encoded.tolist())) for name, encoded in ties.items()} == {
        "tied.weight": ["again.weight"]
    }


class Statistics(nn.Module):
    """A small and a complex buffer, an integer one, one that is not persistent, and one that may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.mean = nn.Buffer(torch.zeros(3))
        self.small = nn.Buffer(torch.zeros(3, dtype=torch.bfloat16))
        self.wave = nn.Buffer(torch.zeros(2, dtype=torch.complex64))
        self.count = nn.Buffer(torch.tensor(0))
        self.transient = nn.Buffer(torch.zeros(1), persistent=False)
        self.late: Tensor | None
        self.register_buffer("late", None)

    def fill(self, value: float) -> None:
        for name, buffer in self.named_buffers():
            buffer.fill_(1j * value if name == "wave" else value)


NUM_FILLS = 7


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.unit is None], ids=str)
def test_averaged_buffers_are_the_closed_form(rule: Rule) -> None:
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
    # The average is kept in float32 and rounded once.
    torch.testing.assert_close(full["small"], torch.full((3,), of_rounded).bfloat16(), rtol=2**-8, atol=0)
    assert full["count"] == int(values[-1])
    with average.swapped_in():
        assert model.mean.equal(full["mean"])
        assert model.transient.item() == pytest.approx(oracle, abs=1e-6)
    assert model.mean.eq(values[-1]).all()
    model.fill(9)
    assert same_bits(average.full_state_dict(), full)  # a copy


def test_averaged_buffers_that_are_written_inside_swapped_in_keep_their_values_until_the_next_update() -> None:
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


@pytest.mark.parametrize("rule", [EMA(0.5), Window(2)], ids=str)
def test_averaged_buffers_continue_from_a_state_dict(rule: Rule) -> None:
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
    assert same_bits(loaded.full_state_dict(), saved.full_state_dict())


@pytest.mark.parametrize("rule", [Equal(), Window(3)], ids=str)
def test_averaged_buffers_start_anew_when_their_shape_changes(rule: Rule) -> None:
    model = Statistics()
    average = ShardedAverage(model, rule, buffers="average")
    found: list[Any] = []
    for late in (None, torch.ones(2), torch.ones(2) * 4, torch.ones(4), torch.ones(4) * 3, None):
        model.late = late
        if late is None:
            model.fill(2)
        model.mean.fill_(2)
        average.update()
        full = average.full_state_dict()
        assert full["mean"].eq(2).all()
        found.append(full["late"].tolist() if "late" in full else None)
    assert found[0] is None
    assert found[1] == [1, 1]
    assert 1 < found[2][0] < 4
    assert found[3] == [1, 1, 1, 1]
    assert 1 < found[4][0] < 3
    assert found[5] is None


@pytest.mark.parametrize(("rule", "expected"), [(Equal(), 2.0), (Window(2), 2.5)], ids=["equal", "window"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@on_ranks(2)
def test_a_checkpoint_has_the_averaged_buffers_of_the_first_rank(
    tmp_path: Path, wrapper: str, rule: Rule, expected: float
) -> None:
    averages = []
    for _ in range(2):
        net = Statistics()
        averages.append(ShardedAverage(wrap(net, wrapper), rule, buffers="average"))
        for value in (1.0, 2.0):
            net.fill(value + 10 * dist.get_rank())
            averages[-1].update()
    saved, loaded = averages
    with loaded.swapped_in():
        net.fill(77)
    save_checkpoint({"swa": saved}, checkpoint_id=tmp_path)
    load_checkpoint({"swa": loaded}, checkpoint_id=tmp_path)
    with loaded.swapped_in():
        assert net.mean.eq(1.5).all()
        assert net.count == 2
    net.fill(3)
    loaded.update()
    assert loaded.state_dict()["buffers"]["mean"].as_subclass(Tensor).eq(expected).all()


def spectral(form: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    forms: dict[str, Callable[[nn.Module], nn.Module]] = {
        "hooked": nn.utils.spectral_norm,
        "parametrized": nn.utils.parametrizations.spectral_norm,
    }
    return nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(forms[form](nn.Linear(4, 3))))


def vectors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(("_u", "_v"))}


@pytest.mark.parametrize("buffers", ["average", "*_u", ["*running_*", lambda name: name.endswith("_v")]])
@pytest.mark.parametrize("form", ["hooked", "parametrized"])
def test_buffers_are_averaged_by_name_and_vectors_of_spectral_norm_only_if_named(form: str, buffers: Any) -> None:
    model = spectral(form)
    average = ShardedAverage(model, buffers=buffers)
    seen = []
    for seed in range(3):
        with torch.no_grad():
            for (_, buffer), (_, value) in zip(
                model.named_buffers(), spectral(form, seed).named_buffers(), strict=True
            ):
                buffer.copy_(value)
            model.get_buffer("0.running_mean").fill_(seed)
        average.update()
        seen.append({name: buffer.double() for name, buffer in model.state_dict().items()})
    named = {"average": ("running_mean", "running_var"), "*_u": ("_u",)}
    averaged = named.get(str(buffers), ("running_mean", "running_var", "_v"))
    last, full = seen[-1], average.full_state_dict()
    assert len(vectors_of(model)) == 2
    for name, _ in model.named_buffers():
        expected = torch.stack([one[name] for one in seen]).mean(0) if name.endswith(averaged) else last[name]
        torch.testing.assert_close(full[name].double(), expected)
