"""Do all ranks agree? Facts are shared before any rank acts on them, so that no rank waits for one that raised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def agreed_max(values: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """Return the largest of each of `values` over the ranks of `group`. A collective; without any, `values`."""
    if not dist.is_initialized():
        return [int(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group)
    return [int(value) for value in tensor.tolist()]


def check_replicas(
    names: Sequence[str], fingerprints: Sequence[int], group: dist.ProcessGroup, device: torch.device
) -> None:
    """Raise ValueError on every rank of `group` unless all have the same fingerprints. A collective."""
    (count,) = _ranges([len(names)], group, device)
    if count[0] != count[1]:
        raise ValueError(
            f"replicas need the same parameters on every rank, got num_parameters={count[0]} to {count[1]}; build the"
            " same model on every rank"
        )
    for name, (lowest, highest) in zip(names, _ranges(fingerprints, group, device), strict=True):
        if lowest != highest:
            raise ValueError(
                f"replicas need the same names, shapes and values on every rank, got other ones of parameter={name!r}"
                "; broadcast the model from one rank first, or wrap it in DDP, which does"
            )


def _ranges(values: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> list[tuple[int, int]]:
    """Return the least and the largest of each of `values` over the ranks."""
    largest = agreed_max([*values, *(-value for value in values)], group, device)
    count = len(values)
    return [(-low, high) for high, low in zip(largest[:count], largest[count:], strict=True)]
