"""Loaders, devices, progress bars, and recalibration of an average."""

import contextlib
import dataclasses
import io
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from batch_norm_oracle import (
    LoaderError,
    assert_all_statistics,
    assert_layerwise_statistics,
    batches_of,
    build,
    dealt,
    drawing,
    in_every_wrapper,
    random,
    scale,
    statistics,
    weights,
    wrap,
)
from dist_swa import SWA, ShardedAverage, recalibrate_batch_norm
from ranks import on_ranks


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
