"""The state dict of one average: its keys, and the checks before it is loaded. `dist_swa.checkpoint` describes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_swa.averaging.rules import Rule
from dist_swa.sharding.shard import LocalShard

FORMAT_VERSION = 1
_RULE_BYTES = 256  # a fixed size: a rule with other parameters must not change the shapes of a checkpoint
_KEYS = ("format_version", "num_averaged", "num_parameters", "num_others", "rule", "slots", "buffers", "ties")


def check_header(state: Mapping[str, Any], rule: Rule) -> None:
    """Raise ValueError unless `state` is of an average by `rule`, in a format that this version reads."""
    check_keys(state, _KEYS)
    check_version(state["format_version"])
    name, encoded = next(iter(state["rule"].items()))
    if name != type(rule).__name__:
        raise ValueError(
            f"load_state_dict needs a checkpoint of rule={type(rule).__name__}, got rule={name}; build the"
            " average with the rule of the checkpoint"
        )
    saved = bytes(encoded.tolist()).rstrip(b"\0").decode()
    if saved != repr(rule) and rule.num_slots > 1:
        raise ValueError(
            f"load_state_dict needs as many slots as the checkpoint has, got {rule!r} for {saved}; build the"
            " average with the rule of the checkpoint"
        )
    if saved != repr(rule):
        warnings.warn(f"the checkpoint was averaged with {saved}; continuing with {rule!r}", stacklevel=4)


def check_keys(state: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise ValueError unless `state` has `keys`."""
    missing = sorted(set(keys) - set(state))
    if missing:
        raise ValueError(f"load_state_dict needs what state_dict returns, got {missing=}; pass all of it")


def check_version(version: Any) -> None:
    if int(version) > FORMAT_VERSION:
        raise ValueError(
            f"loading needs format_version <= {FORMAT_VERSION}, got format_version={int(version)}; update dist_swa"
        )


def encode(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def local_tensors(saved: Mapping[str, Tensor], shards: Sequence[LocalShard]) -> list[Tensor]:
    """Return this rank's part of each tensor in `saved`; ValueError with the first name that `shards` do not match."""
    mine = {shard.name: shard for shard in shards}
    for name in [*mine, *saved]:
        shape = tuple(saved[name].shape) if name in saved else None
        expected = tuple(mine[name].shape) if name in mine else None
        if shape != expected:
            raise ValueError(
                f"load_state_dict needs {name} of shape {expected}, got shape={shape}; load the checkpoint into the"
                " model that it was averaged from"
            )
    return [shard.local_of(saved[shard.name]) for shard in shards]


def encode_rule(rule: Rule) -> Tensor:
    return encode(repr(rule).ljust(_RULE_BYTES, "\0"))
