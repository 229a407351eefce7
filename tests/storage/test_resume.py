"""A saved average loads under any wrapper on any number of ranks, and a resumed run equals an uninterrupted one."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from checkpoints import ManyBuffers, deep, wide
from dist_swa import EMA, SWA, Equal, ShardedAverage, Window, checkpoint
from dist_swa.averaging.rules import Rule
from models import Net, build, group_of, same_bits, train, trajectory, wrap, write
from ranks import on_ranks, run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a checkpoint of one process
WRAPPERS = ("plain", "ddp", "fsdp1", "fsdp2", "hsdp", "fsdp2+tp")
WORLD_SIZES = (1, 2, 3, 4, 8)
RULE = EMA(decay=0.9, warmup=True)  # the next weight depends on num_averaged


def update(model: nn.Module, averages: list[ShardedAverage], models: list[dict[str, Tensor]]) -> None:
    for values in models:
        write(model, values)
        for average in averages:
            average.update()


def save_all(folder: Path) -> list[dict[str, Tensor]]:
    """Save averages of 4 models under every wrapper, in one checkpoint; return them after 3 more models."""
    models = {wrapper: wrap(build(), wrapper) for wrapper in WRAPPERS}
    averages = {wrapper: ShardedAverage(model, RULE) for wrapper, model in models.items()}
    for wrapper, model in models.items():
        update(model, [averages[wrapper]], trajectory(7, build())[:4])
    checkpoint.save(averages, folder / f"{dist.get_world_size()}")
    for wrapper, model in models.items():
        update(model, [averages[wrapper]], trajectory(7, build())[4:])
    return [average.full_state_dict() for average in averages.values()]


def has_same_shards(left: ShardedAverage, right: ShardedAverage) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    pairs = [(mine["slots"]["0"][name], value) for name, value in theirs["slots"]["0"].items()]
    pairs += [(mine["buffers"][name], value) for name, value in theirs["buffers"].items()]
    return left.num_averaged == right.num_averaged > 0 and all(torch.equal(local(a), local(b)) for a, b in pairs)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Return the checkpoints of every wrapper on every number of ranks, and the average after 3 more models."""
    folder = tmp_path_factory.mktemp("matrix")
    found = [result for ranks in WORLD_SIZES for result in run_on_ranks(save_all, ranks, folder)[0]]
    assert all(same_bits(result, found[0]) for result in found)
    return folder, found[0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("source", WORLD_SIZES)
@on_ranks(*WORLD_SIZES)
def test_any_wrapper_and_number_of_ranks_continues_with_the_same_bits(
    matrix: tuple[Path, dict[str, Tensor]], source: int, wrapper: str
) -> None:
    """Load what every wrapper has saved on `source` ranks, and compare the shards with an average never saved."""
    folder, expected = matrix
    model = wrap(build(), wrapper)
    never_saved = ShardedAverage(model, RULE)
    update(model, [never_saved], trajectory(7, build())[:4])
    averages = {saved: ShardedAverage(model, RULE) for saved in WRAPPERS}
    checkpoint.load({**averages}, folder / f"{source}")
    assert [saved for saved in WRAPPERS if not has_same_shards(averages[saved], never_saved)] == []
    update(model, [never_saved, *averages.values()], trajectory(7, build())[4:])
    assert [saved for saved in WRAPPERS if not has_same_shards(averages[saved], never_saved)] == []
    full = never_saved.full_state_dict()
    assert same_bits(full, expected) or (dist.get_rank() > 0 and not full)


def test_the_table_of_the_format_names_every_key() -> None:
    model = build()
    swa = SWA(model, torch.optim.SGD(model.parameters(), lr=0.1), swa_start="1ba", swa_end=None, update_interval="1ba")
    swa.step()
    described = str(checkpoint.__doc__).partition("version 1 of the format")[2].partition("Several averages")[0]
    state = swa.state_dict()
    for key in state:
        for inner in state["schedule"] if key == "schedule" else [""]:
            assert re.search(rf"`(swa.schedule)?\.?{inner}`" if inner else rf"`swa\.{key}[.`]", described), (key, inner)
    rows = re.findall(r"^\| `swa\.(\w+)", described, re.MULTILINE)
    assert set(rows) == set(state)


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "hsdp", "group"])
@on_ranks(4)
def test_loaded_buffers_are_those_of_rank_0_on_every_rank(tmp_path: Path, wrapper: str, buffers: str) -> None:
    averages = []
    for _ in range(2):
        model = wrap(ManyBuffers(), wrapper)
        for i, buffer in enumerate(model.buffers()):  # after the wrapper: DDP makes them equal
            buffer.fill_(10 * i + dist.get_rank())
        averages.append(ShardedAverage(model, buffers=buffers, process_group=group_of(wrapper)))
        averages[-1].update()
    saved, loaded = averages
    save_checkpoint({"swa": saved}, checkpoint_id=tmp_path / "a")
    load_checkpoint({"swa": loaded}, checkpoint_id=tmp_path / "a")
    loaded.transfer()  # into the second model
    assert all(bool(buffer.eq(10 * i).all()) for i, buffer in enumerate(model.buffers()))
    for buffer in model.buffers():
        buffer.zero_()
    loaded.update()  # continues from the loaded buffers, or copies
    loaded.transfer()
    share = 5 if buffers == "average" else 0
    assert all(bool(buffer.eq(share * i).all()) for i, buffer in enumerate(model.buffers()) if buffer.ndim)


class State:
    """A training run on some ranks: its steps, and the state that a script would save."""

    def __init__(self, wrapper: str, **options: Any) -> None:
        torch.manual_seed(0 if wrapper == "fsdp2+tp" else dist.get_rank())  # replicas under TP drop out the same
        self.model = wrap(build(), wrapper)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        schedule: dict[str, Any] = {"max_duration": "30ba", "swa_start": "0.3dur", "swa_end": None}
        schedule |= {"update_interval": "3ba", "schedule_swa_lr": True, "swa_lr": 0.2, "anneal_steps": 4}
        self.swa = SWA(self.model, self.optimizer, **(schedule | options))

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            train(self.model, self.optimizer, 1, first=step)
            self.swa.step()

    def state(self) -> dict[str, Any]:
        """Return the state to save; each rank saves its own buffers and random state."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        own = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        own["random_state"] = torch.get_rng_state()
        return {"model": model, "optimizer": optimizer, "swa": self.swa, str(dist.get_rank()): own}

    def save(self, folder: Path) -> None:
        save_checkpoint(self.state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = self.state()
        load_checkpoint(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        own = state[str(dist.get_rank())]
        torch.set_rng_state(own["random_state"])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(own[name])

    def result(self) -> dict[str, Any]:
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        facts = {"lrs": lrs, "num_averaged": self.swa.num_averaged, "started": self.swa.started}
        facts |= {"completed": self.swa.completed, "position": self.swa.schedule.state_dict()}
        parameters = dict(Net().named_parameters())
        full = self.swa.average.full_state_dict() if self.swa.started else {}
        return facts | {name: value for name, value in full.items() if name in parameters}


MOMENTS: dict[str, tuple[int, str | None]] = {  # the step after which a run is interrupted, and its swa_end
    "before the first update": (5, None),
    "in the learning-rate phase": (10, None),
    "between two updates": (14, None),
    "at an update": (18, "0.7dur"),
    "after completion": (25, "0.7dur"),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "hsdp", "fsdp2+tp"])
@on_ranks(2)
def test_a_resumed_run_equals_an_uninterrupted_run(tmp_path: Path, wrapper: str, moment: str) -> None:
    step, swa_end = MOMENTS[moment]
    uninterrupted = State(wrapper, swa_end=swa_end)
    uninterrupted.run(0, step)
    uninterrupted.save(tmp_path)
    uninterrupted.run(step, 30)
    resumed = State(wrapper, swa_end=swa_end)
    resumed.load(tmp_path)
    resumed.run(step, 30)
    expected, found = uninterrupted.result(), resumed.result()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]) if isinstance(value, Tensor) else value == found[name], name
    assert found["completed"] == (swa_end is not None)


def fewer() -> Net:
    model = build()
    del model.one_row
    model.register_buffer("one_row", torch.ones(1), persistent=False)
    return model


REFUSED: dict[str, tuple[Rule, Callable[[], Net], type[BaseException], str]] = {
    "rule": (EMA(decay=0.9), build, CheckpointException, "Missing key in checkpoint state_dict: swa.rule.EMA"),
    "shape": (Equal(), wide, CheckpointException, "Size mismatch .*swa.slots.0.one_row"),
    "more": (Equal(), deep, CheckpointException, "Missing key in checkpoint state_dict: swa.slots.0.more"),
    "fewer": (Equal(), fewer, ValueError, "needs a checkpoint of 7 averaged parameters, got num_parameters=8; load"),
}


@pytest.mark.parametrize("case", REFUSED)
@on_ranks(2)
def test_plain_dcp_refuses_a_checkpoint_that_does_not_fit(tmp_path: Path, case: str) -> None:
    rule, model, error, message = REFUSED[case]
    saved = ShardedAverage(wrap(build(), "fsdp2"))
    saved.update()
    save_checkpoint({"swa": saved}, checkpoint_id=tmp_path)
    loading = ShardedAverage(wrap(model(), "fsdp2"), rule)
    with pytest.raises(error, match=message):
        load_checkpoint({"swa": loading}, checkpoint_id=tmp_path)
    assert loading.num_averaged == 0
    if error is CheckpointException:  # raised by DCP before it reads a tensor
        assert all(not value.to_local().any() for value in loading.state_dict()["slots"]["0"].values())


def replace(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda state: state["slots"]["0"].__setitem__(name, value)


def rename(state: dict[str, Any]) -> None:
    state["slots"]["0"]["norm.scale"] = state["slots"]["0"].pop("norm.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state["format_version"].fill_(2),
            r"needs format_version <= 1, got format_version=2; update dist_swa",
        ),
        (replace("norm.weight", torch.zeros(6)), r"needs norm.weight of shape \(5,\), got shape=\(6,\); load the"),
        (rename, r"needs norm.weight of shape \(5,\), got shape=None; load the checkpoint into the model"),
        (replace("more", torch.zeros(1)), r"needs more of shape None, got shape=\(1,\); load the checkpoint into"),
        (lambda state: state.pop("rule"), r"needs what state_dict returns, got missing=\['rule'\]; pass all of it"),
    ],
    ids=["version", "shape", "name", "more", "missing"],
)
def test_state_that_does_not_fit_is_refused_with_nothing_changed(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    average = ShardedAverage(build(seed=1))
    average.update()
    before = average.full_state_dict()
    other = ShardedAverage(build(seed=2))
    other.update()
    other.update()
    state = other.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        average.load_state_dict(state)
    assert same_bits(average.full_state_dict(), before)
    assert average.num_averaged == 1


def test_rule_of_a_checkpoint() -> None:
    model = build()
    saved = ShardedAverage(model, EMA(decay=0.9))
    saved.update()
    with pytest.raises(ValueError, match=r"needs a checkpoint of rule=Equal, got rule=EMA; build the average with"):
        ShardedAverage(model).load_state_dict(saved.state_dict())
    other = ShardedAverage(model, EMA(decay=0.5))
    with pytest.warns(UserWarning, match=r"was averaged with EMA\(decay=0.9.*; continuing with EMA\(decay=0.5"):
        other.load_state_dict(saved.state_dict())
    assert (other.num_averaged, other.rule) == (1, EMA(decay=0.5))


@pytest.mark.parametrize(("saved", "loading"), [(3, 2), (2, 3)])
def test_window_of_another_size_is_refused(saved: int, loading: int) -> None:
    model = build()
    state = ShardedAverage(model, Window(saved)).state_dict()
    with pytest.raises(ValueError, match=r"needs as many slots as the checkpoint has, got Window"):
        ShardedAverage(model, Window(loading)).load_state_dict(state)


@pytest.mark.parametrize(("saved", "loading"), [("fsdp2", "plain"), ("plain", "fsdp2")])
@on_ranks(2)
def test_state_of_another_layout_is_refused(saved: str, loading: str) -> None:
    state = ShardedAverage(wrap(build(), saved)).state_dict()
    with pytest.raises(ValueError, match=r"needs tensors laid out as this average's, .*checkpoint.load, which"):
        ShardedAverage(wrap(build(), loading)).load_state_dict(state)


def test_average_and_controller_are_stateful() -> None:
    model = build()
    assert isinstance(ShardedAverage(model), Stateful)
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
    assert isinstance(swa, Stateful)

    def leaves(tree: Any) -> list[Any]:
        return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree]

    assert all(isinstance(leaf, Tensor) for leaf in leaves(swa.state_dict()))  # DCP would pickle other values
