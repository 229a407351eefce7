"""A damaged checkpoint does not load: the error names the file, on every rank, and nothing has changed."""

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from checkpoints import Training
from dist_swa import checkpoint
from models import same_bits
from ranks import on_ranks, run_on_ranks

FILES = (".metadata", "SHA256SUMS", "__0_0.distcp", "__1_0.distcp")
NUM_FLIPS = 30  # of each file


def save_checkpoints(folder: Path) -> None:
    for name, models in (("one", 3), ("other", 4)):
        checkpoint.save(Training("fsdp2", models=models).state(), folder / name)
    dcp_save(Training("fsdp2").state(), checkpoint_id=folder / "plain dcp")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with checkpoints of 2 ranks: "one", "other", and "plain dcp" without checksums."""
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(save_checkpoints, 2, folder)
    return folder


def flip(path: Path, number: int) -> None:
    draw, content = random.Random(f"{path.name} {number}"), bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, size: Callable[[int], int]) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: size(len(content))])


def swap(path: Path, name: str) -> None:
    content, other = path.read_bytes(), path.with_name(name)
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"bit flip {i}": partial(flip, number=i) for i in range(NUM_FLIPS)},
    "empty": lambda path: cut(path, lambda _: 0),
    "cut to one byte": lambda path: cut(path, lambda _: 1),
    "cut to a half": lambda path: cut(path, lambda size: size // 2),
    "cut by one byte": lambda path: cut(path, lambda size: size - 1),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": Path.unlink,
    "renamed": lambda path: path.rename(path.with_name("renamed")),
    "of another checkpoint": lambda path: shutil.copy(path.parents[1] / "other" / path.name, path),
}
SWAPS = {f"{a} with {b}": (a, b) for a in FILES for b in FILES if a < b}


def check_refused(folder: Path, *names: str) -> None:
    """Check that a load raises an error that names one of the files, and changes nothing."""
    training = Training(models=1)
    before = training.values()
    with pytest.raises(checkpoint.CheckpointError) as raised:
        checkpoint.load(training.state(), folder)
    # An error of a checksum names two files: either may be the damaged one.
    text = str(raised.value).replace("checksum in SHA256SUMS", f"{folder}/SHA256SUMS: ")
    assert any(f"{folder}/{name}: " in text for name in names), text
    assert same_bits(training.values(), before)
    assert training.average.num_averaged == 1


@pytest.fixture
def one(saved: Path, tmp_path: Path) -> Path:
    """Return a checkpoint that a test may damage, beside "other"."""
    shutil.copytree(saved / "other", tmp_path / "other")
    return shutil.copytree(saved / "one", tmp_path / "one")


def test_the_undamaged_checkpoint_loads(one: Path) -> None:
    training = Training(models=1)
    checkpoint.load(training.state(), one)
    assert training.average.num_averaged == 3


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_changes_nothing(one: Path, name: str, damage: str) -> None:
    DAMAGES[damage](one / name)
    check_refused(one, name)


@pytest.mark.parametrize("swapped", SWAPS)
def test_swapped_files_are_named_and_change_nothing(one: Path, swapped: str) -> None:
    name, other = SWAPS[swapped]
    swap(one / name, other)
    check_refused(one, name, other)


def test_a_read_of_one_tensor_verifies_its_file_first(one: Path) -> None:
    reader = checkpoint.open_checkpoint(one)
    for name in ("__0_0.distcp", "__1_0.distcp"):
        flip(one / name, 0)
    with pytest.raises(checkpoint.CheckpointError, match=r"distcp: its content is not what its checksum"):
        reader.read("swa.slots.0.up.weight")


@pytest.mark.parametrize("damage", ["empty", "cut", "missing"])
@pytest.mark.parametrize("name", [name for name in FILES if name != "SHA256SUMS"])
def test_missing_and_short_files_of_plain_dcp_are_named(saved: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = shutil.copytree(saved / "plain dcp", tmp_path / "plain dcp")
    if damage == "missing":
        (folder / name).unlink()
    else:
        cut(folder / name, lambda size: size - 300 if damage == "cut" else 0)
    check_refused(folder, name)


@pytest.mark.parametrize("name", FILES)
@on_ranks(2)
def test_damage_is_raised_on_every_rank(tmp_path: Path, name: str) -> None:
    checkpoint.save(Training("fsdp2").state(), tmp_path / "one")
    training = Training("fsdp2", models=1)
    before = training.values()
    if dist.get_rank() == 0:
        path = tmp_path / "one" / name
        path.write_bytes(path.read_bytes()[:-5] + bytes(5))
    dist.barrier()
    with pytest.raises(checkpoint.CheckpointError, match=name):
        checkpoint.load(training.state(), tmp_path / "one")
    assert same_bits(training.values(), before)


@pytest.mark.parametrize("name", ["absent", "one/__0_0.distcp"])
def test_a_path_without_a_checkpoint_is_an_error(one: Path, name: str) -> None:
    """A warning, as for a checkpoint without the entry, would be an error of the test."""
    with pytest.raises((checkpoint.CheckpointError, NotADirectoryError), match=name):
        checkpoint.load(Training(models=0).state(), one.parent / name)
