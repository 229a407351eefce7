"""What a shard is: this rank's part of a parameter or buffer, and how the parts make up the whole tensor.

[Note: one format]
An average keeps plain local tensors. A `Layout`, a device mesh and placements, says how they make up a whole tensor:

- A parameter that is a DTensor gives its own layout to its average (`dtensor.py`).
- A parameter that is replicated over a group of ranks, by DDP or a `process_group`, has an average that is
  ``Shard(0)`` over these ranks. They share the memory and the work (`replicas.py`).
- FSDP1 shards a flattened parameter, so a rank has a piece of it that is no set of rows. The average is of the same
  piece. Communication turns it into ``Shard(0)`` (`fsdp1.py`).
- A plain tensor without a group is whole on its rank (`plain.py`). So is a quantised weight, which is never averaged
  (`opaque.py`).

With a layout, and the shape and stride of the whole tensor, a local tensor becomes a DTensor of the whole parameter in
a state dict. torch.distributed.checkpoint reshards it for any wrapper and number of ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

# DTensor.from_local would move an average that is kept on the CPU to the mesh's device.
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


class Layout(NamedTuple):
    """How a whole tensor lies on the ranks."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def num_replicas(self) -> int:
        """How many ranks have the same part."""
        return math.prod(self.mesh.size(axis) for axis, place in enumerate(self.placements) if place.is_replicate())


@dataclass(frozen=True, eq=False)
class LocalShard(ABC):
    """This rank's part of one parameter or buffer. Tied tensors are one shard with several names."""

    names: tuple[str, ...]
    owner: Mapping[str, Any]  # has the tensor under `key`: `_parameters` or `_buffers` of a module
    key: str
    shape: torch.Size  # of the whole tensor, like `stride`
    stride: tuple[int, ...]
    is_persistent: bool = True

    is_opaque: ClassVar[bool] = False  # whether only its module can copy and write the tensor

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def layout(self) -> Layout | None:
        """The layout of the average; None where it is whole on its rank."""
        return None

    @property
    def is_trainable(self) -> bool:
        return bool(self.owner[self.key].requires_grad)

    @property
    def is_replica(self) -> bool:
        """Whether each rank of a group has the whole tensor, and averages a part of it."""
        return False

    @property
    def is_on_first_rank(self) -> bool:
        """Whether this rank is the first of those that have the tensor."""
        return True

    def data_ptr(self) -> int:
        """Return the address of what this rank has of the tensor. Cheap."""
        tensor = self.owner[self.key]
        # `_local_tensor`: `to_local` makes a view of each parameter, and every update calls this.
        return cast(int, getattr(tensor, "_local_tensor", tensor).data_ptr())

    def plain_tensors(self) -> list[Tensor]:
        """Return all that this rank has of the tensor, as plain tensors."""
        return [self.local_tensor]

    @property
    def local_tensor(self) -> Tensor:
        """All that this rank has of the tensor, as a plain tensor on the same storage."""
        return to_local(self.owner[self.key])

    @property
    def local(self) -> Tensor:
        """The part that this rank averages, as a plain tensor on the same storage."""
        return self.local_tensor

    @abstractmethod
    def as_dtensor(self, local: Tensor) -> Tensor:
        """Return the whole tensor of which `local` is this rank's part, on the storage of `local`."""

    @abstractmethod
    def full_tensor(self, local: Tensor) -> Tensor:
        """Return the whole tensor as a plain one. A collective of the mesh, if there is one."""

    def full_tensor_of_model(self) -> Tensor:
        """Return the whole tensor that the model has. A collective of the mesh, except for replicas."""
        return self.full_tensor(self.local)

    @abstractmethod
    def local_of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of `whole`, which `as_dtensor` returned; ValueError for another layout."""

    def write(self, local: Tensor) -> None:
        """Copy the part `local` into the model."""
        copy_unless_expanded(self.local_tensor, local)

    def has_layout_of(self, other: LocalShard) -> bool:
        return (self.names, self.shape, self.layout) == (other.names, other.shape, other.layout)

    def error_of_layout(self, whole: Tensor) -> ValueError:
        return ValueError(
            f"load_state_dict needs tensors laid out as this average's, got {self.name}={type(whole).__name__} of"
            " another layout; load the checkpoint with torch.distributed.checkpoint.load, which reshards"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class MeshShard(LocalShard):
    """A part of a tensor whose average lies on the ranks of a mesh."""

    mesh_layout: Layout

    @property
    def layout(self) -> Layout:
        return self.mesh_layout

    @property
    def is_on_first_rank(self) -> bool:
        return not any(self.layout.mesh.get_coordinate() or ())

    def as_dtensor(self, local: Tensor) -> DTensor:
        spec = DTensorSpec(*self.layout, tensor_meta=TensorMeta(self.shape, self.stride, local.dtype))
        return DTensor(local, spec, requires_grad=False)

    def full_tensor(self, local: Tensor) -> Tensor:
        return self.as_dtensor(local.to(self.layout.mesh.device_type)).full_tensor()

    def local_of(self, whole: Tensor) -> Tensor:
        if not isinstance(whole, DTensor) or self.layout != (whole.device_mesh, whole.placements):
            raise self.error_of_layout(whole)
        if whole.device_mesh.get_coordinate() != self.layout.mesh.get_coordinate():
            raise ValueError(
                f"load_state_dict needs this rank's part of {self.name}, got that of another rank; load the checkpoint"
                " with dist_swa.checkpoint.load or torch.distributed.checkpoint"
            )
        return to_local(whole)


def to_local(tensor: Tensor) -> Tensor:
    """Return the local tensor of a DTensor, or a plain tensor, detached and on the same storage."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local().detach()


def rows_of_rank(shape: torch.Size, mesh: DeviceMesh) -> slice:
    """Return the rows that this rank has where ``Shard(0)``, as torch.chunk, splits a tensor of this shape."""
    chunk = -(-shape[0] // mesh.size())
    start = min(chunk * mesh.get_local_rank(), shape[0])
    return slice(start, min(start + chunk, shape[0]))


def copy_unless_expanded(target: Tensor, values: Tensor) -> None:
    """Copy `values` into `target`, unless several elements of it share memory: torch cannot write into those."""
    if all(stride or size == 1 for stride, size in zip(target.stride(), target.shape, strict=True)):
        target.copy_(values)


class LoadOnlyTensor(Tensor):
    """A tensor that torch.distributed.checkpoint reads on this rank, and does not write."""

    def __create_write_items__(self, fqn: str, tensor: Tensor) -> list[Any]:
        return []

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.as_subclass(Tensor)


def checkpoint_view(shard: LocalShard, local: Tensor, is_first_rank: bool) -> Tensor:
    """Return the tensor that a checkpoint stores. Only the first rank writes plain tensors.

    Plain tensors, such as buffers, may differ between ranks. torch.distributed.checkpoint would write that of any rank.
    """
    if shard.layout is None and not is_first_rank:
        return local.as_subclass(LoadOnlyTensor)
    return shard.as_dtensor(local)
