"""Post-hoc EMA: an average of another width from those that a run has kept."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_swa.averaging.rules import PowerEMA
from dist_swa.checkpoint.merge import checked_paths, write_combination
from dist_swa.checkpoint.sources import Source, averages_in, open_reader, open_source
from dist_swa.collectives import raise_on_all
from dist_swa.storage.reader import CheckpointReader

_CHUNK_MODELS = 1 << 16  # models whose coefficients are held at a time
_MAX_MODELS = 10**8  # more take minutes
_REACH = 0.1  # the largest relative error of the coefficients of a synthesized average


def synthesize(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    sigma_rel: float,
    key: str | None = None,
    progress: bool = False,
) -> float:
    """Write the average that a `PowerEMA` of another width would have kept. arXiv:2312.02696, section 3.2.

    `sources` are checkpoints of one run, whose averages by `PowerEMA` (two widths, 0.05 and 0.10, in the paper) are
    combined, in any order; `out` and memory as in `merge`. With a `key`, only the averages of that name. The result
    stands for the last of them in time. Returns the relative error of what each model weighs in it.

    Appendix C solves for the coefficients in continuous time. Here what each of the N models weighs is known, so the
    least-squares problem is over these N numbers, exactly: min over x of |sum_k x_k c_k - c|, with coefficients x that
    sum to 1, in float64.

    Raises ValueError where the error is above 0.1: the averages are too few, or too far from `sigma_rel`; where there
    is none by `PowerEMA`, or one of more than 10**8 models; and as `merge` does.
    """
    with raise_on_all():
        target = PowerEMA(sigma_rel)
        found = [source for path in checked_paths(sources) for source in _power_emas(path, key)]
        found.sort(key=lambda pair: pair[1][0])  # by time: what is not floating comes from the last
        opened, tracks = [source for source, _ in found], [track for _, track in found]
        num_models = tracks[-1][0]
        coefficients, error = synthesis(tracks, num_models, target)
        if not error <= _REACH:
            widths = ", ".join(f"{rule.sigma_rel:g} after {n}" for n, rule in tracks)
            raise ValueError(
                f"synthesize needs averages from which sigma_rel can be made within {_REACH:.0%}, got {sigma_rel=} with"
                f" an error of {error:.0%} from {widths} models; choose one nearer to theirs, or add checkpoints"
            )
    write_combination(opened, coefficients, Path(out), progress)
    return error


def synthesis(tracks: Sequence[tuple[int, PowerEMA]], num_models: int, target: PowerEMA) -> tuple[list[float], float]:
    """Return the coefficients, which sum to 1, of averages of so many models by these rules, and the relative error.

    The last is expressed by the others, and QR factors of blocks of models are stacked: no Gram matrix, which would
    square the condition number. Memory: 64 Ki models for each track.
    """
    triangle = torch.empty(0, len(tracks), dtype=torch.float64)
    squares = 0.0
    for first in range(1, num_models + 1, _CHUNK_MODELS):
        models = torch.arange(first, min(first + _CHUNK_MODELS, num_models + 1), dtype=torch.float64)
        *others, last = (_power_coefficients(models, n, rule) for n, rule in tracks)
        aim = _power_coefficients(models, num_models, target)
        squares += float(aim.square().sum())
        block = torch.stack([*(other - last for other in others), aim - last], dim=1)
        triangle = torch.linalg.qr(torch.cat([triangle, block]), mode="r").R
    matrix, aim = triangle[:, :-1], triangle[:, -1]
    solution = torch.linalg.lstsq(matrix, aim[:, None], driver="gelsd").solution[:, 0]
    error = float((matrix @ solution - aim).norm()) / math.sqrt(squares)
    others = solution.tolist()
    return [*others, 1 - math.fsum(others)], error


def _power_coefficients(models: Tensor, num_models: int, rule: PowerEMA) -> Tensor:
    """Return (i**p - (i-1)**p) / N**p, p = gamma + 1, for each model i; 0 for models after the N-th."""
    power = rule.gamma + 1
    weights = torch.exp(power * torch.log(models / num_models)) * -torch.expm1(power * torch.log1p(-1 / models))
    return weights.masked_fill(models > num_models, 0)


def _power_emas(path: str | Path, key: str | None) -> list[tuple[Source, tuple[int, PowerEMA]]]:
    """Return the averages by `PowerEMA` in a checkpoint, with how many models they average."""
    reader = open_reader(path)
    averages = averages_in(reader) if isinstance(reader, CheckpointReader) else {}
    found = []
    for name, average in averages.items():
        match = re.fullmatch(r"PowerEMA\(sigma_rel=([0-9.e-]+)\)", average.rule)
        if match and key in (None, name):
            if average.num_averaged > _MAX_MODELS:
                raise ValueError(
                    f"synthesize needs averages of at most {_MAX_MODELS} models, got num_averaged="
                    f"{average.num_averaged} of {name} in {path}; leave it out, or restore it where it is damaged"
                )
            found.append((open_source(path, name), (average.num_averaged, PowerEMA(float(match[1])))))
    if not found:
        rules = ", ".join(f"{name} by {average.rule}" for name, average in averages.items()) or "no average"
        raise ValueError(
            f"synthesize needs averages by PowerEMA, got {key=} and {rules} in {path}; pass a run's with such"
        )
    return found
