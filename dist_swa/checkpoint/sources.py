"""Open the weights of an average, of a model or of safetensors, under the names that load_state_dict expects."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dist_swa.averaging.format import FORMAT_VERSION
from dist_swa.checkpoint.safetensors_io import INDEX, SUFFIX, SafetensorsReader, Spec
from dist_swa.storage.reader import METADATA, CheckpointError, CheckpointReader, open_checkpoint

MODEL = "model"  # the entry of a merged checkpoint, and of the parameters that are not averaged
TOP_LEVEL = ""  # the entry of keys that belong to no other entry, as all of ``dcp.save(model.state_dict())``
Reader = CheckpointReader | SafetensorsReader


class Average(NamedTuple):
    """What a checkpoint says about an average. `step` is None if it is unknown."""

    rule: str
    num_averaged: int
    step: int | None


class Entry(NamedTuple):
    """The keys of an entry by name. Of an average: those of its first slot and its buffers."""

    stored: dict[str, str]
    average: Average | None = None


class Source:
    """The weights in one entry of a checkpoint, or in safetensors.

    `specs` are their shapes and dtypes by name, aliases of tied parameters included. `skipped` are the names of values
    that are not tensors; they cannot be read.
    """

    def __init__(self, reader: Reader, key: str | None, stored: Mapping[str, tuple[str, ...]]) -> None:
        self.path, self.key = reader.folder, key
        self.is_safetensors = isinstance(reader, SafetensorsReader)
        self._reader, self._stored = reader, stored
        specs = {name: spec_of(reader, first) for name, (first, *_) in stored.items()}
        self.specs = {name: spec for name, spec in specs.items() if spec is not None}
        self.skipped = [name for name, spec in specs.items() if spec is None]

    def read(self, name: str) -> Tensor:
        """Return a full tensor on the CPU: the stored one, or the mean of the slots. Memory: up to three times it."""
        first, *others = self._stored[name]
        total: Tensor = self._reader.read(first)
        for key in others:
            total += self._reader.read(key)
        return total.div_(1 + len(others)) if others else total

    @property
    def step(self) -> int | None:
        """The optimizer step that the schedule of an average in the same checkpoint has counted."""
        if not isinstance(self._reader, CheckpointReader):
            return None
        counted = [key for key in self._reader.keys if key.endswith(".schedule.now")]
        return max((_integers(self._reader, key)[0] for key in counted), default=None)

    def __str__(self) -> str:
        return f"{self.key} in {self.path}" if self.key else f"{self.path}"


def open_reader(path: str | Path) -> Reader:
    """Return a reader of a DCP checkpoint or of safetensors. No code in them runs.

    Raises ValueError if `path` is neither, and CheckpointError if it is damaged.
    """
    path = Path(path)
    if path.is_dir() and (path / METADATA).exists():
        return open_checkpoint(path)
    if path.is_file() or (path / INDEX).exists() or any(path.glob(f"*{SUFFIX}")):
        return SafetensorsReader(path)
    if not path.exists():
        raise FileNotFoundError(f"a checkpoint or safetensors are needed, got nothing at {path}; see the path")
    steps = sorted(folder.name for folder in path.glob("step-*"))
    hint = f"choose one of {', '.join(steps)} in it" if steps else f"it has no {METADATA}; see the path"
    raise ValueError(f"a checkpoint or safetensors are needed, got {path}; {hint}")


def open_source(path: str | Path, key: str | None = None) -> Source:
    """Return the weights of the entry `key`; safetensors need no key.

    The default is the only average, or the only entry if there is no average.
    """
    reader = open_reader(path)
    if isinstance(reader, SafetensorsReader):
        return Source(reader, None, {name: (name,) for name in reader.keys})
    entries = entries_in(reader)
    averages = {name: entry.average for name, entry in entries.items() if entry.average}
    if key is None and 1 in (len(averages), len(entries)):
        key = next(iter(entries))
    if key is not None and (average := averages.get(key)):
        return _open_average(reader, key, average)
    if key is not None and _root(key) not in map(_root, averages):
        source = Source(reader, key, {name: (stored,) for name, stored in _names_in(reader, key).items()})
        if source.specs:
            return source
    choice = ", ".join(entry or '""' for entry in entries) or "none"
    raise ValueError(
        f"a checkpoint needs one average, or the key of an entry, got {key=} for {path}; pass one of {choice}"
    )


def spec_of(reader: Reader, key: str) -> Spec | None:
    """Return the shape and dtype of a tensor; None for other values."""
    shape, dtype = reader.shape(key), reader.dtype(key)
    return None if shape is None or dtype is None else Spec(shape, dtype)


def entries_in(reader: CheckpointReader) -> dict[str, Entry]:
    """Return the averages of a checkpoint by key, such as "swa" or "swa.ema_long", then the other entries with tensors.

    The entry `TOP_LEVEL` has the tensors of the saved dict itself.
    """
    found = {
        key: Entry(_below(reader, f"{key}.slots.0") | _below(reader, f"{key}.buffers"), average)
        for key, average in _averages_in(reader).items()
    }
    roots, top_level = {_root(key) for key in found}, _top_level(reader)
    tensors = [key for key in reader.keys if reader.shape(key) is not None and _root(key) not in roots]
    others = sorted({TOP_LEVEL if key in top_level else _root(key) for key in tensors})
    return found | {entry: Entry(_names_in(reader, entry)) for entry in others}


def _averages_in(reader: CheckpointReader) -> dict[str, Average]:
    found = {}
    for version_key in reader.keys:
        key, _, last = version_key.rpartition(".")
        if last != "format_version" or not key or f"{key}.num_averaged" not in reader.keys:
            continue
        if (version := _integers(reader, version_key)[0]) > FORMAT_VERSION:
            raise ValueError(
                f"reading needs format_version <= {FORMAT_VERSION}, got {version_key}={version} in {reader.folder};"
                " update dist_swa"
            )
        rule = next(iter(_below(reader, f"{key}.rule").values()), None)
        if rule is None:
            raise _damaged(reader, f"{key}.rule")
        text = _bytes(reader, rule).rstrip(b"\0").decode(errors="replace")
        found[key] = Average(text, _integers(reader, f"{key}.num_averaged")[0], _step(reader, key))
    return found


def _names_in(reader: CheckpointReader, entry: str) -> dict[str, str]:
    """Return the keys of an entry by name, without the prefix of a DDP module's state dict."""
    names = _top_level(reader) if entry == TOP_LEVEL else _below(reader, entry)
    if all(name.startswith("module.") for name in names):
        return {name.removeprefix("module."): stored for name, stored in names.items()}
    return names


def _top_level(reader: CheckpointReader) -> dict[str, str]:
    """Return the keys of the saved dict itself. DCP stores the path of each key; a name may contain dots."""
    data = reader.metadata.planner_data
    paths = {key: data.get(key) if isinstance(data, dict) else None for key in reader.keys}
    return {key: key for key, path in paths.items() if len(path if isinstance(path, tuple) else key.split(".")) == 1}


def _open_average(reader: CheckpointReader, key: str, average: Average) -> Source:
    if average.num_averaged == 0:
        raise ValueError(f"a checkpoint needs an average of models, got num_averaged=0 of {key} in {reader.folder}")
    slots = list(takewhile(bool, (_below(reader, f"{key}.slots.{i}") for i in range(average.num_averaged))))
    if not slots or any(slot.keys() != slots[0].keys() for slot in slots):
        raise _damaged(reader, f"{key}.slots")
    stored = {name: tuple(slot[name] for slot in slots) for name in slots[0]}
    stored |= {name: (buffer,) for name, buffer in _below(reader, f"{key}.buffers").items()}
    ties = {name: _string_list(reader, tied) for name, tied in _below(reader, f"{key}.ties").items()}
    stored |= _not_averaged(reader, key, stored.keys(), {alias for aliases in ties.values() for alias in aliases})
    for name, aliases in ties.items():  # in the same order on every rank: `merge` deals out tensors by position
        stored |= dict.fromkeys(aliases, stored[name]) if name in stored else {}
    return Source(reader, key, stored)


def _not_averaged(
    reader: CheckpointReader, key: str, averaged: Set[str], aliases: Set[str]
) -> dict[str, tuple[str, ...]]:
    """Return the parameters that are not averaged (frozen, or not selected). The entry of the model has them."""
    num_others = _integers(reader, f"{key}.num_others")[0]
    model = _names_in(reader, MODEL)
    is_same_model = not averaged.isdisjoint(model)
    others: dict[str, tuple[str, ...]] = {n: (model[n],) for n in model if is_same_model and n not in averaged}
    extra_state = {name: stored for name, stored in others.items() if name.endswith("_extra_state")}
    num_found = len(others.keys() - extra_state.keys() - aliases)
    if num_found < num_others:
        raise ValueError(
            f"an export of {key} needs the {num_others} parameters that are not averaged (frozen, or not selected), got"
            f" {num_found} of them beside it in {reader.folder}; save the state dict of the model, with its own names,"
            f" as the entry {MODEL!r} as well, or export from the run"
        )
    return others if num_others else extra_state


def _root(key: str) -> str:
    return key.partition(".")[0]


def _below(reader: CheckpointReader, key: str) -> dict[str, str]:
    prefix = f"{key}."
    return {stored.removeprefix(prefix): stored for stored in reader.keys if stored.startswith(prefix)}


def _step(reader: CheckpointReader, key: str) -> int | None:
    """Return the optimizer step of an average from its schedule, or from the name of a `CheckpointFolder`'s folder."""
    for parent in (key, key.rpartition(".")[0]):
        if f"{parent}.schedule.now" in reader.keys:
            return _integers(reader, f"{parent}.schedule.now")[0]
    found = re.fullmatch(r"step-(\d+)", reader.folder.resolve().name)
    return int(found[1]) if found else None


def _integers(reader: CheckpointReader, key: str) -> list[int]:
    value = reader.read(key) if key in reader.keys else None
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or not 0 < value.numel() < 1e6:
        raise _damaged(reader, key)
    return [int(number) for number in value.flatten().to(torch.int64).tolist()]


def _bytes(reader: CheckpointReader, key: str) -> bytes:
    if reader.dtype(key) != torch.uint8:
        raise _damaged(reader, key)
    return bytes(_integers(reader, key))


def _string_list(reader: CheckpointReader, key: str) -> list[str]:
    try:
        names = json.loads(_bytes(reader, key))
    except (ValueError, RecursionError) as error:
        raise _damaged(reader, key) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _damaged(reader, key)
    return names


def _damaged(reader: CheckpointReader, key: str) -> CheckpointError:
    return CheckpointError(f"an average needs its state as it was written, got an invalid {key} in {reader.folder}")
