"""The weighted sums of a merge, one tensor at a time, and what is doubtful about them."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dist_swa.checkpoint.cast import BLOCK_NUMEL, checked_cast, has_nan
from dist_swa.checkpoint.safetensors_io import Spec
from dist_swa.checkpoint.terms import Term
from dist_swa.collectives import all_gather


class WeightedSums:
    """Reads weighted sums by name, in the dtypes of `specs`. Tensors that are not floating come from the last term."""

    def __init__(self, terms: Sequence[Term], specs: Mapping[str, Spec]) -> None:
        self._terms, self._specs = terms, specs
        self._all_nan: list[str] = []
        self._differing: list[str] = []

    def read(self, name: str) -> Tensor:
        """Return the sum of a tensor. A source with weight 0 is not read: it may contain infinity."""
        shape, dtype = self._specs[name]
        if not (dtype.is_floating_point or dtype.is_complex):
            return self._last(name)
        parts = (*shape, 2) if dtype.is_complex else shape
        total = torch.full((math.prod(parts),), -0.0, dtype=torch.float64)  # -0.0 + x keeps the sign of a zero x
        for term in self._terms:
            if term.weight != 0:
                _add(total, term.source.read(name), term.weight)
        if has_nan(total) and all(bool(part.isnan().all()) for part in total.split(BLOCK_NUMEL)):
            self._all_nan.append(name)
        result = checked_cast(name, total, dtype.to_real(), "choose smaller weights, or another dtype").view(parts)
        return torch.view_as_complex(result) if dtype.is_complex else result

    def warn(self) -> None:
        """Warn on every rank, for the caller of `merge`, of doubtful tensors that the ranks have read. A collective."""
        found = all_gather((self._all_nan, self._differing))
        all_nan, differing = (sorted(itertools.chain.from_iterable(names)) for names in zip(*found, strict=True))
        if all_nan:
            warnings.warn(
                f"merging needs finite weights, got nothing but NaN in {len(all_nan)} tensors, such as {all_nan[0]};"
                " leave out the sources with NaN",
                stacklevel=4,
            )
        if differing:
            warnings.warn(
                f"merging needs integer tensors that are equal in all sources, got others in {len(differing)}, such as"
                f" {differing[0]}, which are now those of the last source; merge weights before they are quantised",
                stacklevel=4,
            )

    def _last(self, name: str) -> Tensor:
        """Return a tensor of the last source; note integers that differ, unless they are a counter or a mask."""
        last = self._terms[-1].source.read(name)
        if last.dtype != torch.bool and last.numel() > 1:
            others = (term.source.read(name) for term in self._terms[:-1] if term.weight != 0)
            if not all(torch.equal(other, last) for other in others):
                self._differing.append(name)
        return last


def _add(total: Tensor, values: Tensor, coefficient: float) -> None:
    """Add `values` times `coefficient` to the flat float64 `total`, a block at a time to save memory."""
    values = (torch.view_as_real(values) if values.is_complex() else values).flatten()
    for start in range(0, len(values), BLOCK_NUMEL):
        block = slice(start, start + BLOCK_NUMEL)
        total[block] += values[block].to(torch.float64) * coefficient
