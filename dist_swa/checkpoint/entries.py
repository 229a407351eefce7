"""The entries of a checkpoint: averages, weights and optimizer states, found by their keys."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dist_swa.averaging.format import FORMAT_VERSION
from dist_swa.checkpoint.keys import COMPILED, DDP, KeyPath, Reader, below, join, parents_of, without_prefix
from dist_swa.checkpoint.safetensors_io import SafetensorsReader
from dist_swa.storage.reader import CheckpointError, CheckpointReader

TOP_LEVEL = ""  # the entry of tensors in the saved dict itself, as all of ``dcp.save(model.state_dict())``
TRAINER_FOLDER = "dist_swa"  # the folder of the average in a trainer's checkpoint, see `dist_swa.integrations`
TRAINED = "trained"  # below the key of an average: trained weights, which a trainer's adapter saves there
_OPTIMIZER = re.compile(r"optim(izer)?s?")


class Average(NamedTuple):
    """What a checkpoint says about an average. `step` is None if it is unknown."""

    rule: str
    num_averaged: int
    step: int | None


class Entry(NamedTuple):
    """The keys of an entry by name. Of an average: those of its first slot and its buffers."""

    stored: dict[str, str]
    average: Average | None = None
    has_optimizer: bool = False  # it is the state of an optimizer, or has one inside


class Contents:
    """The `entries` of a reader by key: first the averages, such as "swa" or "swa.ema_long", then others, sorted.

    An entry is a dict that directly has tensors, with the dicts inside it. An average is one entry, and so is the state
    of an optimizer; dicts around them are split. Where the file does not say where the dots of a key come from, an
    entry is as short as possible.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._paths = _paths_of(reader)
        self._has_ddp_names = not isinstance(reader, SafetensorsReader)  # these have names as a user chose them
        averages = _averages_in(reader)
        optimizers = _optimizers_in(self._paths)
        self._regions = {*averages, *optimizers, *_schedules_of(reader, averages)}
        trained = tuple(f"{join(key, TRAINED)}." for key in averages)
        self._plain = [
            key
            for key in reader.keys
            if key.startswith(trained) or self._regions.isdisjoint([TOP_LEVEL, *parents_of(key.split(".")), key])
        ]
        tensors = [key for key in self._plain if reader.shape(key) is not None]
        self._is_uncertain = any(self._paths[key] is None and "." in key for key in tensors)
        self._dicts = {".".join(path[:-1]) for key in tensors if (path := self._paths[key])} - {TOP_LEVEL}

        grouped: dict[str, list[str]] = defaultdict(list)
        for key in self._plain:
            grouped[self._entry_of(key)].append(key)
        others = {
            entry: Entry(self._names(entry, grouped[entry]), None, _has_inside(entry, optimizers))
            for entry in {self._entry_of(key) for key in tensors}
        }
        for key in optimizers:
            if self._has_tensors(names := below(reader, key)):
                others[key] = Entry(names, None, True)
        self.entries = {
            key: Entry(below(reader, join(key, "slots.0")) | below(reader, join(key, "buffers")), average)
            for key, average in averages.items()
        } | dict(sorted(others.items()))

    def weights(self, key: str) -> dict[str, str]:
        """Return the keys of an entry, or of all tensors below the prefix `key`, by name.

        They are empty where there are none, or where an optimizer or an average is inside. Where the file does not say
        where dots come from, the top level is all that is not in an optimizer or an average.
        """
        if key == TOP_LEVEL and (self._is_uncertain or not (self._regions or key in self.entries)):
            names = self._names(key, self._plain)
        elif key in self.entries:
            entry = self.entries[key]
            names = {} if entry.average or entry.has_optimizer else entry.stored
        elif _has_inside(key, self._regions):
            names = {}
        else:
            names = self._names(key, [stored for stored in self._plain if stored.startswith(f"{key}.")])
        return names if self._has_tensors(names) else {}

    @property
    def choices(self) -> list[str]:
        """The keys of weights. The top level is one if several entries are in it, or if all names may begin alike."""
        weights = [key for key in self.entries if self.weights(key)]
        may_be_flat = self._is_uncertain and not self._regions
        has_all = TOP_LEVEL not in self.entries and (len(weights) > 1 or may_be_flat) and self.weights(TOP_LEVEL)
        return [*weights, TOP_LEVEL] if has_all else weights

    def inside(self, key: str) -> list[str]:
        """Return the entries below `key`."""
        return [entry for entry in self.entries if entry.startswith(f"{key}." if key else "") and entry != key]

    def _names(self, entry: str, keys: Iterable[str]) -> dict[str, str]:
        """Return keys by the names of the unwrapped model, if a DDP module or a compiled one was saved."""
        names = {key.removeprefix(join(entry, "")): key for key in keys}
        clean = {f".{name}".replace(COMPILED, ".")[1:]: key for name, key in names.items()}
        names = clean if len(clean) == len(names) else names
        return without_prefix(names, DDP) if self._has_ddp_names else names

    def _has_tensors(self, names: Mapping[str, str]) -> bool:
        return any(self.reader.shape(stored) is not None for stored in names.values())

    def _entry_of(self, key: str) -> str:
        path = self._paths[key]
        parents = parents_of(path or key.split("."))
        free = (p for p in parents if p not in self._regions and not _has_inside(p, self._regions))
        found = (p for p in free if path is None or p in self._dicts)
        return next(found, parents[-1] if parents else TOP_LEVEL)


def _has_inside(key: str, others: Iterable[str]) -> bool:
    return any(other.startswith(f"{key}.") for other in others)


def _paths_of(reader: Reader) -> dict[str, KeyPath | None]:
    """Return the keys of the nested dicts that each value was saved in; None where the file does not say."""
    if not isinstance(reader, CheckpointReader):
        paths: Mapping[str, KeyPath] = getattr(reader, "paths", {})
        return {key: paths.get(key, (key,)) for key in reader.keys}
    data = reader.metadata.planner_data  # written by DCP's default planner; others write what they like
    found: dict[str, KeyPath | None] = {}
    for key in reader.keys:
        given = data.get(key) if isinstance(data, dict) else None
        path = tuple(map(str, given)) if isinstance(given, tuple | list) else ()
        found[key] = path if ".".join(path) == key else None
    return found


def _optimizers_in(paths: Mapping[str, KeyPath | None]) -> set[str]:
    """Return the keys of optimizer states: dicts of such a name, and those with "param_groups".

    In a flattened state, the path of a tensor ends with one key, such as "state.layers.0.weight.exp_avg".
    """
    found = set()
    for key, path in paths.items():
        parts = path or tuple(key.split("."))
        for i, part in enumerate(parts):
            if part.partition(".")[0] == "param_groups":
                found.add(".".join(parts[:i]))
                break
            if _OPTIMIZER.fullmatch(part) and i + 1 < len(parts):
                found.add(".".join(parts[: i + 1]))
                break
    return found


def _averages_in(reader: Reader) -> dict[str, Average]:
    found, keys = {}, set(reader.keys)
    for version_key in reader.keys:
        key, _, last = version_key.rpartition(".")
        if last != "format_version" or join(key, "num_averaged") not in keys:
            continue
        if (version := integers(reader, version_key)[0]) > FORMAT_VERSION:
            raise ValueError(
                f"reading needs format_version <= {FORMAT_VERSION}, got {version_key}={version} in {reader.folder};"
                " update dist_swa"
            )
        rule = next(iter(below(reader, join(key, "rule")).values()), None)
        if rule is None:
            raise damaged(reader, join(key, "rule"))
        text = _bytes(reader, rule).rstrip(b"\0").decode(errors="replace")
        found[key] = Average(text, integers(reader, join(key, "num_averaged"))[0], _step(reader, key))
    return found


def _schedules_of(reader: Reader, averages: Iterable[str]) -> set[str]:
    """Return the keys of schedules beside several averages of one `SWA`."""
    parents = {key.rpartition(".")[0] for key in averages if key}
    return {join(parent, "schedule") for parent in parents if join(parent, "schedule.now") in reader.keys}


def _step(reader: Reader, key: str) -> int | None:
    """Return the optimizer step of an average from its schedule, or from the name of a `CheckpointFolder`'s folder."""
    for parent in (key, key.rpartition(".")[0]):
        if (now := join(parent, "schedule.now")) in reader.keys:
            return integers(reader, now)[0]
    found = re.fullmatch(r"step-(\d+)", reader.folder.resolve().name)
    return int(found[1]) if found else None


def integers(reader: Reader, key: str) -> list[int]:
    value = reader.read(key) if key in reader.keys else None
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or not 0 < value.numel() < 1e6:
        raise damaged(reader, key)
    return [int(number) for number in value.flatten().to(torch.int64).tolist()]


def _bytes(reader: Reader, key: str) -> bytes:
    if reader.dtype(key) != torch.uint8:
        raise damaged(reader, key)
    return bytes(integers(reader, key))


def strings(reader: Reader, key: str) -> list[str]:
    try:
        names = json.loads(_bytes(reader, key))
    except (ValueError, RecursionError) as error:
        raise damaged(reader, key) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise damaged(reader, key)
    return names


def damaged(reader: Reader, key: str) -> CheckpointError:
    return CheckpointError(f"an average needs its state as it was written, got an invalid {key} in {reader.folder}")
