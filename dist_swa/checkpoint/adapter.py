"""Adapters under the names of PEFT: those in its files, and averaged ones, of which it saved the trained ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dist_swa.checkpoint.beside import ADAPTER_FILES, adapter_folders
from dist_swa.checkpoint.keys import Reader, spec_of
from dist_swa.checkpoint.readers import open_reader
from dist_swa.checkpoint.safetensors_io import SUFFIX
from dist_swa.checkpoint.sources import Source

_IN_MODULES = "modules_to_save"
_REMEDY = f"name an output that ends in {SUFFIX} to write them under the names of the model"


class Adapter:
    """An adapter by the names in PEFT's file. What is not averaged has the values of that file."""

    def __init__(self, folder: Path, file: Reader, source: Source, names: Mapping[str, str]) -> None:
        self.folder = folder
        self._file, self._source, self._names = file, source, dict(names)
        specs = {key: source.spec(names[key]) if key in names else spec_of(file, key) for key in file.keys}
        self.specs = {key: spec for key, spec in specs.items() if spec is not None}
        self.skipped = [key for key, spec in specs.items() if spec is None]

    def read(self, key: str) -> Tensor:
        tensor: Tensor = self._source.read(self._names[key]) if key in self._names else self._file.read(key)
        return tensor


def open_adapter(path: str | Path, source: Source, *, is_averaged: bool) -> Adapter | None:
    """Return the adapter at `path` that `source` is, or the average of with `is_averaged`; None where PEFT saved none.

    Raises ValueError if several are averaged, or if the file of PEFT lacks an averaged parameter.
    """
    folders = adapter_folders(path)
    files = {name: open_reader(_file_in(folder)) for name, folder in folders.items()}
    for name, file in files.items():
        if source.specs.keys() == set(file.keys):
            return Adapter(folders[name], file, source, {key: key for key in file.keys})
    if not (files and is_averaged):
        return None
    names = {name: _names_of(name, file, source) for name, file in files.items()}
    # Biases have the names of the model in each file; the names of other parameters have that of their adapter.
    averaged = [name for name, known in names.items() if any(key != other for key, other in known.items())]
    averaged = averaged or list(files)
    if len(averaged) > 1:
        raise ValueError(
            f"an adapter folder needs one averaged adapter, got {', '.join(averaged)} in {source.path}; {_REMEDY}"
        )
    (adapter,) = averaged
    if missing := source.names_besides(names[adapter].values()):
        raise ValueError(
            f"an adapter folder needs each averaged parameter in the file of PEFT, got none of {missing[0]} in"
            f" {files[adapter].folder}; {_REMEDY}"
        )
    return Adapter(folders[adapter], files[adapter], source, names[adapter])


def _file_in(folder: Path) -> Path:
    return next(path for file in ADAPTER_FILES if (path := folder / file).exists())


def _names_of(adapter: str, file: Reader, source: Source) -> dict[str, str]:
    """Return the names in `source` by the keys in the file of an adapter."""
    found: dict[str, str] = {}
    keys_of_file = set(file.keys)
    for name in (*source.specs, *source.buffers):
        spec = source.spec(name)
        keys = [key for key in _keys_of(name, adapter) if key in keys_of_file]
        keys = [key for key in keys if spec is not None and file.shape(key) == spec.shape]
        found |= {keys[0]: name} if keys else {}
    return found


def _keys_of(name: str, adapter: str) -> list[str]:
    """Return how PEFT may name a parameter in the file of an adapter.

    "lora_A.default.weight" becomes "lora_A.weight", "lora_magnitude_vector.default.weight" "lora_magnitude_vector", and
    "head.modules_to_save.default.weight" "head.weight". A module of the model may have the name of the adapter.
    """
    parts = name.split(".")
    keys = []
    for i in (i for i, part in enumerate(parts) if part == adapter):
        before = parts[: i - 1] if parts[i - 1] == _IN_MODULES else parts[:i]
        keys += [".".join([*before, *parts[i + 1 :]]), ".".join(before)]
    return [*reversed(keys), name]
