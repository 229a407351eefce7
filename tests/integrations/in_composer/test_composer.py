"""Composer's Trainer with `SWA`, beside Composer's own and against a plain loop over the same steps."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import composer.algorithms
import pytest
import torch
import torch.distributed as dist
from composer import Callback, ComposerModel, DataSpec, Event, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import dist_swa
from cases import read
from dist_swa import EMA, Equal, Window
from dist_swa.integrations.composer import SWA
from models import same_bits
from ranks import on_ranks, run_on_ranks
from small_run import averages_of, loader, network, samples, sgd

README = Path(__file__).parents[3] / "README.md"
EPOCHS, STEPS = 4, 8  # epochs of a run, optimizer steps of an epoch
SEVERAL: dict[str, Any] = {
    "swa_start": "0.3dur",
    "swa_end": None,
    "update_interval": "1ba",
    "rule": {"swa": Equal(), "ema": EMA(decay=0.8), "last": Window(3)},
    "transfer": "swa",
}


class Model(ComposerModel):  # type: ignore[misc]
    def __init__(self, with_norm: bool = False) -> None:
        super().__init__()
        self.net = network(with_norm)
        self.looks: list[dict[str, Tensor]] = []

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.net(batch[0])
        return out

    def loss(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        return (outputs - batch[1]).square().mean()

    def eval_forward(self, batch: Sequence[Tensor], outputs: Any = None) -> Tensor:
        self.looks.append(read(self.net))
        return self.forward(batch)


class Watch(Callback):  # type: ignore[misc]
    """Keeps what `look` says after every event of a kind, and the number of the batch."""

    def __init__(self, events: Sequence[Event], look: Callable[[], Any]) -> None:
        self.events, self.look = events, look
        self.seen: list[tuple[int, Any]] = []

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        if event in self.events:
            self.seen.append((int(state.timestamp.batch), self.look()))


class Stop(Callback):  # type: ignore[misc]
    """Breaks a run off."""

    def __init__(self, after: int) -> None:
        self.after = after

    def batch_end(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch == self.after:
            raise ZeroDivisionError


def trainer(model: Model, algorithms: Sequence[Any], *callbacks: Any, **options: Any) -> Trainer:
    if dist.is_initialized():  # what Composer's launcher would tell it
        os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
        os.environ |= {f"LOCAL_{name}": os.environ[name] for name in ("RANK", "WORLD_SIZE")}
        os.environ["NODE_RANK"] = "0"
    defaults: dict[str, Any] = {"progress_bar": False, "auto_log_hparams": False, "device": "cpu"}
    defaults |= {
        "max_duration": f"{EPOCHS}ep",
        "optimizers": sgd(model),
        "train_dataloader": loader(STEPS, dist.is_initialized()),
    }
    return Trainer(model=model, algorithms=algorithms, callbacks=callbacks, **(defaults | options))


def composers_own(*args: Any, **options: Any) -> Any:
    with pytest.warns(UserWarning, match="known issues when resuming"):
        return composer.algorithms.SWA(*args, **options)


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


class Look(NamedTuple):
    """What there is after an event."""

    num_averaged: int
    is_completed: bool
    average: dict[str, Tensor]


def look_at(swa: Any) -> Look:
    if not isinstance(swa, SWA):
        return Look(int(swa.swa_model.n_averaged), swa.swa_completed, read(swa.swa_model.module.net))
    if swa.swa is None or not swa.swa.started:
        return Look(0, False, {})
    average = {key.removeprefix("net."): value for key, value in swa.swa.average.full_state_dict().items()}
    return Look(swa.swa.num_averaged, swa.swa.completed, average)


def watched(length: str, *algorithms: Any) -> list[tuple[int, tuple[dict[str, Tensor], list[Look]]]]:
    """Return the weights and the state of every algorithm after every batch and epoch of a run."""
    model = Model()
    watch = Watch([Event.BATCH_END, Event.EPOCH_END], lambda: (read(model.net), [look_at(one) for one in algorithms]))
    trainer(model, algorithms, watch, max_duration=length).fit()
    return watch.seen


@pytest.mark.parametrize("case", SIDE_BY_SIDE)
def test_updates_averages_and_weights_are_composers(case: str) -> None:
    """In runs of their own, to the end; and in one run, until the first of both puts its average into the model."""
    arguments, length, updates = SIDE_BY_SIDE[case]
    close = partial(torch.testing.assert_close, rtol=2e-6, atol=2e-7)
    theirs, mine = watched(length, composers_own(**arguments)), watched(length, SWA(**arguments))
    counts = {batch: look.num_averaged for batch, (_, (look,)) in mine}
    assert [batch for batch in counts if counts[batch] > counts.get(batch - 1, 0)] == list(updates)
    num_completed = 0
    for (_, (their_weights, (their,))), (_, (weights, (look,))) in zip(theirs, mine, strict=True):
        assert (look.num_averaged, look.is_completed) == (their.num_averaged, their.is_completed)
        close(weights, their_weights)
        if look.num_averaged:
            close(look.average, their.average)
        num_completed += look.is_completed
    assert num_completed
    for _, (_, (their, look)) in watched(length, composers_own(**arguments), SWA(**arguments))[:-num_completed]:
        assert look.num_averaged == their.num_averaged
        if look.num_averaged:
            close(look.average, their.average)


def test_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(from composer import.*?)```", README.read_text(), re.DOTALL)
    model = Model()
    names: dict[str, Any] = {"model": model, "optimizer": sgd(model), "loader": loader(STEPS, dist.is_initialized())}
    exec(compile(code, "README.md", "exec"), names)
    (swa,) = names["trainer"].state.algorithms
    assert swa.swa.num_averaged == 2
    assert swa.swa.completed


def plain_loop() -> dict[str, Tensor]:
    """Return the averages of a run in a loop of its own."""
    model = DistributedDataParallel(network())
    optimizer = sgd(model)
    swa = dist_swa.SWA(model, optimizer, max_duration=f"{EPOCHS}ep", **SEVERAL)
    steps = []
    for _ in range(EPOCHS):
        for given, wanted in loader(STEPS, dist.is_initialized()):
            optimizer.zero_grad()
            (model(given) - wanted).square().mean().backward()
            optimizer.step()
            swa.step()
            steps.append(read(model))
        swa.end_epoch()
    averages = averages_of(swa)
    for name in steps[0]:  # 0.3 of four epochs are over when two have ended
        expected = torch.stack([step[name].double() for step in steps[2 * STEPS :]]).mean(0).float()
        torch.testing.assert_close(averages[f"swa.{name}"], expected)
    return averages


def run_and_be_killed(folder: Path) -> dict[str, Tensor]:
    """Compare an uninterrupted run with a plain loop, and break off another in its last epoch."""
    averages, model, swa = plain_loop(), Model(), SWA(**SEVERAL)
    trainer(model, [swa]).fit()
    assert same_bits(averages_of(swa.swa), averages)
    assert same_bits({f"swa.{name}": value for name, value in read(model.net).items()}, averages, read_names(averages))
    with pytest.raises(ZeroDivisionError):
        trainer(Model(), [SWA(**SEVERAL)], Stop(3 * STEPS + 2), save_folder=str(folder), save_interval="1ep").fit()
    return averages


def read_names(averages: Mapping[str, Tensor]) -> list[str]:
    return [name for name in averages if name.startswith("swa.")]


def resume(path: Path) -> dict[str, Tensor]:
    swa = SWA(**SEVERAL)
    warnings.filterwarnings("ignore", "The current world size")  # of Composer: it has a random state of each rank
    trainer(Model(), [swa], load_path=str(path)).fit()
    assert swa.swa is not None
    assert swa.swa.schedule.now.batches == EPOCHS * STEPS
    return averages_of(swa.swa)


def test_a_resumed_run_ends_as_a_plain_loop(tmp_path: Path) -> None:
    """Bit for bit on as many ranks, and but for the order of sums on others."""
    plain = run_on_ranks(run_and_be_killed, 2, tmp_path)
    path = tmp_path / f"ep3-ba{3 * STEPS}-rank0.pt"
    for averages in run_on_ranks(resume, 2, path):
        assert same_bits(averages, plain[0])
    for ranks in (1, 4):
        for averages in run_on_ranks(resume, ranks, path):
            torch.testing.assert_close(averages, plain[0])


def updates_of(swa: SWA) -> list[int]:
    """Return the batches of a run after which the average was updated."""
    data = DataSpec(loader(STEPS, dist.is_initialized()), get_num_tokens_in_batch=lambda batch: 5)
    watch = Watch([Event.BATCH_END, Event.EPOCH_END], lambda: look_at(swa).num_averaged)
    trainer(Model(), [swa], watch, train_dataloader=data).fit()
    counts = dict(watch.seen)
    return [batch for batch in counts if counts[batch] > counts.get(batch - 1, 0)]


def test_times_are_taken_in_any_unit() -> None:
    assert updates_of(SWA("3ba", "64sp", "2ba")) == [3, 5, 7]
    assert updates_of(SWA("64sp", "0.5dur", "16sp")) == [8, 10, 12, 14, 16]
    assert updates_of(SWA("1ep", "30ba", "10ba")) == [9, 19, 29]
    assert updates_of(SWA("15tok", "40tok", "10tok")) == [3, 5, 7]


@pytest.mark.parametrize("every_batch", [True, False])
def test_swa_lr_is_reached_whatever_a_scheduler_does(every_batch: bool) -> None:
    model, rates = Model(), list[float]()
    optimizer = sgd(model)
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    schedule: dict[str, Any] = {"swa_start": "20ba", "swa_end": None, "update_interval": "1ba"}
    swa = SWA(schedule_swa_lr=True, swa_lr=0.2, anneal_steps=2, anneal_strategy="LINEAR", **schedule)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    options = {"schedulers": scheduler, "step_schedulers_every_batch": every_batch}
    trainer(model, [swa], optimizers=optimizer, **options).fit()
    before = [0.1 * 0.9 ** (step if every_batch else step // STEPS) for step in range(21)]
    torch.testing.assert_close(rates, [*before[:20], (before[20] + 0.2) / 2, *[0.2] * (EPOCHS * STEPS - 21)])


def test_swa_lr_without_a_phase_is_ignored() -> None:
    with pytest.warns(UserWarning, match="swa_lr=0.5 is ignored without schedule_swa_lr=True"):
        swa = SWA(swa_lr=0.5, update_interval="1ba")
    model = Model()
    optimizer = sgd(model)
    trainer(model, [swa], optimizers=optimizer).fit()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_evaluation_sees_the_average_and_changes_nothing() -> None:
    looks, steps, ends = {}, {}, {}
    for evaluate in ("trained", "averaged"):
        model = Model()
        swa = SWA(swa_start="8ba", swa_end=None, update_interval="1ba", evaluate=evaluate)
        watch = Watch([Event.BATCH_END], lambda: read(model.net))  # noqa: B023 (called within this turn)
        trainer(model, [swa], watch, eval_dataloader=loader(STEPS, dist.is_initialized()), eval_interval="4ba").fit()
        looks[evaluate], steps[evaluate], ends[evaluate] = model.looks[::STEPS], watch.seen, read(model.net)
    assert all(same_bits(one, other) for (_, one), (_, other) in zip(*steps.values(), strict=True))
    assert same_bits(*ends.values())
    weights = [one for _, one in steps["trained"]]
    for batch, trained, averaged in zip(range(4, 33, 4), looks["trained"], looks["averaged"], strict=True):
        assert same_bits(trained, weights[batch - 1])
        seen = weights[7:batch] or weights[batch - 1 : batch]
        expected = {name: torch.stack([one[name].double() for one in seen]).mean(0).float() for name in trained}
        torch.testing.assert_close(averaged, expected)


def test_an_error_in_an_evaluation_does_not_mix_the_weights_up() -> None:
    class Fails(Model):
        def eval_forward(self, batch: Sequence[Tensor], outputs: Any = None) -> Tensor:
            super().eval_forward(batch)
            raise ZeroDivisionError

    model, swa = Fails(), SWA(swa_start="1ba", swa_end=None, update_interval="1ba")
    it = trainer(model, [swa], watch := Watch([Event.BATCH_END], lambda: read(model.net)))
    with pytest.raises(ZeroDivisionError):
        it.fit(duration="4ba", eval_dataloader=loader(STEPS, dist.is_initialized()), eval_interval="4ba")
    assert not same_bits(model.looks[0], watch.seen[-1][1])
    with pytest.raises(RuntimeError, match="inside swapped_in"):  # a checkpoint now would lose the trained weights
        swa.state_dict()
    it.fit(duration="4ba", eval_dataloader=[])
    weights = {batch: plain for batch, (plain, _) in watched("8ba")}
    assert len(watch.seen) == len(weights) == 8
    assert all(same_bits(seen, weights[batch]) for batch, seen in watch.seen)


@on_ranks(2)
def test_batch_norm_is_recalibrated() -> None:
    """At the end of the epoch in which the average has entered the model, and at the end where that never came."""

    def run(swa_end: str | None, length: str) -> list[tuple[int, Any]]:
        model = Model(with_norm=True)

        def look() -> Any:
            weight, bias = read(model.net)["0.weight"].double(), read(model.net)["0.bias"].double()
            seen = samples(STEPS).tensors[0].double() @ weight.T + bias
            norm: Any = model.net[1]
            return all(
                torch.allclose(statistic, expected.float(), rtol=1e-4, atol=1e-5)
                for statistic, expected in ((norm.running_mean, seen.mean(0)), (norm.running_var, seen.var(0)))
            )

        watch = Watch([Event.BATCH_END, Event.EPOCH_END, Event.FIT_END], look)
        trainer(model, [SWA("2ba", swa_end, "1ba")], watch, max_duration=length).fit()
        return [(batch, is_exact) for batch, is_exact in watch.seen if is_exact or batch == int(length[:-2])]

    assert (STEPS, True) in run("5ba", "12ba")
    assert run(None, "12ba")[-1] == (12, True)
    assert run("11ba", "12ba")[-1] == (12, True)
    assert run("11ba", "12ba")[0][0] == 12


def test_a_run_that_resumes_after_the_recalibration_keeps_its_statistics(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"swa_start": "2ba", "swa_end": "9ba", "update_interval": "1ba"}
    plain = Model(with_norm=True)
    trainer(plain, [SWA(**arguments)], max_duration="3ep").fit()
    before = trainer(Model(with_norm=True), [SWA(**arguments)], max_duration="2ep")
    before.fit()
    path = before.save_checkpoint(str(tmp_path / "last.pt"))
    resumed, swa = Model(with_norm=True), SWA(**arguments)
    trainer(resumed, [swa], max_duration="3ep", load_path=path).fit()
    assert swa.swa is not None
    assert swa.swa.completed
    assert same_bits(resumed.net.state_dict(), plain.net.state_dict())


def test_a_checkpoint_of_composers_own_swa_warns(tmp_path: Path) -> None:
    before = trainer(Model(), [composers_own()], max_duration="1ep")
    before.fit()
    path = before.save_checkpoint(str(tmp_path / "last.pt"))
    swa = SWA(swa_start="1ba", swa_end=None, update_interval="1ba")
    it = trainer(Model(), [swa], load_path=path)
    with pytest.warns(UserWarning, match="has no averaging state: averaging starts anew"):
        it.fit()
    assert swa.swa is not None
    assert swa.swa.num_averaged == (EPOCHS - 1) * STEPS
    assert swa.swa.schedule.now.batches == EPOCHS * STEPS


def test_several_fits_are_composers() -> None:
    """An end that has not come leaves the model alone; it comes in the second."""
    seen = []
    for build in (composers_own, SWA):
        model = Model()
        swa = build(swa_start="1ep", swa_end="3ep", update_interval="1ep")
        it = trainer(model, [swa], max_duration=None)
        with pytest.warns(UserWarning, match="swa_end=3ep has not come in 16 steps") if build is SWA else nullcontext():
            it.fit(duration="2ep")
        seen.append([read(model.net), look_at(swa)[:2]])
        it.fit(duration="2ep")
        seen[-1] += [read(model.net), look_at(swa)[:2]]
    assert seen[0][1] == seen[1][1] == (2, False)
    assert seen[0][3] == seen[1][3] == (3, True)
    torch.testing.assert_close(seen[0], seen[1], rtol=2e-6, atol=2e-7)


def test_a_further_fit_keeps_the_statistics_of_what_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    swa = SWA(update_interval="1ba")
    it = trainer(Model(with_norm=True), [swa], max_duration="5ba")  # the end, 0.97dur, comes with the end of the fit
    it.fit()
    assert swa.swa is not None
    assert swa.swa.completed
    monkeypatch.setattr(dist_swa, "recalibrate_batch_norm", lambda *_, **__: pytest.fail("a model that trains"))
    it.fit(duration="2ep")


def test_a_run_goes_on_after_its_end(tmp_path: Path) -> None:
    model, swa, states = Model(), SWA(swa_start="1ba", swa_end=None, update_interval="1ba"), []
    watch = Watch([Event.BATCH_END], lambda: states.append(read(model.net)))
    it = trainer(model, [swa], watch, max_duration="1ep")
    it.fit()
    path = it.save_checkpoint(str(tmp_path / "ended.pt"))
    it.fit(duration="1ep")
    longer = SWA(swa_start="1ba", swa_end=None, update_interval="1ba")
    resumed = Model()
    trainer(resumed, [longer], max_duration="2ep", load_path=path).fit()
    for swa_of, model_of in ((swa, model), (longer, resumed)):
        assert swa_of.swa is not None
        assert (swa_of.swa.num_averaged, swa_of.swa.completed) == (2 * STEPS, True)
        expected = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
        torch.testing.assert_close(read(model_of.net), expected)


def test_what_composer_shards_is_refused() -> None:
    for name in ("_fsdp_config", "tp_config"):
        it = trainer(Model(), [SWA()])
        setattr(it.state, name, SimpleNamespace())
        with pytest.raises(ValueError, match="needs a model in DDP or one process, got parallelism_config"):
            SWA().apply(Event.FIT_START, it.state, None)


def test_a_second_one_is_refused() -> None:
    with pytest.raises(RuntimeError, match="needs one SWA of dist_swa, got num_algorithms=2; pass several averages"):
        trainer(Model(), [SWA(), SWA()])


def test_what_evaluation_sees_is_checked() -> None:
    with pytest.raises(ValueError, match="evaluate needs to be 'averaged' or 'trained', got evaluate='both'"):
        SWA(evaluate="both")


def test_without_composer_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "composer.core", None)
    monkeypatch.delitem(sys.modules, "dist_swa.integrations.composer")
    with pytest.raises(ImportError, match=r"needs Composer, got .*; pip install --no-deps mosaicml"):
        importlib.import_module("dist_swa.integrations.composer")
