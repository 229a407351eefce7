"""The rows of the table in tests/README.md, each a way to shard and wrap: a model to build and a wrapper."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

from models import Net, build, clean, group_of, wrap

Wrap = Callable[[Any], nn.Module]


class Adapted(nn.Module):
    """A frozen layer with two small trainable factors, as with LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 6).requires_grad_(False)
        self.down = nn.Linear(4, 1, bias=False)
        self.up = nn.Linear(1, 6, bias=False)

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.base(given) + self.up(self.down(given))
        return out


class Normed(nn.Module):
    """A parametrized weight, which is not a parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Linear(4, 5))
        self.second = nn.Linear(5, 3)

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(given)))
        return out


class Uncopied(Net):
    """A module that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> None:
        raise TypeError("this module cannot be copied")

    __copy__ = __reduce_ex__ = __deepcopy__  # type: ignore[assignment]


class Sequences(nn.Module):
    """A block of a transformer without attention, for sequence parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, given: Tensor) -> Tensor:
        hidden = given.unsqueeze(-1) * torch.ones(4, device=given.device)  # (batch, sequence 4, 4)
        out: Tensor = self.norm(self.down(torch.tanh(self.up(hidden))))
        return out.full_tensor() if isinstance(out, DTensor) else out


def seeded(model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build_seeded() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model()

    return build_seeded


def mesh_2d() -> DeviceMesh:
    inner = 2 if dist.get_world_size() % 2 == 0 else 1
    return init_device_mesh("cpu", (dist.get_world_size() // inner, inner), mesh_dim_names=("outer", "inner"))


def core(wrapper: str) -> Wrap:
    return lambda model: wrap(model, wrapper)


def fsdp1(nested: bool = True, **options: Any) -> Wrap:
    def put_on(model: Any) -> nn.Module:
        settings: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")} | options
        if nested:
            model.up = FullyShardedDataParallel(model.up, **settings)
        return FullyShardedDataParallel(model, **settings)

    return put_on


def fsdp2(*children: str, ignored: str = "", **options: Any) -> Wrap:
    def put_on(model: Any) -> nn.Module:
        ignored_params = {model.get_parameter(ignored)} if ignored else None
        for names in children:
            group = [model.get_submodule(name) for name in names.split("+")]
            fully_shard(group if len(group) > 1 else group[0], **options)
        fully_shard(model, ignored_params=ignored_params, **options)
        return model  # type: ignore[no-any-return]

    return put_on


def fsdp2_in_mixed_precision(model: Any) -> nn.Module:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    fully_shard(model.up, mp_policy=policy)
    fully_shard(model.norm)  # in full precision: on the CPU, BatchNorm needs weights of its buffers' dtype
    fully_shard(model, mp_policy=policy)
    return model  # type: ignore[no-any-return]


def fsdp2_on_nested_meshes(model: Any) -> nn.Module:
    fully_shard(model.up, mesh=mesh_2d())
    fully_shard(model.down, mesh=mesh_2d()["inner"])
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model  # type: ignore[no-any-return]


def sequence_parallel(is_sharded: bool) -> Wrap:
    def put_on(model: Any) -> nn.Module:
        mesh = mesh_2d()
        tp = mesh["inner"] if is_sharded else init_device_mesh("cpu", (dist.get_world_size(),))
        plan = {
            "up": ColwiseParallel(),
            "down": RowwiseParallel(output_layouts=Shard(1)),
            "norm": SequenceParallel(),
        }
        parallelize_module(model, tp, plan)
        if is_sharded:
            fully_shard(model, mesh=mesh["outer"])
        return model  # type: ignore[no-any-return]

    return put_on


def compiled(wrapper: str, in_place: bool = False) -> Wrap:
    def put_on(model: Any) -> nn.Module:
        wrapped = wrap(model, wrapper)
        if in_place:
            wrapped.compile(backend="eager")
            return wrapped
        return torch.compile(wrapped, backend="eager")  # type: ignore[return-value]

    return put_on


def activation_checkpointed(wrapper: str) -> Wrap:
    def put_on(model: Any) -> nn.Module:
        model.down = checkpoint_wrapper(model.down)
        return wrap(model, wrapper)

    return put_on


class Case(NamedTuple):
    """A row of the table: a model, its wrapper, and the numbers of ranks that save and load its checkpoints."""

    wrap: Wrap
    build: Callable[[], nn.Module] = build
    saving_ranks: int = 4
    loading_ranks: int = 3
    group: str = ""


_HALF = torch.bfloat16
CASES: dict[str, Case] = {
    "plain module": Case(core("plain")),
    "plain module, process_group": Case(core("plain"), group="group"),
    "DDP": Case(core("ddp")),
    "DDP, static_graph": Case(lambda model: DistributedDataParallel(model, static_graph=True)),
    "FSDP1, use_orig_params": Case(core("fsdp1")),
    "FSDP1, not use_orig_params": Case(core("fsdp1 flat")),
    "FSDP1, one level": Case(fsdp1(nested=False)),
    "FSDP1, SHARD_GRAD_OP": Case(core("fsdp1 grad")),
    "FSDP1, HYBRID_SHARD": Case(core("fsdp1 hybrid"), loading_ranks=2),
    "FSDP1, NO_SHARD": Case(core("fsdp1 whole")),
    "FSDP1, mixed precision": Case(fsdp1(mixed_precision=MixedPrecision(_HALF, torch.float32, _HALF))),
    "FSDP2": Case(core("fsdp2")),
    "FSDP2, reshard_after_forward=False": Case(fsdp2("up", reshard_after_forward=False)),
    "FSDP2, reshard_after_forward=2": Case(fsdp2("up", reshard_after_forward=2), loading_ranks=2),
    "FSDP2, CPUOffloadPolicy": Case(fsdp2("up", offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "FSDP2, MixedPrecisionPolicy": Case(fsdp2_in_mixed_precision),
    "FSDP2, tied modules in a group": Case(fsdp2("up", "tied+again")),
    "FSDP2, root without parameters": Case(fsdp2("first", "second"), seeded(Normed)),
    "FSDP2, ignored_params": Case(fsdp2("up", ignored="one_row")),
    "FSDP2, nested meshes": Case(fsdp2_on_nested_meshes, loading_ranks=2),
    "HSDP": Case(core("hsdp")),
    "TP": Case(core("tp"), saving_ranks=3, loading_ranks=2),
    "TP, sequence-parallel norm": Case(sequence_parallel(is_sharded=False), seeded(Sequences), loading_ranks=2),
    "FSDP2 + TP": Case(core("fsdp2+tp")),
    "FSDP2 + TP, sequence-parallel norm": Case(sequence_parallel(is_sharded=True), seeded(Sequences)),
    "torch.compile, DDP": Case(compiled("ddp"), saving_ranks=2),
    "torch.compile, FSDP2": Case(compiled("fsdp2"), saving_ranks=2),
    "torch.compile, FSDP2 in place": Case(compiled("fsdp2", in_place=True), saving_ranks=2),
    "activation checkpointing, DDP": Case(activation_checkpointed("ddp")),
    "activation checkpointing, FSDP1": Case(activation_checkpointed("fsdp1")),
    "activation checkpointing, FSDP2": Case(activation_checkpointed("fsdp2")),
    "mostly frozen, DDP": Case(core("ddp"), seeded(Adapted)),
    "mostly frozen, FSDP2": Case(core("fsdp2"), seeded(Adapted)),
    "weight_norm, DDP": Case(core("ddp"), seeded(Normed)),
    "weight_norm, FSDP1": Case(core("fsdp1"), seeded(Normed)),
    "weight_norm, FSDP2": Case(core("fsdp2"), seeded(Normed)),
    "cannot be copied, FSDP2": Case(core("fsdp2"), seeded(Uncopied)),
}
# Wrappers that exchange checkpoints with each case; they take every model.
PARTNERS = ("DDP", "FSDP1, use_orig_params", "FSDP2", "HSDP")


def average_group(case: Case) -> dist.ProcessGroup | None:
    return group_of(case.group)


@torch.no_grad()
def read(model: nn.Module) -> dict[str, Tensor]:
    """Return full copies of the trainable parameters of a wrapped model, without library code. A collective."""
    inner = model._modules.get("_orig_mod", model)
    if isinstance(inner, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(inner):
            return {clean(name): p.detach().clone() for name, p in inner.named_parameters() if p.requires_grad}
    return {
        clean(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
