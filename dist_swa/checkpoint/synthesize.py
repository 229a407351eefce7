"""Post-hoc EMA: compute an average of another width from the averages that a run has saved."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_swa.averaging.rules import PowerEMA
from dist_swa.checkpoint.entries import Contents
from dist_swa.checkpoint.merge import checked_paths, write_combination
from dist_swa.checkpoint.readers import open_reader
from dist_swa.checkpoint.sources import Source, open_source
from dist_swa.checkpoint.terms import make_terms, record
from dist_swa.collectives import raise_on_all

_CHUNK_MODELS = 1 << 16  # models whose coefficients are in memory at a time
_MAX_MODELS = 10**8  # more take minutes
_MAX_ERROR = 0.1  # of the coefficients, relative


def synthesize(
    sources: Iterable[str | Path],
    out: str | Path,
    *,
    sigma_rel: float,
    key: str | None = None,
    progress: bool = False,
) -> float:
    """Write the average that a `PowerEMA` of width `sigma_rel` would have, and return its relative error.

    arXiv:2312.02696, section 3.2. `sources` are checkpoints of one run in any order. Their averages by `PowerEMA` are
    combined; the paper uses the widths 0.05 and 0.10. With a `key`, only the averages of that name are used. The result
    is the average at the time of the latest one. `out` (with ``dist_swa.json``), memory and ranks are as in `merge`.
    With `progress` the first rank shows a progress bar.

    The coefficients x minimise |sum_k x_k c_k - c| and sum to 1, where c_k are the known weights of the N models in
    average k, and c those in the result. This float64 least-squares problem is exact; appendix C solves it in
    continuous time. The error is relative to |c|.

    Raises ValueError if the error is above 0.1 (too few averages, or too far from `sigma_rel`), if there is no average
    by `PowerEMA`, or one of more than 10**8 models; and what `merge` raises.

    Example:

    >>> import torch
    >>> from dist_swa import PowerEMA, ShardedAverage, checkpoint
    >>> model = torch.nn.Linear(2, 2)
    >>> averages = ShardedAverage(model, {"narrow": PowerEMA(0.05), "wide": PowerEMA(0.10)})
    >>> for step in range(1, 13):
    ...     averages.update()
    ...     if step % 4 == 0:
    ...         checkpoint.save({"swa": averages}, f"step-{step}")
    >>> sources = ["step-4", "step-8", "step-12"]
    >>> error = checkpoint.synthesize(sources, "averaged.safetensors", sigma_rel=0.08)
    >>> error < 0.05
    True
    """
    with raise_on_all():
        rule = PowerEMA(sigma_rel)
        found = [source for path in checked_paths(sources) for source in _power_emas(path, key)]
        found.sort(key=lambda item: item[2][0])  # by time: tensors that are not floating come from the last source
        known = [average for *_, average in found]
        num_models = known[-1][0]
        coefficients, error = synthesis(known, num_models, rule)
        if not error <= _MAX_ERROR:
            widths = ", ".join(f"{average.sigma_rel:g} after {n}" for n, average in known)
            raise ValueError(
                f"synthesize needs averages from which sigma_rel can be made within {_MAX_ERROR:.0%}, got {sigma_rel=}"
                f" with an error of {error:.0%} from {widths} models; choose one nearer to theirs, or add checkpoints"
            )
        paths, sources, _ = zip(*found, strict=True)
        terms = make_terms(paths, sources, coefficients)
    made_by = record(terms, command="synthesize", rule=repr(rule), relative_error=error)
    write_combination(terms, Path(out), made_by, progress)
    return error


def synthesis(known: Sequence[tuple[int, PowerEMA]], num_models: int, rule: PowerEMA) -> tuple[list[float], float]:
    """Return the coefficients of averages, given as (number of models, rule), and the relative error of their sum.

    The last coefficient is 1 minus the others. The QR factor is updated block by block instead of a Gram matrix, which
    would square the condition number. Memory: 64 Ki models per average.
    """
    r_factor = torch.empty(0, len(known), dtype=torch.float64)
    target_norm = 0.0
    for first in range(1, num_models + 1, _CHUNK_MODELS):
        models = torch.arange(first, min(first + _CHUNK_MODELS, num_models + 1), dtype=torch.float64)
        *others, last = (_power_coefficients(models, n, average) for n, average in known)
        target = _power_coefficients(models, num_models, rule)
        target_norm = math.hypot(target_norm, float(target.norm()))
        block = torch.stack([*(other - last for other in others), target - last], dim=1)
        r_factor = torch.linalg.qr(torch.cat([r_factor, block]), mode="r").R
    matrix, target = r_factor[:, :-1], r_factor[:, -1]
    solution = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
    coefficients = solution.tolist()
    return [*coefficients, 1 - math.fsum(coefficients)], float((matrix @ solution - target).norm()) / target_norm


def _power_coefficients(models: Tensor, num_models: int, rule: PowerEMA) -> Tensor:
    """Return (i**p - (i-1)**p) / N**p, p = gamma + 1, for each model i; 0 for models after the N-th."""
    power = rule.gamma + 1
    weights = torch.exp(power * torch.log(models / num_models)) * -torch.expm1(power * torch.log1p(-1 / models))
    return weights.masked_fill(models > num_models, 0)


def _power_emas(path: str | Path, key: str | None) -> list[tuple[str | Path, Source, tuple[int, PowerEMA]]]:
    """Return the averages by `PowerEMA` in a checkpoint: its path, the source, the number of models and the rule."""
    entries = Contents(open_reader(path)).entries
    averages = {name: entry.average for name, entry in entries.items() if entry.average}
    found = []
    for name, average in averages.items():
        match = re.fullmatch(r"PowerEMA\(sigma_rel=([0-9.e-]+)\)", average.rule)
        if match and key in (None, name):
            if average.num_averaged > _MAX_MODELS:
                raise ValueError(
                    f"synthesize needs averages of at most {_MAX_MODELS} models, got num_averaged="
                    f"{average.num_averaged} of {name} in {path}; leave it out, or restore it where it is damaged"
                )
            found.append((path, open_source(path, name), (average.num_averaged, PowerEMA(float(match[1])))))
    if not found:
        rules = ", ".join(f"{name} by {average.rule}" for name, average in averages.items()) or "no average"
        raise ValueError(
            f"synthesize needs averages by PowerEMA, got {key=} and {rules} in {path}; pass checkpoints that have them"
        )
    return found
