"""The statistics are those of all samples on all ranks, with any number, size and kind of batches."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from batch_norm_models import (
    HANG_S,
    batches_of,
    build,
    dealt,
    in_every_wrapper,
    plain_name,
    random,
    statistics,
    unwrapped,
    without_distributed,
    wrap,
)
from batch_norm_oracle import assert_all_statistics, has_statistics_of, is_exact, rows, two_pass
from dist_swa import recalibrate_batch_norm
from ranks import on_ranks


class Case(NamedTuple):
    """Batch i of a rank, and the number of batches of a rank; the shape of a batch selects BatchNorm1d, 2d or 3d."""

    batch: Callable[[int, int], Tensor]
    num_batches: Callable[[int, int], int] = lambda rank, last: 3

    def batches(self, num_ranks: int) -> list[list[Tensor]]:
        """Return the batches of every rank."""
        return [[self.batch(r, i) for i in range(self.num_batches(r, num_ranks - 1))] for r in range(num_ranks)]


def x(rank: int, i: int, *shape: int) -> Tensor:
    return random(*shape, seed=100 * rank + i)


CASES = {
    "means 2, 12, 22": Case(lambda rank, i: x(rank, i, 8, 3) + 2 + 10 * rank),
    "scales": Case(lambda rank, i: x(rank, i, 8, 3) * 10.0**rank),
    "batch sizes": Case(lambda rank, i: x(rank, i, 2 + 5 * i + rank, 3) + 5 * i - rank),
    "batch counts": Case(lambda rank, i: x(rank, i, 6, 3) - 3 * rank, lambda rank, last: 1 + 2 * rank),
    "none on the first": Case(
        lambda rank, i: x(rank, i, 6, 3) + 4 * i, lambda rank, last: 4 if rank or not last else 0
    ),
    "all on the last": Case(lambda rank, i: x(rank, i, 6, 3) + 4 * i, lambda rank, last: 4 if rank == last else 0),
    "N(100, 1e-3)": Case(lambda rank, i: x(rank, i, 40, 3) * 1e-3 + 100),
    "N(-1e4, 1)": Case(lambda rank, i: x(rank, i, 40, 3) - 1e4),
    "N(1e3, 1e-2)": Case(lambda rank, i: x(rank, i, 40, 3) * 1e-2 + 1e3),
    "constant": Case(lambda rank, i: torch.full((5, 3), 1234.567)),
    "1d": Case(lambda rank, i: x(rank, i, 2, 3, 5 + i) + rank * i),
    "2d": Case(lambda rank, i: x(rank, i, 2, 3, 4, 2 + i) + rank * i),
    "2d, one image": Case(lambda rank, i: x(rank, i, 1, 3, 4, 4) + rank),
    "2d, channels last": Case(lambda rank, i: x(rank, i, 2, 3, 4, 5).to(memory_format=torch.channels_last) + 7 * rank),
    "3d": Case(lambda rank, i: x(rank, i, 2, 3, 2, 3, 2 + i) + rank * i),
}


@in_every_wrapper
@pytest.mark.parametrize("case", CASES)
@on_ranks(1, 2, 3, 4, timeout_s=HANG_S)
def test_statistics_are_those_of_all_samples_on_all_ranks(case: str, wrapper: str) -> None:
    batches = CASES[case].batches(dist.get_world_size())
    everywhere = [batch for own in batches for batch in own]
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[everywhere[0].ndim](3)
    recalibrate_batch_norm(wrap(nn.Sequential(layer), wrapper), batches[dist.get_rank()])
    assert has_statistics_of(layer, everywhere), (layer.running_mean, layer.running_var)
    assert layer.num_batches_tracked == len(everywhere)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_oracle_rejects_wrong_formulas(case: str, num_ranks: int) -> None:
    batches = CASES[case].batches(num_ranks)
    everywhere = [batch for own in batches for batch in own]
    mean, variance = two_pass(everywhere)
    assert is_exact(mean.float(), variance.float(), everywhere)
    wrong = {"biased": rows(everywhere).var(0, correction=0)} if "d" in case[:2] else {}
    if case in ("means 2, 12, 22", "batch counts", "scales"):
        wrong["mean over ranks"] = torch.stack([two_pass(own)[1] for own in batches]).mean(0)
    if case in ("means 2, 12, 22", "batch sizes", "2d"):
        wrong["mean over batches"] = torch.stack([two_pass([batch])[1] for batch in everywhere]).mean(0)
    if case in ("N(100, 1e-3)", "N(-1e4, 1)"):
        samples = rows(everywhere).float()
        wrong["difference of squares"] = samples.square().mean(0) - samples.mean(0).square()
    assert [name for name, other in wrong.items() if is_exact(mean, other, everywhere)] == []
    if case == "batch sizes":
        assert not is_exact(torch.stack([batch.mean(0) for batch in everywhere]).mean(0), variance, everywhere)


@in_every_wrapper
@on_ranks(1, 2, 3, 4)
def test_the_same_batches_give_the_same_bits_on_any_number_of_ranks(wrapper: str) -> None:
    alone, model = build(), wrap(build(), wrapper)
    with without_distributed():
        recalibrate_batch_norm(alone, batches_of(12))
    recalibrate_batch_norm(model, dealt(batches_of(12)))
    buffers, expected = dict(unwrapped(model).named_buffers()), dict(alone.named_buffers())
    assert {plain_name(name) for name in buffers} == expected.keys()
    assert [name for name, buffer in buffers.items() if not torch.equal(buffer, expected[plain_name(name)])] == []


# Layers of a model


@in_every_wrapper
@on_ranks(1, 2, 3)
def test_deeper_layers_have_the_statistics_of_their_inputs(wrapper: str) -> None:
    model, batches = wrap(build(), wrapper), batches_of(6)
    recalibrate_batch_norm(model, dealt(batches))
    assert_all_statistics(model, build(), batches)


class Variety(nn.Module):
    """A layer of every kind after dropout: not affine, called twice, cumulative, without statistics, not called."""

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


@in_every_wrapper
@on_ranks(1, 2, 3)
def test_every_kind_of_layer_in_one_model(wrapper: str) -> None:
    batches = batches_of(6)
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


class StaysInTraining(nn.Dropout):
    def train(self, mode: bool = True) -> "StaysInTraining":
        return self


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("dropout", [nn.Dropout, StaysInTraining])
def test_dropout_is_off(dropout: type[nn.Dropout], is_training: bool) -> None:
    model = nn.Sequential(dropout(0.5), nn.BatchNorm1d(3)).train(is_training)
    modes = [part.training for part in model.modules()]
    recalibrate_batch_norm(model, batches_of(3))
    assert has_statistics_of(model[1], batches_of(3))
    assert [part.training for part in model.modules()] == modes


def test_a_string_is_not_a_model() -> None:
    with pytest.raises(TypeError, match="got model=str"):
        recalibrate_batch_norm("model", batches_of(1))  # type: ignore[arg-type]
