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
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState
from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from dist_swa.agreement import agreed_max, all_agree, check_replicas, fingerprint

NamePattern = str | Sequence[str] | Callable[[str], bool]
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
    def held(self) -> Tensor:
        """All that this rank holds of it now, as a plain tensor on its own storage."""
        held = _plain(self.owner[self.key])
        return held if self.piece is None else held[self.piece.where]

    @property
    def local(self) -> Tensor:
        """The part of it that this rank averages, on its own storage."""
        return self.held if self.rows is None else self.held[self.rows]

    def write(self, values: Tensor) -> None:
        """Copy `values` into all that this rank holds of it. An expanded buffer stays: it cannot be written."""
        held = self.held
        if all(stride or size == 1 for stride, size in zip(held.stride(), held.shape, strict=True)):
            held.copy_(values)

    def is_same_as(self, other: LocalShard | None) -> bool:
        """Whether `other` has the same names, shape and placements."""
        if other is None or self.names != other.names or self.shape != other.shape:
            return False
        return self.layout == other.layout

    def whole(self, local: Tensor) -> Tensor:
        """Return the whole tensor of which `local` is this rank's part: a DTensor on its storage, or itself.

        Under FSDP1 a collective of the mesh, and a copy.
        """
        if self.layout is None:
            return local
        if self.piece is not None:
            whole = self.gathered(local)
            local = (
                whole[_rows(self.shape, self.layout.mesh)].clone() if self.layout.placements[0].is_shard() else whole
            )
        return _as_dtensor(local, self.layout, self.shape, self.stride)

    def gathered(self, local: Tensor) -> Tensor:
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

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of `whole`, as `whole` of this layout made it; ValueError for another layout."""
        if self.layout != (Layout(whole.device_mesh, whole.placements) if isinstance(whole, DTensor) else None):
            raise ValueError(
                f"load_state_dict needs tensors laid out as this average's, got {self.name}={type(whole).__name__} of"
                " another layout; load the checkpoint with torch.distributed.checkpoint.load, which reshards"
            )
        if self.piece is not None and isinstance(whole, DTensor):
            return whole.full_tensor().flatten()[self.piece.start :][: self.held.numel()]
        return _plain(whole)


class ModelShards:
    """This rank's shards of a model: the averaged parameters (trainable and selected), the others, the buffers.

    Where the parameters are replicated over a group, construction is a collective of that group: it checks that
    names, shapes and values agree.
    """

    def __init__(
        self,
        model: nn.Module,
        process_group: dist.ProcessGroup | None = None,
        parameters: NamePattern | None = None,
    ) -> None:
        self.module, self._ddp = unwrap(model)
        self._selects = name_matcher(parameters, "parameters")
        if self._ddp is not None and process_group is not None:
            raise ValueError("a DDP model needs no process_group, got one besides its own; leave process_group out")
        self.group = process_group if self._ddp is None else self._ddp.process_group
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(
                f"process_group needs a group that this rank is in, got process_group={self.group!r}; call this on its"
                " ranks only"
            )
        self._fsdp_modules = find_fsdp_modules(self.module)
        self._replica_mesh: DeviceMesh | None = None
        self._flat_meshes: dict[FullyShardedDataParallel, DeviceMesh] = {}
        with self.all_agree():
            self._capture()
        if self._replica_mesh is not None:
            shards = [(shard, True) for shard in self.averaged] + [(shard, False) for shard in self.others]
            names = [shard.name for shard, _ in shards]
            fingerprints = [
                fingerprint(shard.held, f"{shard.names} {tuple(shard.shape)} {is_averaged}")
                for shard, is_averaged in shards
            ]
            check_replicas(names, fingerprints, self._replica_mesh.get_group(), self._device)
        self.is_first_rank = _is_first_rank([*self.averaged, *self.others], self._flat_meshes)

    def _capture(self) -> None:
        self.reshard()
        parameters = list(self.module.parameters())
        if self.group is not None:
            if all(isinstance(parameter, DTensor | FlatParameter) for parameter in parameters):
                raise ValueError(
                    "process_group needs a model with replicated parameters, got sharded ones; leave process_group out"
                )
            self._replica_mesh = DeviceMesh.from_group(self.group, self._device.type)
        self._flat_meshes = {
            module: DeviceMesh.from_group(module.process_group, next(module.parameters()).device.type)
            for module in self._fsdp_modules
            if isinstance(module, FullyShardedDataParallel) and module._handle and module.process_group
        }
        shards = self._find_parameters()
        self.averaged = [shard for shard in shards if self._is_to_be_averaged(shard)]
        self.others = [shard for shard in shards if not self._is_to_be_averaged(shard)]
        if not self.averaged:
            num_trainable = sum(shard.is_trainable for shard in shards)
            raise ValueError(
                f"ShardedAverage needs a parameter that requires a gradient and is selected by `parameters`, got none"
                f" among num_parameters={len(shards)}, {num_trainable=}; set requires_grad first, or see the names in"
                " model.named_parameters()"
            )
        self.buffers = _find(self.module, "_buffers")
        self._seen = self._look()

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters(), torch.empty(0)).device

    @property
    def everything(self) -> list[LocalShard]:
        """Every parameter and buffer."""
        return [*self.averaged, *self.others, *self.buffers]

    def all_agree(self) -> AbstractContextManager[None]:
        """Let an error in the body raise on all replicas, which would wait for each other. A collective of them."""
        return nullcontext() if self.group is None else all_agree(self.group, self._device)

    def reshard(self) -> None:
        reshard(self._fsdp_modules)

    def follow(self) -> None:
        """Reshard, and take over parameters that were replaced by others of the same names, shapes and layouts.

        Raises ValueError that names the first parameter that differs.
        """
        self.reshard()
        now = {shard.name: shard for shard in self._find_parameters()}
        before = {shard.name: shard for shard in [*self.averaged, *self.others]}
        for name in [*before, *now]:
            if name not in now or not now[name].is_same_as(before.get(name)):
                raise ValueError(
                    "ShardedAverage needs the parameters it was built on, got other names, another shape or layout of"
                    f" parameter={name!r}; build the average after the model has its parameters and wrapper"
                )
        for shard in self.others:
            if self._is_to_be_averaged(now[shard.name]):
                raise ValueError(
                    "ShardedAverage needs frozen parameters to stay frozen, got requires_grad=True now for"
                    f" parameter={shard.name!r}; build the average once all trained parameters require gradients"
                )
        self.averaged = [now[shard.name] for shard in self.averaged]
        self.others = [now[shard.name] for shard in self.others]
        self.buffers = _find(self.module, "_buffers")
        self._seen = self._look()

    def is_current(self) -> bool:
        """Reshard, and return whether modules, parameters, storage and buffers are those seen last. Local, cheap."""
        self.reshard()
        return self._look() == self._seen

    def write(self, averages: Sequence[Tensor]) -> None:
        """Put averaged shards into the model's parameters. A collective of the replicas, local otherwise."""
        for shard, average in zip(self.averaged, averages, strict=True):
            whole = average if shard.rows is None else shard.gathered(average.to(shard.tensor.dtype))
            shard.write(whole)

    def written_once(self, shard: LocalShard, local: Tensor) -> Tensor:
        """Return the whole of a buffer so that the first rank's goes into a checkpoint, from which all ranks read.

        Buffers may differ between ranks, and torch.distributed.checkpoint takes plain tensors from any of them.
        """
        if shard.layout is None and not self.is_first_rank:
            return local.as_subclass(_Unwritten)
        return shard.whole(local)

    @contextmanager
    def kept_state(self) -> Iterator[None]:
        """Give back, on exit, the parameters that are averaged, all buffers, and what a forward changes in DDP.

        Local. Takes a copy of them.
        """
        with torch.no_grad():
            values = [(shard, shard.held.clone()) for shard in [*self.averaged, *self.buffers]]
        owners = [(part._buffers, dict(part._buffers)) for part in self.module.modules()]
        # A forward under no_grad clears DDP's flag, and the next one would not broadcast buffers.
        syncs = self._ddp is None or self._ddp.require_forward_param_sync
        try:
            yield
        finally:
            if self._ddp is not None:
                self._ddp.require_forward_param_sync = syncs
            self.reshard()
            for buffers, before in owners:  # a forward may have put other tensors there
                buffers.clear()
                buffers.update(before)
            with torch.no_grad():
                for shard, held in values:
                    shard.write(held)

    def extra_state(self) -> dict[str, Any]:
        """Return what modules keep besides tensors (`torch.nn.Module.get_extra_state`)."""
        return {
            _clean_name(f"{name}._extra_state"): module.get_extra_state()
            for name, module in self.module.named_modules(remove_duplicate=False)
            if type(module).get_extra_state is not nn.Module.get_extra_state
        }

    def is_finite(self) -> bool:
        """Whether no rank's averaged shard holds NaN or inf now. One small all-reduce for each axis of the meshes."""
        self.reshard()
        held = [shard.local for shard in self.averaged if shard.local.numel()]
        held = [torch.view_as_real(local) if local.is_complex() else local for local in held]
        largest = torch._foreach_norm(held, torch.inf) if held else []
        is_finite = [value.isfinite().to(self._device) for value in largest]
        num_bad = int(bool(held) and not torch.stack(is_finite).all())
        meshes = dict.fromkeys(shard.layout.mesh for shard in self.averaged if shard.layout)
        axes = {mesh.get_group(axis): mesh.device_type for mesh in meshes for axis in range(mesh.ndim)}
        for group, device_type in axes.items():
            (num_bad,) = agreed_max([num_bad], group, torch.device(device_type))
        return num_bad == 0

    def _is_to_be_averaged(self, shard: LocalShard) -> bool:
        return shard.is_trainable and any(self._selects(name) for name in shard.names)

    def _find_parameters(self) -> list[LocalShard]:
        prefixes = {module: name for name, module in self.module.named_modules()}
        flat = [
            shard for module, mesh in self._flat_meshes.items() for shard in _find_flat(prefixes[module], module, mesh)
        ]
        names = {name for shard in flat for name in shard.names}
        others = _find(self.module, "_parameters", self._replica_mesh)
        return [*flat, *(shard for shard in others if shard.name not in names and shard.key != "_flat_param")]

    def _look(self) -> tuple[list[Any], ...]:
        """Return what tells whether the model still consists of the same tensors on the same storage."""
        held = [shard.owner.get(shard.key) for shard in chain(self.averaged, self.others)]
        parameters = [
            (id(t), getattr(t, "_local_tensor", t).data_ptr(), t.requires_grad) for t in held if t is not None
        ]
        parts = list(self.module.modules())
        buffers = [key for part in parts for key, buffer in part._buffers.items() if buffer is not None]
        return parameters, buffers, [id(part) for part in parts]


def _is_first_rank(shards: Sequence[LocalShard], flat_modules: Iterable[FullyShardedDataParallel]) -> bool:
    """Whether this rank comes first on every mesh, and in every group of FSDP1's HYBRID_SHARD."""
    meshes = {shard.layout.mesh for shard in shards if shard.layout}
    replicas = [getattr(module, "_inter_node_pg", None) for module in flat_modules]
    return not (
        any(any(mesh.get_coordinate() or ()) for mesh in meshes)
        or any(group is not None and dist.get_rank(group) for group in replicas)
    )


class _Unwritten(Tensor):
    """A tensor that torch.distributed.checkpoint reads on this rank, and does not write."""

    def __create_write_items__(self, fqn: str, tensor: Tensor) -> list[Any]:
        return []

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.as_subclass(Tensor)


def name_matcher(pattern: NamePattern | None, argument: str) -> Callable[[str], bool]:
    """Return what tells whether an FQN is meant by the argument: a shell-style pattern, several, a function, or None.

    None means all names. Raises TypeError for anything else.
    """
    if pattern is None:
        return lambda name: True
    if callable(pattern):
        return pattern
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(patterns, Iterable) or not all(isinstance(one, str) for one in patterns):
        raise TypeError(
            f"{argument} needs a pattern such as 'head.*', a list of them or a function of a name, got"
            f" {argument}={pattern!r}; see fnmatch"
        )
    return lambda name: any(fnmatchcase(name, one) for one in patterns)


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


def reshard(fsdp_modules: Sequence[FSDPModule | FullyShardedDataParallel]) -> None:
    """Free unsharded parameters, so that the shards are what counts. See [Note: stale unsharded weights]."""
    for module in fsdp_modules:
        if isinstance(module, FullyShardedDataParallel):
            _reshard_flat(module)
            continue
        state = module._get_fsdp_state()
        if state._is_root and state._training_state.name == "FORWARD":  # a forward raised; it would not reshard
            if not hasattr(module, "reset_iter_state"):
                raise RuntimeError(
                    "FSDP2 needs torch >= 2.13 to go on after an error inside a forward, got"
                    f" torch={torch.__version__}; restart from the last checkpoint, or update torch"
                )
            module.reset_iter_state()
    for module in fsdp_modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def _reshard_flat(module: FullyShardedDataParallel) -> None:
    handle = module._handle
    if handle is None or module._is_root is None:  # nothing to shard, or no forward yet
        return
    if module.training_state == TrainingState.FORWARD_BACKWARD:  # a forward raised
        module.training_state, handle._training_state = TrainingState.IDLE, HandleTrainingState.IDLE
    if handle.uses_sharded_strategy:
        _reshard(module, handle, True)
    elif handle._use_orig_params:
        handle._use_sharded_views()


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
        shard = LocalShard(tuple(names), owner, key, tensor, tensor.shape, tensor.stride(), layout, rows)
        shards.append(replace(shard, is_trainable=tensor.requires_grad, is_persistent=is_persistent))
    return shards


def _find_flat(prefix: str, module: FullyShardedDataParallel, mesh: DeviceMesh) -> list[LocalShard]:
    """Return the pieces of the parameters that one FSDP1 module has flattened."""
    handle = cast(FlatParamHandle, module._handle)
    flat, is_sharded = handle.flat_param, handle.uses_sharded_strategy
    tied: dict[str, list[str]] = {}
    for shared in flat._shared_param_infos:
        name = _clean_name(f"{shared.prim_module_name}.{shared.prim_param_name}")
        tied.setdefault(name, []).append(f"{shared.module_name}.{shared.param_name}")
    shards = []
    for i, (name, shape, info) in enumerate(zip(flat._fqns, flat._shapes, flat._shard_param_infos, strict=True)):
        names = tuple(_clean_name(f"{prefix}.{name}") for name in (name, *tied.get(_clean_name(name), ())))
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
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _plain(tensor: Tensor) -> Tensor:
    local: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.detach()


def _clean_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part and part not in _WRAPPERS)
