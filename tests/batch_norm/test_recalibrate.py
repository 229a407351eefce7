"""The statistics are those of all samples on all ranks, for every kind of layer, batch and split."""

import copy
import inspect
from collections.abc import Callable, Generator, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batch_norm_oracle import (
    HANG_S,
    SHARDED,
    WRAPPERS,
    assert_all_statistics,
    batches_of,
    build,
    dealt,
    has_statistics_of,
    is_exact,
    norms,
    plain_name,
    random,
    rows,
    statistics,
    two_pass,
    unwrapped,
    wrap,
)
from dist_swa import recalibrate_batch_norm
from ranks import on_ranks, run_on_ranks

# Statistics of all samples


def cases(num_ranks: int) -> dict[str, list[list[Tensor]]]:
    """Return the batches of every rank; their shape says which BatchNorm they are for."""

    def deal(batch: Callable[[int, int], Tensor], count: Callable[[int], int] = lambda rank: 3) -> list[list[Tensor]]:
        return [[batch(rank, i) for i in range(count(rank))] for rank in range(num_ranks)]

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    generator, last = torch.Generator().manual_seed(0), num_ranks - 1
    return {
        "means 2, 12, 22": deal(lambda rank, i: x(8, 3) + 2 + 10 * rank),
        "scales": deal(lambda rank, i: x(8, 3) * 10.0**rank),
        "batch sizes": deal(lambda rank, i: x(2 + 5 * i + rank, 3) + 5 * i - rank),
        "batch counts": deal(lambda rank, i: x(6, 3) - 3 * rank, lambda rank: 1 + 2 * rank),
        "none on the first": deal(lambda rank, i: x(6, 3) + 4 * i, lambda rank: 4 if rank or not last else 0),
        "all on the last": deal(lambda rank, i: x(6, 3) + 4 * i, lambda rank: 4 if rank == last else 0),
        "N(100, 1e-3)": deal(lambda rank, i: x(40, 3) * 1e-3 + 100),
        "N(-1e4, 1)": deal(lambda rank, i: x(40, 3) - 1e4),
        "N(1e3, 1e-2)": deal(lambda rank, i: x(40, 3) * 1e-2 + 1e3),
        "constant": deal(lambda rank, i: torch.full((5, 3), 1234.567)),
        "1d": deal(lambda rank, i: x(2, 3, 5 + i) + rank * i),
        "2d": deal(lambda rank, i: x(2, 3, 4, 2 + i) + rank * i),
        "2d, one image": deal(lambda rank, i: x(1, 3, 4, 4) + rank),
        "2d, channels last": deal(lambda rank, i: x(2, 3, 4, 5).to(memory_format=torch.channels_last) + 7 * rank),
        "3d": deal(lambda rank, i: x(2, 3, 2, 3, 2 + i) + rank * i),
    }


@on_ranks(1, 2, 3, 4, timeout_s=HANG_S)
def test_statistics_are_those_of_all_samples_on_all_ranks() -> None:
    for wrapper in WRAPPERS:
        for case, batches in cases(dist.get_world_size()).items():
            everywhere = [batch for mine in batches for batch in mine]
            layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[everywhere[0].ndim](3)
            recalibrate_batch_norm(wrap(nn.Sequential(layer), wrapper), batches[dist.get_rank()])
            assert has_statistics_of(layer, everywhere), (wrapper, case, layer.running_mean, layer.running_var)
            assert layer.num_batches_tracked == len(everywhere), (wrapper, case)


def test_the_oracle_rejects_wrong_formulas() -> None:
    for num_ranks in (2, 3, 4):
        for case, batches in cases(num_ranks).items():
            everywhere = [batch for mine in batches for batch in mine]
            mean, variance = two_pass(everywhere)
            assert is_exact(mean.float(), variance.float(), everywhere), case
            wrong = [rows(everywhere).var(0, correction=0)] if "d" in case[:2] else []
            if case in ("means 2, 12, 22", "batch counts", "scales"):
                wrong.append(torch.stack([two_pass(mine)[1] for mine in batches]).mean(0))
            if case in ("means 2, 12, 22", "batch sizes", "2d"):
                wrong.append(torch.stack([two_pass([batch])[1] for batch in everywhere]).mean(0))
            if case in ("N(100, 1e-3)", "N(-1e4, 1)"):
                samples = rows(everywhere).float()
                wrong.append(samples.square().mean(0) - samples.mean(0).square())
            for other in wrong:
                assert not is_exact(mean, other, everywhere), (num_ranks, case)
            if case == "batch sizes":
                assert not is_exact(torch.stack([batch.mean(0) for batch in everywhere]).mean(0), variance, everywhere)


def buffers_on_rank() -> dict[str, dict[str, Tensor]]:
    models = {wrapper: wrap(build(), wrapper) for wrapper in WRAPPERS}
    for model in models.values():
        recalibrate_batch_norm(model, dealt(batches_of(12)))
    return {
        wrapper: {plain_name(name): buffer for name, buffer in unwrapped(model).named_buffers()}
        for wrapper, model in models.items()
    }


def test_the_same_batches_give_the_same_bits_on_any_number_of_ranks() -> None:
    alone = run_on_ranks(buffers_on_rank, 1)[0]["plain"]
    for num_ranks in (1, 2, 3, 4):
        for rank, found in enumerate(run_on_ranks(buffers_on_rank, num_ranks)):
            for wrapper, buffers in found.items():
                assert buffers.keys() == alone.keys()
                for name, buffer in buffers.items():
                    assert torch.equal(buffer, alone[name]), (num_ranks, rank, wrapper, name)


class Variety(nn.Module):
    """A layer of every kind, after dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.dropout = nn.Dropout(0.5)
        self.not_affine = nn.BatchNorm1d(4, affine=False)
        self.shared = nn.BatchNorm1d(4)
        self.cumulative = nn.BatchNorm1d(4, momentum=None)
        self.untracked: nn.Module = nn.BatchNorm1d(4, track_running_stats=False)
        self.unreached = nn.BatchNorm1d(4)

    def forward(self, given: Tensor) -> Any:
        hidden = self.not_affine(self.dropout(self.linear(given)))
        hidden = self.shared(hidden) + self.shared(3 * hidden + given.mean())
        return self.untracked(self.cumulative(hidden + given.sum(1, keepdim=True)))


@on_ranks(1, 2, 3)
def test_every_layer_of_a_deep_model() -> None:
    batches = batches_of(6)
    for wrapper in WRAPPERS:
        model = wrap(build(), wrapper)
        recalibrate_batch_norm(model, dealt(batches))
        assert_all_statistics(model, build(), batches)

        torch.manual_seed(0)
        layers = Variety()
        for buffer in layers.unreached.buffers():
            buffer.fill_(7)
        like, before = copy.deepcopy(layers), statistics(layers.unreached)
        like.untracked, like.unreached = nn.Identity(), None  # type: ignore[assignment]
        model = wrap(layers, wrapper)
        with pytest.warns(UserWarning, match="no batch reached keep their statistics: unreached$") as warned:
            recalibrate_batch_norm(model, dealt(batches))
        assert [warning.filename for warning in warned] == [__file__]
        assert_all_statistics(layers, like, batches)
        assert layers.shared.num_batches_tracked == 12
        assert statistics(layers.unreached) == before
        assert list(layers.untracked.buffers()) == []
        assert layers.cumulative.momentum is None


def test_statistics_that_are_not_finite_are_replaced() -> None:
    model, batches = build(), batches_of(3)
    for buffer in model.buffers():
        buffer.fill_(torch.nan if buffer.is_floating_point() else 9)
    recalibrate_batch_norm(model, batches)
    assert_all_statistics(model, build(), batches)


def test_an_empty_batch_adds_nothing() -> None:
    full, empty = random(8, 3), torch.empty(0, 3)
    for batches in ([full, empty], [empty, full], [full, empty, full + 5]):
        layer = nn.BatchNorm1d(3)
        recalibrate_batch_norm(nn.Sequential(layer), batches)
        assert has_statistics_of(layer, batches), [len(batch) for batch in batches]


def test_frozen_layers_stay_unless_the_whole_model_evaluates() -> None:
    model, batches = build(), batches_of(3)
    model[0].eval()
    before = statistics(model[0])
    recalibrate_batch_norm(model, batches)
    assert statistics(model[0]) == before
    assert model[2].num_batches_tracked == 3
    recalibrate_batch_norm(model.eval(), batches)
    assert_all_statistics(model, build(), batches)
    assert not any(part.training for part in model.modules())


class StaysInTraining(nn.Dropout):
    def train(self, mode: bool = True) -> "StaysInTraining":
        return self


def test_dropout_draws_nothing() -> None:
    for dropout in (nn.Dropout(0.5), StaysInTraining(0.5)):
        for is_training in (True, False):
            model = nn.Sequential(dropout, nn.BatchNorm1d(3)).train(is_training)
            modes = [part.training for part in model.modules()]
            recalibrate_batch_norm(model, batches_of(3))
            assert has_statistics_of(model[1], batches_of(3)), dropout
            assert [part.training for part in model.modules()] == modes


# Batches


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, given: Tensor, *, shift: float = 0.0) -> Any:
        return self.norm(input=given + shift)


def test_kinds_of_batches() -> None:
    given = batches_of(3)
    kinds: dict[str, tuple[list[Any], Any, float]] = {
        "tensor": (list(given), None, 0.0),
        "tuple": ([(batch, torch.zeros(4)) for batch in given], None, 0.0),
        "list": ([[batch, "label"] for batch in given], None, 0.0),
        "dict": ([{"given": batch, "shift": 5.0} for batch in given], None, 5.0),
        "mixed": ([given[0], (given[1], "label"), {"given": given[2]}], None, 0.0),
        "forward=": ([("label", batch) for batch in given], lambda module, batch: module(batch[1], shift=5.0), 5.0),
    }
    for kind, (batches, forward, shift) in kinds.items():
        for loader in (batches, iter(batches)):
            model = Named()
            recalibrate_batch_norm(model, loader, forward=forward)
            assert has_statistics_of(model.norm, [batch + shift for batch in given]), kind


@pytest.mark.parametrize("batch", ["text", 7, None, (), ("text", torch.ones(2, 3)), [[torch.ones(2, 3)]]])
def test_another_kind_of_batch_is_a_type_error(batch: Any) -> None:
    with pytest.raises(TypeError, match=f"got batch={type(batch).__name__}; pass forward="):
        recalibrate_batch_norm(build(), [batch])


@on_ranks(2, 3)
def test_max_batches_is_per_rank_and_draws_no_more() -> None:
    for wrapper in WRAPPERS:
        model = wrap(nn.Sequential(nn.BatchNorm1d(3)), wrapper)
        loader = iter(batches_of(2 + dist.get_rank(), seed=10 * dist.get_rank()))
        recalibrate_batch_norm(model, loader, max_batches=2)
        everywhere = [batch for rank in range(dist.get_world_size()) for batch in batches_of(2, seed=10 * rank)]
        assert has_statistics_of(norms(model)["0"], everywhere), wrapper
        assert len(list(loader)) == dist.get_rank()
        with pytest.raises(ValueError, match="got max_batches=0;"):
            recalibrate_batch_norm(model, everywhere, max_batches=0)


# Models and groups


def unread() -> Generator[Tensor, None, None]:
    pytest.fail("the loader was read")
    yield


def test_a_model_without_batch_norm_leaves_the_loader_alone() -> None:
    for layer in (nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3).eval()):
        batches = unread()
        recalibrate_batch_norm(nn.Sequential(nn.Linear(3, 3), layer), batches)
        assert inspect.getgeneratorstate(batches) == inspect.GEN_CREATED


def test_what_is_no_model_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="got model=str"):
        recalibrate_batch_norm("model", batches_of(1))  # type: ignore[arg-type]


@on_ranks(4, timeout_s=HANG_S)
def test_a_process_group_merges_its_own_ranks_only() -> None:
    rank = dist.get_rank()
    group: Any = [dist.new_group(members) for members in ([0, 2], [1, 3])][rank % 2]
    batches = [batches_of(1 + r, seed=10 * r) for r in range(4)]
    for name, model, options in (
        ("plain", build(), {"process_group": group}),
        ("DDP's own", DistributedDataParallel(build(), process_group=group), {}),
        ("DDP over all", DistributedDataParallel(build()), {"process_group": group}),
    ):
        recalibrate_batch_norm(model, batches[rank], **options)
        assert has_statistics_of(norms(model)["0"], batches[rank % 2] + batches[rank % 2 + 2]), name
    if rank % 2 == 0:  # the others need not even call
        model = build()
        recalibrate_batch_norm(model, batches[rank], process_group=group)
        assert has_statistics_of(model[0], batches[0] + batches[2])


# Communication


def all_reduce_sizes(model: nn.Module, batches: Iterable[Tensor], gathers: bool) -> list[int]:
    """Return the number of elements of every all-reduce of a pass."""
    sizes, all_reduce = [], dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        for name in (
            "all_gather_object",
            "broadcast",
            "gather",
            "reduce",
            "send",
            *([] if gathers else ["all_gather"]),
        ):
            patch.setattr(dist, name, lambda *args, **kwargs: pytest.fail("another collective"))
        recalibrate_batch_norm(model, batches)
    return sizes


@on_ranks(1, 2, 4)
def test_the_number_of_all_reduces_is_fixed() -> None:
    for wrapper in WRAPPERS:
        for num_layers in (1, 4):
            for num_batches in (1, 5):
                model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(num_layers)))
                sizes = all_reduce_sizes(wrap(model, wrapper), [random(4, 3)] * num_batches, wrapper == "fsdp1")
                *agreements, counts_and_means, deviations = sizes
                assert (counts_and_means, deviations) == (6 * num_layers, 3 * num_layers)
                assert len(agreements) == (2 + num_batches if wrapper in SHARDED else 2), wrapper
                assert max(agreements) <= 5, "a few integers"
