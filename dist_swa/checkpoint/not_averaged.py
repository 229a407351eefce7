"""Find the parameters that an average lacks, because they were frozen or not selected, in the model beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from dist_swa.checkpoint.beside import adapter_folders
from dist_swa.checkpoint.entries import TRAINER_FOLDER, Contents, integers
from dist_swa.checkpoint.keys import Reader, bits, join, parents_of, spec_of

MODEL = "model"  # the entry of a merged checkpoint, and of the parameters that are not averaged
# Parameters that are not averaged may be in others, too: Lightning writes "state_dict".
_OF_MODEL = re.compile(r"model(_?\d+)?|state_dict")
_ONLY = "export with only='averaged' (--only averaged)"


def not_averaged(
    contents: Contents, key: str, averaged: Mapping[str, tuple[str, ...]], ties: Mapping[str, list[str]]
) -> dict[str, tuple[str, ...]]:
    """Return the parameters that are not averaged (frozen, or not selected). The entry of the model has them.

    Of the names of a tied parameter, the model may have any.
    """
    num_others = integers(contents.reader, join(key, "num_others"))[0]
    first_name = {alias: name for name, aliases in ties.items() for alias in aliases}
    others: dict[str, dict[str, str]] = {}
    for model, names in _models_beside(contents, key, averaged).items():
        renamed = {first_name.get(name, name): stored for name, stored in names.items()}
        rest = {name: stored for name, stored in renamed.items() if name not in averaged}
        others[model] = rest if num_others else {n: stored for n, stored in rest.items() if _is_extra_state(n)}
    parameters = {model: _parameters_in(contents.reader, names) for model, names in others.items()}
    fitting = [model for model in others if len(parameters[model]) == num_others]
    if fitting and all(_are_same(contents.reader, others[fitting[0]], others[model]) for model in fitting[1:]):
        return {name: (stored,) for name, stored in others[fitting[0]].items()}
    if not num_others and not fitting:
        return {}
    what = f"an export of {key} needs the {num_others} parameters that are not averaged (frozen, or not selected)"
    if fitting:
        raise ValueError(
            f"{what} from one model, got {' and '.join(fitting)} in {contents.reader.folder}, which have the names of"
            f" the average, but not the same values; export from the run, or {_ONLY}"
        )
    if adapter_folders(contents.reader.folder):
        raise ValueError(
            f"{what}, got adapters only beside it in {contents.reader.folder}; {_ONLY}, which writes the averaged"
            " adapter (for a merge: export each, then merge the exports)"
        )
    none: list[str] = []
    found = max(parameters.values(), key=len, default=none)
    extra = f" ({', '.join(found[:5])}{', ...' * (len(found) > 5)})" if len(found) > num_others else ""
    remedy = "export from the run"
    if contents.reader.folder.resolve().name == TRAINER_FOLDER:
        remedy = f"pass {contents.reader.folder.parent}, where a trainer saves the model"
    raise ValueError(
        f"{what}, got {len(found)} of them{extra} beside it in {contents.reader.folder}; save the state dict of the"
        f" model, with its own names, as the entry {MODEL!r} as well, {remedy}, or {_ONLY}"
    )


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2].startswith("_extra_state")  # Megatron-Core adds "/shard_0_2"


def _parameters_in(reader: Reader, others: Mapping[str, str]) -> list[str]:
    """Return the tensors of `others`, without the state of quantised ones, such as "weight.absmax" beside "weight"."""
    tensors = {
        name for name, stored in others.items() if reader.shape(stored) is not None and not _is_extra_state(name)
    }
    return sorted(name for name in tensors if tensors.isdisjoint(parents_of(name.split("."))))


def _are_same(reader: Reader, one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return whether two models have equal tensors. Memory: two tensors."""
    specs = {name: spec_of(reader, stored) for name, stored in one.items()}
    return specs == {name: spec_of(reader, stored) for name, stored in other.items()} and all(
        torch.equal(bits(reader.read(one[name])), bits(reader.read(other[name])))
        for name, spec in specs.items()
        if spec is not None
    )


def _models_beside(contents: Contents, key: str, averaged: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, str]]:
    """Return the names and keys of the models that have most tensors of an average, of those nearest to it."""
    shape = contents.reader.shape
    while key:
        key = key.rpartition(".")[0]
        inside = (entry for entry in contents.inside(key) if _OF_MODEL.fullmatch(entry.rpartition(".")[2]))
        itself = [key] if key in contents.entries else []
        found = {entry: contents.weights(entry) for entry in (join(key, MODEL), *inside, *itself)}
        common = {
            entry: sum(name in averaged and shape(averaged[name][0]) == shape(stored) for name, stored in names.items())
            for entry, names in found.items()
        }
        if most := max(common.values()):
            return {entry: names for entry, names in found.items() if common[entry] == most}
    return {}
