"""Models with BatchNorm, wrappers, batches and loaders."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

WRAPPERS = ("plain", "ddp", "fsdp1", "fsdp2")
SHARDED = ("fsdp1", "fsdp2", "hsdp")
HANG_S = 20.0
LAYER_TYPES = (_BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

in_every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


def build() -> nn.Sequential:
    """Return a model with two BatchNorm layers, the same on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))


class StaysInEvaluation(nn.Linear):
    def train(self, mode: bool = True) -> "StaysInEvaluation":
        return super().train(False)


def mixed_model() -> nn.Sequential:
    """Return a model with mixed modes and momenta, and a hook."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.BatchNorm1d(3, momentum=0.3),
            *(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=None), nn.Dropout(0.5)),
            *(StaysInEvaluation(5, 5), nn.BatchNorm1d(5)),
            *(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False)),
        )
    model.train()[5].eval()
    model[2].register_forward_hook(lambda *_: None)
    return model


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    """Wrap a model on all ranks; FSDP wraps its Linear and Conv2d children first."""
    fsdp1: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    children = [(name, child) for name, child in model.named_children() if isinstance(child, nn.Linear | nn.Conv2d)]
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "fsdp1":
        for name, child in children:
            setattr(model, name, FullyShardedDataParallel(child, **fsdp1))
        return FullyShardedDataParallel(model, **fsdp1)
    if wrapper == "fsdp2":
        for _, child in children:
            fully_shard(child)
        fully_shard(model)
    if wrapper == "hsdp":
        inner = 2 if dist.get_world_size() % 2 == 0 else 1
        mesh = init_device_mesh("cpu", (dist.get_world_size() // inner, inner), mesh_dim_names=("outer", "inner"))
        fully_shard(model, mesh=mesh)
    if wrapper in ("tp", "fsdp2+tp"):  # for `build()` only
        ranks = dist.get_world_size()
        outer = 2 if wrapper == "fsdp2+tp" and ranks % 2 == 0 else 1
        mesh = init_device_mesh("cpu", (outer, ranks // outer), mesh_dim_names=("data", "tensor"))
        colwise = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model, mesh["tensor"], {"1": colwise, "4": colwise})
        if wrapper == "fsdp2+tp":
            fully_shard(model, mesh=mesh["data"])
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("_fsdp_wrapped_module", "_orig_mod"))


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Return the BatchNorm and InstanceNorm layers by FQN."""
    parts = unwrapped(model).named_modules()
    return {plain_name(name): part for name, part in parts if isinstance(part, LAYER_TYPES)}


def statistics(model: nn.Module) -> dict[str, list[float]]:
    return {plain_name(name): buffer.tolist() for name, buffer in unwrapped(model).named_buffers()}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> list[list[float]]:
    return [local(parameter.detach()).tolist() for parameter in model.parameters()]


def scale(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).mul_(factor)
    return model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batches_of(num_batches: int, seed: int = 0) -> list[Tensor]:
    """Return batches with different sizes, means and scales."""
    return [random(4 + 3 * i % 7, 3, seed=seed + i) * (1 + i % 3) + i for i in range(num_batches)]


def images_of(num_batches: int, seed: int = 0, size: int = 8) -> list[Tensor]:
    return [random(2 + i % 3, 3, size, size, seed=seed + i) * (1 + i % 3) + i % 2 for i in range(num_batches)]


def dealt(batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return every n-th batch, for the n ranks."""
    return batches[dist.get_rank() :: dist.get_world_size()]


def uneven(batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the batches of this rank. The first of several ranks has none, the last one has most."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks == 1:
        return batches
    cuts = [len(batches) * r * (r - 1) // (ranks * (ranks - 1)) for r in range(ranks + 1)]
    return batches[cuts[rank] : cuts[rank + 1]]


class LoaderError(Exception):
    pass


def drawing(batches: Iterable[Tensor], fail_at: int | None = None) -> Iterator[Tensor]:
    """Yield batches with random draws, like a shuffling loader. Raise instead of batch `fail_at`."""
    for i, batch in enumerate(batches):
        torch.rand(3)
        if i == fail_at:
            raise LoaderError
        yield batch


class Loader:
    """Batches that count their iterations."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches, self.num_passes = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.num_passes += 1
        return iter(self.batches)


def unread() -> Generator[Tensor, None, None]:
    """Return a loader that must not be read."""
    pytest.fail("the loader was read")
    yield


@contextmanager
def without_distributed() -> Iterator[None]:
    """Run the body as a single process without torch.distributed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        yield
