"""Reading a checkpoint that nobody vouches for: no code of it runs, and damage is found before it spreads."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from dist_swa.storage.metadata import read_metadata

METADATA = ".metadata"  # DCP's list of what is where
SUMS = "SHA256SUMS"  # of all other files, as `sha256sum --check SHA256SUMS` reads it
WRITER = "dist_swa.checkpoint"  # noted in `.metadata`, so that checksums that were deleted are missed
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint is damaged or incomplete, or wants to run code. The message names the file."""


def as_text(sums: Mapping[str, str]) -> str:
    """Return the content of `SUMS`: the checksum and the name of each file."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Return a reader of the DCP checkpoint in the folder `path`, for one process and without a process group.

    It runs no code, and checks the checksum of every file before it reads of it. Raises CheckpointError where the
    checkpoint is damaged, incomplete or would run code.
    """
    return CheckpointReader(path)


class CheckpointReader(FileSystemReader):
    """What is in a checkpoint: `keys`, and the `shape`, `dtype` and value of each.

    Keys are dotted, as "swa.num_averaged". Values that are no tensors have the shape and dtype None.
    Also a ``StorageReader`` for dcp.load.

    `has_checksums` is False for a checkpoint by plain dcp.save: it is looked at for missing and short files, and for
    tensors that do not cover their shape, but flipped bytes inside of tensors go unnoticed.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        super().__init__(self.folder)
        self._sums = self._read_sums()
        self.has_checksums = bool(self._sums)
        self._unverified = set(self._sums)
        self.metadata = self._read_metadata()
        self.storage_data = self.metadata.storage_data
        self.keys = tuple(self.metadata.state_dict_metadata)

    def shape(self, key: str) -> torch.Size | None:
        entry = self._entry(key)
        return entry.size if isinstance(entry, TensorStorageMetadata) else None

    def dtype(self, key: str) -> torch.dtype | None:
        entry = self._entry(key)
        return entry.properties.dtype if isinstance(entry, TensorStorageMetadata) else None

    def read(self, key: str) -> Any:
        """Return the whole tensor `key`, on the CPU; of what is no tensor, its value. Memory: that tensor, twice."""
        entry = self._entry(key)
        if not isinstance(entry, TensorStorageMetadata):
            return self._read_value(key)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        planner = LoadPlannerWithoutPickle(self, flatten=False)
        planner.set_up_planner({key: tensor}, self.metadata, True)
        self.read_data(planner.create_local_plan(), planner).wait()
        return tensor

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read every `parts`-th file, from number `part` on, and raise CheckpointError where its checksum is another.

        The other parts are for the other ranks; nothing is verified again when it is read.
        """
        for name in sorted(self._unverified)[part::parts]:
            self._verify(name)
        self._unverified.clear()

    def read_metadata(self, *args: Any) -> Metadata:
        """Return the metadata, read and checked before. (``StorageReader``)"""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for, file by file. (``StorageReader``)"""
        per_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            per_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in per_file.items():
            self._attempt(name, partial(super().read_data, replace(plan, items=items), planner))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _entry(self, key: str) -> Any:
        if key not in self.metadata.state_dict_metadata:
            raise KeyError(f"{key} is not in the checkpoint {self.folder}")
        return self.metadata.state_dict_metadata[key]

    def _read_value(self, key: str) -> Any:
        where = self.storage_data[MetadataIndex(key)]

        def read() -> Any:
            with (self.folder / where.relative_path).open("rb") as file:
                file.seek(where.offset)
                return torch.load(io.BytesIO(file.read(where.length)), map_location="cpu", weights_only=True)

        return self._attempt(where.relative_path, read)

    def _attempt(self, name: str, read: Callable[[], T]) -> T:
        """Return what `read` returns from a verified file; what it raises becomes an error that names the file."""
        if name in self._unverified:
            self._verify(name)
            self._unverified.discard(name)
        try:
            return read()
        except Exception as error:
            raise self._error(name, f"it holds other than tensors and plain values ({type(error).__name__})") from error

    def _verify(self, name: str) -> None:
        with self._open(name) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self._sums[name]:
                raise self._error(name, f"its content is not what its checksum in {SUMS} says")

    def _error(self, name: str, got: str) -> CheckpointError:
        return CheckpointError(
            f"a checkpoint needs its files as they were written, got {self.folder / name}: {got}; restore the file, or"
            " use another checkpoint"
        )

    def _open(self, name: str) -> io.BufferedReader:
        try:
            return (self.folder / name).open("rb")
        except FileNotFoundError as error:
            raise self._error(name, "it is missing") from error

    def _read_sums(self) -> dict[str, str]:
        """Return the checksum of each file; none for a checkpoint by plain dcp.save."""
        if not (self.folder / SUMS).exists():
            return {}
        with self._open(SUMS) as file:
            text = file.read().decode(errors="replace")
        lines = (line.partition("  ") for line in text.splitlines())
        sums = {name: digest for digest, _, name in lines}
        if text != as_text(sums) or any(Path(name).name != name for name in sums):
            raise self._error(SUMS, "it is no list of checksums and names")
        if METADATA not in sums:
            raise self._error(SUMS, f"it has no line for {METADATA}")
        return sums

    def _read_metadata(self) -> Metadata:
        if METADATA in self._unverified:
            self._verify(METADATA)
            self._unverified.discard(METADATA)
        try:
            with self._open(METADATA) as file:
                metadata = read_metadata(file)
            self._check_files(metadata)
            if WRITER in getattr(metadata.storage_meta, "modules", ()) and not self.has_checksums:
                raise self._error(SUMS, "it is missing")
        except (CheckpointError, OSError):
            raise
        except Exception as error:
            raise self._error(METADATA, str(error)) from error
        return metadata

    def _check_files(self, metadata: Metadata) -> None:
        """Raise unless there is a place in the files for all of each tensor, and the files are long enough."""
        ends: dict[str, int] = {}
        for where in metadata.storage_data.values():
            ends[where.relative_path] = max(ends.get(where.relative_path, 0), where.offset + where.length)
        for name, end in ends.items():
            if Path(name).name != name:
                raise self._error(METADATA, f"it names a file outside of the folder, {name!r}")
            if self.has_checksums and name not in self._sums:
                raise self._error(SUMS, f"it has no line for {name}")
            with self._open(name) as file:
                if (size := file.seek(0, io.SEEK_END)) < end:
                    raise self._error(name, f"it has {size} bytes of at least {end}")
        for key, entry in metadata.state_dict_metadata.items():
            least = {MetadataIndex(key): 0}  # bytes at each place
            if isinstance(entry, TensorStorageMetadata):
                size = entry.properties.dtype.itemsize
                least = {MetadataIndex(key, chunk.offsets): prod(chunk.sizes) * size for chunk in entry.chunks}
            for place, num_bytes in least.items():
                if (where := metadata.storage_data.get(place)) is None:
                    raise self._error(METADATA, f"it does not say where {key} is")
                if where.length < num_bytes and not getattr(where, "transform_descriptors", None):
                    raise self._error(METADATA, f"it puts {num_bytes} bytes of {key} into {where.length}")


class LoadPlannerWithoutPickle(DefaultLoadPlanner):
    """Checks, before any tensor is written on any rank, that the checkpoint fits, and reads all that is no tensor."""

    def __init__(self, reader: CheckpointReader, flatten: bool = True) -> None:
        super().__init__(flatten_state_dict=flatten)
        self._reader = reader
        self._values: dict[str, Any] = {}

    def create_local_plan(self) -> LoadPlan:
        # Not the default's: it takes a parameter of which FSDP1 has nothing on this rank for a sign of torch < 2.4.
        try:
            plan = create_default_local_load_plan(self.state_dict, self._reader.metadata)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"load needs a checkpoint with the keys and shapes of the state, got {self._reader.folder}: {error}"
                "; build model and average as they were"
            ) from error
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                self._values[item.dest_index.fqn] = self._reader.read(item.storage_index.fqn)
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put the value that was read before, and not `value`, which DCP would unpickle."""
        *parents, last = self.mappings[read_item.dest_index.fqn]
        place: Any = self.original_state_dict
        for parent in parents:
            place = place[parent]
        place[last] = self._values[read_item.dest_index.fqn]
