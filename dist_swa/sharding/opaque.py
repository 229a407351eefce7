"""A frozen parameter of a tensor subclass, such as a quantised weight of torchao: only its module can read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_swa.sharding.plain import PlainShard
from dist_swa.sharding.shard import to_local


@dataclass(frozen=True, eq=False)
class OpaqueShard(PlainShard):
    """A whole tensor that is not averaged, copied or written: its class may refuse all of that."""

    is_opaque = True

    @property
    def local_tensor(self) -> Tensor:
        return cast(Tensor, self.owner[self.key]).detach()

    def data_ptr(self) -> int:
        return 0  # a subclass has no storage of its own, and may refuse the call

    def plain_tensors(self) -> list[Tensor]:
        """Return the tensors inside; none of a DTensor, whose ranks have different parts."""
        tensor = self.owner[self.key]
        return [] if isinstance(tensor, DTensor) else list(_inner_tensors(tensor))


def is_subclass(tensor: Tensor) -> bool:
    """Whether `tensor`, or the local tensor of a DTensor, has a class of its own, beyond that of a parameter."""
    return type(to_local(tensor)) is not Tensor


def _inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors inside of a subclass; none if it does not name them, as torch.compile asks for."""
    names = cast("list[str]", tensor.__tensor_flatten__()[0]) if hasattr(tensor, "__tensor_flatten__") else []
    for inner in (getattr(tensor, name) for name in names):
        if type(inner) is Tensor:
            yield inner
        elif isinstance(inner, Tensor):
            yield from _inner_tensors(inner)
