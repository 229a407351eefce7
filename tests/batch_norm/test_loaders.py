"""Kinds of batches and loaders, devices, progress bars, and recalibration of an average."""

import contextlib
import dataclasses
import io
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from batch_norm_models import (
    LoaderError,
    batches_of,
    build,
    dealt,
    drawing,
    in_every_wrapper,
    layers_of,
    random,
    scale,
    statistics,
    weights,
    wrap,
)
from batch_norm_oracle import assert_all_statistics, assert_layerwise_statistics, has_statistics_of
from dist_swa import SWA, ShardedAverage, recalibrate_batch_norm
from ranks import on_ranks


@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_empty_batch_adds_nothing(position: int) -> None:
    layer, batches = nn.BatchNorm1d(3), [random(8, 3), random(8, 3) + 5]
    batches.insert(position, torch.empty(0, 3))
    recalibrate_batch_norm(nn.Sequential(layer), batches)
    assert has_statistics_of(layer, batches)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, given: Tensor, *, shift: float = 0.0) -> Any:
        return self.norm(input=given + shift)


def forward_of_labelled(module: nn.Module, batch: tuple[str, Tensor]) -> None:
    module(batch[1], shift=5.0)


KINDS: dict[str, tuple[Callable[[Tensor], Any], Any, float]] = {
    "tensor": (lambda given: given, None, 0.0),
    "tuple": (lambda given: (given, torch.zeros(4)), None, 0.0),
    "list": (lambda given: [given, "label"], None, 0.0),
    "dict": (lambda given: {"given": given, "shift": 5.0}, None, 5.0),
    "forward=": (lambda given: ("label", given), forward_of_labelled, 5.0),
}


@pytest.mark.parametrize("loader", [list, iter])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_batches(kind: str, loader: Callable[[Any], Any]) -> None:
    make, forward, shift = KINDS[kind]
    model = Shifted()
    recalibrate_batch_norm(model, loader([make(batch) for batch in batches_of(3)]), forward=forward)
    assert has_statistics_of(model.norm, [batch + shift for batch in batches_of(3)])


def test_batches_of_several_kinds() -> None:
    model, given = Shifted(), batches_of(3)
    recalibrate_batch_norm(model, [given[0], (given[1], "label"), {"given": given[2]}])
    assert has_statistics_of(model.norm, given)


@pytest.mark.parametrize("batch", ["text", 7, None, (), ("text", torch.ones(2, 3)), [[torch.ones(2, 3)]]])
def test_another_kind_of_batch_is_a_type_error(batch: Any) -> None:
    with pytest.raises(TypeError, match=f"got batch={type(batch).__name__}; pass forward="):
        recalibrate_batch_norm(build(), [batch])


@in_every_wrapper
@on_ranks(2, 3)
def test_max_batches_is_per_rank_and_reads_no_more(wrapper: str) -> None:
    model = wrap(nn.Sequential(nn.BatchNorm1d(3)), wrapper)
    loader = iter(batches_of(2 + dist.get_rank(), seed=10 * dist.get_rank()))
    recalibrate_batch_norm(model, loader, max_batches=2)
    everywhere = [batch for rank in range(dist.get_world_size()) for batch in batches_of(2, seed=10 * rank)]
    assert has_statistics_of(layers_of(model)["0"], everywhere)
    assert len(list(loader)) == dist.get_rank()


def test_max_batches_of_zero_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="got max_batches=0;"):
        recalibrate_batch_norm(build(), batches_of(1), max_batches=0)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.cat(batches_of(4))


def test_an_iterable_dataset_without_length() -> None:
    model = build()
    recalibrate_batch_norm(model, DataLoader(Stream(), batch_size=4), layerwise=True)
    assert_layerwise_statistics(model, build(), list(DataLoader(Stream(), batch_size=4)))


class Moving:
    """A batch with a `to` method."""

    def __init__(self, given: Tensor) -> None:
        self.given, self.device = given, "elsewhere"

    def to(self, device: torch.device) -> "Moving":
        moved = Moving(self.given)
        moved.device = str(device)
        return moved


@dataclasses.dataclass(frozen=True)
class Sample:
    given: Any
    label: str = "label"


Pair = namedtuple("Pair", ["first", "second"])


def test_batches_go_to_the_models_device() -> None:
    seen: list[Any] = []

    def forward(module: nn.Module, batch: Any) -> None:
        seen.append(batch)
        module(random(4, 3))

    moving = Moving(random(4, 3))
    batches = [moving, (moving, 1), [moving], {"a": {"b": moving}}, Pair(moving, 2), Sample(moving), "text"]
    recalibrate_batch_norm(build(), batches, forward=forward)
    alone, pair, listed, mapped, named, sample, text = seen
    assert [type(batch) for batch in seen] == [Moving, tuple, list, dict, Pair, Sample, str]
    for moved in (alone, pair[0], listed[0], mapped["a"]["b"], named.first, sample.given):
        assert moved.device == "cpu"
    assert (pair[1], named.second, sample.label, text) == (1, 2, "label", "text")
    assert moving.device == "elsewhere"


PROGRESS: dict[str, tuple[dict[str, Any], str]] = {
    "off": ({}, ""),
    "on": ({"progress": True}, "4/4"),
    "max_batches": ({"progress": True, "max_batches": 3}, "3/3"),
    "layerwise": ({"progress": True, "layerwise": True}, "8batch"),
    "layerwise, max_batches": ({"progress": True, "layerwise": True, "max_batches": 3}, "6batch"),
}


@pytest.mark.parametrize("case", PROGRESS)
def test_a_progress_bar_on_the_first_rank(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, expected = PROGRESS[case]
    recalibrate_batch_norm(build(), batches_of(4), **options)
    shown = capsys.readouterr().err
    assert expected in shown
    assert bool(shown) == bool(expected)


@on_ranks(2)
def test_other_ranks_show_no_progress_bar() -> None:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        recalibrate_batch_norm(build(), batches_of(4), progress=True)
    assert ("4/4" in shown.getvalue()) == bool(shown.getvalue()) == (dist.get_rank() == 0)


# The average of `build()` and of three times its weights has twice its weights.


@in_every_wrapper
@on_ranks(1, 2, 3)
def test_statistics_written_inside_swapped_in_stay_with_the_average(wrapper: str) -> None:
    batches, model = batches_of(6), wrap(build(), wrapper)
    average = ShardedAverage(model)
    average.update()
    scale(model, 3.0)
    average.update()
    scale(model, 7.0)
    recalibrate_batch_norm(model, dealt(batches_of(6, seed=99)))
    trained = statistics(model), weights(model)
    with average.swapped_in():
        recalibrate_batch_norm(model, dealt(batches))
        assert_all_statistics(model, scale(build(), 2.0), batches)
        inside, full_inside = statistics(model), average.full_state_dict()
    assert (statistics(model), weights(model)) == trained
    full = average.full_state_dict()
    assert bool(full) == bool(full_inside) == (wrapper == "plain" or dist.get_rank() == 0)
    if full:
        assert inside == {k: full[k].tolist() for k in inside} == {k: full_inside[k].tolist() for k in inside}

    with pytest.raises(LoaderError), average.swapped_in():
        recalibrate_batch_norm(model, drawing(dealt(batches_of(6)), fail_at=1))
    assert (statistics(model), weights(model)) == trained
    with average.swapped_in():
        assert statistics(model) == inside


@in_every_wrapper
@on_ranks(1, 2, 3)
def test_finalize_leaves_averaged_weights_and_their_statistics(wrapper: str) -> None:
    batches, model = batches_of(6), wrap(build(), wrapper)
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
    assert swa.step()
    scale(model, 3.0)
    assert swa.step()
    scale(model, 7.0)
    before = statistics(model), weights(model)
    with pytest.raises(ValueError, match="needs batches for a model with BatchNorm, got batches=None"):
        swa.finalize()
    assert (statistics(model), weights(model), swa.completed) == (*before, False)

    swa.finalize(dealt(batches * 2), max_batches=len(dealt(batches)))
    assert swa.completed
    assert weights(model) == weights(scale(wrap(build(), wrapper), 2.0))
    assert_all_statistics(model, scale(build(), 2.0), batches)
