"""Process groups, tensor parallelism, ranks without batches, and the number of collectives."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from batch_norm_models import (
    HANG_S,
    SHARDED,
    WRAPPERS,
    batches_of,
    build,
    in_every_wrapper,
    layers_of,
    random,
    uneven,
    wrap,
)
from batch_norm_oracle import assert_all_statistics, assert_layerwise_statistics, has_statistics_of
from dist_swa import SWA, recalibrate_batch_norm
from ranks import on_ranks


@dataclasses.dataclass(frozen=True)
class Sample:
    given: Any
    label: str = "label"


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("wrapper", [*WRAPPERS, "hsdp"])
@on_ranks(1, 2, 3, 4, timeout_s=2 * HANG_S)
def test_ranks_may_have_different_numbers_of_batches_and_none(wrapper: str, layerwise: bool) -> None:
    batches, calls = batches_of(7), list[Sample]()
    model, samples = wrap(build(), wrapper), [Sample(batch) for batch in uneven(batches)]

    def forward(module: nn.Module, sample: Sample) -> None:
        calls.append(sample)
        assert isinstance(sample, Sample)
        assert sample.label == "label"
        module(sample.given)

    recalibrate_batch_norm(model, samples, forward=forward, layerwise=layerwise)
    check = assert_layerwise_statistics if layerwise else assert_all_statistics
    check(model, build(), batches)
    num_calls: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(num_calls, len(calls))
    if wrapper in SHARDED:
        assert len(set(num_calls)) == 1, "every rank runs every forward"
    else:
        assert len(calls) == (1 + layerwise) * len(samples)


@on_ranks(2, timeout_s=HANG_S)
def test_ddp_inside_of_a_module_does_not_communicate() -> None:
    ddp = DistributedDataParallel(build())
    batches = batches_of(3)
    recalibrate_batch_norm(nn.Sequential(ddp), batches if dist.get_rank() == 0 else [])
    assert_all_statistics(ddp, build(), batches)
    assert ddp.require_forward_param_sync


def check_tensor_parallel(
    wrapper: str, num_groups: int, everyones: list[list[Tensor]], own: Callable[[list[Tensor], int, int], list[Tensor]]
) -> None:
    """Recalibrate with ``own(batches of the group, rank in the group, its size)``; all batches of all groups count."""
    size = dist.get_world_size() // num_groups
    group, tp_rank = divmod(dist.get_rank(), size)
    data_parallel: list[Any] = [dist.new_group([g * size + t for g in range(num_groups)]) for t in range(size)]
    model = wrap(build(), wrapper)
    recalibrate_batch_norm(model, own(everyones[group], tp_rank, size), process_group=data_parallel[tp_rank])
    assert_all_statistics(model, build(), [batch for batches in everyones for batch in batches])


# The ranks of a tensor-parallel group compute one forward: a rank without a batch receives that of a peer.
TP_BATCHES: dict[str, Callable[[list[Tensor], int, int], list[Tensor]]] = {
    "the same": lambda batches, tp_rank, size: batches,
    "one on all but the last": lambda batches, tp_rank, size: batches if tp_rank == size - 1 else batches[:1],
    "all on the first": lambda batches, tp_rank, size: [] if tp_rank else batches,
}


@pytest.mark.parametrize("case", TP_BATCHES)
@pytest.mark.parametrize("wrapper", ["tp", "fsdp2+tp"])
@on_ranks(1, 2, 3, 4, timeout_s=HANG_S)
def test_tensor_parallel_ranks_share_a_batch(wrapper: str, case: str) -> None:
    num_groups = 2 if wrapper == "fsdp2+tp" and dist.get_world_size() % 2 == 0 else 1
    everyones = [batches_of(3, seed=10 * group) + batches_of(group, seed=90) for group in range(num_groups)]
    check_tensor_parallel(wrapper, num_groups, everyones, TP_BATCHES[case])


@on_ranks(2, 4, timeout_s=HANG_S)
def test_a_tensor_parallel_group_may_have_no_batches() -> None:
    check_tensor_parallel("fsdp2+tp", 2, [[], batches_of(4)], lambda batches, tp_rank, size: batches)


GROUPS: dict[str, tuple[Callable[[Any], nn.Module], bool]] = {
    "plain": (lambda group: build(), True),
    "DDP's own": (lambda group: DistributedDataParallel(build(), process_group=group), False),
    "DDP over all ranks": (lambda group: DistributedDataParallel(build()), True),
}


@pytest.mark.parametrize("case", GROUPS)
@on_ranks(4, timeout_s=HANG_S)
def test_a_process_group_merges_its_own_ranks_only(case: str) -> None:
    rank = dist.get_rank()
    group: Any = [dist.new_group(members) for members in ([0, 2], [1, 3])][rank % 2]
    batches = [batches_of(1 + r, seed=10 * r) for r in range(4)]
    make, is_passed = GROUPS[case]
    model = make(group)
    recalibrate_batch_norm(model, batches[rank], process_group=group if is_passed else None)
    assert has_statistics_of(layers_of(model)["0"], batches[rank % 2] + batches[rank % 2 + 2])


@on_ranks(4, timeout_s=HANG_S)
def test_ranks_outside_of_the_group_need_not_call() -> None:
    group: Any = dist.new_group([0, 2])
    if dist.get_rank() % 2 == 0:
        model = build()
        recalibrate_batch_norm(model, batches_of(2, seed=dist.get_rank()), process_group=group)
        assert has_statistics_of(model[0], batches_of(2) + batches_of(2, seed=2))


def all_reduce_sizes(model: nn.Module, batches: Iterable[Tensor], gathers: bool) -> list[int]:
    """Return the number of elements of every all-reduce of a pass. No other collective is allowed."""
    sizes, all_reduce = [], dist.all_reduce
    forbidden = ["all_gather_object", "broadcast", "broadcast_object_list", "gather", "reduce", "send"]

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        for name in forbidden if gathers else [*forbidden, "all_gather"]:
            patch.setattr(dist, name, lambda *args, **kwargs: pytest.fail("another collective"))
        recalibrate_batch_norm(model, batches)
    return sizes


@pytest.mark.parametrize("num_batches", [1, 5])
@pytest.mark.parametrize("num_layers", [1, 4])
@in_every_wrapper
@on_ranks(1, 2, 4)
def test_the_number_of_all_reduces_is_fixed(wrapper: str, num_layers: int, num_batches: int) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(num_layers)))
    sizes = all_reduce_sizes(wrap(model, wrapper), [random(4, 3)] * num_batches, gathers=wrapper == "fsdp1")
    *agreements, counts_and_means, deviations = sizes
    assert (counts_and_means, deviations) == (6 * num_layers, 3 * num_layers)
    assert len(agreements) == (2 + num_batches if wrapper in SHARDED else 2)
    assert max(agreements) <= 5, "a few integers"


def stage_of(rank: int) -> nn.Sequential:
    """Return one of two parts of a model. Only the first has a layer with statistics."""
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) if rank == 0 else nn.Sequential(nn.Linear(3, 2))


def averaged(stage: nn.Module) -> SWA:
    swa = SWA(stage, swa_start="1ba")
    swa.step()
    return swa


PASSES: dict[str, Callable[[nn.Module], None]] = {
    "recalibrate": lambda stage: recalibrate_batch_norm(stage, batches_of(2), max_batches=1),
    "finalize": lambda stage: averaged(stage).finalize(batches_of(2), max_batches=1),
}


@pytest.mark.parametrize("given", PASSES)
@on_ranks(2, timeout_s=HANG_S)
def test_layers_on_one_rank_only_raise_on_every_rank(given: str) -> None:
    with pytest.raises(ValueError, match=r"same layers on every rank, .*; .* pass the process_group of"):
        PASSES[given](stage_of(dist.get_rank()))


@pytest.mark.parametrize("is_sharded", [False, True])
@on_ranks(4, timeout_s=HANG_S)
def test_without_batches_only_the_ranks_with_layers_raise(is_sharded: bool) -> None:
    stage, mesh = dist.get_rank() // 2, init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages_of_4", "data_of_4"))
    model: nn.Module = stage_of(stage)
    if is_sharded:
        fully_shard(model, mesh=mesh["data_of_4"])
    swa = averaged(model)
    expected = pytest.raises(ValueError, match="needs batches") if stage == 0 else contextlib.nullcontext()
    with expected:
        swa.finalize()


@on_ranks(2, timeout_s=HANG_S)
def test_a_layer_that_is_frozen_on_one_replica_only_raises_on_all() -> None:
    model = stage_of(0)
    model[1].train(dist.get_rank() == 0)
    with pytest.raises(ValueError, match="same layers on every rank"):
        averaged(DistributedDataParallel(model)).finalize()


@pytest.mark.parametrize("is_ddp", [False, True])
@on_ranks(4, timeout_s=HANG_S)
def test_the_ranks_of_a_stage_recalibrate_in_their_own_group(is_ddp: bool) -> None:
    stage, replica = divmod(dist.get_rank(), 2)
    group: Any = [dist.new_group(members) for members in ([0, 1], [2, 3])][stage]
    model = stage_of(stage)
    batches = [batches_of(1 + rank, seed=rank) for rank in range(2)]
    swa = averaged(DistributedDataParallel(model, process_group=group) if is_ddp else model)
    swa.finalize(batches[replica], process_group=None if is_ddp else group)
    if stage == 0:
        inputs = [model[0](batch) for batch in itertools.chain(*batches)]
        assert has_statistics_of(model[1], inputs)
