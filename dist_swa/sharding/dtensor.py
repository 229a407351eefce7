"""A DTensor parameter of FSDP2, HSDP or tensor parallelism: its average has the same layout."""

from __future__ import annotations

from dataclasses import dataclass

from dist_swa.sharding.shard import MeshShard


@dataclass(frozen=True, eq=False, kw_only=True)
class DTensorShard(MeshShard):
    """A shard of a DTensor. Raises ValueError for a ``Partial`` placement, which has no values yet."""

    def __post_init__(self) -> None:
        if any(placement.is_partial() for placement in self.layout.placements):
            raise ValueError(
                f"ShardedAverage needs shards or replicas, got {self.name}={self.layout.placements}; redistribute"
                " Partial first"
            )
