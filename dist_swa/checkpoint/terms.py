"""The sources of a merge with their steps and weights: their order, how they are shown, and what is recorded."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

from dist_swa import __version__
from dist_swa.checkpoint.sources import Source

RECORD = "dist_swa.json"  # the record of a merge in its output folder
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_VERSION = re.compile(r"(?<=.)[-_.]v\d+$")  # of a file that Lightning did not overwrite: "last-v2"
_STEP = re.compile(
    r"(?:step|iter|checkpoint|ckpt|(?<![a-z])ba)[-_=]?(\d+)", re.I
)  # "epoch=3-step=12", "ep1-ba20-rank0"
_EPOCH = re.compile(r"(?:epoch|(?<![a-z])ep)[-_=]?(\d+)", re.I)  # "epoch10_best"
_NUMBER_AT_END = re.compile(r"(?<![\d=]\.)(?<!\d)(\d+)$")  # "model.500", but not the 25 of "loss=0.25"


def printable(text: str) -> str:
    """Escape control characters, which names in files may contain."""
    return text if text.isprintable() else repr(text)[1:-1]


class Term(NamedTuple):
    """One source of a merge. `path` is as the user gave it. `step` is None if it is unknown."""

    path: str | Path
    source: Source
    step: int | None
    weight: float


def make_terms(paths: Sequence[str | Path], sources: Sequence[Source], weights: Sequence[float]) -> list[Term]:
    """Return the terms of a sum. The steps are those in the files if all have one, else the numbers in their names."""
    steps = [source.step for source in sources]
    if None in steps:
        steps = _steps_of_names([Path(path) for path in paths])
    return [Term(*term) for term in zip(paths, sources, steps, weights, strict=True)]


def warn_unless_oldest_first(terms: Sequence[Term]) -> None:
    """Warn, for the caller of `merge`, if weights depend on an order in which the steps do not rise."""
    steps = [term.step for term in terms if term.step is not None]
    weights = [term.weight for term in terms]
    if any(left >= right for left, right in pairwise(steps)) and not isclose(min(weights), max(weights)):
        warnings.warn(
            f"merge needs its sources oldest first, got the steps {', '.join(map(str, steps))}; sort them by number (ls"
            " -v), unless this order is meant",
            stacklevel=3,
        )


def table(terms: Sequence[Term]) -> str:
    """Return one line for each term, under a heading."""
    rows = [("step", "weight", "source")]
    rows += [
        ("-" if term.step is None else str(term.step), f"{term.weight:.6g}", printable(str(term.path)))
        for term in terms
    ]
    step_width, weight_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{step:>{step_width}}  {weight:<{weight_width}}  {path}" for step, weight, path in rows)


def record(terms: Sequence[Term], **facts: Any) -> str:
    """Return JSON that says how an output was made: `facts`, and the path, key, step and weight of each source."""
    sources = [
        {"path": str(term.path), "key": term.source.key, "step": term.step, "weight": term.weight} for term in terms
    ]
    made = {"dist_swa": __version__, "date": datetime.now(UTC).date().isoformat()}  # no time: the same bytes again
    return json.dumps({**made, **facts, "sources": sources}, indent=2)


def _steps_of_names(paths: Sequence[Path]) -> list[int | None]:
    """Return the step in each name; if none has one, the epoch, a number at the end, or what the folder's name has."""
    names = [path.name for path in paths]
    for suffix in _SUFFIXES:
        names = [name.removesuffix(suffix) for name in names]
    names = [_VERSION.sub("", name) for name in names]
    folders = [path.parent.name for path in paths]  # "checkpoint-64/weights.pt"
    for pattern, texts in (
        (_STEP, names),
        (_EPOCH, names),
        (_NUMBER_AT_END, names),
        (_STEP, folders),
        (_EPOCH, folders),
    ):
        found = [pattern.search(text) for text in texts]
        if any(found):
            return [int(match[1]) if match else None for match in found]
    return [None] * len(paths)
