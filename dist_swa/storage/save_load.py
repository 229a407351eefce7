"""Saving and loading: torch.distributed.checkpoint (DCP) with checksums, errors that all ranks share, and no pickle."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.stateful import Stateful

from dist_swa.collectives import raise_on_all, rank_and_world_size
from dist_swa.storage.reader import CheckpointReader, LoadPlannerWithoutPickle, open_checkpoint
from dist_swa.storage.writer import CheckpointWriter


@runtime_checkable
class Checked(Protocol):
    """What `load` asks of an entry that has these methods, beside those of ``Stateful``."""

    def check_saved(self, saved: Mapping[str, Any]) -> None:
        """Raise, before anything is read, where `load_state_dict` cannot take `saved`. Local.

        `saved` maps the keys of the entry, such as "slots.0.weight", to values that are read on access. It is empty
        where the checkpoint has nothing of the entry.
        """

    def reset(self) -> None:
        """Start anew: the checkpoint has nothing of the entry."""


class SavedEntry(Mapping[str, Any]):
    """The keys of one entry of a checkpoint, and their values, which are read on access."""

    def __init__(self, reader: CheckpointReader, entry: str) -> None:
        self._reader, self._prefix = reader, f"{entry}."
        self._keys = [key.removeprefix(self._prefix) for key in reader.keys if key.startswith(self._prefix)]

    def __getitem__(self, key: str) -> Any:
        return self._reader.read(self._prefix + key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def save(state: Mapping[str, Any], path: str | Path, *, process_group: dist.ProcessGroup | None = None) -> None:
    """Save a state dict, as dcp.save takes it, into the new folder `path`. A collective of `process_group`.

    Entries may be ``Stateful``, nested dicts, tensors, and values that torch.load reads with ``weights_only=True``.
    Plain tensors are written by the first rank that has them: buffers that differ between ranks are the first rank's.
    Without a process group, one process saves alone. Memory: one tensor on its way to the CPU.

    Raises TypeError for other values, FileExistsError where `path` is there already, and OSError where it cannot be
    written (disk full, no permission), on every rank alike; then no checkpoint appears.
    """
    states = _states_to_save(state, process_group)
    writer = CheckpointWriter(Path(path))
    with writer.cleaned_up(), unwrap_dcp_errors(), no_group_is_fine():
        dcp_save(states, storage_writer=writer, planner=_save_planner(), process_group=process_group)


def save_async(
    state: Mapping[str, Any], path: str | Path, *, process_group: dist.ProcessGroup | None = None
) -> Callable[[], None]:
    """Copy the state to the CPU and save it in a thread; return a function that waits for the end.

    Every rank calls both; the second raises what `save` raises, the first TypeError alone. `process_group` needs a CPU
    backend (gloo), and to be nobody else's while the thread runs: collectives of the training on the same group would
    mix with those of the save. Without torch.distributed it saves at once. Memory: a copy on the CPU of all that this
    rank holds of the state, until the end.
    """
    if not dist.is_initialized():
        save(state, path)
        return lambda: None
    states = _states_to_save(state, process_group)
    with raise_on_all(process_group):
        staged: Any = _copied(states)
    writer = CheckpointWriter(Path(path))  # its own stager, too, which need not copy again
    future: Any = dcp_async_save(staged, storage_writer=writer, planner=_save_planner(), process_group=process_group)

    def wait() -> None:
        with writer.cleaned_up(), unwrap_dcp_errors():
            future.result()

    return wait


def load(state: dict[str, Any], path: str | Path, *, process_group: dist.ProcessGroup | None = None) -> None:
    """Load the checkpoint in the folder `path` into `state`, in place, as dcp.load does. A collective.

    The number of ranks and the wrappers may be others than those of the save. An entry that is `Checked`, such as an
    average, is reset where the checkpoint has nothing of it, with one warning. A checkpoint by plain dcp.save has no
    checksums: one warning says that damage inside tensors is not detected.

    Raises on every rank alike, and before anything has changed: CheckpointError for a checkpoint that is damaged,
    incomplete or would run code, ValueError for one that does not fit the state. (Where a file fails while it is read
    for the second time, part of the state may have been written.) Costs: every file is read once more for its
    checksum, each by one of the ranks.
    """
    with raise_on_all(process_group):
        _check_is_dict(state)
        reader = open_checkpoint(path)
        reader.verify(*rank_and_world_size(process_group))
        if not reader.has_checksums:
            warnings.warn(
                f"{path} was not written by dist_swa.checkpoint: without checksums, damage inside of its tensors goes"
                " unnoticed",
                stacklevel=2,
            )
        saved = {key: SavedEntry(reader, key) for key, value in state.items() if isinstance(value, Checked)}
        for key, entry in saved.items():
            try:
                state[key].check_saved(entry)
            except ValueError as error:
                raise ValueError(f"{error} (entry {key!r} of {path})") from error
        if anew := {key for key, entry in saved.items() if not entry}:
            warnings.warn(f"{path} has no averaging state under {sorted(anew)}: averaging starts anew", stacklevel=2)
    states = _states({key: value for key, value in state.items() if key not in anew}, process_group)
    planner = LoadPlannerWithoutPickle(reader)
    with unwrap_dcp_errors(), no_group_is_fine():
        dcp_load(states, storage_reader=reader, planner=planner, process_group=process_group)
    with raise_on_all(process_group):
        for key in anew:
            state[key].reset()
        for key, loaded in states.items():
            if isinstance(state[key], Stateful):
                state[key].load_state_dict(loaded)
            else:
                state[key] = loaded


def _check_is_dict(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"a checkpoint needs a state dict, got state={type(state).__name__}; pass a dict")


def _states_to_save(state: Mapping[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Return `_states`; TypeError where a load would take one of their values for damage."""
    with raise_on_all(group):
        _check_is_dict(state)
    states = _states(state, group)
    with raise_on_all(group):
        for key, value in _leaves(states):
            if not _is_readable(value):
                raise TypeError(
                    "save needs tensors and values that torch.load reads with weights_only=True, got"
                    f" {key}={type(value).__name__}; save what it consists of, as numbers, text, lists and tensors"
                )
    return states


def _is_readable(value: Any) -> bool:
    """Whether torch.load gives `value` back, with ``weights_only=True``; tensors it does, so they are not copied."""
    if isinstance(value, Tensor) or value is None or type(value) in (bool, int, float, str):
        return True
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def _states(state: Mapping[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Return the state dicts of what is ``Stateful``, and the rest as it is; in one order, for they may communicate."""
    with raise_on_all(group):
        return {
            key: value.state_dict() if isinstance(value, Stateful) else value for key, value in sorted(state.items())
        }


def _copied(tree: Any) -> Any:
    """Return a copy on the CPU; DCP's own stagers fail on what FSDP1 gives, or leave 0-dim DTensors uncopied."""
    if isinstance(tree, Tensor):
        with torch.no_grad():
            return tree.to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value) for value in tree)
    return copy.deepcopy(tree)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in dicts and lists, with its keys, as DCP does."""
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(value, Mapping) or type(value) is list:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _save_planner() -> SavePlanner:
    return DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # else DCP mixes the ranks' buffers


@contextmanager
def unwrap_dcp_errors() -> Iterator[None]:
    """Turn DCP's exception, which is no ``Exception``, into the first rank's error that is in it."""
    try:
        yield
    except CheckpointException as error:
        rank, cause = min((rank, failure[0]) for rank, failure in error.failures.items())
        cause.add_note(f"(raised on rank {rank})")
        raise (cause if isinstance(cause, Exception) else RuntimeError(repr(cause))) from error


@contextmanager
def no_group_is_fine() -> Iterator[None]:
    """Silence DCP's warning about a single process without a process group, which is what was asked for."""
    with warnings.catch_warnings():
        if not dist.is_initialized():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield
