"""CheckpointFolder: the newest checkpoints of one run."""

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
_REMOVED = ".removed"  # suffix of the hidden name of a checkpoint while it is removed
_STEP = re.compile(r"step-(\d{9}|[1-9]\d{9,})")
_LEFTOVER = re.compile(rf"\.step-\d+({re.escape(PARTIAL)}|{re.escape(_REMOVED)})")
_locked: list[int] = []  # descriptors of the lock files of this process, never closed


class CheckpointFolder:
    """The checkpoints of one run: folders ``step-<step>`` in `path`, of which the newest `keep` are kept.

    Every rank constructs it with the same arguments and makes the same calls. The methods are collectives on a gloo
    group that the constructor makes, unless they say that they are local. A checkpoint appears when it is complete.
    Files that a killed save or removal leaves have hidden names; the constructor of the next run removes them.

    Only one run may write: its first rank locks `path` until the process ends. Ranks that outlive a killed launcher
    keep the lock; end them before the next run starts. Other programs may read at any time, with `checkpoint.load` and
    `open_checkpoint`.

    Raises on every rank, with nothing changed: ValueError if keep < 1, RuntimeError if another run has locked the
    folder, OSError if the folder cannot be made or written to.

    Example:

    >>> from dist_swa.checkpoint import CheckpointFolder
    >>> folder = CheckpointFolder("checkpoints", keep=2)
    >>> for step in (100, 200, 300):
    ...     folder.save(step, {"tokens": 4096 * step})
    >>> folder.steps()
    [200, 300]
    >>> state = {"tokens": 0}
    >>> folder.load_latest(state), state
    (300, {'tokens': 1228800})
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
            if self._is_first and _lock(self.path):
                for leftover in self.path.iterdir():
                    if _LEFTOVER.fullmatch(leftover.name):
                        remove(leftover)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save `state` as `checkpoint.save` does, as number `step`; then remove the checkpoints beyond `keep`.

        Raises ValueError unless `step` is later than all saved steps, and the errors of `checkpoint.save`, such as
        OSError if the disk is full or the folder is read-only. The older checkpoints are kept then.
        """
        self.wait()
        save(state, self._new_folder(step), process_group=self._group)
        self._remove_old()

    def save_async(self, step: int, state: Mapping[str, Any]) -> None:
        """Save `state` as `step`, as `save` does, in a thread. Training may change it after the return.

        The next `wait`, `save`, `save_async` or `load_latest` raises an error of the thread, on every rank. Call `wait`
        at the end of the run, before the process group is destroyed. Memory: a copy on the CPU of all that this rank
        has of the state.
        """
        self.wait()
        self._wait = save_async(state, self._new_folder(step), process_group=self._group)

    def wait(self) -> None:
        """Wait for the last `save_async`, if there was one, and raise its error."""
        if self._wait is None:
            return
        wait, self._wait = self._wait, None
        wait()
        self._remove_old()

    def load_latest(self, state: dict[str, Any]) -> int | None:
        """Load the newest checkpoint into `state`, as `checkpoint.load` does; return its step, or None without one.

        An `SWA` of which the checkpoint has nothing starts its schedule at this step, with one warning.
        A newest checkpoint that is damaged raises, as `checkpoint.load` does, and the message names the file. To load
        the checkpoint before it, remove its folder.
        """
        self.wait()
        step = self._latest()
        if step is not None:
            load(state, self._folder_of(step), process_group=self._group, position={"batches": step})
        return step

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, in ascending order, including damaged ones. Local."""
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

    def _new_folder(self, step: int) -> Path:
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
                    remove(folder.rename(folder.with_name(f".{folder.name}{_REMOVED}")))  # never partly visible


def _lock(path: Path) -> bool:
    """Make the folder and lock it until this process ends; return False if this process had locked it before.

    Raises RuntimeError if another process has locked it. Uses flock, because a lockf lock ends when this process closes
    any descriptor of the file, as a backup does.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OSError(error.errno, f"CheckpointFolder needs to write there: {error.strerror}", str(path)) from error
    if any(os.path.sameopenfile(file, mine) for mine in _locked):  # one process is one run
        os.close(file)
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(file, 1000, 0).decode().strip()
        os.close(file)
        raise RuntimeError(
            f"CheckpointFolder needs a folder that no other run writes to, got path={path}, which is locked by {holder}"
            "; end that run, or use another folder"
        ) from error
    except OSError as error:
        warnings.warn(f"{path} cannot be locked ({error}): take care that one run at a time writes there", stacklevel=3)
    _locked.append(file)
    os.truncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return True


def _close_locks() -> None:
    """Close the lock files in a forked child, such as a DataLoader worker: it would keep the lock of its parent."""
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_close_locks)
