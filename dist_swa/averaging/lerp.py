"""How are averages moved towards the shards: in place, in few calls, within bounded memory?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_NUMEL = 1 << 18  # elements that a CPU's cache keeps for the next average, and that are converted at a time

GroupKey = tuple[torch.dtype, torch.device, torch.dtype, torch.device]  # of a shard, and of its averages


class Group(NamedTuple):
    """Tensors for one foreach call per average; `staging` is empty where shards have the dtype and device of these."""

    shards: list[Tensor]
    slots: list[list[Tensor]]  # of each slot, the average of each shard
    staging: list[Tensor]


def plan(slots: Sequence[Sequence[Tensor]], shards: Sequence[Tensor]) -> list[Group]:
    """Group shards and their averages in each of `slots`, once, for the many calls of `lerp`.

    foreach refuses mixed dtypes, and type promotion would copy whole tensors; so a shard of another dtype or device
    than its averages goes, a block at a time, through a staging area of bounded size. Blocks also let several
    averages share one read of the shards, where a cache holds a block; elsewhere a few large calls are faster.
    """
    groups: dict[GroupKey, list[Group]] = {}
    room: dict[GroupKey, int] = {}  # elements that still fit into the last group
    for shard, *averages in zip(shards, *slots, strict=True):
        kind = (shard.dtype, shard.device, averages[0].dtype, averages[0].device)
        is_blocked = _is_staged(kind) or shard.device.type == "cpu"
        for piece, *slices in zip(*_split([shard, *averages], is_blocked), strict=True):
            if kind not in groups or (is_blocked and piece.numel() > room[kind]):
                groups.setdefault(kind, []).append(Group([], [[] for _ in slots], []))
                room[kind] = _BLOCK_NUMEL
            group = groups[kind][-1]
            room[kind] -= piece.numel()
            group.shards.append(piece)
            for members, member in zip(group.slots, slices, strict=True):
                members.append(member)
    for kind, of_kind in groups.items():
        if _is_staged(kind):
            _add_staging(of_kind)
    return list(chain.from_iterable(groups.values()))


@torch.no_grad()
def lerp(groups: Sequence[Group], weights: Mapping[int, float]) -> None:
    """Move the averages in the slot of each key by its weight of the way to the shards; a weight of 1 copies."""
    for shards, slots, staging in groups:
        source = shards
        if staging and any(weight != 1 for weight in weights.values()):
            torch._foreach_copy_(staging, shards)
            source = staging
        for slot, weight in weights.items():
            if weight == 1:  # lerp would keep a NaN of what was there
                torch._foreach_copy_(slots[slot], source)
            else:
                torch._foreach_lerp_(slots[slot], source, weight)


def mean(slots: Sequence[list[Tensor]]) -> list[Tensor]:
    """Return the mean of each tensor over `slots`: copies, but for a single slot, which is returned itself."""
    if len(slots) == 1:
        return slots[0]
    total = [tensor.clone() for tensor in slots[0]]
    for slot in slots[1:]:
        torch._foreach_add_(total, slot)
    torch._foreach_div_(total, len(slots))
    return total


def _is_staged(kind: GroupKey) -> bool:
    return kind[:2] != kind[2:]


def _add_staging(groups: Sequence[Group]) -> None:
    """Let all of `groups`, which are moved one after the other, have the same staging area."""
    like = groups[0].slots[0][0]
    numel = max(sum(piece.numel() for piece in group.shards) for group in groups)
    area = torch.empty(numel, dtype=like.dtype, device=like.device)
    for group in groups:
        filled = 0
        for piece in group.shards:
            group.staging.append(area[filled : filled + piece.numel()].view(piece.shape))
            filled += piece.numel()


def _split(tensors: Sequence[Tensor], is_blocked: bool) -> Iterator[Sequence[Tensor]]:
    """Split tensors of one shape alike, into pieces of about a block."""
    first = tensors[0]
    num_pieces = -(-first.numel() // _BLOCK_NUMEL) if is_blocked else 1
    for tensor in tensors:
        if num_pieces <= 1:
            yield [tensor]
        elif all(other.is_contiguous() for other in tensors):
            yield tensor.view(-1).tensor_split(num_pieces)
        else:
            yield tensor.tensor_split(num_pieces, dim=max(range(first.ndim), key=first.size))
