"""Training after a recalibration has the same bits as without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from batch_norm_models import (
    LoaderError,
    batches_of,
    drawing,
    in_every_wrapper,
    layers_of,
    local,
    mixed_model,
    random,
    weights,
    wrap,
)
from batch_norm_oracle import has_statistics_of
from dist_swa import recalibrate_batch_norm
from ranks import on_ranks


def train(wrapper: str, after_step: Callable[[nn.Module], None]) -> tuple[list[Any], list[float]]:
    """Return the weights and the losses of a training run that calls `after_step` after each step."""
    torch.manual_seed(0)
    model, losses = wrap(mixed_model(), wrapper), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss = model(random(6, 3, seed=step)).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after_step(model)
    return weights(model), losses


def recalibrate_and_fail(model: nn.Module) -> None:
    recalibrate_batch_norm(model, drawing(batches_of(2)))
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 3"):
        recalibrate_batch_norm(model, drawing([*batches_of(2), random(6, 4)]))
    recalibrate_batch_norm(model, batches_of(2), layerwise=True)
    with pytest.raises(LoaderError):
        recalibrate_batch_norm(model, drawing(batches_of(3), fail_at=1))


@in_every_wrapper
@on_ranks(1, 2)
def test_training_after_recalibrations_has_the_same_bits(wrapper: str) -> None:
    assert train(wrapper, recalibrate_and_fail) == train(wrapper, lambda model: None)


@on_ranks(1, 2)
def test_weights_written_to_shards_after_an_evaluation_are_used() -> None:
    """After a forward without a backward FSDP2's root stays unsharded, with weights that are stale then."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5))
    fully_shard(model)
    shards = list(model.parameters())
    with torch.no_grad():
        model.eval()(random(4, 3))
        for shard in shards:
            local(shard).fill_(0.5)
    recalibrate_batch_norm(model, [random(4, 3)])
    assert torch.allclose(layers_of(model)["2"].running_mean, torch.tensor(0.5 + 3 * 0.5 * 0.5))


def test_a_shuffling_data_loader_leaves_the_random_state() -> None:
    loader = DataLoader(TensorDataset(random(24, 3)), batch_size=8, shuffle=True)
    model, before = nn.Sequential(nn.BatchNorm1d(3)), torch.get_rng_state()
    recalibrate_batch_norm(model, loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert has_statistics_of(model[0], [random(24, 3)])
