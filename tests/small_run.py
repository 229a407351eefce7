"""A small training run for the tests of trainers; any number of ranks trains on the same global batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from cases import read
from dist_swa import SWA

GLOBAL_BATCH = 8


def samples(num_batches: int) -> TensorDataset:
    given = torch.randn(GLOBAL_BATCH * num_batches, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(given, given.roll(1, 0).square())


def loader(num_batches: int, is_distributed: bool) -> DataLoader[Any]:
    """Return a loader of this rank's part of the global batches."""
    data, ranks = samples(num_batches), dist.get_world_size() if is_distributed else 1
    sampler: Any = DistributedSampler(data, shuffle=False) if is_distributed else None
    return DataLoader(data, GLOBAL_BATCH // ranks, sampler=sampler)


def network(with_norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(6) if with_norm else nn.Tanh()
        return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 5), nn.Linear(5, 4))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


def plain_loop(
    model: nn.Module, epochs: int, steps_per_epoch: int, counts_steps: bool = True, **options: Any
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Train `model` without a trainer; return `averages_of` the run, and the weights after every step.

    The `SWA` counts epochs by their steps, or (``counts_steps=False``) when they end.
    """
    optimizer = sgd(model)
    length: dict[str, Any] = {"steps_per_epoch": steps_per_epoch} if counts_steps else {}
    swa = SWA(model, optimizer, max_duration=f"{epochs}ep", **length, **options)
    weights = []
    for _ in range(epochs):
        for batch in loader(steps_per_epoch, True):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            swa.step()
            weights.append(read(model))
        if not counts_steps:
            swa.end_epoch()
    return averages_of(swa), weights


def mean_of(models: Sequence[Mapping[str, Tensor]], prefix: str = "") -> dict[str, Tensor]:
    """Return the equal average of `models`, with `prefix` before each name."""
    return {prefix + name: torch.stack([one[name].double() for one in models]).mean(0).float() for name in models[0]}


def statistics_of(model: Mapping[str, Tensor], given: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of what the BatchNorm layer of `network` gets for the input `given`."""
    seen = given.double() @ model["0.weight"].double().T + model["0.bias"].double()
    return seen.mean(0).float(), seen.var(0).float()


def averages_of(swa: SWA | None) -> dict[str, Tensor]:
    """Return the full averages of a run, on every rank, as ``average name.parameter name of network``."""
    assert swa is not None
    whole: dict[str, Tensor] = {}
    for name in swa.average.names:
        state = swa.average.full_state_dict(name)
        whole |= {f"{name}.{key.removeprefix('net.')}": value for key, value in state.items()}
    first: list[Any] = [whole]
    dist.broadcast_object_list(first)
    return first[0]  # type: ignore[no-any-return]


def full_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the full tensors of a model under any wrapper. A collective; the result is on every rank."""
    swa = SWA(model, swa_start="0ba", swa_end=None, update_interval="1ba")
    swa.step()
    return swa.average.full_state_dict()


def mean(models: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    return torch.stack([model[name].double() for model in models]).mean(0)
