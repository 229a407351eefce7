"""A plain tensor without a process group: whole on its rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_swa.sharding.shard import LocalShard


@dataclass(frozen=True, eq=False)
class PlainShard(LocalShard):
    """A whole tensor: a buffer, or a parameter that is averaged on its own."""

    def as_dtensor(self, local: Tensor) -> Tensor:
        return local

    def full_tensor(self, local: Tensor) -> Tensor:
        return local

    def local_of(self, whole: Tensor) -> Tensor:
        if isinstance(whole, DTensor):
            raise self.error_of_layout(whole)
        return whole.detach()
