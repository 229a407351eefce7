"""Several averages share one read of the shards, and updates in blocks have the bits of whole tensors."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dist_swa.averaging import lerp as foreach

SHAPES = [(1, 3 << 18), (1025, 513), (7,), (), (5, 3), (0, 3), (3 << 18,)]


def shards_of(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shards = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return [*shards, torch.randn(513, 1025, generator=generator).to(dtype).t()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_have_the_bits_of_whole_tensors(dtype: torch.dtype) -> None:
    shards = shards_of(dtype)
    weights = {0: 1.0, 1: 0.3, 2: 0.6}
    slots = [[torch.randn(shard.shape) for shard in shards] for _ in weights]
    expected = [
        [average.lerp(shard.float(), weights[i]) for average, shard in zip(slot, shards, strict=True)]
        for i, slot in enumerate(slots)
    ]
    groups = foreach.plan(slots, shards)
    foreach.lerp(groups, weights)
    for slot, values in zip(slots, expected, strict=True):
        assert [i for i in range(len(shards)) if not torch.equal(slot[i], values[i])] == []
    assert len(groups) > 3  # blocks
    assert max(sum(piece.numel() for piece in group.shards) for group in groups) < 300_000


def conversions(num_slots: int) -> int:
    """Return the number of copies in an update of `num_slots` averages."""
    shards = shards_of(torch.bfloat16)
    groups = foreach.plan([[torch.zeros(shard.shape) for shard in shards] for _ in range(num_slots)], shards)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True, record_shapes=True) as profiler:
        foreach.lerp(groups, dict.fromkeys(range(num_slots), 0.5))
    return sum("copy" in event.name for event in profiler.events())


def test_shards_are_converted_once_for_several_averages() -> None:
    assert conversions(1) == conversions(3) > 0


def test_only_the_slots_in_weights_are_updated() -> None:
    shards = [torch.ones(3)]
    slots = [[torch.zeros(3)], [torch.zeros(3)]]
    foreach.lerp(foreach.plan(slots, shards), {1: 0.5})
    assert slots[0][0].eq(0).all()
    assert slots[1][0].eq(0.5).all()
