"""Where are this rank's shards?

The one file that tells FSDP2, HSDP, TP and DDP apart, and the only one that touches torch's private members.

[Note: one format]
An average keeps plain local tensors. How they make up a whole tensor is a `Layout`: a mesh and placements on it. A
parameter that is a DTensor lends its own layout to its average. A parameter that is replicated over a group of ranks
(DDP, or a plain module with a `process_group`) has an average that is ``Shard(0)`` over these ranks, so that they
share the memory and the work. A plain module without a group has no layout: its tensors are whole. With its layout
and the shape and stride of the whole, a local tensor becomes a DTensor of the whole parameter in a state dict, which
torch.distributed.checkpoint reshards for any other wrapper and number of ranks.

[Note: stale unsharded weights]
After a forward without a backward FSDP2's root group stays unsharded: ``named_parameters()`` then gives plain
tensors, and the next forward, training included, computes with them whatever was written into the shards. So every
reader and writer of shards reshards first, and a swap does so again before it gives the trained weights back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from dist_swa.agreement import check_replicas

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Layout(NamedTuple):
    """How a whole tensor lies on the ranks."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class LocalShard:
    """This rank's part of one parameter or buffer of a model. Tied tensors are one shard with several names."""

    names: tuple[str, ...]
    owner: dict[str, Any]  # `_parameters` or `_buffers` of the module that holds it, under `key`
    key: str
    tensor: Tensor = field(repr=False)
    shape: torch.Size  # of the whole, as its stride
    stride: tuple[int, ...]
    layout: Layout | None  # of its average; see [Note: one format]
    rows: slice | None  # of a replicated parameter: those that this rank averages
    is_persistent: bool

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def held(self) -> Tensor:
        """All that this rank holds of it now, as a plain tensor on its own storage."""
        return _plain(self.owner[self.key])

    @property
    def local(self) -> Tensor:
        """The part of it that this rank averages, on its own storage."""
        return self.held if self.rows is None else self.held[self.rows]

    def is_same_as(self, other: LocalShard | None) -> bool:
        """Whether `other` has the same names, shape and placements."""
        if other is None or self.names != other.names or self.shape != other.shape:
            return False
        return self.layout == other.layout

    def whole(self, local: Tensor) -> Tensor:
        """Return the whole tensor of which `local` is this rank's part: a DTensor on its storage, or itself."""
        return local if self.layout is None else _as_dtensor(local, self.layout, self.shape, self.stride)

    def gathered(self, local: Tensor) -> Tensor:
        """Return the whole tensor as a plain one on the mesh's device. A collective of the mesh."""
        if self.layout is None:
            return local
        local = local.to(self.layout.mesh.device_type)
        return _as_dtensor(local, self.layout, self.shape, self.stride).full_tensor()

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of `whole`, as `whole` of this layout made it; ValueError for another layout."""
        if self.layout != (Layout(whole.device_mesh, whole.placements) if isinstance(whole, DTensor) else None):
            raise ValueError(
                f"load_state_dict needs tensors laid out as this average's, got {self.name}={type(whole).__name__} of"
                " another layout; load the checkpoint with torch.distributed.checkpoint.load, which reshards"
            )
        return _plain(whole)


class ModelShards:
    """This rank's shards of a model: the trainable parameters, which are averaged, the frozen ones, the buffers.

    Where the parameters are replicated over a group, construction is a collective of that group: it checks that
    names, shapes and values agree.
    """

    def __init__(self, model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
        self.module, ddp = unwrap(model)
        if ddp is not None and process_group is not None:
            raise ValueError("a DDP model needs no process_group, got one besides its own; leave process_group out")
        group = ddp.process_group if ddp is not None else process_group
        for name, module in self.module.named_modules():
            if isinstance(module, FullyShardedDataParallel):
                raise NotImplementedError(
                    f"ShardedAverage needs FSDP2 or DDP, got FullyShardedDataParallel (FSDP1) at {name or 'the root'!r}"
                    "; wrap the model with torch.distributed.fsdp.fully_shard"
                )
        self._fsdp_modules = find_fsdp_modules(self.module)
        self._replica_mesh = None
        self.reshard()
        parameters = list(self.module.parameters())
        if group is not None:
            if all(isinstance(parameter, DTensor) for parameter in parameters):
                raise ValueError(
                    "process_group needs a model with replicated parameters, got only DTensors; leave process_group out"
                )
            self._replica_mesh = DeviceMesh.from_group(group, parameters[0].device.type)
        parameter_shards = self._find_parameters()
        self.averaged = [shard for shard in parameter_shards if shard.tensor.requires_grad]
        self.frozen = [shard for shard in parameter_shards if not shard.tensor.requires_grad]
        if not self.averaged:
            raise ValueError(
                f"ShardedAverage needs a parameter that requires a gradient, got none among"
                f" num_parameters={len(self.frozen)}; set requires_grad first"
            )
        self.buffers = _find(self.module, "_buffers")
        if self._replica_mesh is not None:
            shards = [*self.averaged, *self.frozen]
            names, fingerprints = [shard.name for shard in shards], [_fingerprint(shard) for shard in shards]
            check_replicas(names, fingerprints, self._replica_mesh.get_group(), shards[0].tensor.device)
        meshes = {shard.layout.mesh for shard in self.averaged if shard.layout}
        self.is_first_rank = not any(any(mesh.get_coordinate() or ()) for mesh in meshes)
        self._pointers = self._current_pointers()

    def reshard(self) -> None:
        reshard(self._fsdp_modules)

    def follow(self) -> None:
        """Reshard, and take over parameters that were replaced by others of the same names, shapes and layouts.

        Raises ValueError that names the first parameter that differs.
        """
        self.reshard()
        now = {shard.name: shard for shard in self._find_parameters()}
        before = {shard.name: shard for shard in [*self.averaged, *self.frozen]}
        for name in [*before, *now]:
            if name not in now or not now[name].is_same_as(before.get(name)):
                raise ValueError(
                    "ShardedAverage needs the parameters it was built on, got other names, another shape or layout of"
                    f" parameter={name!r}; build the average after the model has its parameters and wrapper"
                )
        for shard in self.frozen:
            if now[shard.name].tensor.requires_grad:
                raise ValueError(
                    "ShardedAverage needs frozen parameters to stay frozen, got requires_grad=True now for"
                    f" parameter={shard.name!r}; build the average once all trained parameters require gradients"
                )
        self.averaged = [now[shard.name] for shard in self.averaged]
        self.frozen = [now[shard.name] for shard in self.frozen]
        self.buffers = _find(self.module, "_buffers")
        self._pointers = self._current_pointers()

    def is_current(self) -> bool:
        """Reshard, and return whether parameters and storage are those seen last. Local, and cheap."""
        self.reshard()
        return self._current_pointers() == self._pointers

    def write(self, averages: Sequence[Tensor]) -> None:
        """Put averaged shards into the model's parameters. A collective of the replicas, local otherwise."""
        for shard, average in zip(self.averaged, averages, strict=True):
            whole = average if shard.rows is None else shard.gathered(average.to(shard.tensor.dtype))
            shard.held.copy_(whole)

    def written_once(self, shard: LocalShard, local: Tensor) -> Tensor:
        """Return the whole of a buffer so that the first rank's goes into a checkpoint, from which all ranks read.

        Buffers may differ between ranks, and torch.distributed.checkpoint takes plain tensors from any of them.
        """
        if shard.layout is None and not self.is_first_rank:
            return local.as_subclass(_Unwritten)
        return shard.whole(local)

    def extra_state(self) -> dict[str, Any]:
        """Return what modules keep besides tensors (`torch.nn.Module.get_extra_state`)."""
        state = self.module.state_dict()
        return {_clean_name(name): value for name, value in state.items() if name.endswith("_extra_state")}

    def _find_parameters(self) -> list[LocalShard]:
        return _find(self.module, "_parameters", self._replica_mesh)

    def _current_pointers(self) -> list[tuple[int, int, bool]]:
        held = [shard.owner.get(shard.key) for shard in chain(self.averaged, self.frozen)]
        return [(id(t), getattr(t, "_local_tensor", t).data_ptr(), t.requires_grad) for t in held if t is not None]


class _Unwritten(Tensor):
    """A tensor that torch.distributed.checkpoint reads on this rank, and does not write."""

    def __create_write_items__(self, fqn: str, tensor: Tensor) -> list[Any]:
        return []

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.as_subclass(Tensor)


def unwrap(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """Return the module inside torch.compile and DDP, and the DDP wrapper if there is one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model needs to be a torch.nn.Module, got model={type(model).__name__}; pass the module")
    ddp: DistributedDataParallel | None = None
    while True:
        if isinstance(model, DistributedDataParallel):
            ddp = model
            model = ddp.module
        elif isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
            model = compiled
        else:
            return model, ddp


def find_fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """Return the modules that fully_shard was called on."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def reshard(fsdp_modules: Sequence[FSDPModule]) -> None:
    """Free unsharded parameters, so that the shards are what counts. See [Note: stale unsharded weights]."""
    for module in fsdp_modules:
        state = module._get_fsdp_state()
        if state._is_root and state._training_state.name == "FORWARD":  # a forward raised; it would not reshard
            if not hasattr(module, "reset_iter_state"):
                raise RuntimeError(
                    "FSDP2 needs torch >= 2.13 to go on after an error inside a forward, got"
                    f" torch={torch.__version__}; restart from the last checkpoint, or update torch"
                )
            module.reset_iter_state()
    for module in fsdp_modules:
        module.reshard()


def has_collective_forward(module: nn.Module) -> bool:
    """Whether the ranks have to run a forward of `module` together."""
    return bool(find_fsdp_modules(module)) or any(isinstance(p, DTensor) for p in module.parameters())


def _find(module: nn.Module, kind: str, replica_mesh: DeviceMesh | None = None) -> list[LocalShard]:
    found: dict[int, tuple[dict[str, Any], str, Tensor, list[str], bool]] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for key, tensor in getattr(part, kind).items():
            if is_lazy(tensor) or (tensor is not None and tensor.is_meta):
                raise ValueError(
                    f"ShardedAverage needs tensors with values, got {_clean_name(f'{prefix}.{key}')}="
                    f"{'lazy' if is_lazy(tensor) else 'meta'}; materialise the model first (a forward, or to_empty)"
                )
            if tensor is not None:
                is_persistent = kind != "_buffers" or key not in part._non_persistent_buffers_set
                entry = found.setdefault(id(tensor), (getattr(part, kind), key, tensor, [], is_persistent))
                entry[3].append(_clean_name(f"{prefix}.{key}"))
    shards = []
    for owner, key, tensor, names, is_persistent in found.values():
        layout, rows = _layout(names[0], tensor, replica_mesh)
        shape, stride = tensor.shape, tensor.stride()
        shards.append(LocalShard(tuple(names), owner, key, tensor, shape, stride, layout, rows, is_persistent))
    return shards


def _layout(name: str, tensor: Tensor, replica_mesh: DeviceMesh | None) -> tuple[Layout | None, slice | None]:
    """Return the layout of the average of `tensor` and, where that is replicated, this rank's rows."""
    if isinstance(tensor, DTensor):
        if any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(
                f"ShardedAverage needs shards or replicas, got {name}={tensor.placements}; redistribute Partial first"
            )
        return Layout(tensor.device_mesh, tensor.placements), None
    if replica_mesh is None:
        return None, None
    if tensor.ndim == 0:
        return Layout(replica_mesh, (Replicate(),)), None
    num_rows = tensor.shape[0]
    chunk = -(-num_rows // replica_mesh.size())  # as torch.chunk and Shard(0) split
    start = min(chunk * replica_mesh.get_local_rank(), num_rows)
    rows = slice(start, min(start + chunk, num_rows))
    return Layout(replica_mesh, (Shard(0),)), rows


def _as_dtensor(local: Tensor, layout: Layout, shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
    # Not DTensor.from_local: it moves a local tensor that is kept on the CPU to the mesh's device.
    spec = DTensorSpec(*layout, tensor_meta=TensorMeta(shape, stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _plain(tensor: Tensor) -> Tensor:
    local: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.detach()


def _clean_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part and part not in _WRAPPERS)


def _fingerprint(shard: LocalShard) -> int:
    held = shard.held
    held = torch.view_as_real(held) if held.is_complex() else held
    bits = held.view(_INT_OF_SIZE[held.element_size()]).sum(dtype=torch.int64).item()
    text = f"{shard.names} {tuple(shard.shape)} {shard.tensor.dtype} {shard.tensor.requires_grad} {bits}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
