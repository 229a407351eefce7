"""A state loads on other ranks and under other wrappers; a state or checkpoint that does not fit changes nothing."""

import argparse
import copy
import datetime
import random
import resource
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from checkpoints import ManyBuffers, Training, deep, wide
from dist_swa import EMA, SWA, Equal, ShardedAverage, Window, checkpoint
from dist_swa.averaging.rules import Rule
from dist_swa.storage.save_load import save_async
from models import Net, build, same_bits, wrap
from ranks import on_ranks, run_on_ranks

WRAPPERS = ("plain", "ddp", "fsdp1", "fsdp2+tp")


def save_and_wait(state: dict[str, Any], folder: Path) -> None:
    save_async(state, folder)()


SAVES: dict[str, Callable[[dict[str, Any], Path], None]] = {"save": checkpoint.save, "save_async": save_and_wait}
each_save = pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)


def save_all(folder: Path) -> dict[str, Tensor]:
    for name, save in SAVES.items():
        for wrapper in WRAPPERS:
            training = Training(wrapper)
            save(training.state(), folder / f"{name} {wrapper}")
    return training.average.full_state_dict()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Return checkpoints by every way to save and every wrapper on 3 ranks, and the average in each of them."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_on_ranks(save_all, 3, folder)[0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("source", WRAPPERS)
@pytest.mark.parametrize("save", SAVES)
@on_ranks(1, 2)
def test_loads_on_other_ranks_under_other_wrappers(
    saved: tuple[Path, dict[str, Tensor]], save: str, source: str, wrapper: str
) -> None:
    folder, expected = saved
    training = Training(wrapper, models=0)
    state = training.state()
    state["notes"] = {"lr": 0.0, "betas": ()}
    checkpoint.load(state, folder / f"{save} {source}")
    assert state["notes"] == {"lr": 0.1, "betas": (0.9, 1)}
    full = training.average.full_state_dict()
    assert same_bits(full, expected) or (dist.get_rank() > 0 and not full)


def test_one_process_without_a_group_reads_a_checkpoint_of_several_ranks(
    saved: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, expected = saved
    reader = checkpoint.open_checkpoint(folder / "save fsdp2+tp")
    prefix = "swa.slots.0."
    names = {key.removeprefix(prefix) for key in reader.keys if key.startswith(prefix)}
    assert names == {name for name, _ in build().named_parameters()} - {"frozen"}
    for name in names:
        tensor = reader.read(prefix + name)
        assert (reader.shape(prefix + name), reader.dtype(prefix + name)) == (tensor.shape, tensor.dtype)
        assert torch.equal(tensor, expected[name])
    assert (reader.read("notes.betas"), reader.shape("notes.betas"), reader.dtype("notes.lr")) == ((0.9, 1), None, None)
    with pytest.raises(KeyError, match=r"nothing is not in the checkpoint .*fsdp2\+tp"):
        reader.read("nothing")
    training = Training(models=0)
    checkpoint.load(training.state(), folder / "save fsdp2+tp")
    assert same_bits(training.average.full_state_dict(), expected)


@on_ranks(2)
def test_plain_dcp_loads_our_checkpoint(tmp_path: Path) -> None:
    saved, loaded = Training("fsdp2"), Training("fsdp2", models=0)
    checkpoint.save(saved.state(), tmp_path / "a")
    dcp_load({"swa": loaded.average}, checkpoint_id=tmp_path / "a")
    assert same_bits(loaded.average.full_state_dict(), saved.average.full_state_dict())


@on_ranks(2)
def test_a_checkpoint_of_plain_dcp_loads_with_one_warning(tmp_path: Path) -> None:
    saved, loaded = Training("fsdp2"), Training("fsdp2", models=0)
    dcp_save(saved.state(), checkpoint_id=tmp_path / "a")
    with pytest.warns(UserWarning, match="without checksums, damage inside") as warned:
        checkpoint.load({"swa": loaded.average}, tmp_path / "a")
    assert len(warned) == 1
    assert same_bits(loaded.average.full_state_dict(), saved.average.full_state_dict())


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "hsdp"])
@pytest.mark.parametrize("save", [checkpoint.save, save_async])
@on_ranks(4)
def test_saved_buffers_are_those_of_rank_0_at_the_save(tmp_path: Path, save: Callable[..., Any], wrapper: str) -> None:
    model = wrap(ManyBuffers(), wrapper)
    for buffer in model.buffers():
        buffer.fill_(dist.get_rank())
    average = ShardedAverage(model)
    average.update()
    wait = save({"model": get_model_state_dict(model), "swa": average}, tmp_path / "a")
    for buffer in model.buffers():
        buffer.fill_(9)  # while a thread saves
    average.update()
    if wait:
        wait()
    state: dict[str, Any] = {"model": get_model_state_dict(model), "swa": average}
    checkpoint.load(state, tmp_path / "a")
    assert [float(value.max()) for name, value in state["model"].items() if name != "weight"] == [0.0] * 25
    average.transfer()
    assert [float(buffer.max()) for buffer in model.buffers()] == [0.0] * 25


def test_plain_values_load_as_they_were_saved(tmp_path: Path) -> None:
    values: list[Any] = [None, torch.Size([1]), torch.float32, torch.device("cpu"), 1j, {1, 2}, b"x", [1, (2.0, "x")]]
    values += [[], (OrderedDict(a=1), random.getstate())]
    saved: dict[str, Any] = {"v": {str(i): value for i, value in enumerate(values)}, "empty": {}}
    loaded: dict[str, Any] = {"v": dict.fromkeys(saved["v"], 0), "empty": {}}
    checkpoint.save({**saved, "in a list": [saved["v"], torch.ones(1)]}, tmp_path / "a")
    state = {**copy.deepcopy(loaded), "in a list": [copy.deepcopy(loaded["v"]), torch.zeros(1)]}
    checkpoint.load(state, tmp_path / "a")
    assert state == {**saved, "in a list": [saved["v"], torch.ones(1)]}


def test_a_save_replaces_the_files_of_a_killed_save(tmp_path: Path) -> None:
    state = {"x": torch.ones(3)}
    checkpoint.save(state, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / ".a.partial")
    (tmp_path / ".a.partial/__7_0.distcp").touch()
    shutil.rmtree(tmp_path / "a")
    checkpoint.save(state, tmp_path / "a")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".metadata", "SHA256SUMS", "__0_0.distcp", "a"]


# --- Entries that the checkpoint does not have


def test_missing_entries_are_reset_with_one_warning(tmp_path: Path) -> None:
    training = Training(models=2)
    expected = training.values()
    checkpoint.save({"model": get_model_state_dict(training.model)}, tmp_path / "model only")
    with torch.no_grad():
        dict(training.model.named_parameters())["one_row"].zero_()
    average = ShardedAverage(training.model)
    swa = SWA(training.model, swa_start="1ba", swa_end=None, update_interval="1ba")
    average.update()
    assert swa.step()
    state: dict[str, Any] = {"model": get_model_state_dict(training.model), "avg": average, "swa": swa}
    with pytest.warns(UserWarning, match=r"has nothing under \['avg', 'swa'\]: these entries are reset") as warned:
        checkpoint.load(state, tmp_path / "model only")
    assert len(warned) == 1
    assert (average.num_averaged, swa.num_averaged, swa.schedule.now.batches, swa.step()) == (0, 0, 0, True)
    assert same_bits({f"model {name}": value for name, value in state["model"].items()}, expected, list(expected)[-3:])
    assert torch.equal(state["model"]["one_row"], expected["model one_row"])


def test_an_entry_that_cannot_be_reset_keeps_everything_from_being_loaded(tmp_path: Path) -> None:
    swa = SWA(build(), swa_start="1ba", swa_end=None, update_interval="1ba")
    swa.step()
    checkpoint.save({"epoch": torch.tensor(3)}, tmp_path / "epoch only")
    state: dict[str, Any] = {"epoch": torch.tensor(0), "swa": swa}
    with swa.swapped_in(), pytest.raises(RuntimeError, match="load needs the model to have its trained weights"):
        checkpoint.load(state, tmp_path / "epoch only")
    assert (int(state["epoch"]), swa.num_averaged) == (0, 1)


# --- Checkpoints that do not fit


# The rule and model that are saved, those that load, and the error.
MISFITS: dict[str, tuple[Rule, Callable[[], Net], Rule, Callable[[], Net], str]] = {
    "another rule": (Equal(), build, EMA(decay=0.9), build, "Missing key in checkpoint state_dict: swa.rule.EMA"),
    "a new parameter": (Equal(), build, Equal(), deep, "Missing key in checkpoint state_dict: swa.slots.0.more"),
    "another shape": (Equal(), build, Equal(), wide, "Size mismatch .*swa.slots.0.one_row"),
    "a removed parameter": (Equal(), deep, Equal(), build, "was averaged with, got slots.0.more"),
    "a larger window": (Window(2), build, Window(3), build, "Missing key in checkpoint state_dict: swa.slots.2"),
    "a smaller window": (Window(3), build, Window(2), build, "was averaged with, got slots.2.*"),
}


@pytest.mark.parametrize("case", MISFITS)
@on_ranks(2)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path, case: str) -> None:
    saved_rule, saved_model, rule, model, message = MISFITS[case]
    saved = Training("fsdp2", saved_rule, build=saved_model)
    checkpoint.save({"swa": saved.average, "a": torch.ones(4)}, tmp_path / "saved")
    loading = Training("fsdp2", rule, build=model, models=1)
    check_refused(loading, tmp_path / "saved", message)


@on_ranks(2)
def test_a_checkpoint_of_a_newer_format_changes_nothing(tmp_path: Path) -> None:
    newer = Training("fsdp2").average.state_dict()
    newer["format_version"] += 1
    checkpoint.save({"swa": newer, "a": torch.ones(4)}, tmp_path / "newer")
    message = "needs format_version <= 1, got format_version=2; update dist_swa"
    check_refused(Training("fsdp2", models=1), tmp_path / "newer", message)


def check_refused(loading: Training, path: Path, message: str) -> None:
    before, live = loading.values(), torch.zeros(4)
    with pytest.raises(ValueError, match=message) as raised:
        checkpoint.load({"swa": loading.average, "a": live}, path)
    assert str(path) in str(raised.value)
    assert same_bits(loading.values(), before)
    assert not live.any()


# --- States that could not be loaded again

UNREADABLE: dict[str, tuple[Callable[[], Any], str]] = {  # a value for the entry "v", and how the error names it
    "array": (lambda: np.ones(3), "v=ndarray"),
    "numpy scalar": (lambda: {"w": np.float64(0.5)}, "v.w=float64"),
    "in a list": (lambda: [torch.ones(2), {"w": Path("x")}], "v.1.w=PosixPath"),
    "in a tuple": (lambda: (1, Path("x")), "v=tuple"),
    "date": (lambda: datetime.datetime(2000, 1, 1), "v=datetime"),
    "namespace": (lambda: argparse.Namespace(a=1), "v=Namespace"),
    "function": (lambda: lambda: None, "v=function"),
    "nested average": (lambda: {"inner": ShardedAverage(nn.Linear(1, 1))}, "v.inner=ShardedAverage"),
    "on one rank only": (lambda: Path("x") if dist.get_rank() == 1 else 1, "v=PosixPath"),
}


@pytest.mark.parametrize("save", [checkpoint.save, save_async])
@pytest.mark.parametrize("value", UNREADABLE)
@on_ranks(2)
def test_a_value_that_no_load_would_read_is_not_saved(tmp_path: Path, value: str, save: Callable[..., Any]) -> None:
    make, named = UNREADABLE[value]
    with pytest.raises(TypeError, match=rf"save needs tensors and values .*weights_only=True, got {named}; "):
        save({"x": torch.ones(2), "v": make()}, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", [checkpoint.save, save_async, checkpoint.load])
@pytest.mark.parametrize("state", [None, [1], torch.ones(1)], ids=["None", "list", "tensor"])
@on_ranks(2)
def test_a_state_is_a_dict(tmp_path: Path, state: Any, function: Callable[..., Any]) -> None:
    message = f"a checkpoint needs a state dict, got state={type(state).__name__}; pass a dict"
    with pytest.raises(TypeError, match=message):
        function(state, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- Errors on one rank


class Failing:
    """Stateful; fails in one of its methods on the last rank."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails if dist.get_rank() == dist.get_world_size() - 1 else ""

    def state_dict(self) -> dict[str, Any]:
        if self.fails == "state_dict":
            raise LookupError("state_dict has failed")
        return {"x": torch.ones(2)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.fails == "load_state_dict":
            raise LookupError("load_state_dict has failed")


@each_save
@on_ranks(3)
def test_an_error_of_one_rank_in_a_save_is_raised_on_all(tmp_path: Path, save: Callable[..., Any]) -> None:
    with pytest.raises(LookupError, match="state_dict has failed"):
        save({"x": Failing("state_dict")}, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
@on_ranks(3)
def test_an_error_of_one_rank_in_a_load_is_raised_on_all(tmp_path: Path, method: str) -> None:
    checkpoint.save({"x": Failing()}, tmp_path / "a")
    with pytest.raises(LookupError, match=f"^{method} has failed"):
        checkpoint.load({"x": Failing(method)}, tmp_path / "a")


@each_save
@on_ranks(3)
def test_an_existing_path_is_refused_on_all_ranks(tmp_path: Path, save: Callable[..., Any]) -> None:
    (tmp_path / "a").touch()
    dist.barrier()
    with pytest.raises(FileExistsError, match=r"needs a path where nothing is yet, got .*a; choose another"):
        save({"x": torch.ones(2)}, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@each_save
@pytest.mark.parametrize("rank", [0, 1, 2])
@on_ranks(3)
def test_a_full_disk_of_one_rank_is_raised_on_all(tmp_path: Path, rank: int, save: Callable[..., Any]) -> None:
    """A limit of the file size stands for the full disk: the kernel refuses to write."""
    state = {"x": torch.ones(1 << 18), "own": {str(dist.get_rank()): torch.ones(1 << 18)}}
    checkpoint.save(state, tmp_path / "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: .*__{rank}_0.distcp"):
            save(state, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
    checkpoint.load(state, tmp_path / "before")
