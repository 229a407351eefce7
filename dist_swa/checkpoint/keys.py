"""What each format's reader has: tensors and other values by dotted keys; and the names in keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dist_swa.checkpoint.safetensors_io import Spec

DDP, COMPILED = "module.", "._orig_mod."  # in the names of wrapped models
KeyPath = tuple[str, ...]
Value = TypeVar("Value")


class Reader(Protocol):
    """Tensors and other values by dotted keys. The shape and dtype of other values are None."""

    @property
    def folder(self) -> Path: ...
    @property
    def keys(self) -> Sequence[str]: ...
    def shape(self, key: str) -> torch.Size | None: ...
    def dtype(self, key: str) -> torch.dtype | None: ...
    def read(self, key: str) -> Any: ...


def parents_of(path: Sequence[str]) -> list[str]:
    """Return "a" and "a.b" for (a, b, c)."""
    return [".".join(path[:end]) for end in range(1, len(path))]


def without_prefix(values: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """Remove a prefix that all names have."""
    has_all = all(name.startswith(prefix) for name in values)
    return {name.removeprefix(prefix) if has_all else name: value for name, value in values.items()}


def join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def below(reader: Reader, key: str) -> dict[str, str]:
    """Return the keys below `key` by what follows it."""
    prefix = join(key, "")
    return {stored.removeprefix(prefix): stored for stored in reader.keys if stored.startswith(prefix)}


def spec_of(reader: Reader, key: str) -> Spec | None:
    """Return the shape and dtype of a tensor; None for other values."""
    shape, dtype = reader.shape(key), reader.dtype(key)
    return None if shape is None or dtype is None else Spec(shape, dtype)


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of each element."""
    return tensor.flatten()[:, None].view(torch.uint8)
