"""DCP's `.metadata`, read without running code.

It is a pickle, and pickle runs whatever code a file names. Here a file may name what stands in `_ALLOWED`, class by
class: with a prefix such as "torch." it would reach `os.system`, by a dotted name through any module that imports it.
Nor may it change what it has named: BUILD sets attributes of any object, of a class as well.
"""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import IO, Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

_DCP = "torch.distributed.checkpoint."
_DATACLASSES = {
    *((f"{_DCP}metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}metadata", name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    (f"{_DCP}filesystem", "_StorageInfo"),
}
_ALLOWED = {
    *_DATACLASSES,
    (f"{_DCP}metadata", "_MEM_FORMAT_ENCODING"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks the name up in a table
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
_TUPLES = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_PRIME = 2**127 - 1


def read_metadata(file: IO[bytes]) -> Metadata:
    """Return the metadata in `file`; UnpicklingError where it wants to run code, any Exception where it is damaged."""
    try:
        metadata = _Unpickler(file).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # as IndexError, where it takes from an empty stack
        raise ValueError(f"it is no pickle of metadata ({type(error).__name__}: {error})") from error
    return _checked(metadata)


def _shallow(load_tuple: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let an opcode nest tuples no deeper than ((2, 3),), as arguments are: to hash a deep one would crash."""

    def load(self: _Unpickler) -> None:
        load_tuple(self)
        if any(isinstance(inner, tuple) for value in self.stack[-1] if isinstance(value, tuple) for inner in value):
            raise pickle.UnpicklingError("it has tuples in tuples in tuples, which are not in the metadata of tensors")

    return load


class _Unpickler(pickle._Unpickler):
    """The one in Python, not in C: its opcodes can be replaced."""

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}, which is not in the metadata of tensors")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set fields of a dataclass, and nothing else."""
        state, built = self.stack.pop(), self.stack[-1]
        kind = type(built)
        if kind is TensorProperties:
            built.__setstate__(state)
        elif (kind.__module__, kind.__name__) in _DATACLASSES and state.keys() <= kind.__dataclass_fields__.keys():
            vars(built).update(state)
        else:
            raise pickle.UnpicklingError(
                f"it wants to change a {kind.__name__}, which is not in the metadata of tensors"
            )

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **{code[0]: _shallow(pickle._Unpickler.dispatch[code[0]]) for code in _TUPLES},
        pickle.BUILD[0]: load_build,
    }


def _checked(metadata: Any) -> Metadata:
    """Return `metadata`; TypeError or ValueError unless all that is used is as DCP writes it."""
    if not isinstance(metadata, Metadata):
        raise TypeError(f"it holds {type(metadata).__name__} where Metadata should be")
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    types = {"state_dict_metadata": dict, "storage_data": dict, "storage_meta": StorageMeta}
    for name, expected in types.items():
        if not isinstance(value := getattr(metadata, name), expected):
            raise TypeError(f"it holds {type(value).__name__} where a {expected.__name__} should be")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"it holds {key!r} where a key should be")
        match entry:
            case BytesStorageMetadata():
                pass
            case TensorStorageMetadata(
                properties=TensorProperties(dtype=torch.dtype()), size=torch.Size(), chunks=list()
            ) if all(map(_is_chunk, entry.chunks)):
                if not _fill(entry.chunks, entry.size):
                    raise ValueError(f"its parts of {key} do not make up the shape {tuple(entry.size)}")
            case _:
                raise TypeError(f"it does not describe {key} as a tensor or a value")
    for index, place in metadata.storage_data.items():
        match index, place:
            case MetadataIndex(fqn=str()), object(relative_path=str(), offset=int(start), length=int(length)) if (
                start >= 0 and length >= 0
            ):
                pass
            case _:
                raise TypeError(f"it holds {place!r} where the place of an entry should be")
    return metadata


def _is_chunk(chunk: Any) -> bool:
    match chunk:
        case ChunkStorageMetadata(offsets=torch.Size(), sizes=torch.Size()):
            return len(chunk.offsets) == len(chunk.sizes) and min((*chunk.offsets, *chunk.sizes), default=0) >= 0
    return False


def _fill(chunks: Sequence[ChunkStorageMetadata], shape: torch.Size) -> bool:
    """Whether `chunks` cover each element of a tensor of this shape once, and nothing else.

    Let the element (i, j) weigh x**i * y**j, for x and y drawn at random, modulo a prime. What a box weighs is then a
    product of geometric series, and the boxes weigh as much as the shape does only if they fill it, whatever their
    layout; else with a probability below 1e-15. In linear time, where comparing pairs would take quadratic time.
    """
    bases = [secrets.randbelow(_PRIME) for _ in shape]

    @cache
    def power(axis: int, exponent: int) -> int:
        return pow(bases[axis], exponent, _PRIME)

    def weight(offsets: Sequence[int], sizes: Sequence[int]) -> int:  # times (1 - x) * (1 - y)
        edges = zip(offsets, sizes, strict=True)
        return prod(power(axis, start) - power(axis, start + size) for axis, (start, size) in enumerate(edges))

    if min(shape, default=0) < 0 or any(len(chunk.sizes) != len(shape) for chunk in chunks):
        return False
    covered = sum(weight(chunk.offsets, chunk.sizes) for chunk in chunks)
    return (covered - weight([0] * len(shape), shape)) % _PRIME == 0
