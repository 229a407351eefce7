"""An average goes through torch.distributed.checkpoint to any wrapper and number of ranks, and resumes to the bit."""

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

from dist_swa import EMA, SWA, ShardedAverage, Window, checkpoint
from models import Net, build, group_of, same_bits, train, trajectory, wrap, write
from ranks import on_ranks, run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a checkpoint of one process
WRAPPERS = ("plain", "ddp", "fsdp1", "fsdp2", "hsdp", "fsdp2+tp")
WORLD_SIZES = (1, 2, 3, 4, 8)
RULE = EMA(decay=0.9, warmup=True)  # what comes next depends on how many were averaged


def follow(model: nn.Module, averages: list[ShardedAverage], models: list[dict[str, Tensor]]) -> None:
    for values in models:
        write(model, values)
        for average in averages:
            average.update()


def save_all(folder: Path) -> list[dict[str, Tensor]]:
    """Save averages of 4 models under every wrapper, in one checkpoint; return what they become after 3 more."""
    models = {wrapper: wrap(build(), wrapper) for wrapper in WRAPPERS}
    averages = {wrapper: ShardedAverage(model, RULE) for wrapper, model in models.items()}
    for wrapper, model in models.items():
        follow(model, [averages[wrapper]], trajectory(7, build())[:4])
    checkpoint.save(averages, folder / f"{dist.get_world_size()}")
    for wrapper, model in models.items():
        follow(model, [averages[wrapper]], trajectory(7, build())[4:])
    return [average.full_state_dict() for average in averages.values()]


def load_all(folder: Path, expected: dict[str, Tensor]) -> int:
    """Load what every wrapper on every number of ranks wrote into every wrapper, and go on; return how often.

    What was loaded is compared on every rank, with an average that was never saved: its shards, bit by bit.
    """
    num_loaded = 0
    for wrapper in WRAPPERS:
        model = wrap(build(), wrapper)
        never_saved = ShardedAverage(model, RULE)
        follow(model, [never_saved], trajectory(7, build())[:4])
        for source in sorted(folder.iterdir()):
            averages = {saved: ShardedAverage(model, RULE) for saved in WRAPPERS}
            checkpoint.load({**averages}, source)
            num_loaded += sum(has_same_shards(average, never_saved) for average in averages.values())
        follow(model, [never_saved, *averages.values()], trajectory(7, build())[4:])
        assert all(has_same_shards(average, never_saved) for average in averages.values())
        full = never_saved.full_state_dict()
        assert not full or same_bits(full, expected), wrapper
    return num_loaded


def has_same_shards(left: ShardedAverage, right: ShardedAverage) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    pairs = [(mine[kind][name], value) for kind in ("slots", "buffers") for name, value in theirs[kind].items()]
    return left.num_averaged == right.num_averaged > 0 and all(torch.equal(local(a), local(b)) for a, b in pairs)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Return the checkpoints of every wrapper on every number of ranks, and what they become after 3 more models."""
    folder = tmp_path_factory.mktemp("matrix")
    found = [result for ranks in WORLD_SIZES for result in run_on_ranks(save_all, ranks, folder)[0]]
    assert all(same_bits(result, found[0]) for result in found)
    return folder, found[0]


@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_any_wrapper_and_number_of_ranks_goes_on_to_the_same_bits(
    matrix: tuple[Path, dict[str, Tensor]], ranks: int
) -> None:
    num_loaded = run_on_ranks(load_all, ranks, *matrix)
    assert num_loaded == [len(WRAPPERS) * len(WORLD_SIZES) * len(WRAPPERS)] * ranks


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


class Buffers(nn.Module):
    """Many buffers of several sizes, so that DCP would take them from different ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        for i in range(24):
            self.register_buffer(f"b{i}", torch.zeros(i % 5 + 1, 7))
        self.register_buffer("count", torch.tensor(0))


def buffers_survive(folder: Path, wrapper: str, buffers: str) -> bool:
    averages = []
    for _ in range(2):
        model = wrap(Buffers(), wrapper)
        for i, buffer in enumerate(model.buffers()):  # after the wrapper: DDP makes them equal
            buffer.fill_(10 * i + dist.get_rank())
        averages.append(ShardedAverage(model, buffers=buffers, process_group=group_of(wrapper)))
        averages[-1].update()
    saved, loaded = averages
    save_checkpoint({"swa": saved}, checkpoint_id=folder / wrapper)
    load_checkpoint({"swa": loaded}, checkpoint_id=folder / wrapper)
    loaded.transfer()  # into the model of the last round
    found = [bool(buffer.eq(10 * i).all()) for i, buffer in enumerate(model.buffers())]
    for buffer in model.buffers():
        buffer.zero_()
    loaded.update()  # averages on from what was loaded, or copies
    loaded.transfer()
    share = 5 if buffers == "average" else 0
    found += [bool(buffer.eq(share * i).all()) for i, buffer in enumerate(model.buffers()) if buffer.ndim]
    return all(found)


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "hsdp", "group"])
def test_buffers_are_rank_0s_on_every_rank(tmp_path: Path, wrapper: str, buffers: str) -> None:
    assert all(run_on_ranks(buffers_survive, 4, tmp_path, wrapper, buffers))


class State:
    """A training run on some ranks: what a script would put into a checkpoint, and its steps."""

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
        """Return what goes into a checkpoint; buffers and random state are each rank's own."""
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


def resume(folder: Path, wrapper: str, moment: int, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    uninterrupted = State(wrapper, **options)
    uninterrupted.run(0, moment)
    uninterrupted.save(folder)
    uninterrupted.run(moment, 30)
    resumed = State(wrapper, **options)
    resumed.load(folder)
    resumed.run(moment, 30)
    return uninterrupted.result(), resumed.result()


def same_facts(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
        for name, value in left.items()
    )


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "hsdp", "fsdp2+tp"])
def test_resuming_equals_never_having_stopped(tmp_path: Path, wrapper: str) -> None:
    ending = {"swa_end": "0.7dur"}
    # Before the first update, in the LR phase, between two updates, at one, after completion.
    for moment, options in ((5, {}), (10, {}), (14, {}), (18, ending), (25, ending)):
        folder = tmp_path / f"{moment}"
        for uninterrupted, resumed in run_on_ranks(resume, 2, folder, wrapper, moment, options):
            assert same_facts(uninterrupted, resumed), moment
            assert uninterrupted["completed"] == (options == ending)


def refusals(folder: Path) -> bool:
    """Every checkpoint that does not fit is refused before anything changed."""
    average = ShardedAverage(wrap(build(), "fsdp2"))
    average.update()
    save_checkpoint({"swa": average}, checkpoint_id=folder)
    other_rule = ShardedAverage(wrap(build(), "fsdp2"), EMA(decay=0.9))
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: swa.rule.EMA"):
        load_checkpoint({"swa": other_rule}, checkpoint_id=folder)
    wide = build()
    wide.one_row = nn.Parameter(torch.zeros(2, 5))
    other_shape = ShardedAverage(wrap(wide, "fsdp2"))
    with pytest.raises(CheckpointException, match=r"Size mismatch .*swa.slots.0.one_row"):
        load_checkpoint({"swa": other_shape}, checkpoint_id=folder)
    deep = build()
    deep.more = nn.Parameter(torch.zeros(2, 5))
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: swa.slots.0.more"):
        load_checkpoint({"swa": ShardedAverage(wrap(deep, "fsdp2"))}, checkpoint_id=folder)
    for refused in (other_rule, other_shape):
        assert refused.num_averaged == 0
        assert all(not value.to_local().any() for value in refused.state_dict()["slots"]["0"].values())
    fewer = build()
    del fewer.one_row
    fewer.register_buffer("one_row", torch.ones(1), persistent=False)
    with pytest.raises(ValueError, match=r"needs a checkpoint of 7 averaged parameters, got num_parameters=8; load"):
        load_checkpoint({"swa": ShardedAverage(wrap(fewer, "fsdp2"))}, checkpoint_id=folder)
    return True


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    assert all(run_on_ranks(refusals, 2, tmp_path))


def change_version(state: dict[str, Any]) -> None:
    state["format_version"] = torch.tensor(2)


def change_shape(state: dict[str, Any]) -> None:
    state["slots"]["0"]["norm.weight"] = torch.zeros(6)


def change_name(state: dict[str, Any]) -> None:
    state["slots"]["0"]["norm.scale"] = state["slots"]["0"].pop("norm.weight")


def add_name(state: dict[str, Any]) -> None:
    state["slots"]["0"]["more"] = torch.zeros(1)


def drop_key(state: dict[str, Any]) -> None:
    del state["rule"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_version, r"needs format_version <= 1, got version=2; update dist_swa"),
        (change_shape, r"needs norm.weight of shape \(5,\), got shape=\(6,\); load the checkpoint into the model"),
        (change_name, r"needs norm.weight of shape \(5,\), got shape=None; load the checkpoint into the model"),
        (add_name, r"needs more of shape None, got shape=\(1,\); load the checkpoint into the model"),
        (drop_key, r"needs what state_dict returns, got missing=\['rule'\]; pass all of it"),
    ],
)
def test_state_that_does_not_fit_is_refused_with_nothing_changed(
    change: Callable[[dict[str, Any]], None], message: str
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
    with pytest.warns(UserWarning, match=r"was averaged with EMA\(decay=0.9.*; going on with EMA\(decay=0.5"):
        other.load_state_dict(saved.state_dict())
    assert (other.num_averaged, other.rule) == (1, EMA(decay=0.5))


def test_window_of_another_size_is_refused() -> None:
    model = build()
    for saved, loading in ((3, 2), (2, 3)):
        state = ShardedAverage(model, Window(saved)).state_dict()
        with pytest.raises(ValueError, match=r"needs as many slots as the checkpoint has, got Window"):
            ShardedAverage(model, Window(loading)).load_state_dict(state)


@on_ranks(2)
def test_state_of_another_layout_is_refused() -> None:
    sharded, plain = (ShardedAverage(wrap(build(), wrapper)) for wrapper in ("fsdp2", "plain"))
    for average, state in ((plain, sharded.state_dict()), (sharded, plain.state_dict())):
        with pytest.raises(ValueError, match=r"needs tensors laid out as this average's, .*checkpoint.load, which"):
            average.load_state_dict(state)


def test_average_and_controller_are_stateful() -> None:
    model = build()
    assert isinstance(ShardedAverage(model), Stateful)
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
    assert isinstance(swa, Stateful)

    def leaves(tree: Any) -> list[Any]:
        return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree]

    assert all(isinstance(leaf, Tensor) for leaf in leaves(swa.state_dict()))  # nothing that DCP would pickle
