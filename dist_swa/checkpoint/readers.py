"""Open what lies under a path, by its content: a checkpoint, safetensors, files of torch.save, a trainer's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_swa.checkpoint.entries import Contents, KeyPath, Reader
from dist_swa.checkpoint.safetensors_io import INDEX, SUFFIX, SafetensorsReader
from dist_swa.checkpoint.torch_files import TorchReader, is_torch_file, weight_files_in
from dist_swa.storage.reader import METADATA, CheckpointReader, open_checkpoint

_SWA = "dist_swa"  # the folder of the average in a trainer's checkpoint, see `dist_swa.integrations`
_OF_ACCELERATE = "random_states_0.pkl"  # in each folder of accelerate's save_state, which names averages as it likes
_OF_AVERAGE = re.compile(r"swa\.(.*\.)?format_version")
_OF_MODEL = re.compile(r"(?:pytorch_)?model(?:_fsdp)?(?:_0|(_\d+))?(?:\.safetensors|\.bin)?")
_AVERAGE, _MODEL = "swa", "model"


class TrainerReader:
    """The checkpoint of a trainer: averages in folders of their own, as "swa", and the trained weights, as "model".

    An average in another folder than "dist_swa" has the key of its folder.
    """

    def __init__(self, folder: Path, averages: Sequence[CheckpointReader], models: Mapping[str, Reader]) -> None:
        self.folder = folder
        self.has_checksums = all(reader.has_checksums for reader in averages)
        self.paths: dict[str, KeyPath] = {}
        self._parts: dict[str, tuple[Reader, str]] = {}
        for reader in averages:
            root = _AVERAGE if reader.folder.name == _SWA else reader.folder.name
            for key in reader.keys:
                self._add((root, *key.split(".", 1)[1:]), reader, key)
        for root, model in models.items():
            for entry in Contents(model).entries.values():
                for name, key in {} if entry.has_optimizer else entry.stored.items():
                    self._add((root, name), model, key)
        self.keys = tuple(self._parts)

    def shape(self, key: str) -> torch.Size | None:
        reader, stored = self._parts[key]
        return reader.shape(stored)

    def dtype(self, key: str) -> torch.dtype | None:
        reader, stored = self._parts[key]
        return reader.dtype(stored)

    def read(self, key: str) -> Any:
        reader, stored = self._parts[key]
        return reader.read(stored)

    def _add(self, path: KeyPath, reader: Reader, key: str) -> None:
        self._parts[".".join(path)] = (reader, key)
        self.paths[".".join(path)] = path


def open_reader(path: str | Path) -> Reader:
    """Return a reader of what lies under `path`. No code in it runs.

    Raises FileNotFoundError or ValueError if there is nothing to read, and CheckpointError if it is damaged.
    """
    path = Path(path)
    if path.is_file():
        return TorchReader(path) if is_torch_file(path) else SafetensorsReader(path)
    if (path / METADATA).exists():
        return open_checkpoint(path)
    if averages := _averages_in(path):
        return TrainerReader(path, averages, _models_in(path))
    if (weights := _weights_in(path)) is not None:
        return weights
    if not path.exists():
        raise FileNotFoundError(f"a checkpoint or safetensors are needed, got nothing at {path}; see the path")
    steps = sorted(folder.name for name in ("step-*", "checkpoint-*") for folder in path.glob(name))
    hint = f"choose one of {', '.join(steps)} in it" if steps else f"it has no {METADATA}; see the path"
    raise ValueError(f"a checkpoint or safetensors are needed, got {path}; {hint}")


def _averages_in(folder: Path) -> list[CheckpointReader]:
    """Return readers of the averages that an adapter wrote into the checkpoint of its trainer."""
    folders = [folder / _SWA] if (folder / _SWA).is_dir() else []
    if (folder / _OF_ACCELERATE).exists():
        folders += sorted(file.parent for file in folder.glob(f"*/{METADATA}") if file.parent not in folders)
    return [reader for reader in map(open_checkpoint, folders) if any(map(_OF_AVERAGE.fullmatch, reader.keys))]


def _models_in(folder: Path) -> dict[str, Reader]:
    """Return readers of the models in the checkpoint of a trainer; accelerate numbers those after the first."""
    found: dict[str, Reader] = {}
    for path in () if (folder / INDEX).exists() else sorted(folder.iterdir()):
        if match := _OF_MODEL.fullmatch(path.name):
            found.setdefault(f"{_MODEL}{match[1] or ''}", open_reader(path))
    if not found and (model := _weights_in(folder)) is not None:
        found[_MODEL] = model
    return found


def _weights_in(folder: Path) -> Reader | None:
    """Return a reader of the weights in a folder, as transformers saves them; None without any."""
    if (folder / INDEX).exists() or any(folder.glob(f"*{SUFFIX}")):
        return SafetensorsReader(folder)
    return TorchReader(folder) if weight_files_in(folder) else None
