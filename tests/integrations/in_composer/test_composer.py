"""Composer's Trainer with `SWA` beside Composer's own: updates, weights, times, and the learning rate."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import composer.algorithms
import pytest
import torch
import torch.distributed as dist
from composer import DataSpec, Event
from torch import Tensor

from cases import read
from composer_run import EPOCHS, STEPS, Model, Record, Status, composers_own, status_of, swa_of, trainer
from dist_swa import EMA
from dist_swa.integrations.composer import SWA
from models import same_bits
from small_run import loader, sgd

close = partial(torch.testing.assert_close, rtol=2e-6, atol=2e-7)


def test_arguments_and_defaults_are_composers() -> None:
    theirs = list(inspect.signature(composer.algorithms.SWA).parameters.values())
    mine = list(inspect.signature(SWA).parameters.values())
    assert [(one.name, one.default) for one in mine[: len(theirs)]] == [(one.name, one.default) for one in theirs]
    assert {one.kind for one in mine[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


# arguments of both, the length of the run, the batches after which both update
SIDE_BY_SIDE: dict[str, tuple[dict[str, Any], str, Sequence[int]]] = {
    "defaults": ({}, "4ep", (24, 32)),
    "its example": ({"swa_start": "1ep", "swa_end": "2ep", "update_interval": "5ba"}, "4ep", (9, 14)),
    "every epoch": ({"swa_start": "0.25dur", "swa_end": "0.8dur"}, "8ep", (16, 24, 32, 40, 48, 56)),
    "every 2 batches": ({"swa_start": "1ep", "swa_end": "3ep", "update_interval": "2ba"}, "4ep", range(9, 26, 2)),
    "a run in batches": ({"swa_start": "0.5dur", "swa_end": "0.9dur", "update_interval": "3ba"}, "20ba", (10, 13, 16)),
}
side_by_side = pytest.mark.parametrize(("arguments", "length", "updates"), SIDE_BY_SIDE.values(), ids=SIDE_BY_SIDE)
Entry = tuple[int, tuple[dict[str, Tensor], list[Status]]]


def recorded(length: str, *algorithms: Any) -> list[Entry]:
    """Return batch, weights and the status of every algorithm after every batch and epoch of a run."""
    model = Model()
    record = Record(lambda: (read(model.net), [status_of(one) for one in algorithms]), Event.BATCH_END, Event.EPOCH_END)
    trainer(model, algorithms, record, max_duration=length).fit()
    return record.entries


def changes(counts: dict[int, int]) -> list[int]:
    """Return the batches after which a count has grown."""
    return [batch for batch in counts if counts[batch] > counts.get(batch - 1, 0)]


@side_by_side
def test_runs_have_the_updates_averages_and_weights_of_composers(
    arguments: dict[str, Any], length: str, updates: Sequence[int]
) -> None:
    theirs, mine = recorded(length, composers_own(**arguments)), recorded(length, SWA(**arguments))
    assert changes({batch: status.num_averaged for batch, (_, (status,)) in mine}) == list(updates)
    for (_, (their_weights, (their,))), (_, (weights, (status,))) in zip(theirs, mine, strict=True):
        assert status[:2] == their[:2]
        close(weights, their_weights)
        if status.num_averaged:
            close(status.average, their.average)
    assert status.completed


@side_by_side
def test_in_one_run_both_have_the_same_average_until_it_enters_the_model(
    arguments: dict[str, Any], length: str, updates: Sequence[int]
) -> None:
    entries = recorded(length, composers_own(**arguments), SWA(**arguments))
    before = [(their, status) for _, (_, (their, status)) in entries if not (their.completed or status.completed)]
    assert before
    for their, status in before:
        assert status.num_averaged == their.num_averaged
        if status.num_averaged:
            close(status.average, their.average)


@pytest.mark.parametrize("build", [composers_own, SWA])
def test_a_fit_inside_the_first_epoch_keeps_the_trained_weights(build: Callable[[], Any]) -> None:
    """With the default arguments no model is averaged before an epoch has ended; ours warns."""
    model, plain = Model(with_norm=True), Model(with_norm=True)
    it = trainer(model, [build()], max_duration="5ba")
    message = r"no model was averaged in 5 steps: no epoch has ended, .*; the model keeps its trained weights"
    with pytest.warns(UserWarning, match=message) if build is SWA else nullcontext():
        it.fit()
    trainer(plain, [], max_duration="5ba").fit()
    assert same_bits(model.net.state_dict(), plain.net.state_dict())


def test_a_start_after_the_end_of_the_run_is_told_once() -> None:
    with pytest.warns(UserWarning, match="averag") as caught:
        trainer(Model(), [SWA("9ep", None, "1ba")], max_duration="1ep").fit()
    first, second = (str(warning.message) for warning in caught if "averag" in str(warning.message))
    assert first.startswith("averaging never starts: ")
    assert second.startswith("no model was averaged in")


def test_epochs_that_composer_ends_are_no_reason_to_warn() -> None:
    swa = SWA("0.1dur", None, "1ep")
    trainer(Model(), [swa], max_duration="16ba").fit()  # two epochs; the start is in the first
    assert swa_of(swa).num_averaged == 2


def test_several_fits_are_composers() -> None:
    """A `swa_end` that was not reached leaves the model alone; the second fit reaches it."""
    seen = []
    for build in (composers_own, SWA):
        model = Model()
        swa = build(swa_start="1ep", swa_end="3ep", update_interval="1ep")
        it = trainer(model, [swa], max_duration=None)
        with (
            pytest.warns(UserWarning, match="swa_end=3ep was not reached in 16 steps")
            if build is SWA
            else nullcontext()
        ):
            it.fit(duration="2ep")
        seen.append([read(model.net), status_of(swa)[:2]])
        it.fit(duration="2ep")
        seen[-1] += [read(model.net), status_of(swa)[:2]]
    assert seen[0][1] == seen[1][1] == (2, False)
    assert seen[0][3] == seen[1][3] == (3, True)
    close(seen[0], seen[1])


# swa_start, swa_end, update_interval, and the batches after which it updates; a batch has 8 samples and 5 tokens
TIMES = [
    ("3ba", "64sp", "2ba", [3, 5, 7]),
    ("64sp", "0.5dur", "16sp", [8, 10, 12, 14, 16]),
    ("1ep", "30ba", "10ba", [9, 19, 29]),
    ("15tok", "40tok", "10tok", [3, 5, 7]),
]


@pytest.mark.parametrize(("start", "end", "interval", "updates"), TIMES)
def test_times_have_any_unit(start: str, end: str, interval: str, updates: list[int]) -> None:
    data = DataSpec(loader(STEPS, dist.is_initialized()), get_num_tokens_in_batch=lambda batch: 5)
    swa = SWA(start, end, interval)
    record = Record(lambda: status_of(swa).num_averaged)
    trainer(Model(), [swa], record, train_dataloader=data).fit()
    assert changes(dict(record.entries)) == updates


@pytest.mark.parametrize("every_batch", [True, False])
def test_swa_lr_is_reached_whatever_a_scheduler_does(every_batch: bool) -> None:
    model, rates = Model(), list[float]()
    optimizer = sgd(model)
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    phase: dict[str, Any] = {"schedule_swa_lr": True, "swa_lr": 0.2, "anneal_steps": 2, "anneal_strategy": "LINEAR"}
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    options = {"schedulers": scheduler, "step_schedulers_every_batch": every_batch}
    trainer(model, [SWA("20ba", None, "1ba", **phase)], optimizers=optimizer, **options).fit()
    before = [0.1 * 0.9 ** (step if every_batch else step // STEPS) for step in range(21)]
    torch.testing.assert_close(rates, [*before[:20], (before[20] + 0.2) / 2, *[0.2] * (EPOCHS * STEPS - 21)])


def test_swa_lr_without_a_phase_is_ignored() -> None:
    with pytest.warns(UserWarning, match="swa_lr=0.5 is ignored without schedule_swa_lr=True"):
        swa = SWA(swa_lr=0.5, update_interval="1ba")
    model = Model()
    optimizer = sgd(model)
    trainer(model, [swa], optimizers=optimizer).fit()
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", ["_fsdp_config", "tp_config"])
def test_sharding_by_composer_is_refused(name: str) -> None:
    it = trainer(Model(), [SWA()])
    setattr(it.state, name, SimpleNamespace())
    with pytest.raises(ValueError, match="needs a model in DDP or one process, got parallelism_config"):
        SWA().apply(Event.FIT_START, it.state, None)


def test_a_second_one_is_refused() -> None:
    with pytest.raises(RuntimeError, match="needs one SWA of dist_swa, got num_algorithms=2; pass several averages"):
        trainer(Model(), [SWA(), SWA()])


def test_an_unknown_value_of_evaluate_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluate needs to be 'averaged' or 'trained', got evaluate='both'"):
        SWA(evaluate="both")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swa_strat": "1ep"}, "got swa_strat='1ep'; did you mean swa_start"),
        ({"swa_start": "soon"}, "swa_start='soon'"),
        ({"rule": 3}, "got rule=3"),
        ({"finalize_options": {"max_batch": 3}}, "did you mean max_batches"),
    ],
)
def test_bad_options_raise_where_the_algorithm_is_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        SWA(**options)


def test_without_composer_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "composer.core", None)
    monkeypatch.delitem(sys.modules, "dist_swa.integrations.composer")
    with pytest.raises(ImportError, match=r"needs Composer, got .*; pip install --no-deps mosaicml"):
        importlib.import_module("dist_swa.integrations.composer")


def test_composers_ema_is_a_rule() -> None:
    """As in "Coming from" of dist_swa/README.md."""
    model, theirs = Model(), composer.algorithms.EMA(half_life="3ba")
    ours = SWA("0ba", None, "1ba", rule=EMA(half_life="3ba"))
    averages: list[Any] = []
    record = Record(lambda: averages.append(status_of(ours).average))
    trainer(model, [theirs, ours], record, max_duration="1ep").fit()
    expected = {name.removeprefix("net."): value for name, value in theirs.ema_model.named_parameters_dict.items()}
    close(averages[-1], expected)
