"""Weights that lie on disk, under the names that a strict load wants: of an average, of a model, or in safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_swa.averaging.state import FORMAT_VERSION
from dist_swa.checkpoint.safetensors_io import INDEX, SUFFIX, SafetensorsReader, Spec
from dist_swa.storage.reader import METADATA, CheckpointError, CheckpointReader, open_checkpoint

MODEL = "model"  # the entry that what is no average is taken from, and that a merged checkpoint has
TOP_LEVEL = ""  # the entry of what stands in no other: all of ``dcp.save(model.state_dict())``
Reader = CheckpointReader | SafetensorsReader


class Average(NamedTuple):
    """An average in a checkpoint: its rule as text, how many models it averages, and its step, where it is known."""

    rule: str
    num_averaged: int
    step: int | None


class Source:
    """The weights in one entry of a checkpoint, or in safetensors.

    `specs` are their shapes and dtypes, by all names that a strict load wants, tied ones included. `average` tells of
    an average. `skipped` are the names of what is no tensor, which goes nowhere.
    """

    def __init__(self, reader: Reader, key: str | None, stored: Mapping[str, tuple[str, ...]]) -> None:
        self.path, self.key = reader.folder, key
        self.average: Average | None = None
        self.skipped: list[str] = []
        self._reader, self._stored = reader, stored
        self.specs: dict[str, Spec] = {}
        for name, (first, *_) in stored.items():
            shape, dtype = reader.shape(first), reader.dtype(first)
            if shape is None or dtype is None:
                self.skipped.append(name)
            else:
                self.specs[name] = Spec(shape, dtype)

    @property
    def is_safetensors(self) -> bool:
        return isinstance(self._reader, SafetensorsReader)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU: what is stored, or the mean of slots. Memory: twice, three times of it."""
        first, *others = self._stored[name]
        total: Tensor = self._reader.read(first)
        for key in others:
            total += self._reader.read(key)
        return total.div_(1 + len(others)) if others else total

    def __str__(self) -> str:
        return f"{self.key} in {self.path}" if self.key else f"{self.path}"


def open_reader(path: str | Path) -> Reader:
    """Return a reader of a DCP checkpoint's folder, or of a safetensors file or folder; no code of them runs.

    Raises ValueError where `path` is neither, and CheckpointError where it is damaged.
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
    """Return the weights of the entry `key`, in which "" is what stands at the top level; safetensors need no key.

    By default the only average, or, without any, the only entry.
    """
    reader = open_reader(path)
    if isinstance(reader, SafetensorsReader):
        return Source(reader, None, {name: (name,) for name in reader.keys})
    averages = averages_in(reader)
    entries = [*averages, *entries_in(reader, averages)]
    if key is None and 1 in (len(averages), len(entries)):
        key = entries[0]
    if key in averages:
        return _average(reader, key, averages[key])
    if key is not None and key.partition(".")[0] not in _roots(averages):
        source = Source(reader, key, {name: (stored,) for name, stored in names_in(reader, key).items()})
        if source.specs:
            return source
    choice = ", ".join(entry or '""' for entry in entries) or "none"
    raise ValueError(
        f"a checkpoint needs one average, or the key of an entry, got {key=} for {path}; pass one of {choice}"
    )


def averages_in(reader: CheckpointReader) -> dict[str, Average]:
    """Return the averages in a checkpoint by their keys, as "swa" or "swa.ema_long"."""
    found = {}
    for mark in reader.keys:
        key, _, last = mark.rpartition(".")
        if last != "format_version" or not key or f"{key}.num_averaged" not in reader.keys:
            continue
        if (version := _number(reader, mark)) > FORMAT_VERSION:
            raise ValueError(
                f"reading needs format_version <= {FORMAT_VERSION}, got {mark}={version} in {reader.folder}; update"
                " dist_swa"
            )
        rule = next(iter(_below(reader, f"{key}.rule").values()), None)
        if rule is None:
            raise _odd(reader, f"{key}.rule")
        text = _bytes(reader, rule).rstrip(b"\0").decode(errors="replace")
        found[key] = Average(text, _number(reader, f"{key}.num_averaged"), _step(reader, key))
    return found


def entries_in(reader: CheckpointReader, averages: Mapping[str, Average]) -> list[str]:
    """Return the keys of the entries that hold tensors and are no averages; `TOP_LEVEL` where tensors stand there."""
    roots, top_level = _roots(averages), _top_level(reader)
    tensors = [key for key in reader.keys if reader.shape(key) is not None and key.partition(".")[0] not in roots]
    return sorted({TOP_LEVEL if key in top_level else key.partition(".")[0] for key in tensors})


def _roots(averages: Mapping[str, Average]) -> set[str]:
    return {key.partition(".")[0] for key in averages}


def names_in(reader: CheckpointReader, entry: str) -> dict[str, str]:
    """Return the keys of an entry by their names, without the prefix that a state dict of DDP has."""
    names = _below(reader, entry) if entry != TOP_LEVEL else _top_level(reader)
    if names and all(name.startswith("module.") for name in names):
        return {name.removeprefix("module."): stored for name, stored in names.items()}
    return names


def _top_level(reader: CheckpointReader) -> dict[str, str]:
    """Return the keys of the saved dict itself: whether "0.weight" is one, DCP's mappings tell, where it has them."""
    mappings = reader.metadata.planner_data
    paths = mappings if isinstance(mappings, dict) else {}

    def is_here(key: str) -> bool:
        path = paths.get(key)
        return len(path) == 1 if isinstance(path, tuple) else "." not in key

    return {key: key for key in reader.keys if is_here(key)}


def _average(reader: CheckpointReader, key: str, average: Average) -> Source:
    if average.num_averaged == 0:
        raise ValueError(f"a checkpoint needs an average of models, got num_averaged=0 of {key} in {reader.folder}")
    used = list(takewhile(bool, (_below(reader, f"{key}.slots.{i}") for i in range(average.num_averaged))))
    if not used or any(slot.keys() != used[0].keys() for slot in used):
        raise _odd(reader, f"{key}.slots")
    stored = {name: tuple(slot[name] for slot in used) for name in used[0]}
    stored |= {name: (buffer,) for name, buffer in _below(reader, f"{key}.buffers").items()}
    ties = {name: _names(reader, tied) for name, tied in _below(reader, f"{key}.ties").items()}
    stored |= _rest(reader, key, {*stored, *(alias for name in ties for alias in ties[name] if name in stored)}, ties)
    for name, aliases in ties.items():
        stored |= dict.fromkeys(aliases, stored[name]) if name in stored else {}
    source = Source(reader, key, stored)
    source.average = average
    return source


def _rest(
    reader: CheckpointReader, key: str, known: set[str], ties: Mapping[str, list[str]]
) -> dict[str, tuple[str, ...]]:
    """Return the parameters that are not averaged, frozen ones and unselected ones, which the model's entry has."""
    num_others = _number(reader, f"{key}.num_others")
    model = names_in(reader, MODEL)
    others = model.keys() - known if known & model.keys() else set()
    rest: dict[str, tuple[str, ...]] = {name: (model[name],) for name in model if name in others}
    extra = {name: stored for name, stored in rest.items() if name.endswith("_extra_state")}
    num_found = len(rest.keys() - extra.keys() - {alias for aliases in ties.values() for alias in aliases})
    if num_found < num_others:
        raise ValueError(
            f"an export of {key} needs the {num_others} parameters that are not averaged (frozen, or not selected), got"
            f" {num_found} of them beside it in {reader.folder}; save the state dict of the model, with its own names,"
            f" as the entry {MODEL!r} as well, or export from the run"
        )
    return rest if num_others else extra


def _below(reader: CheckpointReader, key: str) -> dict[str, str]:
    prefix = f"{key}."
    return {stored.removeprefix(prefix): stored for stored in reader.keys if stored.startswith(prefix)}


def _step(reader: CheckpointReader, key: str) -> int | None:
    """Return the optimizer step of an average, by its schedule, or by the name of a `CheckpointFolder`'s folder."""
    for parent in (key, key.rpartition(".")[0]):
        if f"{parent}.schedule.now" in reader.keys:
            return _numbers(reader, f"{parent}.schedule.now")[0]
    found = re.fullmatch(r"step-(\d+)", reader.folder.resolve().name)
    return int(found[1]) if found else None


def _numbers(reader: CheckpointReader, key: str) -> list[int]:
    value: Any = reader.read(key) if key in reader.keys else None
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or not 0 < value.numel() < 1e6:
        raise _odd(reader, key)
    return [int(number) for number in value.flatten().to(torch.int64).tolist()]


def _number(reader: CheckpointReader, key: str) -> int:
    return _numbers(reader, key)[0]


def _bytes(reader: CheckpointReader, key: str) -> bytes:
    if reader.dtype(key) != torch.uint8:
        raise _odd(reader, key)
    return bytes(_numbers(reader, key))


def _names(reader: CheckpointReader, key: str) -> list[str]:
    try:
        names = json.loads(_bytes(reader, key))
    except (ValueError, RecursionError) as error:
        raise _odd(reader, key) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _odd(reader, key)
    return names


def _odd(reader: CheckpointReader, key: str) -> CheckpointError:
    return CheckpointError(f"an average needs its state as it was written, got an odd {key} in {reader.folder}")
