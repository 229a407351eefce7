"""Save and load: torch.distributed.checkpoint (DCP) with checksums, without pickle, and with errors on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.stateful import Stateful

from dist_swa.collectives import raise_on_all, rank_and_world_size
from dist_swa.storage.reader import CheckpointReader, LoadPlannerWithoutPickle, open_checkpoint
from dist_swa.storage.writer import CheckpointWriter, SavePlannerWithoutPickle


@runtime_checkable
class Checked(Protocol):
    """A ``Stateful`` that is checked before a save or a load changes anything, and can be reset."""

    def check_ranks(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Raise on every rank if the states of the ranks do not belong to one checkpoint. A collective."""

    def check_saved(self, saved: Mapping[str, Any]) -> Set[str]:
        """Raise if `load_state_dict` could not load `saved`. Local. Returns the keys that `load_state_dict` can lack.

        `saved` maps the keys of the entry in the checkpoint, such as "layers.0.weight", to their values, which are
        read on access. It is empty if the checkpoint has nothing of the entry; `reset_to` is called then.
        """

    def reset_to(self, position: Mapping[str, int]) -> str:
        """Set the initial state, and return what the warning adds, or "". Local. `position`: see `load`."""


class SavedEntry(Mapping[str, Any]):
    """One entry of a checkpoint: its values by their keys below the entry, read on access."""

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
    """Save the state dict `state`, as dcp.save takes it, into the new folder `path`. A collective of `process_group`.

    Entries may be ``Stateful``, nested dicts, tensors, and values that torch.load reads with ``weights_only=True``.
    A plain tensor that several ranks have is written by the first of them, so buffers that differ between ranks are
    saved from the first. Without a process group, one process saves alone. Memory: one tensor in transit to the CPU.

    Raises TypeError for other values, FileExistsError if `path` exists, and OSError if it cannot be written (disk
    full, no permission), on every rank; no checkpoint appears then.

    Example:

    >>> import torch
    >>> from dist_swa import SWA, checkpoint
    >>> model = torch.nn.Linear(2, 2)
    >>> checkpoint.save({"model": model.state_dict(), "swa": SWA(model, swa_start="1ba")}, "step-1")
    """
    planner = _plan_save(state, process_group)
    writer = CheckpointWriter(Path(path))
    with writer.cleaned_up(), unwrap_dcp_errors(), no_group_is_fine():
        dcp_save(planner.state_dict, storage_writer=writer, planner=planner, process_group=process_group)


def save_async(
    state: Mapping[str, Any], path: str | Path, *, process_group: dist.ProcessGroup | None = None
) -> Callable[[], None]:
    """Copy the state to the CPU and save it in a thread; return a function that waits for the thread.

    Every rank calls both. `save_async` raises TypeError as `save` does; the returned function raises all other errors.
    `process_group` needs a CPU backend (gloo), and nothing else may use it while the thread runs: collectives of the
    training would mix with those of the save. Without torch.distributed the save is synchronous. Memory: a copy on the
    CPU of all that this rank has of the state, until the thread ends.
    """
    if not dist.is_initialized():
        save(state, path)
        return lambda: None
    planner = _plan_save(state, process_group, copy_to_cpu=True)
    writer = CheckpointWriter(Path(path))
    future: Any = dcp_async_save(
        planner.state_dict, storage_writer=writer, planner=planner, process_group=process_group
    )

    def wait() -> None:
        with writer.cleaned_up(), unwrap_dcp_errors():
            future.result()

    return wait


def load(
    state: dict[str, Any],
    path: str | Path,
    *,
    process_group: dist.ProcessGroup | None = None,
    position: Mapping[str, int] | None = None,
) -> None:
    """Load the checkpoint in the folder `path` into `state`, in place, as dcp.load does.

    A collective of `process_group`. The number of ranks and the wrappers may differ from those of the save. An average
    of which the checkpoint has nothing is reset, with one warning; the schedule of an `SWA` then starts at `position`,
    arguments of `SWA.reset` such as ``{"batches": 840}``. Persistent buffers of an average may be missing where they
    are copied from the model. A checkpoint that plain dcp.save wrote has no checksums: one warning says that damage
    inside tensors is not detected.

    Raises on every rank, before anything has changed: CheckpointError if the checkpoint is damaged, incomplete or asks
    to run code, ValueError if it does not fit the state. (If a file fails when it is read for the second time, part of
    the state may have been written.) Cost: the ranks together read every file once more, for its checksum.

    Example:

    >>> import torch
    >>> from dist_swa import SWA, checkpoint
    >>> model = torch.nn.Linear(2, 2)
    >>> swa = SWA(model, swa_start="1ba")
    >>> updated = swa.step()
    >>> checkpoint.save({"model": model.state_dict(), "swa": swa}, "step-1")
    >>> resumed = SWA(torch.nn.Linear(2, 2), swa_start="1ba")
    >>> checkpoint.load({"swa": resumed}, "step-1")
    >>> resumed.num_averaged
    1
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
        missing, optional = _check_entries(state, reader)
    states = _state_dicts({key: value for key, value in state.items() if key not in missing}, process_group)
    planner = LoadPlannerWithoutPickle(reader, optional=optional)
    with unwrap_dcp_errors(), no_group_is_fine():
        dcp_load(states, storage_reader=reader, planner=planner, process_group=process_group)
    with raise_on_all(process_group):
        texts = [state[key].reset_to(position or {}) for key in missing]
        for key, loaded in states.items():
            if isinstance(state[key], Stateful):
                state[key].load_state_dict(loaded)
            else:
                state[key] = loaded
        if missing:
            text = "; ".join(
                [f"{path} has nothing under {missing}: these entries are reset", *dict.fromkeys(filter(None, texts))]
            )
            warnings.warn(text, stacklevel=2)


def _check_is_dict(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"a checkpoint needs a state dict, got state={type(state).__name__}; pass a dict")


def _check_entries(state: Mapping[str, Any], reader: CheckpointReader) -> tuple[list[str], set[str]]:
    """Check the entries that are `Checked`; return those of which the checkpoint has nothing, and the optional keys."""
    missing, optional = [], set()
    for key in sorted(key for key, value in state.items() if isinstance(value, Checked)):
        saved = SavedEntry(reader, key)
        try:
            optional |= {f"{key}.{name}" for name in state[key].check_saved(saved)}
        except ValueError as error:
            raise ValueError(f"{error} (entry {key!r} of {reader.folder})") from error
        if not saved:
            missing.append(key)
    return missing, optional


def _plan_save(
    state: Mapping[str, Any], group: dist.ProcessGroup | None, copy_to_cpu: bool = False
) -> SavePlannerWithoutPickle:
    with raise_on_all(group):
        _check_is_dict(state)
    for _, value in sorted(state.items()):
        if isinstance(value, Checked):
            value.check_ranks(group)
    states = _state_dicts(state, group)
    with raise_on_all(group):
        return SavePlannerWithoutPickle(states, copy_to_cpu)


def _state_dicts(state: Mapping[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Call `state_dict` of the entries that have it, sorted by key on every rank, because it may communicate.

    DCP does the same, but an error on one rank would leave the others waiting.
    """
    with raise_on_all(group):
        return {
            key: value.state_dict() if isinstance(value, Stateful) else value for key, value in sorted(state.items())
        }


@contextmanager
def unwrap_dcp_errors() -> Iterator[None]:
    """Raise the first rank's error in place of DCP's CheckpointException, which is not an ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        rank, cause = min((rank, failure[0]) for rank, failure in error.failures.items())
        cause.add_note(f"(raised on rank {rank})")
        raise (cause if isinstance(cause, Exception) else RuntimeError(repr(cause))) from error


@contextmanager
def no_group_is_fine() -> Iterator[None]:
    """Suppress DCP's warning that there is no process group: one process alone is supported."""
    with warnings.catch_warnings():
        if not dist.is_initialized():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield
