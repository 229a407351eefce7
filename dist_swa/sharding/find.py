"""Find the shards of a module: choose the layout of each parameter, and tell whether anything was replaced since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from dist_swa.sharding.dtensor import DTensorShard
from dist_swa.sharding.fqn import clean_name
from dist_swa.sharding.opaque import OpaqueShard, is_subclass
from dist_swa.sharding.plain import PlainShard
from dist_swa.sharding.replicas import ReplicaShard, replica_layout
from dist_swa.sharding.shard import Layout, LocalShard
from dist_swa.sharding.wrappers import is_fsdp1

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel

FlatMeshes = Mapping["FullyShardedDataParallel", DeviceMesh]


def find_parameters(module: nn.Module, replica_mesh: DeviceMesh | None, flat_meshes: FlatMeshes) -> list[LocalShard]:
    """Return this rank's shards of the parameters; those that are not sharded are replicas on `replica_mesh`.

    `flat_meshes`: the FSDP1 modules and the meshes of their ranks. Raises ValueError for a parameter without values.
    """
    pieces = _find_pieces(module, flat_meshes)
    flattened = {name for shard in pieces for name in shard.names}
    shards = [
        _shard_of(found, replica_mesh)
        for found in _find_tensors(module, "_parameters")
        if found.names[0] not in flattened and found.key != "_flat_param"  # the name that FSDP1 gives what it flattened
    ]
    return [*pieces, *shards]


def find_buffers(module: nn.Module) -> list[LocalShard]:
    """Return the buffers of `module`. One that is no DTensor is whole on every rank."""
    return [_shard_of(found, None) for found in _find_tensors(module, "_buffers")]


def find_flat_meshes(fsdp_modules: Iterable[nn.Module]) -> FlatMeshes:
    """Return the modules of which FSDP1 has flattened parameters, each with a mesh of the ranks that share them."""
    modules = [module for module in fsdp_modules if is_fsdp1(module)]
    if not modules:
        return {}
    from dist_swa.sharding.fsdp1 import find_meshes

    return find_meshes(modules)


def is_sharded(module: nn.Module, fsdp_modules: Iterable[nn.Module]) -> bool:
    """Whether FSDP or tensor parallelism has sharded every parameter of `module`."""
    flattened = {id(p) for part in fsdp_modules if is_fsdp1(part) for p in part.parameters()}
    return all(isinstance(p, DTensor) or id(p) in flattened for p in module.parameters())


def storage_fingerprint(module: nn.Module, parameters: Iterable[LocalShard]) -> tuple[list[Any], ...]:
    """Return a value that differs after a module, parameter, storage or name of a tensor was replaced. Cheap."""
    tensors = [(tensor, shard) for shard in parameters if (tensor := shard.owner.get(shard.key)) is not None]
    storages = [(id(tensor), shard.data_ptr(), shard.is_trainable) for tensor, shard in tensors]
    parts = list(module.modules())
    owners = [owner for part in parts for owner in (part._parameters, part._buffers)]
    keys = [key for owner in owners for key, tensor in owner.items() if tensor is not None]
    return storages, keys, [id(part) for part in parts]


def write_marks(shards: Iterable[LocalShard]) -> dict[tuple[str, torch.Size], tuple[int, int, int]]:
    """Return, by name and shape, a value that differs after a parameter was written. Cheap.

    A write is one in place, or ``parameter.data = other`` of the same shape. A layer of bitsandbytes that repacks its
    weight does not write it.
    """
    marks = {}
    for shard in shards:
        tensor = shard.owner[shard.key]
        local = getattr(tensor, "_local_tensor", tensor)
        # A write raises the version of the DTensor or of its local tensor, not of both.
        versions = (0, 0) if tensor.is_inference() else (tensor._version, local._version)
        marks[shard.name, local.shape] = (shard.data_ptr(), *versions)
    return marks


class _Found(NamedTuple):
    """A tensor of a module, and where it is. `names`: more than one if it is tied."""

    names: list[str]
    owner: dict[str, Any]
    key: str
    tensor: Tensor
    is_persistent: bool


def _find_tensors(module: nn.Module, kind: str) -> Sequence[_Found]:
    """Return the parameters (``"_parameters"``) or buffers (``"_buffers"``) of all modules; ValueError without values.

    The dicts of `torch.nn.Module` are private. Their tensors are read at every swap, where public access is slow, and
    no public call tells which buffers are persistent.
    """
    found: dict[int, _Found] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        owner = getattr(part, kind)
        for key, tensor in owner.items():
            if tensor is None:
                continue
            name = clean_name(f"{prefix}.{key}")
            if is_lazy(tensor) or tensor.is_meta:
                raise ValueError(
                    f"ShardedAverage needs tensors with values, got {name}={'lazy' if is_lazy(tensor) else 'meta'};"
                    " materialise the model first (a forward, or to_empty)"
                )
            is_persistent = kind != "_buffers" or key not in part._non_persistent_buffers_set
            names = found.setdefault(id(tensor), _Found([], owner, key, tensor, is_persistent)).names
            if name not in names:
                names.append(name)
    return list(found.values())


def _shard_of(found: _Found, replica_mesh: DeviceMesh | None) -> LocalShard:
    names, owner, key, tensor, is_persistent = found
    where = (tuple(names), owner, key, tensor.shape, tensor.stride(), is_persistent)
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad and is_subclass(tensor):
        return OpaqueShard(*where)
    if isinstance(tensor, DTensor):
        return DTensorShard(*where, mesh_layout=Layout(tensor.device_mesh, tensor.placements))
    if replica_mesh is None:
        return PlainShard(*where)
    return ReplicaShard(*where, mesh_layout=replica_layout(tensor.shape, replica_mesh))


def _find_pieces(module: nn.Module, flat_meshes: FlatMeshes) -> list[LocalShard]:
    if not flat_meshes:
        return []
    from dist_swa.sharding.fsdp1 import find_pieces

    prefixes: dict[nn.Module, list[str]] = {}  # several where a module has several parents
    for prefix, part in module.named_modules(remove_duplicate=False):
        prefixes.setdefault(part, []).append(prefix)
    return [shard for part, mesh in flat_meshes.items() for shard in find_pieces(part, mesh, prefixes[part])]
