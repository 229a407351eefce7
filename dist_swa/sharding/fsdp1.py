"""FSDP1 (`FullyShardedDataParallel`): a rank has pieces of the parameters that were flattened.

Imported only for a model that has an FSDP1 module. FSDP1 has no public call for what this file reads and resets: its
public access, ``summon_full_params``, gathers every parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_swa.sharding.fqn import clean_name
from dist_swa.sharding.shard import Layout, MeshShard, rows_of_rank


@dataclass(frozen=True, eq=False, kw_only=True)
class FlatPieceShard(MeshShard):
    """The piece of a flattened parameter that a rank has. Its average is of the same piece."""

    index: int  # of the parameter in the flattened one
    piece: slice  # of the rank's shard of the flattened parameter
    start: int  # of the piece in the parameter
    is_sharded: bool  # False under NO_SHARD
    replicas: dist.ProcessGroup | None  # under HYBRID_SHARD, the ranks that have the same piece

    @property
    def is_trainable(self) -> bool:
        flat = self.owner[self.key]
        return bool((flat if flat._params is None else flat._params[self.index]).requires_grad)

    @property
    def is_on_first_rank(self) -> bool:
        return super().is_on_first_rank and not (self.replicas is not None and dist.get_rank(self.replicas))

    @property
    def local_tensor(self) -> Tensor:
        return super().local_tensor[self.piece]

    def as_dtensor(self, local: Tensor) -> DTensor:
        """Return a copy, as ``Shard(0)``. A collective."""
        whole = self.full_tensor(local)
        is_split = self.layout.placements[0].is_shard()
        return super().as_dtensor(whole[rows_of_rank(self.shape, self.layout.mesh)].clone() if is_split else whole)

    def full_tensor(self, local: Tensor) -> Tensor:
        local = local.to(self.layout.mesh.device_type)
        if not self.is_sharded:
            return local.view(self.shape)
        whole = local.new_zeros(self.shape.numel())
        whole[self.start : self.start + local.numel()] = local
        dist.all_reduce(whole.view(torch.uint8), group=self.layout.mesh.get_group())  # a sum of floats loses -0.0
        return whole.view(self.shape)

    def local_of(self, whole: Tensor) -> Tensor:
        """Return this rank's piece of `whole`. A collective."""
        super().local_of(whole)
        return cast(DTensor, whole).full_tensor().flatten()[self.start :][: self.local_tensor.numel()]


def find_meshes(modules: Iterable[nn.Module]) -> dict[FullyShardedDataParallel, DeviceMesh]:
    """Return the FSDP1 modules that have flattened parameters, each with a mesh of the ranks that share them."""
    return {
        module: DeviceMesh.from_group(module.process_group, next(module.parameters()).device.type)
        for module in modules
        if isinstance(module, FullyShardedDataParallel) and module._handle and module.process_group
    }


def find_pieces(
    module: FullyShardedDataParallel, mesh: DeviceMesh, prefixes: Iterable[str]
) -> Iterator[FlatPieceShard]:
    """Yield the pieces of the parameters that `module` has flattened. `prefixes`: its names, one per parent."""
    handle = cast(FlatParamHandle, module._handle)
    flat, is_sharded = handle.flat_param, handle.uses_sharded_strategy
    tied: dict[str, list[str]] = {}
    for shared in flat._shared_param_infos:
        name = clean_name(f"{shared.prim_module_name}.{shared.prim_param_name}")
        tied.setdefault(name, []).append(f"{shared.module_name}.{shared.param_name}")
    for i, (name, shape, info) in enumerate(zip(flat._fqns, flat._shapes, flat._shard_param_infos, strict=True)):
        names = (name, *tied.get(clean_name(name), ()))
        offset = info.offset_in_shard or 0
        placement = Shard(0) if is_sharded and len(shape) else Replicate()
        yield FlatPieceShard(
            tuple(clean_name(f"{prefix}.{name}") for prefix in prefixes for name in names),
            vars(handle),
            "flat_param",
            shape,
            torch.empty(shape, device="meta").stride(),
            mesh_layout=Layout(mesh, (placement,)),
            index=i,
            piece=slice(offset, offset + (info.numel_in_shard or 0)),
            start=info.intra_param_start_idx or 0,
            is_sharded=is_sharded,
            replicas=getattr(module, "_inter_node_pg", None),
        )


def reshard(module: FullyShardedDataParallel) -> None:
    """Free the unsharded parameters of `module`, also after a forward that raised. Local."""
    handle = module._handle
    if handle is None or module._is_root is None:  # nothing is sharded, or no forward has run
        return
    if module.training_state == TrainingState.FORWARD_BACKWARD:  # a forward raised
        module.training_state, handle._training_state = TrainingState.IDLE, HandleTrainingState.IDLE
    elif handle._use_orig_params and not handle._skip_writeback_check:
        handle._writeback_orig_params()  # for weights that were assigned, as by ``p.data = ...``
    # torch's own `_reshard` also adds an event to its rate limiter, which only an unshard removes.
    handle.reshard(handle.uses_sharded_strategy)
    handle.post_reshard()
    handle._prefetched = False
