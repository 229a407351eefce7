"""Move averages towards the shards of a model: in place, with few foreach calls, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_NUMEL = 1 << 18  # elements per block: small enough for the cache of a CPU

GroupKey = tuple[torch.dtype, torch.device, torch.dtype, torch.device]  # of the shards, and of their averages


class Group(NamedTuple):
    """The tensors of one foreach call per slot. `staging` is empty if shards and averages have one dtype and device."""

    shards: list[Tensor]
    slots: list[list[Tensor]]  # per slot, the average of each shard
    staging: list[Tensor]


def plan(slots: Sequence[Sequence[Tensor]], shards: Sequence[Tensor]) -> list[Group]:
    """Group `shards` with their averages in each of `slots`. The plan is made once and used by every `lerp`.

    Shards of another dtype or device than their averages are copied into a staging buffer of bounded size, block by
    block: foreach refuses mixed dtypes, and type promotion would copy whole tensors. On the CPU all shards are split
    into blocks, so that the cache serves several averages with one read. Elsewhere a few large calls are faster.
    """
    groups: dict[GroupKey, list[Group]] = {}
    free: dict[GroupKey, int] = {}  # elements that the last group can still take
    for shard, *averages in zip(shards, *slots, strict=True):
        key = (shard.dtype, shard.device, averages[0].dtype, averages[0].device)
        is_blocked = _is_staged(key) or shard.device.type == "cpu"
        for piece, *slices in zip(*_split([shard, *averages], is_blocked), strict=True):
            if key not in groups or (is_blocked and piece.numel() > free[key]):
                groups.setdefault(key, []).append(Group([], [[] for _ in slots], []))
                free[key] = _BLOCK_NUMEL
            group = groups[key][-1]
            free[key] -= piece.numel()
            group.shards.append(piece)
            for members, member in zip(group.slots, slices, strict=True):
                members.append(member)
    for key, same_key in groups.items():
        if _is_staged(key):
            _add_staging(same_key)
    return list(chain.from_iterable(groups.values()))


# The _foreach functions are private. torch's optimizers use them, and the public functions take one tensor each.
@torch.no_grad()
def lerp(groups: Sequence[Group], weights: Mapping[int, float]) -> None:
    """Update the slots named in `weights`: average += weight * (shard - average). A weight of 1 copies the shards."""
    for shards, slots, staging in groups:
        source = shards
        if staging and any(weight != 1 for weight in weights.values()):
            torch._foreach_copy_(staging, shards)
            source = staging
        for slot, weight in weights.items():
            if weight == 1:  # lerp would keep a NaN or inf of the old average
                torch._foreach_copy_(slots[slot], source)
            else:
                torch._foreach_lerp_(slots[slot], source, weight)


def mean(slots: Sequence[list[Tensor]]) -> list[Tensor]:
    """Return the mean of each tensor over `slots`. A single slot is returned itself, without a copy."""
    if len(slots) == 1:
        return slots[0]
    total = [tensor.clone() for tensor in slots[0]]
    for slot in slots[1:]:
        torch._foreach_add_(total, slot)
    torch._foreach_div_(total, len(slots))
    return total


def _is_staged(key: GroupKey) -> bool:
    return key[:2] != key[2:]


def _add_staging(groups: Sequence[Group]) -> None:
    """Give all `groups` views of one staging buffer. They are updated one after the other."""
    like = groups[0].slots[0][0]
    numel = max(sum(piece.numel() for piece in group.shards) for group in groups)
    buffer = torch.empty(numel, dtype=like.dtype, device=like.device)
    for group in groups:
        sizes = [piece.numel() for piece in group.shards]
        views = buffer[: sum(sizes)].split_with_sizes(sizes)
        group.staging.extend(view.view_as(piece) for view, piece in zip(views, group.shards, strict=True))


def _split(tensors: Sequence[Tensor], is_blocked: bool) -> Iterator[Sequence[Tensor]]:
    """Split tensors of the same shape in the same way, into pieces of about one block."""
    first = tensors[0]
    num_pieces = -(-first.numel() // _BLOCK_NUMEL) if is_blocked else 1
    for tensor in tensors:
        if num_pieces <= 1:
            yield [tensor]
        elif all(other.is_contiguous() for other in tensors):
            yield tensor.view(-1).tensor_split(num_pieces)
        else:
            yield tensor.tensor_split(num_pieces, dim=max(range(first.ndim), key=first.size))
