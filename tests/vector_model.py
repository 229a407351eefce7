"""A model with a single vector, and averages of it."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from dist_swa import Rule, ShardedAverage


class Vector(nn.Module):
    """A model with a single vector."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())

    @torch.no_grad()
    def put(self, values: Tensor) -> None:
        self.values.copy_(values)


def averaged(average: ShardedAverage) -> Tensor:
    full = average.full_state_dict()["values"]
    assert isinstance(full, Tensor)
    return full


def one_hot_coefficients(rule: Rule, num_models: int, gaps: Sequence[float] = ()) -> list[float]:
    """Return the average of the unit vectors, which is the coefficients."""
    models = torch.eye(num_models, dtype=torch.float64)
    model = Vector(torch.full_like(models[0], math.nan))
    average = ShardedAverage(model, rule, dtype=torch.float64)
    for row, gap in zip(models, [0.0, *gaps] if gaps else [None] * num_models, strict=True):
        model.put(row)
        average.update(gap)
    assert average.num_averaged == num_models
    return [float(value) for value in averaged(average)]


def close(values: Sequence[float]) -> object:
    return pytest.approx(list(values), rel=1e-10, abs=1e-14)
