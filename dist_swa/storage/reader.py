"""Read a checkpoint from an untrusted source: none of its code runs, and damage is found before any value is used."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dist_swa.storage.metadata import UnsafeMetadataError, read_metadata

METADATA = ".metadata"  # written by DCP: which tensor is where
SUMS = "SHA256SUMS"  # of all other files, in the format of `sha256sum --check SHA256SUMS`
WRITER = "dist_swa.checkpoint"  # recorded in `.metadata`, so that a deleted SHA256SUMS is detected


class CheckpointError(ValueError):
    """A checkpoint is damaged or incomplete, or asks to run code. The message names the file.

    Example:

    >>> from pathlib import Path
    >>> from dist_swa import checkpoint
    >>> checkpoint.save({"step": 1}, "step-1")
    >>> Path("step-1/SHA256SUMS").unlink()
    >>> try:
    ...     checkpoint.open_checkpoint("step-1")
    ... except checkpoint.CheckpointError as error:
    ...     print(error)
    a checkpoint needs its files as they were written, got step-1/SHA256SUMS: it is missing; ...
    """


def format_sums(sums: Mapping[str, str]) -> str:
    """Return the content of `SUMS` for checksums by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Return a reader of the DCP checkpoint in the folder `path`, for one process and without a process group.

    The reader runs no code, and verifies the checksum of a file before it first reads from it. Raises CheckpointError
    if the checkpoint is damaged, incomplete or asks to run code.

    Example:

    >>> import torch
    >>> from dist_swa import checkpoint
    >>> checkpoint.save({"model": {"weight": torch.ones(2, 3)}}, "step-1")
    >>> reader = checkpoint.open_checkpoint("step-1")
    >>> reader.keys, reader.shape("model.weight")
    (('model.weight',), torch.Size([2, 3]))
    >>> reader.read("model.weight")
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    return CheckpointReader(path)


class CheckpointReader(FileSystemReader):
    """The content of the checkpoint in the folder `path`: `keys`, and the `shape`, `dtype` and value of each. Local.

    Keys are dotted, such as "model.layers.0.weight". The reader is also a ``StorageReader`` for dcp.load. Raises
    CheckpointError as `open_checkpoint` does.

    `has_checksums` is False for a checkpoint that plain dcp.save wrote. Missing and short files, and tensors with
    missing parts, are then detected, but not flipped bits inside of tensors.

    Example:

    >>> from dist_swa import checkpoint
    >>> checkpoint.save({"epoch": 4, "seed": 0}, "step-840")
    >>> reader = checkpoint.CheckpointReader("step-840")
    >>> {key: reader.read(key) for key in reader.keys}
    {'epoch': 4, 'seed': 0}
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        super().__init__(self.folder)
        self.fs = self._files = _VerifyingFileSystem(self.folder)
        self.has_checksums = bool(self._files.sums)
        self.metadata = self._read_metadata()
        self.storage_data = self.metadata.storage_data
        self.keys = tuple(self.metadata.state_dict_metadata)

    def shape(self, key: str) -> torch.Size | None:
        """The shape of the full tensor `key`; None if it is not a tensor. KeyError if it is not in the checkpoint."""
        entry = self._entry(key)
        return entry.size if isinstance(entry, TensorStorageMetadata) else None

    def dtype(self, key: str) -> torch.dtype | None:
        """The dtype of the tensor `key`; None if it is not a tensor. KeyError if it is not in the checkpoint."""
        entry = self._entry(key)
        return entry.properties.dtype if isinstance(entry, TensorStorageMetadata) else None

    def read(self, key: str) -> Any:
        """Return the full tensor `key` on the CPU, or the value if it is not a tensor. Memory: twice the tensor."""
        entry = self._entry(key)
        if not isinstance(entry, TensorStorageMetadata):
            place = self.storage_data[MetadataIndex(key)]
            with self._files.create_stream(self.folder / place.relative_path, "rb") as file:
                file.seek(place.offset)
                return torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        planner = LoadPlannerWithoutPickle(self, flatten=False)
        planner.set_up_planner({key: tensor}, self.metadata, True)
        self.read_data(planner.create_local_plan(), planner).wait()
        return tensor

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Verify the checksum of every `parts`-th file, starting with number `part`; CheckpointError if one differs.

        The other files are left to other ranks. No file is verified again when it is read.
        """
        for name in sorted(self._files.unverified)[part::parts]:
            self._files.verify(name)
        self._files.unverified.clear()

    def read_metadata(self, *args: Any) -> Metadata:
        """Return the metadata that the constructor read and checked. (``StorageReader``)"""
        return self.metadata

    def _entry(self, key: str) -> Any:
        if key not in self.metadata.state_dict_metadata:
            raise KeyError(f"{key} is not in the checkpoint {self.folder}")
        return self.metadata.state_dict_metadata[key]

    def _read_metadata(self) -> Metadata:
        self._files.verify(METADATA)
        try:
            with self._files.open(METADATA) as file:
                metadata = read_metadata(file)
            is_ours = WRITER in getattr(metadata.storage_meta, "modules", ())
        except (CheckpointError, OSError):
            raise
        except UnsafeMetadataError as error:
            raise CheckpointError(
                f"a checkpoint needs metadata that runs no code, got {self.folder / METADATA}: {error}; if you"
                " trust it, load it with the program that wrote it, and save it with torch.distributed.checkpoint.save"
            ) from error
        except Exception as error:
            raise self._files.error(METADATA, str(error)) from error
        if is_ours and not self.has_checksums:
            raise self._files.error(SUMS, "it is missing")
        ends: dict[str, int] = {}
        for place in metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            self._files.check_size(name, end)
        return metadata


class _VerifyingFileSystem(FileSystem):
    """Verifies each file in a folder before DCP first reads from it, and names the file in errors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.sums = self._read_sums()
        self.unverified = set(self.sums)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        name = Path(path).name
        self.verify(name)
        try:
            with self.open(name) as file:
                yield file
        except CheckpointError:
            raise
        except Exception as error:
            raise self.error(
                name, f"it contains other values than tensors and plain ones ({type(error).__name__})"
            ) from error

    def open(self, name: str) -> io.BufferedReader:
        try:
            return (self._folder / name).open("rb")
        except FileNotFoundError as error:
            raise self.error(name, "it is missing") from error

    def verify(self, name: str) -> None:
        if name in self.unverified:
            with self.open(name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.sums[name]:
                    raise self.error(name, f"its content is not what its checksum in {SUMS} says")
            self.unverified.discard(name)

    def check_size(self, name: str, least: int) -> None:
        """Raise CheckpointError unless the file has a checksum, if there are any, and at least `least` bytes."""
        if self.sums and name not in self.sums:
            raise self.error(SUMS, f"it has no line for {name}")
        with self.open(name) as file:
            if (size := file.seek(0, io.SEEK_END)) < least:
                raise self.error(name, f"it has {size} bytes of at least {least}")

    def error(self, name: str, got: str) -> CheckpointError:
        return CheckpointError(
            f"a checkpoint needs its files as they were written, got {self._folder / name}: {got}; restore the file, or"
            " use another checkpoint"
        )

    def _read_sums(self) -> dict[str, str]:
        """Return the checksums by file name; none for a checkpoint that plain dcp.save wrote."""
        if not (self._folder / SUMS).exists():
            return {}
        text = (self._folder / SUMS).read_bytes().decode(errors="replace")
        lines = (line.partition("  ") for line in text.splitlines())
        sums = {name: digest for digest, _, name in lines}
        if text != format_sums(sums) or any(Path(name).name != name for name in sums):
            raise self.error(SUMS, "it is no list of checksums and names")
        if METADATA not in sums:
            raise self.error(SUMS, f"it has no line for {METADATA}")
        return sums


class LoadPlannerWithoutPickle(DefaultLoadPlanner):
    """Checks that the checkpoint fits, and reads all values that are not tensors, before any rank writes a tensor.

    Removes keys that are `optional`, and that the checkpoint does not have, from the state dict.
    """

    def __init__(self, reader: CheckpointReader, flatten: bool = True, optional: Set[str] = frozenset()) -> None:
        super().__init__(flatten_state_dict=flatten)
        self._reader = reader
        self._optional = optional - set(reader.keys)
        self._values: dict[str, Any] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        for key in self._optional & self.state_dict.keys():
            del self.state_dict[key]
            container, last = self._place_of(key)
            del container[last]

    def create_local_plan(self) -> LoadPlan:
        # The method of the base class takes an FSDP1 parameter that is empty on this rank for a sign of torch < 2.4.
        try:
            plan = create_default_local_load_plan(self.state_dict, self._reader.metadata)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"load needs a checkpoint with the keys and shapes of the state, got {self._reader.folder}: {error}"
                "; build the state as it was saved"
            ) from error
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                self._values[item.dest_index.fqn] = self._reader.read(item.storage_index.fqn)
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Store the value that was read safely before; the method of the base class would unpickle `value`."""
        container, last = self._place_of(read_item.dest_index.fqn)
        container[last] = self._values[read_item.dest_index.fqn]

    def _place_of(self, key: str) -> tuple[Any, Any]:
        """Return the dict or list that has the value of `key` in the state dict, and its key or index there."""
        *parents, last = self.mappings[key]
        container: Any = self.original_state_dict
        for parent in parents:
            container = container[parent]
        return container, last
