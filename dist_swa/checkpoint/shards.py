"""The files of a folder that together have the weights of one model, as transformers and `export` write them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dist_swa.storage.reader import CheckpointError

_SHARD = re.compile(r"(.+-)\d{5}-of-(\d{5})(\..+)")


def weight_files(folder: Path, index: Path, pattern: str) -> list[Path]:
    """Return the files that an index lists, or without one those of a pattern and the missing ones between them."""
    files = set(read_index(index).values())
    for file in () if files else folder.glob(pattern):
        files.add(file)
        if match := _SHARD.fullmatch(file.name):
            files |= {folder / f"{match[1]}{i:05}-of-{match[2]}{match[3]}" for i in range(1, int(match[2]) + 1)}
    return sorted(files)


def read_index(path: Path) -> dict[str, Path]:
    """Return the file of each tensor from the index of a folder; an empty dict without an index."""
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        if not all(Path(name).name == name and name not in ("", "..") for name in weight_map.values()):
            raise ValueError("a file outside of the folder")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"weights need an index as it was written, got {path}: {error}; restore it") from error
    return {key: path.with_name(name) for key, name in weight_map.items()}
