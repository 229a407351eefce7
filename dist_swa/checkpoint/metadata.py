"""DCP's `.metadata`, read without running code.

It is a pickle, and pickle runs whatever code a file names. Here a file may name what stands in `_ALLOWED`, class by
class: with a prefix such as "torch." it would reach `os.system`, by a dotted name through any module that imports it.
"""

from __future__ import annotations

import pickle
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    *((f"{_DCP}metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((f"{_DCP}metadata", name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    *((f"{_DCP}metadata", name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks the name up in a table
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


def read_metadata(file: IO[bytes]) -> Metadata:
    """Return the metadata in `file`; UnpicklingError where it wants to run code, any Exception where it is damaged."""
    return _checked(_Unpickler(file).load())


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}, which is not in the metadata of tensors")
        return super().find_class(module, name)


def _checked(metadata: Any) -> Metadata:
    """Return `metadata`; TypeError unless the attributes that are used have the types that DCP writes."""
    if not isinstance(metadata, Metadata):
        raise TypeError(f"it holds {type(metadata).__name__} where Metadata should be")
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    types = {"state_dict_metadata": dict, "storage_data": dict, "storage_meta": StorageMeta}
    for name, expected in types.items():
        if not isinstance(value := getattr(metadata, name), expected):
            raise TypeError(f"it holds {type(value).__name__} where a {expected.__name__} should be")
    for key in metadata.state_dict_metadata:
        if not isinstance(key, str):
            raise TypeError(f"it holds {key!r} where a key should be")
    return metadata
