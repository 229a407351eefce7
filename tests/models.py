"""A model with difficult shapes, its wrappers, and trajectories of weights to average."""

import gc
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

FSDP1_STRATEGIES = {
    "fsdp1": ShardingStrategy.FULL_SHARD,
    "fsdp1 flat": ShardingStrategy.FULL_SHARD,  # without use_orig_params
    "fsdp1 grad": ShardingStrategy.SHARD_GRAD_OP,
    "fsdp1 hybrid": ShardingStrategy.HYBRID_SHARD,
    "fsdp1 whole": ShardingStrategy.NO_SHARD,
}
WRAPPERS = ("plain", "group", "ddp", "fsdp1", "fsdp1 flat", "fsdp2", "hsdp", "tp", "fsdp2+tp")
ALL_WRAPPERS = (*WRAPPERS, "fsdp1 grad", "fsdp1 hybrid", "fsdp1 whole")


class Stop(Exception):
    """Raised on purpose, inside a forward or inside `swapped_in`."""


class Net(nn.Module):
    """Rows of 1, 5 and 6 (uneven and empty shards on 3 and 4 ranks), tied and frozen weights, an int buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.2)
        self.tied = nn.Linear(5, 5, bias=False)
        self.again = nn.Linear(5, 5, bias=False)
        self.again.weight = self.tied.weight
        self.one_row = nn.Parameter(torch.ones(1, 5))
        self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        self.offset = nn.Buffer(torch.zeros(5))
        self.seen = nn.Buffer(torch.tensor(0))
        self.cache = nn.Buffer(torch.zeros(2), persistent=False)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.norm(self.down(torch.tanh(self.up(given)))) * self.one_row * self.frozen.sum()
        hidden = hidden - self.offset.to(hidden.dtype)
        if self.training:
            self.seen.add_(1)
            mean = hidden.detach().mean(0).to(self.offset.dtype)
            self.offset.lerp_(mean, 0.1)  # training depends on this buffer
        out: Tensor = self.again(self.dropout(torch.tanh(self.tied(hidden))))
        return out


def build(seed: int = 0) -> Net:
    """Return the same model on every rank and in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    """Put `wrapper` around a model on all ranks; "group" leaves it plain, its average has a process group."""
    ranks = dist.get_world_size()
    # Two in the inner axis if that divides the ranks: 4 -> (2, 2), 2 -> (1, 2), 3 -> (3, 1).
    inner = 2 if ranks % 2 == 0 else 1
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper in ("plain", "group"):
        return model
    if wrapper.startswith("fsdp1"):
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        options: dict[str, Any] = {"use_orig_params": wrapper != "fsdp1 flat", "device_id": torch.device("cpu")}
        options["sharding_strategy"] = FSDP1_STRATEGIES[wrapper]
        if wrapper == "fsdp1 hybrid":
            options["device_mesh"] = init_device_mesh("cpu", (ranks // inner, inner))
        options["ignored_states"] = frozen if wrapper == "fsdp1 flat" else []
        if isinstance(model, Net):
            model.up = FullyShardedDataParallel(model.up, **options)  # type: ignore[assignment]
        return FullyShardedDataParallel(model, **options)
    mesh = init_device_mesh("cpu", (ranks // inner, inner), mesh_dim_names=("outer", "inner"))
    if wrapper == "hsdp":
        fully_shard(model, mesh=mesh)
    if wrapper in ("tp", "fsdp2+tp"):
        tp = mesh["inner"] if wrapper == "fsdp2+tp" else init_device_mesh("cpu", (ranks,))
        parallelize_module(model, tp, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if wrapper == "fsdp2+tp":
        fully_shard(model, mesh=mesh["outer"])
    if wrapper == "fsdp2":
        parts = [fully_shard(model.up)] if isinstance(model, Net) else []
        fully_shard(model).set_modules_to_forward_prefetch(parts)  # all-gathers are unfinished between the parts
    return model


def group_of(wrapper: str) -> dist.ProcessGroup | None:
    """Return the `process_group` for the average of a model in `wrapper`."""
    return dist.group.WORLD if wrapper == "group" else None


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, first: int = 0) -> None:
    """Take `num_steps` steps on batches that depend on the step and, except under TP, on the rank."""
    model.train()
    rank = 0 if any(isinstance(p, DTensor) and p.device_mesh.ndim > 1 for p in model.parameters()) else dist.get_rank()
    for step in range(first, first + num_steps):
        given = torch.randn(8, 4, generator=torch.Generator().manual_seed(1000 * step + rank))
        optimizer.zero_grad()
        model(given).square().mean().backward()
        optimizer.step()


def trajectory(num_models: int, model: nn.Module, seed: int = 1) -> list[dict[str, Tensor]]:
    """Return `num_models` sets of random full tensors for the trainable parameters of an unwrapped model."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [
        {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in parameters.items()}
        for _ in range(num_models)
    ]


def clean(name: str) -> str:
    """Return the name that a parameter has in the unwrapped model."""
    inner = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
    return ".".join(part for part in name.split(".") if part not in inner)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this rank."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write full tensors into the shards of a wrapped model, without library code. A collective under FSDP1."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            _write(model, values)
    else:
        _write(model, values)


def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if clean(name) in values and isinstance(parameter, DTensor):
            parameter.to_local().copy_(_shard(values[clean(name)], parameter))
        elif clean(name) in values:
            parameter.copy_(values[clean(name)])


def _shard(whole: Tensor, like: DTensor) -> Tensor:
    mesh, axes = like.device_mesh, list(enumerate(like.placements))
    axes.sort(key=lambda axis: "Strided" in type(axis[1]).__name__)  # FSDP2 shards the local tensors of TP
    for axis, placement in axes:
        if placement.is_shard() or "Strided" in type(placement).__name__:
            dim, size = placement.dim, mesh.size(axis)  # type: ignore[attr-defined]
            parts = [*whole.chunk(size, dim), *[whole.narrow(dim, 0, 0)] * size]
            whole = parts[mesh.get_local_rank(axis)]
    return whole


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor], names: Iterable[str] = ()) -> bool:
    """Return whether two state dicts have the same tensors, bit for bit; with `names`, whether these are the same."""
    keys = list(names) or list(left)
    return (bool(names) or set(left) == set(right)) and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in keys
    )


def live_bytes() -> int:
    """Return the bytes of all tensors that are alive in this process."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())
