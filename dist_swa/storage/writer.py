"""Write a checkpoint, with the checksums of its files, that appears under its path only when it is complete."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from dist_swa.storage.reader import METADATA, SUMS, WRITER, format_sums

PARTIAL = ".partial"  # suffix of the hidden name under which a checkpoint is written
_BUFFER_BYTES = 1 << 20


class SavePlannerWithoutPickle(DefaultSavePlanner):
    """Plans to save nested dicts and lists; raises TypeError for values that a load would not read.

    The constructor flattens the state once, before DCP's collectives. With `copy_to_cpu` it copies all tensors: DCP's
    own stagers fail on the ShardedTensors of FSDP1, and do not copy 0-dim DTensors.
    """

    def __init__(self, state: Mapping[str, Any], copy_to_cpu: bool = False) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)  # otherwise a checkpoint has buffers of several ranks
        super().set_up_planner(dict(state))
        with torch.no_grad():
            for key, value in self.state_dict.items():
                if not isinstance(value, Tensor):
                    self.state_dict[key] = _copy_of_value(key, value)
                    continue
                _check_is_plain(key, value)
                if copy_to_cpu:
                    self.state_dict[key] = value.to("cpu", copy=True)

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.is_coordinator = is_coordinator


class CheckpointWriter(FileSystemWriter):
    """Writes files and their checksums into a hidden folder, and renames it to `path` when it is complete.

    The coordinator does everything outside of the files of one rank, between DCP's collectives, so that its errors are
    raised on every rank. It receives the checksums as the results of one more item per file. It also writes the files
    in `beside`, given as content by name.
    """

    def __init__(
        self, path: Path, *, one_file_per_tensor: bool = False, beside: Mapping[str, bytes] | None = None
    ) -> None:
        self._path, self._beside = path, beside or {}
        # torch keeps all tensors of a file in memory until it closes the file.
        super().__init__(path.with_name(f".{path.name}{PARTIAL}"), single_file_per_rank=not one_file_per_tensor)
        self.fs = self._files = _HashingFileSystem()
        self._must_clean_up = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict  # the planner has copied it

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if self._path.exists():
            raise FileExistsError(f"save needs a path where nothing is yet, got {self._path}; choose another one")
        partial = Path(self.path)
        remove(partial)  # left by a killed save
        partial.mkdir(parents=True)
        self._must_clean_up = True
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        sums = [WriteResult(MetadataIndex(name), 0, digest) for name, digest in self._files.digests.items()]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results + sums)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        sums = {r.index.fqn: r.storage_data for part in results for r in part if isinstance(r.storage_data, str)}
        super().finish(metadata, [[r for r in part if not isinstance(r.storage_data, str)] for part in results])
        for name, content in self._beside.items():
            self._write(name, content)
        sums |= {name: self._files.digests[name] for name in (METADATA, *self._beside)}
        self._write(SUMS, format_sums(sums).encode())
        sync_folder(Path(self.path))
        Path(self.path).rename(self._path)
        self._must_clean_up = False
        sync_folder(self._path.parent)

    def _write(self, name: str, content: bytes) -> None:
        with self.fs.create_stream(Path(self.path) / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=str(self._path), save_id=self.save_id, modules=[WRITER])

    @contextmanager
    def cleaned_up(self) -> Iterator[None]:
        """Remove the files of a failed save, which may have filled the disk."""
        try:
            yield
        finally:
            if self._must_clean_up:
                shutil.rmtree(self.path, ignore_errors=True)


class _HashingFileSystem(FileSystem):
    """Computes the checksum of each file while it is written, and names the file in errors."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}  # by file name

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        try:
            with _HashedFile(io.FileIO(path, mode), _BUFFER_BYTES) as file:
                yield file
            self.digests[Path(path).name] = file.digest.hexdigest()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _HashedFile(io.BufferedWriter):
    def __init__(self, raw: io.FileIO, buffer_size: int) -> None:
        super().__init__(raw, buffer_size)
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)


def _check_is_plain(key: str, tensor: Tensor) -> None:
    """Raise TypeError for a quantised weight or another subclass that contains other tensors: no load would read it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if hasattr(local, "__tensor_flatten__"):
        raise TypeError(
            f"save needs plain tensors, got {key}={type(local).__name__}; leave it out, as the state dict of the"
            " parameters that are trained does, and save it once with torch.save"
        )


def _copy_of_value(key: str, value: Any) -> Any:
    """Return `value` as a load would return it, or raise TypeError if a load would refuse it."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TypeError(
            "save needs tensors and values that torch.load reads with weights_only=True, got"
            f" {key}={type(value).__name__}; save what it consists of, as numbers, text, lists and tensors"
        ) from error


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link without its target, if there is one at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Write the names of the files in a folder to the disk, so that they survive a crash of the machine."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
