"""Open the weights of an average or of a model, under the names that load_state_dict expects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from dist_swa.averaging.averaged_model import check_only
from dist_swa.checkpoint.entries import TOP_LEVEL, Contents, damaged, integers, strings
from dist_swa.checkpoint.keys import DDP, Reader, below, bits, join, spec_of, without_prefix
from dist_swa.checkpoint.not_averaged import MODEL, not_averaged
from dist_swa.checkpoint.readers import open_contents
from dist_swa.checkpoint.safetensors_io import Spec
from dist_swa.storage.reader import CheckpointReader

_OF_WHOLE = (None, TOP_LEVEL, MODEL, "state_dict")  # of a file that is one model; checkpoints beside it need a key
_LIGHTNING, _OF_LIGHTNING = "pytorch-lightning_version", "state_dict"  # callbacks have tensors beside it
_STEPS = "global_step"  # in the same file


class Source:
    """The weights in one entry of a checkpoint, or in a file of weights.

    `specs` are their shapes and dtypes by name, aliases of tied parameters included. `skipped` are the names of values
    that are not tensors; they cannot be read. `buffers` are the names of buffers that are left out of `specs`.
    """

    def __init__(
        self,
        reader: Reader,
        key: str | None,
        stored: Mapping[str, tuple[str, ...]],
        buffers: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.path, self.key = reader.folder, key
        self.is_checkpoint = isinstance(reader, CheckpointReader)
        self.buffers = tuple(buffers or ())
        self._reader, self._stored = reader, {**stored, **(buffers or {})}
        specs = {name: spec_of(reader, first) for name, (first, *_) in stored.items()}
        self.specs = {name: spec for name, spec in specs.items() if spec is not None}
        self.skipped = [name for name, spec in specs.items() if spec is None]

    def spec(self, name: str) -> Spec | None:
        """Return the shape and dtype of a tensor, also of one of the `buffers`."""
        return spec_of(self._reader, self._stored[name][0])

    def names_besides(self, names: Iterable[str]) -> list[str]:
        """Return the names in `specs` of tensors that have none of `names`."""
        stored = {self._stored[name] for name in names}
        return sorted(name for name in self.specs if self._stored[name] not in stored)

    def read(self, name: str) -> Tensor:
        """Return a full tensor on the CPU: the stored one, or the mean of the slots. Memory: up to three times it."""
        first, *others = self._stored[name]
        total: Tensor = self._reader.read(first)
        for key in others:
            total += self._reader.read(key)
        return total.div_(1 + len(others)) if others else total

    def tied_to(self, name: str, others: Iterable[str]) -> Iterator[str]:
        """Yield those of `others` that are the tensor `name`, or equal to the bit. Memory: two tensors.

        A tensor of equal elements, such as a bias of zeros, is not equal to another: that may be chance.
        """
        value: Tensor | None = None
        for other in others:
            if self._stored[other] == self._stored[name]:
                yield other
            elif self.specs[other] == self.specs[name]:
                value = bits(self.read(name)) if value is None else value
                if bool((value[1:] != value[:1]).any()) and torch.equal(bits(self.read(other)), value):
                    yield other

    def tie(self, name: str, other: str) -> None:
        """Give the tensor `other` one more name."""
        self._stored[name], self.specs[name] = self._stored[other], self.specs[other]

    @property
    def is_wrapped(self) -> bool:
        """Whether all names begin as those of a DDP module."""
        return all(name.startswith(DDP) for name in self._stored)

    def unwrap(self) -> None:
        """Remove DDP's prefix from all names."""
        self._stored, self.specs = without_prefix(self._stored, DDP), without_prefix(self.specs, DDP)
        self.skipped = [name.removeprefix(DDP) for name in self.skipped]

    @property
    def step(self) -> int | None:
        """The optimizer step that the schedule of an average in the file has counted, or else Lightning."""
        counted = [key for key in self._reader.keys if key.endswith("schedule.now")]
        of_lightning = self._reader.read(_STEPS) if _STEPS in self._reader.keys else None
        default = of_lightning if type(of_lightning) is int else None
        return max((integers(self._reader, key)[0] for key in counted), default=default)

    def __str__(self) -> str:
        return f"{self.key} in {self.path}" if self.key else f"{self.path}"


def open_source(path: str | Path, key: str | None = None, only: str | None = None) -> Source:
    """Return the weights of the entry `key`, or of all below it; a file of weights alone needs no key.

    The default is the only average, or without one the only entry that has no optimizer. With ``only="averaged"`` they
    are the averaged parameters. Raises ValueError, with the keys to choose from, if that is not one entry, or if an
    optimizer or an average is inside of `key`.
    """
    check_only(only)
    contents = open_contents(path, key)
    entries, reader = contents.entries, contents.reader
    averages = [name for name, entry in entries.items() if entry.average]
    weights = contents.choices
    if is_one_model(contents) and only is None and key in _OF_WHOLE:
        return _open_weights(reader, None, entries[TOP_LEVEL].stored)
    choices = averages or ([_OF_LIGHTNING] if _LIGHTNING in reader.keys and _OF_LIGHTNING in weights else weights)
    if key is None and len(choices) == 1:
        (key,) = choices
    if key in averages:
        return _open_average(contents, key, only)
    if only is not None:
        choice = f"pass one of {', '.join(averages)}, or leave it out" if averages else "leave it out"
        raise ValueError(f"only='averaged' needs an average, got {key=} for {path}; {choice}")
    if key is not None and (stored := contents.weights(key)):
        return _open_weights(reader, key, stored)
    choice = ", ".join(name or '""' for name in [*averages, *weights])
    raise ValueError(
        f"a checkpoint needs one average, or the key of an entry, got {key=} for {path}{_content_of(contents, key)};"
        f" pass {f'one of {choice}' if choice else 'another path'}"
    )


def open_sources(paths: Sequence[str | Path], key: str | None) -> list[Source]:
    """Open the sources of a merge. DDP's prefix is removed from names if other sources do not have it."""
    sources = [open_source(path, key) for path in paths]
    wrapped = [source for source in sources if source.is_wrapped]
    for source in wrapped if len(wrapped) < len(sources) else ():
        source.unwrap()
    return sources


def is_one_model(contents: Contents) -> bool:
    """Return whether a file, or a folder of files, is one state dict of a model, which needs no key."""
    is_checkpoint = isinstance(contents.reader, CheckpointReader)
    return not is_checkpoint and contents.entries.keys() == {TOP_LEVEL} and bool(contents.weights(TOP_LEVEL))


def _content_of(contents: Contents, key: str | None) -> str:
    """Say what is inside of an entry that cannot be opened. Without a key: why there is nothing to choose from."""
    if key is None and contents.choices:
        return ""
    names = contents.inside(key or TOP_LEVEL)
    if names:
        marked = (f"{name} (optimizer)" if contents.entries[name].has_optimizer else name for name in names)
        return f", which has {', '.join(marked)} inside"
    if (key or TOP_LEVEL) not in contents.entries:
        return ""
    return ", which is the state of an optimizer" if key else ", which has the state of an optimizer at its top level"


def _open_weights(reader: Reader, key: str | None, stored: Mapping[str, str]) -> Source:
    return Source(reader, key, {name: (stored_key,) for name, stored_key in stored.items()})


def _open_average(contents: Contents, key: str, only: str | None) -> Source:
    reader, average = contents.reader, contents.entries[key].average
    if average is None or average.num_averaged == 0:
        raise ValueError(
            f"a checkpoint needs an average of models, got num_averaged=0 of {key} in {reader.folder}; take a later"
            " one, or pass another key"
        )
    slots = list(takewhile(bool, (below(reader, join(key, f"slots.{i}")) for i in range(average.num_averaged))))
    if not slots or any(slot.keys() != slots[0].keys() for slot in slots):
        raise damaged(reader, join(key, "slots"))
    stored = {name: tuple(slot[name] for slot in slots) for name in slots[0]}
    buffers = {name: (buffer,) for name, buffer in below(reader, join(key, "buffers")).items()}
    ties = {name: strings(reader, tied) for name, tied in below(reader, join(key, "ties")).items()}
    if only:
        stored = {name: slots_of for name, slots_of in stored.items() if name not in buffers}
    else:
        stored |= buffers
        stored |= not_averaged(contents, key, stored, ties)
        buffers = {}
    for name, aliases in ties.items():  # in the same order on every rank: `merge` deals out tensors by position
        stored |= dict.fromkeys(aliases, stored[name]) if name in stored else {}
    return Source(reader, key, stored, buffers)
