"""Writing a checkpoint that appears when it is whole, with the checksums of its files."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dist_swa.storage.reader import METADATA, SUMS, WRITER, as_text

PARTIAL = ".partial"  # ends the hidden name under which a checkpoint is written
_BUFFER_BYTES = 1 << 20


class CheckpointWriter(FileSystemWriter):
    """Writes files and their checksums into a hidden folder, and renames it to `path` when it is whole.

    Everything that the ranks share is done by the coordinator between DCP's collectives, so that its errors are
    everybody's. Checksums travel to it as the results of one more item per file.
    """

    def __init__(self, path: Path, *, one_file_per_tensor: bool = False) -> None:
        self._path = path
        # torch holds all tensors of a file until the file is closed
        super().__init__(path.with_name(f".{path.name}{PARTIAL}"), single_file_per_rank=not one_file_per_tensor)
        self.fs = self._files = _HashingFileSystem()
        self._must_clean_up = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict  # which `save_async` has copied

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if self._path.exists():
            raise FileExistsError(f"save needs a path where nothing is yet, got {self._path}; choose another one")
        partial = Path(self.path)
        remove(partial)  # a killed save left it
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
        sums[METADATA] = self._files.digests[METADATA]
        with self.fs.create_stream(Path(self.path) / SUMS, "wb") as file:
            file.write(as_text(sums).encode())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(Path(self.path))
        Path(self.path).rename(self._path)
        self._must_clean_up = False
        sync_folder(self._path.parent)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=str(self._path), save_id=self.save_id, modules=[WRITER])

    @contextmanager
    def cleaned_up(self) -> Iterator[None]:
        """Remove what a failed save has written, which may be what filled the disk."""
        try:
            yield
        finally:
            if self._must_clean_up:
                shutil.rmtree(self.path, ignore_errors=True)


class _HashingFileSystem(FileSystem):
    """Computes the checksum of each file as it is written, and names the file in errors."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}  # by the names of files

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


def remove(path: Path) -> None:
    """Remove what is at `path`, if there is anything: a file, a folder, or a link and not where it leads."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Let names of files last over a crash of the machine, as their contents do."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
