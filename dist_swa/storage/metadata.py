"""Read DCP's `.metadata` without running code.

The file is a pickle, and unpickling calls whatever the file names. Here a file may name only the keys of `_ALLOWED`.
Each stands for an object that is chosen here: no module is imported for a file, and no dotted name is looked up. What
no tensor needs, such as the plans of Megatron-Core, becomes an `_Ignored`. The opcode BUILD may set fields of DCP's
dataclasses only; pickle lets it change any object.
"""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, ClassVar, Self

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo  # where an entry is; DCP has no public name for it
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,  # a field of TensorProperties
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout  # a lookup in a table


class UnsafeMetadataError(Exception):
    """`.metadata` asks for what could run code. It need not be damaged."""


class _Ignored:
    """Stands for an object that no tensor needs. Accepts any arguments and has no content."""

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls)


def _enum_member(cls: Any, name: Any) -> Any:
    """Return the member of an enum, which some releases of Python 3.11 pickle as ``getattr(cls, name)``."""
    if cls is _Ignored:
        return _Ignored()
    if cls is _MEM_FORMAT_ENCODING:
        return _MEM_FORMAT_ENCODING[name]
    raise _refusal("wants to run builtins.getattr")


_TORCH = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.metadata"  # torch before 2.3
_MAY_HAVE_MORE = (
    Metadata,
    StorageMeta,
)  # writers add attributes; more about the place of a tensor may change its bytes
_DATACLASSES = (
    *_MAY_HAVE_MORE,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    _StorageInfo,
)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__name__): cls for cls in (*_DATACLASSES, _MEM_FORMAT_ENCODING, _get_layout)},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch", "Size"): torch.Size,
    (_SHARDED_TENSOR, "TensorProperties"): TensorProperties,
    (_SHARDED_TENSOR, "MEM_FORMAT_ENCODING"): _MEM_FORMAT_ENCODING,
    (_MEGATRON, "MCoreMetadata"): Metadata,
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("nemo_automodel.components.checkpoint._backports.filesystem", "_StorageInfo"): _StorageInfo,
    **{
        (module, f"{pure}{system}Path"): path
        for module in ("pathlib", "pathlib._local")  # the latter in Python 3.13
        for system, path in (("Posix", PurePosixPath), ("Windows", PureWindowsPath))
        for pure in ("", "Pure")
    },
    ("builtins", "getattr"): _enum_member,
    **{
        (f"{_TORCH}.planner", name): _Ignored
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    },
    (_MEGATRON, "MCoreSavePlan"): _Ignored,
    **{
        (f"{package}.filesystem", "_StoragePrefix"): _Ignored
        for package in (_TORCH, "olmo_core.distributed.checkpoint")
    },
}
_TUPLE_OPCODES = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_PRIME = 2**127 - 1


def read_metadata(file: IO[bytes]) -> Metadata:
    """Return the metadata in `file`; UnsafeMetadataError if it could run code, TypeError or ValueError if damaged."""
    try:
        metadata = _SafeUnpickler(file).load()
    except UnsafeMetadataError:
        raise
    except Exception as error:  # damaged opcodes raise anything, such as IndexError
        raise ValueError(f"it is no pickle of metadata ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata):
        raise TypeError(f"it contains {type(metadata).__name__} instead of Metadata")
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    types = {"state_dict_metadata": dict, "storage_data": dict, "storage_meta": StorageMeta}
    for name, expected in types.items():
        if not isinstance(value := getattr(metadata, name), expected):
            raise TypeError(f"it contains {type(value).__name__} instead of a {expected.__name__}")
    for index, place in metadata.storage_data.items():
        _check_place(index, place)
    for key, entry in metadata.state_dict_metadata.items():
        _check_entry(key, entry)
        _check_is_stored(key, entry, metadata.storage_data)
    return metadata


def _refusal(what: str) -> UnsafeMetadataError:
    return UnsafeMetadataError(f"it {what}, which is not known to be safe")


def _limit_nesting(load_tuple: Callable[[Any], None]) -> Callable[[Any], None]:
    """Refuse tuples nested deeper than ((2, 3),): hashing a deep tuple overflows the C stack."""

    def load(self: _SafeUnpickler) -> None:
        load_tuple(self)
        if any(isinstance(inner, tuple) for value in self.stack[-1] if isinstance(value, tuple) for inner in value):
            raise _refusal("has tuples in tuples in tuples")

    return load


class _SafeUnpickler(pickle._Unpickler):
    """The unpickler written in Python: the one in C does not let its opcodes be replaced."""

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _refusal(f"wants to run {module}.{name}")
        return _ALLOWED[module, name]

    def get_extension(self, code: int) -> None:
        raise _refusal(f"wants to run the extension {code} of copyreg")

    def load_build(self) -> None:
        """Set fields of one of DCP's dataclasses, and nothing else."""
        state, built = self.stack.pop(), self.stack[-1]
        cls = type(built)
        if cls is TensorProperties:
            built.__setstate__(state)
        elif cls in _DATACLASSES and (cls in _MAY_HAVE_MORE or state.keys() <= cls.__dataclass_fields__.keys()):
            vars(built).update({name: state[name] for name in state.keys() & cls.__dataclass_fields__.keys()})
        elif cls is not _Ignored:
            raise _refusal(f"wants to change a {cls.__name__}")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **{code[0]: _limit_nesting(pickle._Unpickler.dispatch[code[0]]) for code in _TUPLE_OPCODES},
        pickle.BUILD[0]: load_build,
    }


def _check_place(index: Any, place: Any) -> None:
    match index, place:
        case MetadataIndex(fqn=str()), object(relative_path=str(name), offset=int(start), length=int(length)) if (
            start >= 0 and length >= 0
        ):
            if Path(name).name != name:
                raise ValueError(f"it names a file outside of the folder, {name!r}")
        case _:
            raise TypeError(f"it contains {place!r} instead of the place of an entry")


def _check_entry(key: Any, entry: Any) -> None:
    if not isinstance(key, str):
        raise TypeError(f"it contains {key!r} instead of a key")
    match entry:
        case BytesStorageMetadata():
            pass
        case TensorStorageMetadata(
            properties=TensorProperties(dtype=torch.dtype()), size=torch.Size(), chunks=list()
        ) if all(map(_is_chunk, entry.chunks)):
            if not _cover(entry.chunks, entry.size):
                raise ValueError(f"its parts of {key} do not make up the shape {tuple(entry.size)}")
        case _:
            raise TypeError(f"it does not describe {key} as a tensor or a value")


def _is_chunk(chunk: Any) -> bool:
    match chunk:
        case ChunkStorageMetadata(offsets=torch.Size(), sizes=torch.Size()):
            return len(chunk.offsets) == len(chunk.sizes) and min((*chunk.offsets, *chunk.sizes), default=0) >= 0
    return False


def _check_is_stored(key: str, entry: Any, places: dict[MetadataIndex, Any]) -> None:
    """Raise ValueError unless each chunk has a place in a file, with room for its elements."""
    needed = {MetadataIndex(key): 0}  # bytes at each place; a value may have any length
    if isinstance(entry, TensorStorageMetadata):
        size = entry.properties.dtype.itemsize
        needed = {MetadataIndex(key, chunk.offsets): prod(chunk.sizes) * size for chunk in entry.chunks}
    for index, num_bytes in needed.items():
        if (place := places.get(index)) is None:
            raise ValueError(f"it does not say where {key} is")
        if place.length < num_bytes and not getattr(place, "transform_descriptors", None):  # such as compression
            raise ValueError(f"it puts {num_bytes} bytes of {key} into {place.length}")


def _cover(chunks: Sequence[ChunkStorageMetadata], shape: torch.Size) -> bool:
    """Return whether `chunks` contain each element of a tensor of this shape exactly once, and nothing else.

    Give the element (i, j) the weight x**i * y**j, for random x and y, modulo a prime. The weight of a box is then a
    product of geometric series. The chunks weigh as much as the whole shape if they cover it; if they do not, the
    weights are equal with a probability below 1e-15. The time is linear in the number of chunks.

    DCP validates the plan of a save with a private function. It compares pairs of chunks, so that a hostile file of
    overlapping chunks takes quadratic time and memory, and it does not check 0-dim tensors.
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
