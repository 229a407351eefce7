"""The wrappers of a model: torch.compile, Lightning Fabric, DDP, FSDP1 and FSDP2.

[Note: stale unsharded weights]
After a forward without a backward, the root of FSDP1 and FSDP2 stays unsharded. ``named_parameters()`` then gives plain
tensors, and the next forward, also one of training, uses these stale tensors even if the shards have changed. So every
reader and writer of shards calls `reshard` first. A writer also discards the all-gathers that FSDP2 has prefetched. A
reader leaves them to the next forward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.module_tracker import ModuleTracker

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

_passes = ModuleTracker()
_FABRIC = "_forward_module"  # the child of the module that Fabric returns; Lightning is not imported
_TRANSPARENT = ("_orig_mod", _FABRIC)  # the first is of torch.compile


def unwrap(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """Return the module inside torch.compile, Fabric, DDP and DataParallel, and the DDP wrapper if there is one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model needs to be a torch.nn.Module, got model={type(model).__name__}; pass the module")
    ddp: DistributedDataParallel | None = None
    while True:
        if isinstance(model, DistributedDataParallel):
            ddp = model
            model = ddp.module
        elif isinstance(model, nn.DataParallel):
            model = model.module
        elif (inside := _inside(model)) is not None:
            model = inside
        else:
            return model, ddp


def runnable(model: nn.Module) -> nn.Module:
    """Return the module that runs a forward of `model` on this rank alone, if it is not sharded.

    That is the unwrapped module, or the module of Fabric, which converts inputs to the precision of the parameters.
    """
    outer: nn.Module | None = model
    while outer is not None and _FABRIC not in dict(outer.named_children()):
        outer = _inside(outer)
    return unwrap(model)[0] if outer is None else outer


def _inside(model: nn.Module) -> nn.Module | None:
    children = dict(model.named_children())
    return next((children[name] for name in _TRANSPARENT if name in children), None)


def find_fsdp_modules(module: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP1 wraps and those that fully_shard was called on, each before those inside it."""
    if "torch.distributed.fsdp" not in sys.modules:  # then no module can be wrapped; `import dist_swa` does not load it
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return [part for part in module.modules() if isinstance(part, FSDPModule | FullyShardedDataParallel)]


def is_fsdp1(fsdp_module: nn.Module) -> TypeGuard[FullyShardedDataParallel]:
    """Whether `fsdp_module`, one of `find_fsdp_modules`, is FSDP1's."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(fsdp_module, FullyShardedDataParallel)


def reshard(fsdp_modules: Sequence[nn.Module], *, discard_prefetched: bool = False) -> None:
    """Free unsharded parameters, so that the shards are valid. See [Note: stale unsharded weights]. Local.

    `discard_prefetched`: also drop the all-gathers that FSDP2 has prefetched. Raises RuntimeError inside a backward.
    """
    if not fsdp_modules:
        return
    if _passes.is_bw:
        raise RuntimeError("a sharded model needs its backward to have ended, got a call inside of it; call it after")
    from dist_swa.sharding import fsdp2

    for module in fsdp_modules:
        if is_fsdp1(module):
            from dist_swa.sharding import fsdp1

            fsdp1.reshard(module)
        else:
            fsdp2.reshard(cast("FSDPModule", module), discard_prefetched=discard_prefetched)


@contextmanager
def preserve_broadcast_flags(modules: Iterable[nn.Module | None]) -> Iterator[list[DistributedDataParallel]]:
    """Restore DDP's require_forward_param_sync on exit; a forward under no_grad changes it. Gives the DDP modules."""
    ddps = [module for module in modules if isinstance(module, DistributedDataParallel)]
    flags = [ddp.require_forward_param_sync for ddp in ddps]
    try:
        yield ddps
    finally:
        for ddp, flag in zip(ddps, flags, strict=True):
            ddp.require_forward_param_sync = flag


@contextmanager
def preserve_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the buffers of `module` on exit, as the same tensors: a forward may replace, add or remove one."""
    # Not named_buffers(), which leaves out buffers that are None.
    owners = [(part._buffers, dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for buffers, before in owners:
            buffers.clear()
            buffers.update(before)


def collective_device(module: nn.Module) -> torch.device:
    """Return a device on which the ranks of `module` communicate. Offloaded parameters are on another one."""
    parameter = next(module.parameters(), torch.empty(0))
    if isinstance(parameter, DTensor) and parameter.device.type != parameter.device_mesh.device_type:
        return torch.device(parameter.device_mesh.device_type)
    return parameter.device


def collective_groups(module: nn.Module) -> tuple[list[dist.ProcessGroup], list[dist.ProcessGroup]]:
    """Return the groups whose ranks run a forward of `module` together, and those of them that need the same input.

    The first are those of FSDP1, FSDP2 and tensor parallelism, the second those of tensor parallelism alone.
    """
    num_fsdp_axes: dict[int, int] = {}
    collective: dict[dist.ProcessGroup, None] = {}
    for part in find_fsdp_modules(module):
        if is_fsdp1(part):
            collective |= dict.fromkeys([part.process_group] if part.process_group else [])
        else:
            from dist_swa.sharding import fsdp2

            num_fsdp_axes |= fsdp2.num_fsdp_axes(cast("FSDPModule", part))
    tensor_parallel: dict[dist.ProcessGroup, None] = {}
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            groups = parameter.device_mesh.get_all_groups()
            collective.update(dict.fromkeys(groups))
            tensor_parallel.update(dict.fromkeys(groups[num_fsdp_axes.get(id(parameter), 0) :]))
    return list(collective), list(tensor_parallel)
