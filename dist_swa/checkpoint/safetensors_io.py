"""Read and write safetensors one tensor at a time, so that a file need not fit into memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from dist_swa.checkpoint.shards import read_index, weight_files
from dist_swa.collectives import raise_on_all, rank_and_world_size
from dist_swa.storage.reader import CheckpointError
from dist_swa.storage.writer import PARTIAL, sync_folder

SUFFIX = ".safetensors"
INDEX = f"model{SUFFIX}.index.json"  # maps each tensor of a folder to its file
_METADATA = "__metadata__"  # the text in a header, among the names of tensors
_MAX_FILE_BYTES = 5 * 10**9
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Spec(NamedTuple):
    """The shape and dtype of a tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def in_dtype(self, dtype: torch.dtype | None) -> Spec:
        """Return the spec of an output that has `dtype`, if it is not None, for floating tensors."""
        return Spec(self.shape, dtype if dtype is not None and self.dtype.is_floating_point else self.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class SafetensorsReader:
    """Reads the shape, dtype and value of each of the `keys` in a safetensors file, or in a folder of such files.

    Raises CheckpointError, which names the file, if one is damaged or missing, or has a dtype that torch lacks.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        self._files: dict[str, Path] = {}
        self._specs: dict[str, Spec] = {}
        listed = read_index(self.folder / INDEX)
        is_file = self.folder.is_file()
        for file in [self.folder] if is_file else weight_files(self.folder, self.folder / INDEX, f"*{SUFFIX}"):
            with _opened(file) as tensors:
                for key in tensors.keys():  # noqa: SIM118  (not a dict)
                    if listed.get(key, file) != file or key in self._specs:
                        raise CheckpointError(f"safetensors need each tensor once, got {key} again in {file}")
                    tensor = tensors.get_slice(key)
                    if tensor.get_dtype() not in _DTYPES:
                        raise CheckpointError(f"safetensors need dtypes of torch, got {tensor.get_dtype()} in {file}")
                    self._specs[key] = Spec(torch.Size(tensor.get_shape()), _DTYPES[tensor.get_dtype()])
                    self._files[key] = file
        if missing := sorted(set(listed) - set(self._specs)):
            raise CheckpointError(f"safetensors need the tensors of {self.folder / INDEX}, got none of {missing[0]}")
        self.keys = tuple(self._specs)

    def shape(self, key: str) -> torch.Size:
        return self._specs[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._specs[key].dtype

    def read(self, key: str) -> Tensor:
        """Return the tensor `key` on the CPU. Memory: that tensor."""
        with _opened(self._files[key]) as tensors:  # reopened each time: mapped pages stay resident until the close
            tensor: Tensor = tensors.get_tensor(key)
            return tensor


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do: with a length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def write_safetensors(
    files: Mapping[str, Mapping[str, Spec]],
    folder: Path,
    read: Callable[[str], Tensor],
    group: dist.ProcessGroup | None,
    progress: bool,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `files` into `folder`, and an index if there are several. Local: each rank writes its share of the files.

    `read` returns a tensor by name. `metadata` is text for the header of each file. One tensor is in memory at a time,
    so the header is written here: `safetensors.serialize_file` needs all tensors of a file at once.
    """
    rank, ranks = rank_and_world_size(group)
    mine = list(files.items())[rank::ranks]
    with tqdm(total=sum(len(specs) for _, specs in mine), unit="tensor", disable=not progress or rank > 0) as bar:
        for name, specs in mine:
            with created(folder / name) as file:
                file.write(_header(specs, {"format": "pt", **(metadata or {})}))
                for key in specs:
                    file.write(read(key).contiguous().flatten().view(torch.uint8).numpy().data)
                    bar.update()
    if rank == 0 and len(files) > 1:
        total_bytes = sum(spec.num_bytes for specs in files.values() for spec in specs.values())
        weight_map = {key: name for name, specs in files.items() for key in specs}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        with created(folder / INDEX) as file:
            file.write(json.dumps(index, indent=2).encode())


def files_of(specs: Mapping[str, Spec], out: Path, name: str | None = None) -> dict[str, dict[str, Spec]]:
    """Split tensors into files of at most 5 GB; a single file if `out` is a file, or one of `name`.

    In a file, tensors with larger elements come first, so that all are aligned. Raises ValueError for a dtype or a
    name that safetensors lack.
    """
    # huggingface_hub splits in the same way, but an HTTP client is too large a dependency for this loop.
    is_single = name is not None or out.suffix == SUFFIX
    parts: list[dict[str, Spec]] = [{}]
    num_bytes = 0
    for key, spec in sorted(specs.items()):
        if key == _METADATA or key.encode(errors="ignore").decode() != key:
            raise ValueError(f"safetensors need names of UTF-8 other than {_METADATA}, got {key!r}; rename the tensor")
        if spec.dtype not in _NAMES:
            raise ValueError(f"safetensors need {', '.join(_DTYPES)}, got {key}={spec}; leave it out of the checkpoint")
        if not is_single and parts[-1] and num_bytes + spec.num_bytes > _MAX_FILE_BYTES:
            parts.append({})
            num_bytes = 0
        parts[-1][key] = spec
        num_bytes += spec.num_bytes
    parts = [dict(sorted(part.items(), key=lambda item: -item[1].dtype.itemsize)) for part in parts]
    if len(parts) == 1:
        return {name or f"model{SUFFIX}": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}{SUFFIX}": part for i, part in enumerate(parts, start=1)}


def check_new(out: Path) -> None:
    """Raise FileExistsError if `out` exists, even as a dangling link, or has no name ("/" and ".")."""
    if not out.name or os.path.lexists(out):
        raise FileExistsError(f"an output needs a path where nothing is yet, got {out}; choose another")


@contextmanager
def atomic_output(out: Path, group: dist.ProcessGroup | None) -> Iterator[Path]:
    """Yield a hidden folder that is renamed to `out` once the body has succeeded on every rank. A collective.

    If `out` is a safetensors file, the only file in the folder is renamed. Raises FileExistsError if `out` exists. An
    error of the body is raised on every rank, and the folder is removed.
    """
    partial, is_first = out.parent / f".{out.name}{PARTIAL}", rank_and_world_size(group)[0] == 0
    with raise_on_all(group):
        if is_first:
            check_new(out)
            shutil.rmtree(partial, ignore_errors=True)  # of a killed process
            partial.mkdir(parents=True)
    try:
        with raise_on_all(group):
            yield partial
        with raise_on_all(group):
            if is_first:
                sync_folder(partial)
                (next(partial.iterdir()) if out.suffix == SUFFIX else partial).rename(out)
                sync_folder(out.parent)
    finally:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError as error:
        raise CheckpointError(f"safetensors need all files of the folder, got none at {path}; restore it") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"safetensors need a file as it was written, got {path}: {error}; restore it") from error


@contextmanager
def created(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {_METADATA: metadata}
    end = 0
    for key, spec in specs.items():
        start, end = end, end + spec.num_bytes
        entries[key] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
