"""A folder keeps its checkpoints when a save is killed, the disk is full, another run starts, or training continues."""

import contextlib
import errno
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_swa import ShardedAverage, checkpoint
from dist_swa.checkpoint import CheckpointError, CheckpointFolder, open_checkpoint
from dist_swa.storage import writer
from models import same_bits, wrap
from ranks import on_ranks, run_on_ranks

ROOT = Path(__file__).parents[2]


def state_of(value: float) -> dict[str, Any]:
    return {"x": torch.full((1000,), float(value)), "rank": {str(i): torch.tensor(value) for i in range(4)}}


def save_and_wait(folder: CheckpointFolder, method: str, step: int) -> None:
    getattr(folder, method)(step, state_of(step))
    folder.wait()


each_save = pytest.mark.parametrize("save", ["save", "save_async"])


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")


def load_value(folder: CheckpointFolder) -> tuple[int | None, float]:
    state = state_of(-1.0)
    step = folder.load_latest(state)
    return step, float(state["x"].max())


@on_ranks(1, 3)
def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "new" / "folder", keep=2)
    assert load_value(folder) == (None, -1.0)
    for step, save in ((5, folder.save), (10, folder.save_async), (15, folder.save_async), (200, folder.save)):
        save(step, state_of(step))
        assert load_value(folder) == (step, float(step))
    dist.barrier()
    assert folder.steps() == [15, 200]
    assert names(folder.path) == ["step-000000015", "step-000000200"]


def test_one_process_needs_no_process_group(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), keep=1)
    folder.save(0, state_of(3.0))
    assert load_value(folder) == (0, 3.0)
    folder.save_async(2_000_000_000, state_of(4.0))
    folder.wait()
    assert load_value(folder) == (2_000_000_000, 4.0)
    assert names(tmp_path) == ["step-2000000000"]


@pytest.mark.parametrize("keep", [0, -1, 1.5])
@on_ranks(2)
def test_a_folder_keeps_at_least_one_checkpoint(tmp_path: Path, keep: Any) -> None:
    with pytest.raises(ValueError, match=rf"needs to keep one checkpoint or more, got keep={keep}; pass 1 or more"):
        CheckpointFolder(tmp_path, keep=keep)


@each_save
@pytest.mark.parametrize("step", [7, 6, 0])
@on_ranks(2)
def test_a_step_is_later_than_all_saved_steps(tmp_path: Path, step: int, save: str) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(7, state_of(7))
    with pytest.raises(ValueError, match=rf"needs a step after those in .*, got step={step}, latest=7; remove"):
        save_and_wait(folder, save, step)
    assert load_value(folder) == (7, 7.0)


@pytest.mark.parametrize("step", [-1, 1.0, "1"])
@on_ranks(2)
def test_a_step_is_a_whole_number_from_0_on(tmp_path: Path, step: Any) -> None:
    with pytest.raises(ValueError, match=r"needs a step that is a whole number from 0 on, got step="):
        CheckpointFolder(tmp_path).save(step, state_of(0))


def test_files_of_killed_saves_are_ignored_and_removed(tmp_path: Path) -> None:
    whole = tmp_path / "step-000000001"
    checkpoint.save(state_of(1), whole)
    for name in (".step-000000002.partial", ".step-000000000.removed", ".mine", "step-of-mine", "notes"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / ".step-000000003.partial").touch()
    (tmp_path / ".step-000000004.partial").symlink_to("notes")
    (tmp_path / ".step-000000005.removed").symlink_to("nowhere")
    folder = CheckpointFolder(tmp_path)
    assert load_value(folder) == (1, 1.0)
    assert names(tmp_path) == [".mine", "notes", "step-000000001", "step-of-mine"]
    assert names(tmp_path / "notes") == names(whole)
    (tmp_path / ".step-000000006.partial").symlink_to("notes")  # after the folder was constructed
    folder.save(6, state_of(6))
    assert load_value(folder) == (6, 6.0)
    assert names(tmp_path / "notes") == names(whole)


@pytest.mark.parametrize(
    "missing", [(".metadata",), ("SHA256SUMS",), ("__0_0.distcp",), (".metadata", "SHA256SUMS", "__0_0.distcp")]
)
def test_a_damaged_newest_checkpoint_raises(tmp_path: Path, missing: tuple[str, ...]) -> None:
    """It is neither removed as incomplete nor skipped."""
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, state_of(step))
    for name in missing:
        (tmp_path / "step-000000002" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"step-000000002/{missing[0]}: it is missing"):
        load_value(folder)
    assert folder.steps() == [1, 2]
    shutil.rmtree(tmp_path / "step-000000002")
    assert load_value(folder) == (1, 1.0)


# --- Killed


def save_and_be_killed(path: Path, moment: str) -> None:
    """Save steps 1 and 2 with keep=1, and die at the `moment` of the second save."""

    def die(*_: Any, **__: Any) -> Any:
        os._exit(9)

    def die_at_the_second(*args: Any, **options: Any) -> None:
        os.unlink = die
        unlink(*args, **options)

    unlink, folder = os.unlink, CheckpointFolder(path, keep=1)
    folder.save(1, state_of(1))
    owner, name = {
        "files": (writer.CheckpointWriter, "write_data"),
        "metadata": (writer.CheckpointWriter, "finish"),
        "rename": (Path, "rename"),
        "after rename": (CheckpointFolder, "_remove_old"),
        "removal": (os, "unlink"),
    }[moment]
    setattr(owner, name, die_at_the_second if moment == "removal" else die)
    folder.save(2, state_of(2))


@pytest.mark.parametrize(
    ("moment", "step"), [("files", 1), ("metadata", 1), ("rename", 1), ("after rename", 2), ("removal", 2)]
)
def test_a_save_killed_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path, moment: str, step: int) -> None:
    with pytest.raises(AssertionError, match="died"):
        run_on_ranks(save_and_be_killed, 1, tmp_path, moment)
    for path in tmp_path.glob("step-*"):
        open_checkpoint(path).verify()
    folder = CheckpointFolder(tmp_path, keep=1)
    assert load_value(folder) == (step, float(step))
    folder.save(3, state_of(3))
    assert load_value(folder) == (3, 3.0)
    assert names(tmp_path) == ["step-000000003"]


# --- Nothing can be written


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Drop the rights of root, who can write anywhere."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def open_to_all(path: Path) -> None:
    """Let any user reach `path` and read it."""
    for folder in [path, *list(path.parents)[:-2]]:
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o055)


@pytest.mark.parametrize("name", [".", "new"])
def test_a_read_only_folder_is_refused(tmp_path: Path, name: str) -> None:
    open_to_all(tmp_path)
    path = tmp_path / name
    with unprivileged():
        if os.access(path, os.W_OK, effective_ids=True):  # the owner, if it is not root
            tmp_path.chmod(0o555)
        with pytest.raises(PermissionError, match=rf"CheckpointFolder needs to write there: Permission .*{path}"):
            CheckpointFolder(path)
    assert names(tmp_path) == []


@each_save
@on_ranks(2)
def test_a_folder_that_became_read_only_keeps_its_checkpoints(tmp_path: Path, save: str) -> None:
    open_to_all(tmp_path)
    folder = CheckpointFolder(tmp_path)
    folder.save(1, state_of(1))
    dist.barrier()
    tmp_path.chmod(0o555)
    with unprivileged(), pytest.raises(PermissionError, match=r"Permission denied: .*step-000000002"):
        save_and_wait(folder, save, 2)
    tmp_path.chmod(0o755)
    assert load_value(folder) == (1, 1.0)


@each_save
@pytest.mark.parametrize("rank", [0, 1])
@on_ranks(2)
def test_a_full_disk_of_one_rank_keeps_the_checkpoints_and_frees_the_space(
    tmp_path: Path, rank: int, save: str
) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, state_of(1))
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with contextlib.ExitStack() as full:
        if dist.get_rank() == rank:
            full.enter_context(mock.patch.object(os, "fsync", side_effect=no_space))
        with pytest.raises(OSError, match=rf"No space left on device: .*step-000000002.partial/__{rank}_0.distcp"):
            save_and_wait(folder, save, 2)
    dist.barrier()
    assert names(tmp_path) == ["step-000000001"]
    assert load_value(folder) == (1, 1.0)
    folder.save(2, state_of(2))
    assert load_value(folder) == (2, 2.0)


# --- Two runs


LOCK = """
import sys
from dist_swa.checkpoint import CheckpointFolder
folder = CheckpointFolder(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""


def refused(path: Path) -> str:
    with pytest.raises(RuntimeError) as raised:
        CheckpointFolder(path)
    return str(raised.value)


def is_locked(path: Path) -> bool:
    """Return whether another process is refused the folder."""
    command = [sys.executable, "-c", LOCK, str(path)]
    ran = subprocess.run(command, input=b"", capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return b"which is locked by process" in ran.stderr


def test_a_backup_or_a_second_object_does_not_release_the_lock(tmp_path: Path) -> None:
    CheckpointFolder(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    assert f"process {os.getpid()} on " in (tmp_path / "run/.lock").read_text()
    assert is_locked(tmp_path / "run")
    CheckpointFolder(tmp_path / "run")  # one process is one run
    gc.collect()
    assert is_locked(tmp_path / "run")
    assert not is_locked(tmp_path / "backup")


def lock_and_be_killed(path: Path, result: Path) -> None:
    """Fork a child that outlives this process, such as a DataLoader worker."""
    folder = CheckpointFolder(path)
    child = os.fork()
    if child == 0:
        found = "it has locked the folder"
        try:
            CheckpointFolder(path)
        except RuntimeError as error:
            found = str(error)
        result.write_text(f"{os.getpid()} {found}")
        time.sleep(100)
    while not result.exists() or not result.read_text():
        time.sleep(0.01)
    folder.save(1, state_of(1))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died"):
        run_on_ranks(lock_and_be_killed, 1, tmp_path / "run", tmp_path / "child")
    child, _, error = (tmp_path / "child").read_text().partition(" ")
    try:
        assert "needs a folder that no other run writes to" in error  # while its parent ran
        assert load_value(CheckpointFolder(tmp_path / "run")) == (1, 1.0)
    finally:
        os.kill(int(child), signal.SIGKILL)


def save_one(path: Path) -> None:
    CheckpointFolder(path).save(1, state_of(1))


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    run_on_ranks(save_one, 1, tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", LOCK, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        (tmp_path / ".step-000000002.partial").mkdir()  # of a running save
        before = names(tmp_path)
        messages = run_on_ranks(refused, 2, tmp_path)
        assert names(tmp_path) == before
        holder.kill()
    for message in messages:
        assert f"needs a folder that no other run writes to, got path={tmp_path}, which is locked by process" in message
        assert f"process {holder.pid} on " in message
    assert load_value(CheckpointFolder(tmp_path)) == (1, 1.0)  # a killed run has no lock
    assert names(tmp_path) == ["step-000000001"]


def test_a_file_system_without_locks_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match=r"cannot be locked .*: take care that one run at a time writes there"):
        folder = CheckpointFolder(tmp_path)
    folder.save(1, state_of(1))
    assert load_value(folder) == (1, 1.0)


# --- Training continues during a save


def saved_average(path: Path) -> dict[str, Tensor]:
    reader = open_checkpoint(path)
    prefixes = ("swa.slots.0.", "swa.buffers.")
    return {key.removeprefix(p): reader.read(key) for key in reader.keys for p in prefixes if key.startswith(p)}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp1"])
@on_ranks(2)
def test_updates_and_collectives_during_a_save_do_not_change_it(tmp_path: Path, wrapper: str) -> None:
    layers = nn.Sequential(nn.Linear(300, 501), nn.BatchNorm1d(501), nn.Linear(501, 300))
    if wrapper == "ddp":
        layers.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))  # 0-dim, which FSDP1 refuses
    model = wrap(layers, wrapper)
    average, folder = ShardedAverage(model), CheckpointFolder(tmp_path)
    num_during_saves, gradient = 0, torch.ones(1000)
    for step in range(1, 6):
        average.update()
        expected, path = average.full_state_dict(), tmp_path / f"step-{step:09}"
        folder.save_async(step, {"swa": average, "model": model.state_dict()})
        is_complete = torch.tensor(False)
        while not is_complete:
            work = dist.all_reduce(gradient, async_op=True)
            with torch.no_grad():
                for tensor in [*model.parameters(), *model.buffers()]:
                    tensor.add_(1)
            average.update()
            work.wait()
            is_complete = torch.tensor(path.exists())
            num_during_saves += not is_complete
            dist.all_reduce(is_complete, dist.ReduceOp.MAX)  # all ranks leave the loop together
        folder.wait()
        assert dist.get_rank() > 0 or same_bits(saved_average(path), expected)
    assert num_during_saves >= 5


@on_ranks(2)
def test_a_second_object_keeps_the_files_of_a_running_save(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    for step in (1, 4):
        folder.save_async(step, {"x": torch.ones(3_000_000)})
        again = CheckpointFolder(tmp_path, keep=1)
        again.save(step + 1, state_of(step))
        folder.wait()
        assert load_value(again) == (step + 1, float(step))


CALLS_AFTER_A_SAVE: dict[str, Callable[[CheckpointFolder], object]] = {
    "wait": lambda folder: folder.wait(),
    "save": lambda folder: folder.save(2, state_of(2)),
    "load_latest": lambda folder: folder.load_latest(state_of(0)),
}


@pytest.mark.parametrize("call", CALLS_AFTER_A_SAVE)
@on_ranks(2)
def test_an_error_of_the_thread_is_raised_once_by_the_next_call(tmp_path: Path, call: str) -> None:
    folder = CheckpointFolder(tmp_path)
    if dist.get_rank() == 0:
        (tmp_path / "step-000000001").touch()
    folder.save_async(1, state_of(1))
    with pytest.raises(FileExistsError, match=r"needs a path where nothing is yet, got .*step-000000001"):
        CALLS_AFTER_A_SAVE[call](folder)
    folder.wait()
    folder.save(2, state_of(2))
    assert load_value(folder) == (2, 2.0)
