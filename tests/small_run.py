"""A small network and its data for the tests of trainers; the global batches do not depend on the number of ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

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


def averages_of(swa: SWA | None) -> dict[str, Tensor]:
    """Return the full averages of a run, on every rank, under the names of `network`. A collective."""
    assert swa is not None
    whole: dict[str, Tensor] = {}
    for name in swa.average.names:
        state = swa.average.full_state_dict(name)
        whole |= {f"{name}.{key.removeprefix('net.')}": value for key, value in state.items()}
    first: list[Any] = [whole]
    dist.broadcast_object_list(first)
    return first[0]  # type: ignore[no-any-return]
