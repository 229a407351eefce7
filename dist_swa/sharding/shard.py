"""Where are this rank's shards?

The one file that tells FSDP1, FSDP2, HSDP, TP and DDP apart, and the only one that touches torch's private members.

[Note: one format]
An average keeps plain local tensors. How they make up a whole tensor is a `Layout`: a mesh and placements on it. A
parameter that is a DTensor lends its own layout to its average. A parameter that is replicated over a group of ranks
(DDP, or a plain module with a `process_group`) has an average that is ``Shard(0)`` over these ranks, so that they
share the memory and the work. FSDP1 shards what it has flattened: the average is of the same piece, which is no set
of rows, and becomes ``Shard(0)`` by communication. A plain module without a group has no layout: its tensors are
whole. With its layout and the shape and stride of the whole, a local tensor becomes a DTensor of the whole parameter
in a state dict, which torch.distributed.checkpoint reshards for any other wrapper and number of ranks.

[Note: stale unsharded weights]
After a forward without a backward the root group of FSDP1 and FSDP2 stays unsharded: ``named_parameters()`` then
gives plain tensors, and the next forward, training included, computes with them whatever was written into the shards.
So every reader and writer of shards reshards first, and a swap does so again before it gives the trained weights back.
A gather that FSDP2 has begun and not used would be as stale once shards are written: who writes drops it (`reshard`
with `discard_prefetched`); who reads leaves it, since the next forward has it for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState
from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class Layout(NamedTuple):
    """How a whole tensor lies on the ranks."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]


class FlatPiece(NamedTuple):
    """What a rank holds of a parameter that FSDP1 has flattened."""

    where: slice  # in the rank's shard
    start: int  # in the parameter
    is_whole: bool  # on every rank (NO_SHARD)


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
    rows: slice | None = None  # of a replicated parameter: those that this rank averages
    piece: FlatPiece | None = None  # under FSDP1
    is_trainable: bool = False
    is_persistent: bool = True

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def local_tensor(self) -> Tensor:
        """All that this rank holds of it now, as a plain tensor on its own storage."""
        held = _plain(self.owner[self.key])
        return held if self.piece is None else held[self.piece.where]

    @property
    def local(self) -> Tensor:
        """The part of it that this rank averages, on its own storage."""
        return self.local_tensor if self.rows is None else self.local_tensor[self.rows]

    def is_same_as(self, other: LocalShard | None) -> bool:
        """Whether `other` has the same names, shape and placements."""
        if other is None or self.names != other.names or self.shape != other.shape:
            return False
        return self.layout == other.layout

    def as_dtensor(self, local: Tensor) -> Tensor:
        """Return the whole tensor of which `local` is this rank's part: a DTensor on its storage, or itself.

        Under FSDP1 a collective of the mesh, and a copy.
        """
        if self.layout is None:
            return local
        if self.piece is not None:
            whole = self.full_tensor(local)
            local = (
                whole[_rows(self.shape, self.layout.mesh)].clone() if self.layout.placements[0].is_shard() else whole
            )
        return _as_dtensor(local, self.layout, self.shape, self.stride)

    def full_tensor(self, local: Tensor) -> Tensor:
        """Return the whole tensor as a plain one on the mesh's device. A collective of the mesh."""
        if self.layout is None:
            return local
        local = local.to(self.layout.mesh.device_type)
        if self.piece is None:
            return _as_dtensor(local, self.layout, self.shape, self.stride).full_tensor()
        if self.piece.is_whole:
            return local.view(self.shape)
        whole = local.new_zeros(self.shape.numel())
        whole[self.piece.start : self.piece.start + local.numel()] = local
        dist.all_reduce(whole.view(torch.uint8), group=self.layout.mesh.get_group())  # bytes: a sum would lose -0.0
        return whole.view(self.shape)

    def local_of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of `whole`, as `whole` of this layout made it; ValueError for another layout."""
        if self.layout != (Layout(whole.device_mesh, whole.placements) if isinstance(whole, DTensor) else None):
            raise ValueError(
                f"load_state_dict needs tensors laid out as this average's, got {self.name}={type(whole).__name__} of"
                " another layout; load the checkpoint with torch.distributed.checkpoint.load, which reshards"
            )
        if self.piece is not None and isinstance(whole, DTensor):
            return whole.full_tensor().flatten()[self.piece.start :][: self.local_tensor.numel()]
        return _plain(whole)


def is_first_rank(shards: Sequence[LocalShard], flat_modules: Iterable[FullyShardedDataParallel]) -> bool:
    """Whether this rank comes first on every mesh, and in every group of FSDP1's HYBRID_SHARD."""
    meshes = {shard.layout.mesh for shard in shards if shard.layout}
    replicas = [getattr(module, "_inter_node_pg", None) for module in flat_modules]
    return not (
        any(any(mesh.get_coordinate() or ()) for mesh in meshes)
        or any(group is not None and dist.get_rank(group) for group in replicas)
    )


def write_into(target: Tensor, values: Tensor) -> None:
    """Copy `values` into `target`. An expanded one stays: it cannot be written."""
    if all(stride or size == 1 for stride, size in zip(target.stride(), target.shape, strict=True)):
        target.copy_(values)


class LoadOnlyTensor(Tensor):
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


def find_fsdp_modules(module: nn.Module) -> list[FSDPModule | FullyShardedDataParallel]:
    """Return the modules that were wrapped in FSDP1, and those that fully_shard was called on."""
    return [part for part in module.modules() if isinstance(part, FSDPModule | FullyShardedDataParallel)]


def reshard(fsdp_modules: Sequence[FSDPModule | FullyShardedDataParallel], *, discard_prefetched: bool = False) -> None:
    """Free unsharded parameters, so that the shards are what counts. See [Note: stale unsharded weights].

    `discard_prefetched`: drop those that FSDP2 has under way, too. Raises RuntimeError inside a backward.
    """
    if fsdp_modules and torch._C._current_graph_task_id() != -1:
        raise RuntimeError("a sharded model needs its backward to have ended, got a call inside of it; call it after")
    for module in fsdp_modules:  # a root comes before what is inside it
        if isinstance(module, FullyShardedDataParallel):
            _reshard_flat(module)
            continue
        state = module._get_fsdp_state()
        if _has_unfinished_pass(state):
            _end_pass(state)
        if discard_prefetched:
            state._device_handle.synchronize()  # offloaded shards may still be on their way to the device
            state._state_ctx.post_optim_event = None  # recorded before what is written now; all waits without it
            for group in _param_groups(state):
                group.wait_for_unshard()  # what was prefetched and not used would count as the next forward's gather
        module.reshard()


def _has_unfinished_pass(state: Any) -> bool:
    """Whether FSDP2 takes itself to be in a forward or backward: one has raised, or has run a part of a group only."""
    states = [state._training_state, *(group._training_state for group in _param_groups(state))]
    return state._state_ctx.post_backward_final_callback_queued or any(one.name != "IDLE" for one in states)


def _end_pass(state: Any) -> None:
    """Let FSDP2 forget such a pass, with the unreduced gradients of a backward.

    Torch's own `reset_iter_state` drops what earlier passes have accumulated as well, also after a forward.
    """
    context, idle = state._state_ctx, type(state._training_state).IDLE
    for group in state._comm_ctx.post_forward_order:  # those of other roots, too, that share the communication
        group._post_forward_indices.clear()
    state._comm_ctx.post_forward_order.clear()
    context.iter_forward_root = None
    has_backward, context.post_backward_final_callback_queued = context.post_backward_final_callback_queued, False
    if has_backward:
        state._device_handle.synchronize()  # reductions that are under way
    for part in context.all_states:
        part._training_state = idle
        part._modules_to_run_forward.clear()
        for group in _param_groups(part):
            group._training_state = idle
            for sharded in group.fsdp_params if has_backward and group.reduce_grads else ():
                if "unsharded_accumulated_grad" in vars(sharded):  # torch 2.15 has only the other one
                    sharded.unsharded_accumulated_grad = None
                if hasattr(sharded, "_unsharded_param"):
                    sharded._unsharded_param.grad = None


def _reshard_flat(module: FullyShardedDataParallel) -> None:
    handle = module._handle
    if handle is None or module._is_root is None:  # nothing to shard, or no forward yet
        return
    if module.training_state == TrainingState.FORWARD_BACKWARD:  # a forward raised
        module.training_state, handle._training_state = TrainingState.IDLE, HandleTrainingState.IDLE
    elif handle._use_orig_params and not handle._skip_writeback_check:
        handle._writeback_orig_params()  # weights that were assigned, as by ``p.data = ...``
    # As torch's `_reshard`, but for an event to its rate limiter, which only an unshard takes out again.
    handle.reshard(handle.uses_sharded_strategy)
    handle.post_reshard()
    handle._prefetched = False


def find_flat_meshes(fsdp_modules: Iterable[Any]) -> dict[FullyShardedDataParallel, DeviceMesh]:
    """Return the modules of which FSDP1 has flattened parameters, each with a mesh of the ranks that share them."""
    return {
        module: DeviceMesh.from_group(module.process_group, next(module.parameters()).device.type)
        for module in fsdp_modules
        if isinstance(module, FullyShardedDataParallel) and module._handle and module.process_group
    }


def find_parameters(
    module: nn.Module,
    replica_mesh: DeviceMesh | None,
    flat_meshes: Mapping[FullyShardedDataParallel, DeviceMesh],
) -> list[LocalShard]:
    """Return this rank's shards of the parameters; those that are not sharded are replicas on `replica_mesh`."""
    prefixes: dict[nn.Module, list[str]] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        prefixes.setdefault(part, []).append(prefix)
    flat = [shard for part, mesh in flat_meshes.items() for shard in _find_flat(prefixes[part], part, mesh)]
    names = {name for shard in flat for name in shard.names}
    others = _find(module, "_parameters", replica_mesh)
    return [*flat, *(shard for shard in others if shard.name not in names and shard.key != "_flat_param")]


def find_buffers(module: nn.Module) -> list[LocalShard]:
    """Return the buffers, which are whole on every rank."""
    return _find(module, "_buffers")


def are_sharded(module: nn.Module) -> bool:
    """Whether there are no parameters but those that FSDP or tensor parallelism has sharded."""
    return all(isinstance(parameter, DTensor | FlatParameter) for parameter in module.parameters())


def storage_fingerprint(module: nn.Module, parameters: Iterable[LocalShard]) -> tuple[list[Any], ...]:
    """Return what tells whether `module` still consists of the same tensors on the same storage. Cheap."""
    held = [shard.owner.get(shard.key) for shard in parameters]
    storages = [(id(t), getattr(t, "_local_tensor", t).data_ptr(), t.requires_grad) for t in held if t is not None]
    parts = list(module.modules())
    buffers = [key for part in parts for key, buffer in part._buffers.items() if buffer is not None]
    return storages, buffers, [id(part) for part in parts]


@contextmanager
def preserve_broadcast_flags(modules: Iterable[Any]) -> Iterator[list[DistributedDataParallel]]:
    """Give back, on exit, whether DDP broadcasts buffers in its next forward; one under no_grad changes that."""
    ddps = [module for module in modules if isinstance(module, DistributedDataParallel)]
    flags = [ddp.require_forward_param_sync for ddp in ddps]
    try:
        yield ddps
    finally:
        for ddp, flag in zip(ddps, flags, strict=True):
            ddp.require_forward_param_sync = flag


@contextmanager
def preserve_buffers(module: nn.Module) -> Iterator[None]:
    """Let every buffer be the same tensor afterwards: a forward may put another one there."""
    owners = [(part._buffers, dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for buffers, before in owners:
            buffers.clear()
            buffers.update(before)


def forward_groups(module: nn.Module) -> tuple[list[dist.ProcessGroup], list[dist.ProcessGroup]]:
    """Return the groups whose ranks run a forward of `module` together, and those of them that need the same input.

    The first are those of FSDP1, FSDP2 and tensor parallelism, the second of tensor parallelism alone.
    """
    num_fsdp_axes = {
        id(sharded.sharded_param): group.mesh_info.mesh.ndim
        for part in module.modules()
        if isinstance(part, FSDPModule)
        for group in _param_groups(part._get_fsdp_state())
        for sharded in group.fsdp_params
    }
    together: dict[dist.ProcessGroup, None] = {}
    same_input: dict[dist.ProcessGroup, None] = {}
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            groups = parameter.device_mesh.get_all_groups()
            together.update(dict.fromkeys(groups))
            same_input.update(dict.fromkeys(groups[num_fsdp_axes.get(id(parameter), 0) :]))
    for part in module.modules():
        if isinstance(part, FullyShardedDataParallel) and part.process_group:
            together[part.process_group] = None
    return list(together), list(same_input)


def _param_groups(fsdp2_state: Any) -> list[Any]:
    if hasattr(fsdp2_state, "_fsdp_param_groups"):
        return list(fsdp2_state._fsdp_param_groups)
    return [] if fsdp2_state._fsdp_param_group is None else [fsdp2_state._fsdp_param_group]  # torch < 2.12


def named_parts(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside `module` by their FQN; of a wrapper and what it wraps, the latter."""
    return {clean_name(name): part for name, part in module.named_modules()}


def _find(module: nn.Module, kind: str, replica_mesh: DeviceMesh | None = None) -> list[LocalShard]:
    found: dict[int, tuple[dict[str, Any], str, Tensor, list[str], bool]] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for key, tensor in getattr(part, kind).items():
            if is_lazy(tensor) or (tensor is not None and tensor.is_meta):
                raise ValueError(
                    f"ShardedAverage needs tensors with values, got {clean_name(f'{prefix}.{key}')}="
                    f"{'lazy' if is_lazy(tensor) else 'meta'}; materialise the model first (a forward, or to_empty)"
                )
            if tensor is not None:
                is_persistent = kind != "_buffers" or key not in part._non_persistent_buffers_set
                entry = found.setdefault(id(tensor), (getattr(part, kind), key, tensor, [], is_persistent))
                entry[3].append(clean_name(f"{prefix}.{key}"))
    shards = []
    for owner, key, tensor, names, is_persistent in found.values():
        layout, rows = _layout(names[0], tensor, replica_mesh)
        shard = LocalShard(tuple(names), owner, key, tensor, tensor.shape, tensor.stride(), layout, rows)
        shards.append(replace(shard, is_trainable=tensor.requires_grad, is_persistent=is_persistent))
    return shards


def _find_flat(prefixes: Iterable[str], module: FullyShardedDataParallel, mesh: DeviceMesh) -> list[LocalShard]:
    """Return the pieces of the parameters that one FSDP1 module has flattened, which may have several parents."""
    handle = cast(FlatParamHandle, module._handle)
    flat, is_sharded = handle.flat_param, handle.uses_sharded_strategy
    tied: dict[str, list[str]] = {}
    for shared in flat._shared_param_infos:
        name = clean_name(f"{shared.prim_module_name}.{shared.prim_param_name}")
        tied.setdefault(name, []).append(f"{shared.module_name}.{shared.param_name}")
    shards = []
    for i, (name, shape, info) in enumerate(zip(flat._fqns, flat._shapes, flat._shard_param_infos, strict=True)):
        tied_names = (name, *tied.get(clean_name(name), ()))
        names = tuple(clean_name(f"{prefix}.{tied_name}") for prefix in prefixes for tied_name in tied_names)
        offset = info.offset_in_shard or 0
        piece = FlatPiece(
            slice(offset, offset + (info.numel_in_shard or 0)), info.intra_param_start_idx or 0, not is_sharded
        )
        placement = Shard(0) if is_sharded and len(shape) else Replicate()
        stride = torch.empty(shape, device="meta").stride()
        is_trainable = flat.requires_grad if flat._params is None else flat._params[i].requires_grad
        shard = LocalShard(names, vars(handle), "flat_param", flat, shape, stride, Layout(mesh, (placement,)))
        shards.append(replace(shard, piece=piece, is_trainable=is_trainable))
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
    return Layout(replica_mesh, (Shard(0),)), _rows(tensor.shape, replica_mesh)


def _rows(shape: torch.Size, mesh: DeviceMesh) -> slice:
    """Return the rows that are this rank's where Shard(0) and torch.chunk split."""
    chunk = -(-shape[0] // mesh.size())
    start = min(chunk * mesh.get_local_rank(), shape[0])
    return slice(start, min(start + chunk, shape[0]))


def _as_dtensor(local: Tensor, layout: Layout, shape: torch.Size, stride: tuple[int, ...]) -> DTensor:
    # Not DTensor.from_local: it moves a local tensor that is kept on the CPU to the mesh's device.
    spec = DTensorSpec(*layout, tensor_meta=TensorMeta(shape, stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)


def _plain(tensor: Tensor) -> Tensor:
    local: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.detach()


def clean_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part and part not in _WRAPPERS)
