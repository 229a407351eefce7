"""Uneven loaders, what is skipped or frozen, and recalibration inside of a swap and at the end of a run."""

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
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from batch_norm_oracle import (
    HANG_S,
    SHARDED,
    WRAPPERS,
    LoaderError,
    assert_all_statistics,
    assert_layerwise_statistics,
    batches_of,
    build,
    dealt,
    drawing,
    norms,
    random,
    scale,
    statistics,
    uneven,
    unwrapped,
    weights,
    wrap,
)
from dist_swa import SWA, ShardedAverage, recalibrate_batch_norm
from ranks import on_ranks

# Ranks with other numbers of batches, also none


@dataclasses.dataclass(frozen=True)
class Sample:
    given: Any
    label: str = "label"


def forward_of_sample(module: nn.Module, sample: Sample) -> None:
    assert isinstance(sample, Sample)
    assert sample.label == "label"
    module(sample.given)


@on_ranks(1, 2, 3, 4, timeout_s=2 * HANG_S)
def test_ranks_may_have_other_numbers_of_batches_and_none() -> None:
    batches = batches_of(7)
    for wrapper in (*WRAPPERS, "hsdp"):
        for layerwise in (False, True):
            model = wrap(build(), wrapper)
            calls: list[Sample] = []

            def forward(module: nn.Module, sample: Sample, calls: list[Sample] = calls) -> None:
                calls.append(sample)
                forward_of_sample(module, sample)

            samples = [Sample(batch) for batch in uneven(batches)]
            recalibrate_batch_norm(model, samples, forward=forward, layerwise=layerwise)
            check = assert_layerwise_statistics if layerwise else assert_all_statistics
            check(model, build(), batches)
            num_calls: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(num_calls, len(calls))
            if wrapper in SHARDED:
                assert len(set(num_calls)) == 1, "every forward on every rank"
            else:
                assert len(calls) == (1 + layerwise) * len(samples)


@on_ranks(2, timeout_s=HANG_S)
def test_ddp_inside_of_a_module_waits_for_nobody() -> None:
    ddp = DistributedDataParallel(build())
    batches = batches_of(3)
    recalibrate_batch_norm(nn.Sequential(ddp), batches if dist.get_rank() == 0 else [])
    assert_all_statistics(ddp, build(), batches)
    assert ddp.require_forward_param_sync


@on_ranks(1, 2, 3, 4, timeout_s=HANG_S)
def test_tensor_parallel_ranks_share_a_batch() -> None:
    """The ranks of a tensor-parallel group compute one forward: one that has run out is sent its peer's batch."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for wrapper in ("tp", "fsdp2+tp"):
        data = 2 if wrapper == "fsdp2+tp" and ranks % 2 == 0 else 1
        size, everyones = ranks // data, [batches_of(3, seed=10 * d) + batches_of(d, seed=90) for d in range(data)]
        everywhere = [batch for batches in everyones for batch in batches]
        groups: list[Any] = [dist.new_group([d * size + t for d in range(data)]) for t in range(size)]
        batches = everyones[rank // size]
        for case, mine in {
            "the same": batches,
            "fewer on all but one": batches if rank % size == size - 1 else batches[:1],
            "all on one": batches if rank % size == 0 else [],
            "none in one group": batches if rank >= size or data == 1 else [],
        }.items():
            model = wrap(build(), wrapper)
            recalibrate_batch_norm(model, mine, process_group=groups[rank % size])
            expected = everyones[-1] if case == "none in one group" else everywhere
            assert_all_statistics(model, build(), expected)


# Skipped, frozen


def test_skip_takes_patterns_and_functions() -> None:
    cases: list[tuple[Any, list[str]]] = [
        ("0", ["0"]),
        ("inner.*", ["inner.0", "inner.2"]),
        (["inner.0", "after"], ["inner.0", "after"]),
        (lambda name: name == "after", ["after"]),
        (["inner.2", [lambda name: name.startswith("a")]], ["inner.2", "after"]),
        ([], []),
        ("*", ["inner.0", "inner.2", "after"]),
    ]
    for skip, skipped in cases:
        model: Any = build() if skip == "0" else nn.ModuleDict({"inner": build(), "after": nn.BatchNorm1d(4)})
        if skip != "0":
            model.forward = lambda batch, model=model: model["after"](model["inner"](batch))
        for is_training in (True, False):
            before = statistics(model.train(is_training))
            if skip != "*":
                recalibrate_batch_norm(model, batches_of(3, seed=10 * is_training), skip=skip)
            else:
                recalibrate_batch_norm(model, unread(), skip=skip)
            after = statistics(model)
            changed = {name.rpartition(".")[0] for name in after if after[name] != before[name]}
            assert changed == set(norms(model)) - set(skipped), skip


def unread() -> Iterator[Tensor]:
    pytest.fail("the loader was read")
    yield


def test_a_skip_that_cannot_be_meant_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"skip needs a pattern that .* got skip='bakcbone\.\*'; as 0, 2"):
        recalibrate_batch_norm(build(), batches_of(1), skip="bakcbone.*")
    with pytest.raises(TypeError, match=r"skip needs a pattern such as .* got skip=7; leave it out"):
        recalibrate_batch_norm(build(), batches_of(1), skip=7)  # type: ignore[arg-type]


def frozen_backbone() -> nn.Sequential:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    return model


@on_ranks(1, 2)
def test_swa_remembers_which_layers_were_frozen(tmp_path: Any) -> None:
    for wrapper in WRAPPERS:
        for resumed in (False, True):
            model = wrap(frozen_backbone(), wrapper)
            swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
            model.train()
            norms(model)["0.1"].eval()
            before = statistics(model)
            assert swa.step()
            unwrapped(model).eval()  # an evaluation; DDP's own flag stays
            assert swa.step()  # an update in evaluation mode tells nothing
            if resumed:
                state = swa.state_dict()
                swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
                swa.load_state_dict(state)
            swa.finalize(dealt(batches_of(4)))
            after = statistics(model)
            changed = {name.rpartition(".")[0] for name in after if after[name] != before[name]}
            assert changed == {"2"}, wrapper
            swa.finalize(dealt(batches_of(4)), skip="2")  # and both kinds of skip together
            assert statistics(model)["0.1.running_mean"] == before["0.1.running_mean"]


def test_a_layer_that_trains_again_is_not_frozen() -> None:
    model = frozen_backbone()
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
    norms(model)["0.1"].eval()
    swa.step()
    model.train()
    swa.step()
    swa.finalize(batches_of(3))
    assert norms(model)["0.1"].num_batches_tracked == 3
    with pytest.raises(ValueError, match="skip needs a pattern"):
        swa.finalize(batches_of(3), skip="typo")


# Loaders


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.cat(batches_of(4))


def test_iterable_datasets_without_length() -> None:
    model = build()
    recalibrate_batch_norm(model, DataLoader(Stream(), batch_size=4), layerwise=True)
    assert_layerwise_statistics(model, build(), list(DataLoader(Stream(), batch_size=4)))


class Moving:
    """A batch that knows how to go to a device."""

    def __init__(self, given: Tensor) -> None:
        self.given, self.device = given, "elsewhere"

    def to(self, device: torch.device) -> "Moving":
        moved = Moving(self.given)
        moved.device = str(device)
        return moved


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


def test_a_progress_bar_on_the_first_rank(capsys: pytest.CaptureFixture[str]) -> None:
    for options, expected in (
        ({}, ""),
        ({"progress": True}, "4/4"),
        ({"progress": True, "max_batches": 3}, "3/3"),
        ({"progress": True, "layerwise": True}, "8batch"),
    ):
        recalibrate_batch_norm(build(), batches_of(4), **options)
        shown = capsys.readouterr().err
        assert expected in shown
        assert bool(shown) == bool(expected)


@on_ranks(2)
def test_other_ranks_show_no_progress_bar() -> None:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        recalibrate_batch_norm(build(), batches_of(4), progress=True)
    assert ("4/4" in shown.getvalue()) == bool(shown.getvalue()) == (dist.get_rank() == 0)


# The average: of `build()` and three times its weights, so twice its weights


@on_ranks(1, 2, 3)
def test_inside_swapped_in_statistics_stay_with_the_average() -> None:
    batches = batches_of(6)
    for wrapper in WRAPPERS:
        model = wrap(build(), wrapper)
        average = ShardedAverage(model)
        average.update()
        scale(model, 3.0)
        average.update()
        scale(model, 7.0)
        recalibrate_batch_norm(model, dealt(batches_of(6, seed=99)))
        own = statistics(model), weights(model)
        with average.swapped_in():
            recalibrate_batch_norm(model, dealt(batches))
            assert_all_statistics(model, scale(build(), 2.0), batches)
            inside, shown_inside = statistics(model), average.full_state_dict()
        assert (statistics(model), weights(model)) == own, wrapper
        shown = average.full_state_dict()
        assert bool(shown) == bool(shown_inside) == (wrapper == "plain" or dist.get_rank() == 0)
        if shown:
            assert inside == {k: shown[k].tolist() for k in inside} == {k: shown_inside[k].tolist() for k in inside}

        with pytest.raises(LoaderError), average.swapped_in():
            recalibrate_batch_norm(model, drawing(dealt(batches_of(6)), fail_at=1))
        assert (statistics(model), weights(model)) == own, wrapper
        with average.swapped_in():
            assert statistics(model) == inside, wrapper


@on_ranks(1, 2, 3)
def test_finalize_leaves_averaged_weights_and_their_statistics() -> None:
    batches = batches_of(6)
    for wrapper in WRAPPERS:
        model = wrap(build(), wrapper)
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
        assert weights(model) == weights(scale(wrap(build(), wrapper), 2.0)), wrapper
        assert_all_statistics(model, scale(build(), 2.0), batches)
