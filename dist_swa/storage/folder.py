"""CheckpointFolder: the checkpoints of one run, of which the newest few are kept."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from dist_swa.collectives import raise_on_all
from dist_swa.storage.save_load import load, save, save_async
from dist_swa.storage.writer import PARTIAL, remove

_LOCK = ".lock"
_REMOVED = ".removed"  # ends the hidden name of a checkpoint while it is removed
_STEP = re.compile(r"step-(\d{9}|[1-9]\d{9,})")
_LEFTOVER = re.compile(rf"\.step-\d+({re.escape(PARTIAL)}|{re.escape(_REMOVED)})")
_locked: list[int] = []  # descriptors of the lock files that this process holds, never closed


class CheckpointFolder:
    """The checkpoints of one run: the folders ``step-<step>`` in `path`, of which the `keep` newest ones stay.

    Every rank builds it, with the same arguments, and calls its methods alike: they are collectives, on a gloo group
    of its own, which the constructor makes. A checkpoint appears when it is whole. What a killed save, or a killed
    removal, has left is hidden, and removed by the next run's constructor. All ranks see the same file system.

    One run at a time: the first rank holds a lock on `path` until it ends. So ranks that a killed launcher left
    behind keep the next run from starting; end them first. Other programs may read at any time, with
    `checkpoint.load` and `open_checkpoint`.

    Raises ValueError for keep < 1, RuntimeError where another run holds the folder, and OSError where the folder cannot
    be made or written to; on every rank alike, with nothing changed.
    """

    def __init__(self, path: str | Path, keep: int = 3) -> None:
        if not isinstance(keep, int) or keep < 1:
            raise ValueError(f"CheckpointFolder needs to keep one checkpoint or more, got keep={keep}; pass 1 or more")
        self.path, self._keep = Path(path), keep
        group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._group = cast("dist.ProcessGroup | None", group)
        self._is_first = not dist.is_initialized() or dist.get_rank() == 0
        self._wait: Callable[[], None] | None = None
        with raise_on_all(self._group):
            if self._is_first:
                is_begin_of_run = _lock(self.path)
                if is_begin_of_run:
                    self._remove_leftovers()

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save `state`, as `checkpoint.save` takes it, under the number `step`; then remove what is not to be kept.

        Raises ValueError unless `step` comes after all that are there, and what `checkpoint.save` raises: OSError
        where the disk is full or the folder read-only. The checkpoints that were there stay then.
        """
        self.wait()
        save(state, self._place_for(step), process_group=self._group)
        self._remove_old()

    def save_async(self, step: int, state: Mapping[str, Any]) -> None:
        """Do as `save`, in a thread: return when the state is copied, and training may go on to change it.

        An error in the thread is raised by the next `wait`, `save` or `save_async`, on every rank alike. Call `wait`
        at the end of the run, before the process group is destroyed. Memory: a copy on the CPU of all that this rank
        holds of the state.
        """
        self.wait()
        self._wait = save_async(state, self._place_for(step), process_group=self._group)

    def wait(self) -> None:
        """Wait until the last `save_async` is whole, if there was one, and raise what it met with."""
        if self._wait is None:
            return
        wait, self._wait = self._wait, None
        wait()
        self._remove_old()

    def load_latest(self, state: dict[str, Any]) -> int | None:
        """Load the newest checkpoint into `state`, as `checkpoint.load` does, and return its step; None without one.

        A damaged newest checkpoint raises, as `checkpoint.load` does; the message names the file. To go on from the
        one before, remove that folder.
        """
        self.wait()
        step = self._latest()
        if step is not None:
            load(state, self._folder_of(step), process_group=self._group)
        return step

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that are there, in order, damaged ones too. Local."""
        folders = [folder for folder in self.path.iterdir() if folder.is_dir()]
        return sorted(int(found[1]) for folder in folders if (found := _STEP.fullmatch(folder.name)))

    def _folder_of(self, step: int) -> Path:
        return self.path / f"step-{step:09}"

    def _latest(self) -> int | None:
        """Return the newest step that the first rank sees."""
        found: list[int | None] = [None]
        with raise_on_all(self._group):
            if self._is_first:
                found = [max(self.steps(), default=None)]
        if self._group is not None:
            dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def _place_for(self, step: int) -> Path:
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"save needs a step that is a whole number from 0 on, got {step=}; count optimizer steps")
        latest = self._latest()
        if latest is not None and step <= latest:
            raise ValueError(
                f"save needs a step after those in {self.path}, got {step=}, {latest=}; remove the later ones, or use"
                " another folder"
            )
        return self._folder_of(step)

    def _remove_old(self) -> None:
        with raise_on_all(self._group):
            if self._is_first:
                for step in self.steps()[: -self._keep]:
                    folder = self._folder_of(step)
                    remove(folder.rename(folder.with_name(f".{folder.name}{_REMOVED}")))  # whole, or not there

    def _remove_leftovers(self) -> None:
        for folder in self.path.iterdir():
            if _LEFTOVER.fullmatch(folder.name):
                remove(folder)


def _lock(path: Path) -> bool:
    """Make the folder and lock it, until this process ends, however it ends; False where this process had it before.

    RuntimeError where another one has it.
    By flock, not lockf: that lock would end when anything in this process has read the file, as a backup does.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OSError(error.errno, f"CheckpointFolder needs to write there: {error.strerror}", str(path)) from error
    if any(os.path.sameopenfile(file, mine) for mine in _locked):  # two objects of one process, one run
        os.close(file)
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(file, 1000, 0).decode().strip()
        os.close(file)
        raise RuntimeError(
            f"CheckpointFolder needs a folder that no other run writes to, got path={path}, which is held by {holder}"
            "; end that run, or use another folder"
        ) from error
    except OSError as error:
        warnings.warn(f"{path} cannot be locked ({error}): take care that one run at a time writes there", stacklevel=3)
    _locked.append(file)
    os.truncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return True


def _leave_locks() -> None:
    """Let a forked child, as a worker of a DataLoader, not hold the folder when its parent has ended."""
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_leave_locks)
