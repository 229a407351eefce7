"""A parameter that is replicated over a group of ranks (DDP, a process group): each rank averages some of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from dist_swa.sharding.shard import Layout, MeshShard, copy_unless_expanded, rows_of_rank


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplicaShard(MeshShard):
    """The rows of a replicated parameter that this rank averages. A 0-dim parameter is averaged on every rank."""

    @cached_property
    def _rows(self) -> tuple[slice, ...]:
        return (rows_of_rank(self.shape, self.layout.mesh),) if self.shape else ()

    @property
    def is_replica(self) -> bool:
        return True

    @property
    def local(self) -> Tensor:
        return self.local_tensor[self._rows]

    def full_tensor_of_model(self) -> Tensor:
        return self.local_tensor

    def write(self, local: Tensor) -> None:
        """Copy the rows of all ranks into the model. A collective."""
        whole = self.local_tensor
        copy_unless_expanded(whole, self.full_tensor(local.to(whole.dtype)))


def replica_layout(shape: torch.Size, mesh: DeviceMesh) -> Layout:
    return Layout(mesh, (Shard(0) if shape else Replicate(),))
