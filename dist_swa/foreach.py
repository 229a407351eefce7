"""How are averages moved towards the shards: in place, in few calls, within bounded memory?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_STAGING_NUMEL = 1 << 20  # elements that are converted at a time


class Group(NamedTuple):
    """Tensors for one foreach call; `staging` is empty where a shard has the dtype and device of its average."""

    averages: list[Tensor]
    shards: list[Tensor]
    staging: list[Tensor]


def plan(averages: Sequence[Tensor], shards: Sequence[Tensor]) -> list[Group]:
    """Group averages and shards, once, for the many calls of `lerp`.

    foreach refuses mixed dtypes, and type promotion would copy whole tensors; so a shard of another dtype or device
    than its average goes, a piece at a time, through a staging area of bounded size.
    """
    alike = Group([], [], [])
    groups: list[Group] = []
    pieces: list[tuple[Tensor, Tensor]] = []
    for average, shard in zip(averages, shards, strict=True):
        if (average.dtype, average.device) == (shard.dtype, shard.device):
            alike.averages.append(average)
            alike.shards.append(shard)
        else:
            is_flat = average.is_contiguous() and shard.is_contiguous()
            pieces += zip(_split(average, is_flat), _split(shard, is_flat), strict=True)
    numels = [average.numel() for average, _ in pieces]
    area_numel = min(sum(numels), max(_STAGING_NUMEL, *numels, 0))
    areas: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    last, filled = None, 0
    for average, shard in pieces:
        key = average.dtype, average.device
        if key != last or filled + average.numel() > area_numel:
            groups.append(Group([], [], []))
            last, filled = key, 0
        if key not in areas:
            areas[key] = torch.empty(area_numel, dtype=average.dtype, device=average.device)
        staging = areas[key][filled : filled + average.numel()].view(average.shape)
        filled += average.numel()
        for members, member in zip(groups[-1], (average, shard, staging), strict=True):
            members.append(member)
    return [alike, *groups] if alike.averages else groups


@torch.no_grad()
def lerp(groups: Sequence[Group], weight: float) -> None:
    """Move every average by `weight` of the way to its shard; a weight of 1 copies."""
    for averages, shards, staging in groups:
        if weight == 1:  # lerp would keep a NaN of what was there
            torch._foreach_copy_(averages, shards)
            continue
        if staging:
            torch._foreach_copy_(staging, shards)
        torch._foreach_lerp_(averages, staging or shards, weight)


def _split(tensor: Tensor, is_flat: bool) -> Iterator[Tensor]:
    num_pieces = -(-tensor.numel() // _STAGING_NUMEL)
    if num_pieces <= 1:
        return iter([tensor])
    if is_flat:
        return iter(tensor.view(-1).tensor_split(num_pieces))
    return iter(tensor.tensor_split(num_pieces, dim=max(range(tensor.ndim), key=tensor.size)))
