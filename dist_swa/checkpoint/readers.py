"""Open what lies under a path, by its content: a checkpoint, safetensors, files of torch.save, a trainer's folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_swa.checkpoint.entries import TRAINER_FOLDER, Contents
from dist_swa.checkpoint.keys import KeyPath, Reader
from dist_swa.checkpoint.safetensors_io import INDEX, SUFFIX, SafetensorsReader, is_safetensors
from dist_swa.checkpoint.torch_files import INDEX as BIN_INDEX
from dist_swa.checkpoint.torch_files import TorchReader, is_torch_file, weight_files_in
from dist_swa.storage.reader import METADATA, CheckpointError, CheckpointReader, open_checkpoint
from dist_swa.storage.writer import PARTIAL

_OF_ACCELERATE = "random_states_0.pkl"  # in each folder of accelerate's save_state, which names averages as it likes
_OF_AVERAGE = re.compile(r"swa\.(.*\.)?format_version")
_OF_MODEL = re.compile(r"(?:pytorch_)?model(?:_fsdp)?(?:_0|(_\d+))?(?:\.safetensors|\.bin)?")
_AVERAGE, _MODEL = "swa", "model"
_BIN, _DCP_SUFFIX = "pytorch_model.bin", ".distcp"


class Model(NamedTuple):
    """The weights of a model: their keys by name."""

    reader: Reader
    stored: Mapping[str, str]


class TrainerReader:
    """The checkpoint of a trainer: averages in folders of their own, as "swa", and the trained weights, as "model".

    An average in another folder than "dist_swa" has the key of its folder.
    """

    def __init__(self, folder: Path, averages: Sequence[CheckpointReader], models: Mapping[str, Model]) -> None:
        self.folder = folder
        self.has_checksums = all(reader.has_checksums for reader in averages)
        self.paths: dict[str, KeyPath] = {}
        self._parts: dict[str, tuple[Reader, str]] = {}
        for reader in averages:
            root = _AVERAGE if reader.folder.name == TRAINER_FOLDER else reader.folder.name
            for key in reader.keys:
                self._add((root, *key.split(".", 1)[1:]), reader, key)
        for root, model in models.items():
            for name, key in model.stored.items():
                self._add((root, name), model.reader, key)
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
        return _open_file(path)
    whole = open_checkpoint(path) if (path / METADATA).exists() else None
    if (whole is None or not _has_average(whole)) and (averages := _averages_in(path)):
        return TrainerReader(path, averages, _models_in(path))
    if whole is not None:
        return whole
    if (weights := _weights_in(path)) is not None:
        return weights
    if not path.exists():
        raise FileNotFoundError(f"a checkpoint or safetensors are needed, got nothing at {path}; see the path")
    steps = sorted(folder.name for name in ("step-*", "checkpoint-*") for folder in path.glob(name))
    hint = f"choose one of {', '.join(steps)} in it" if steps else f"it has no {METADATA}; see the path"
    raise ValueError(f"a checkpoint or safetensors are needed, got {path}; {hint}")


def _open_file(path: Path) -> Reader:
    if path.name == METADATA or path.suffix == _DCP_SUFFIX:
        raise ValueError(f"reading needs the folder of a checkpoint, got its file {path}; pass {path.parent}")
    if is_torch_file(path):
        return TorchReader(path)
    if path.suffix == SUFFIX or is_safetensors(path):
        return SafetensorsReader(path)
    raise ValueError(f"reading needs safetensors or a file of torch.save, got {path}, which is neither; pass weights")


def open_contents(path: str | Path, key: str | None = None) -> Contents:
    """Return the entries of what lies under `path`. The model `key` needs no average beside it; that may be damaged.

    Raises what `open_reader` raises; the error of a damaged average names the models beside it.
    """
    try:
        return Contents(open_reader(path))
    except CheckpointError as error:
        models = _models_in(Path(path)) if Path(path).is_dir() else {}
        if key in models:
            return Contents(TrainerReader(Path(path), [], models))
        if not models:
            raise
        choice = " or ".join(f"key={name!r}" for name in models)
        raise CheckpointError(f"{error}, or pass {choice} for trained weights") from error


def _averages_in(folder: Path) -> list[CheckpointReader]:
    """Return readers of the averages that an adapter wrote into the checkpoint of its trainer."""
    has_any_name = (folder / _OF_ACCELERATE).exists()
    for partial in folder.glob(f".{'*' if has_any_name else TRAINER_FOLDER}{PARTIAL}"):
        if not (folder / partial.name[1 : -len(PARTIAL)]).exists():
            raise _no_average(f"{partial} of a save that was interrupted")
    averages = [open_checkpoint(folder / TRAINER_FOLDER)] if (folder / TRAINER_FOLDER).is_dir() else []
    if averages and not _has_average(averages[0]):
        raise _no_average(f"{folder / TRAINER_FOLDER} without one")
    if has_any_name:
        others = sorted(file.parent for file in folder.glob(f"*/{METADATA}") if file.parent.name != TRAINER_FOLDER)
        averages += filter(_has_average, map(open_checkpoint, others))
    return averages


def _no_average(got: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint of a trainer needs its average, got {got}; use another checkpoint")


def _has_average(reader: CheckpointReader) -> bool:
    return any(map(_OF_AVERAGE.fullmatch, reader.keys))


def _models_in(folder: Path) -> dict[str, Model]:
    """Return the models in the checkpoint of a trainer; accelerate numbers those after the first."""
    if (folder / METADATA).exists():
        return {root or _MODEL: model for root, model in _models_of(open_checkpoint(folder)).items()}
    named = _named_weights_in(folder)
    found = {} if named is None else {_MODEL: _whole(named)}
    for path in sorted(folder.iterdir()):
        if (match := _OF_MODEL.fullmatch(path.name)) and (root := f"{_MODEL}{match[1] or ''}") not in found:
            found[root] = _whole(open_reader(path))
    if not found and (reader := _weights_in(folder)) is not None:
        found[_MODEL] = _whole(reader)
    return found


def _models_of(reader: Reader) -> dict[str, Model]:
    """Return the entries that are models."""
    entries = Contents(reader).entries.items()
    return {key: Model(reader, entry.stored) for key, entry in entries if not (entry.average or entry.has_optimizer)}


def _whole(reader: Reader) -> Model:
    """Return all that is in the file or folder of one model."""
    return Model(reader, {name: key for model in _models_of(reader).values() for name, key in model.stored.items()})


def _named_weights_in(folder: Path) -> Reader | None:
    """Return a reader of the files that from_pretrained reads, which it searches in this order; None without any."""
    if (path := folder / f"{_MODEL}{SUFFIX}").exists():
        return SafetensorsReader(path)
    if (folder / INDEX).exists():
        return SafetensorsReader(folder)
    if (path := folder / _BIN).exists():
        return TorchReader(path)
    return TorchReader(folder) if (folder / BIN_INDEX).exists() else None


def _weights_in(folder: Path) -> Reader | None:
    """Return a reader of the weights in a folder: as from_pretrained finds them, else of any names."""
    if (named := _named_weights_in(folder)) is not None:
        return named
    if any(folder.glob(f"*{SUFFIX}")):
        return SafetensorsReader(folder)
    return TorchReader(folder) if weight_files_in(folder) else None
