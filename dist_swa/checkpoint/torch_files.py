"""Read files of torch.save one tensor at a time, without running their code."""

from __future__ import annotations

import re
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_swa.checkpoint.shards import read_index, weight_files
from dist_swa.storage.reader import CheckpointError

INDEX = "pytorch_model.bin.index.json"  # maps each tensor of a folder to its file
_FILES = "*model*.bin"  # and not optimizer.bin, training_args.bin
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_MAX_MAPPED_BYTES = 1 << 24  # read before a mapping is closed: pages that were read stay resident until then
_MAX_STEPS = 2 * 10**7  # about 10**6 values; a small file may have many more, as a list that is in a list twice
_STEPS_PER_KEY = 4  # of a path, compared with a value in a list, which is skipped
_SIGNS_OF_CODE = (" GLOBAL ", "can still be loaded", "TorchScript", "legacy .tar format")  # in errors of torch.load
# Reads anything, and keeps what weights_only=True reads: the averages, the weights and the steps in any file.
_CONVERSION = (
    "keep = lambda x: {{k: keep(v) for k, v in x.items()}} if isinstance(x, dict) else [*map(keep, x)] if isinstance(x,"
    " list) else x if isinstance(x, (int, torch.Tensor)) else None; x = torch.load({path!r}, 'cpu', weights_only=False)"
    "; torch.save(keep(x.state_dict() if isinstance(x, torch.nn.Module) else x), 'weights.pt')"
)
_ZIP, _OLD = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF"  # how files of torch.save begin; the second before version 1.6


class TorchReader:
    """Reads tensors of a file that torch.save wrote, or of a folder of such files, by their dotted keys.

    `paths` are the keys of the nested dicts and lists that each was saved in. The shape and dtype of other values are
    None. Memory: the tensor that is read. A file in torch's format before version 1.6 stays in memory as a whole.

    Raises CheckpointError, which names the file, if one is damaged or missing, or asks to run code.
    """

    has_checksums = False

    def __init__(self, path: Path) -> None:
        self.folder = path
        self.paths: dict[str, tuple[str, ...]] = {}
        self._files: dict[str, Path] = {}
        self._values: dict[str, Any] = {}  # of the files that are open
        self._specs: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._num_bytes = 0
        for file in [path] if path.is_file() else weight_files_in(path):
            for key_path, value in self._open(file):
                key = ".".join(key_path)
                if key in self._files:
                    raise CheckpointError(f"weights need each tensor once, got {key} again in {file}")
                self.paths[key], self._files[key] = key_path, file
                if isinstance(value, Tensor) and value.is_nested:
                    raise ValueError(
                        f"reading needs dense tensors, got nested {key} in {file}; save its parts, or none"
                    )
                if isinstance(value, Tensor):
                    self._specs[key] = value.shape, value.dtype
        listed = {} if path.is_file() else read_index(path / INDEX)
        if missing := sorted(listed.keys() - self._specs.keys()):
            raise CheckpointError(f"weights need the tensors of {path / INDEX}, got none of {missing[0]}")
        self.keys: Sequence[str] = tuple(self._files)

    def shape(self, key: str) -> torch.Size | None:
        return self._specs[key][0] if key in self._specs else None

    def dtype(self, key: str) -> torch.dtype | None:
        return self._specs[key][1] if key in self._specs else None

    def read(self, key: str) -> Any:
        """Return a copy of a tensor on the CPU, or another value as it is. Raises ValueError for a sparse tensor."""
        if key not in self._values:
            self._open(self._files[key])
        value = self._values[key]
        if not isinstance(value, Tensor):
            return value
        if (
            type(value) not in (Tensor, nn.Parameter)
            or value.layout != torch.strided
            or value.device.type != "cpu"
            or value.is_quantized
        ):
            raise ValueError(
                f"reading needs dense tensors with their values, got a {type(value).__name__} of {value.layout} on"
                f" {value.device} for {key} in {self.folder}; save it as a plain tensor, or leave it out"
            )
        copy = value.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        self._num_bytes += copy.nbytes
        if self._num_bytes > _MAX_MAPPED_BYTES:
            self._close()
        return copy

    def _open(self, file: Path) -> list[tuple[tuple[str, ...], Any]]:
        """Read a file again, and return its values by path."""
        found = list(_flatten(_loaded(file), file))
        self._values |= {".".join(path): value for path, value in found}
        return found

    def _close(self) -> None:
        """Close all files that can be mapped again."""
        self._values = {key: value for key, value in self._values.items() if not _is_zip(self._files[key])}
        self._num_bytes = 0


def is_torch_file(path: Path) -> bool:
    """Return whether torch.save wrote the file `path`, by its content; by its suffix if that is of no known format."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # safetensors: a length, then JSON
        return False
    return head.startswith((_ZIP, _OLD)) or path.suffix in _SUFFIXES or tarfile.is_tarfile(path)


def weight_files_in(folder: Path) -> list[Path]:
    """Return the files of the weights that transformers saved in a folder with torch.save."""
    return weight_files(folder, folder / INDEX, _FILES)


def _loaded(path: Path) -> dict[Any, Any]:
    """Return the dict in a file; its tensors are mapped, unless the file has the old format."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecated storages
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"weights need all files of the folder, got none at {path}; restore it") from error
    except Exception as error:
        text = " ".join(str(error).split())
        if any(sign in text for sign in _SIGNS_OF_CODE):
            raise _needs_code(path, text) from error
        reason = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0]
        raise _damaged(path, reason or type(error).__name__) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"weights need a dict of tensors, got a {type(loaded).__name__} in {path}; save a state dict")
    return loaded


def _needs_code(path: Path, text: str) -> CheckpointError:
    """Return an error with the line that converts a file whose values only code can rebuild."""
    what, convert = "code in it", _CONVERSION.format(path=str(path))
    if "TorchScript" in text:
        what, convert = "TorchScript", f"torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), 'weights.pt')"
    elif found := re.search(r"GLOBAL (\S+)", text):
        what = found[1]
    return CheckpointError(
        f"reading needs weights without code, got {path}, which runs {what}; if you trust it, convert it to a state"
        f" dict: {convert}"
    )


def _damaged(path: Path, text: str) -> CheckpointError:
    return CheckpointError(f"weights need a file as torch.save wrote it, got {path}: {text}; restore it")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == _ZIP


def _flatten(loaded: dict[Any, Any], file: Path) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield what is in nested dicts, and the tensors in lists, with the keys that lead to them."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), loaded)]  # all dicts are subclasses of dict; Mapping is slow
    num_steps = 0
    while waiting:
        path, container = waiting.pop()
        is_dict = isinstance(container, dict)
        num_steps += len(container)
        for key, value in container.items() if is_dict else enumerate(container):
            if not (is_dict or isinstance(value, (dict, list, tuple, Tensor))):
                continue
            num_steps += _STEPS_PER_KEY * len(path)
            if num_steps > _MAX_STEPS:
                raise _damaged(file, "it has more than 1000000 dicts and lists, or too many inside one another")
            if isinstance(value, (dict, list, tuple)):
                waiting.append(((*path, str(key)), value))
            else:
                yield (*path, str(key)), value
