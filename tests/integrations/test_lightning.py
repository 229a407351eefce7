"""Lightning's Trainer with `SWACallback`: which steps are averaged, at which learning rate, and what is refused."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset

from cases import read
from dist_swa import checkpoint
from dist_swa.integrations.lightning import SWACallback
from lightning_run import SCHEDULE, STEPS, Module, Stop, fit, lightnings_own_warnings, swa_of
from markdown_blocks import code_for, execute
from models import same_bits
from ranks import on_ranks
from small_run import GLOBAL_BATCH, loader, loss_of, mean_of, samples, sgd


class Manual(Module):
    """Steps two optimizers in every second batch, and none in the others."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        if batch_idx % 2:
            return
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(loss_of(self, batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizers = [sgd(self.net[0]), sgd(self.net[2:])]
        for optimizer in optimizers:
            optimizer.register_step_post_hook(lambda *_: self.steps.append(read(self.net)))
        return optimizers


class NoLength(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(samples(5))


@dataclass
class Run:
    averaged: Sequence[int]  # the steps, from 1
    schedule: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], Module] = Module
    accumulation: dict[int, int] = field(default_factory=dict)  # of a GradientAccumulationScheduler
    batches: int | None = STEPS  # of an epoch; None: five, of a loader without a length


EVERY_EPOCH = {"swa_start": "1ep", "update_interval": "1ep"}
RUNS = {
    "max_epochs": Run(range(3, 13), SCHEDULE),
    "every epoch": Run((8, 12), EVERY_EPOCH | {"swa_start": "2ep"}),
    "max_steps": Run(range(2, 9), SCHEDULE, {"max_steps": 8, "max_epochs": -1}),
    "max_steps before max_epochs": Run(range(2, 9), SCHEDULE, {"max_steps": 8}),
    "max_epochs before max_steps": Run(range(3, 13), SCHEDULE, {"max_steps": 100}),
    "max_duration": Run(range(5, 13), {**SCHEDULE, "max_duration": "20ba"}),
    "limit_train_batches": Run(range(2, 7), SCHEDULE, {"limit_train_batches": 2}),
    # of five batches in an epoch the last one steps alone
    "accumulation": Run(range(3, 10), SCHEDULE, {"accumulate_grad_batches": 2}, batches=5),
    "accumulation, every epoch": Run((3, 6, 9), EVERY_EPOCH, {"accumulate_grad_batches": 2}, batches=5),
    "accumulation that changes": Run((4, 6, 8), EVERY_EPOCH, accumulation={0: 1, 1: 2}),
    "no length": Run((10, 15), EVERY_EPOCH | {"swa_start": "0.5dur"}, batches=None),
    "no length, max_steps": Run(range(4, 9), {"swa_start": "0.5dur"}, {"max_steps": 8}, batches=None),
    "manual": Run((6, 6, 8, 8, 10, 10, 12, 12), {"swa_start": "1ep"}, build=Manual),
    "manual, max_steps": Run((2, 4, 4, 6, 6, 8, 8), SCHEDULE, {"max_steps": 8, "max_epochs": -1}, build=Manual),
    "swa_end": Run(range(3, 9), {**SCHEDULE, "swa_end": "8ba"}),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_optimizer_step_counts_once(run: Run) -> None:
    module, swa = run.build(), SWACallback(**run.schedule)
    data = DataLoader(NoLength(), GLOBAL_BATCH) if run.batches is None else loader(run.batches, False)
    schedulers = [GradientAccumulationScheduler(run.accumulation)] if run.accumulation else []
    it = fit(module, [swa, *schedulers], data=data, validate=True, **run.trainer)
    assert swa_of(swa).schedule.now.batches == it.global_step == len(module.steps)
    assert swa_of(swa).num_averaged == len(run.averaged)
    assert swa_of(swa).completed
    expected = mean_of([module.steps[step - 1] for step in run.averaged], "net.")
    torch.testing.assert_close(swa_of(swa).average.full_state_dict(), expected)
    if "swa_end" not in run.schedule:
        torch.testing.assert_close(read(module), expected)


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with lightnings_own_warnings():
        execute(code_for("tests/integrations/test_lightning.py::test_the_readme_runs"), "README.md", names)
    checkpoint.export("averaged.ckpt", "first")  # as `dist-swa export` does
    first = torch.load("averaged.ckpt", weights_only=True)
    assert same_bits(load_file("first/model.safetensors"), first["state_dict"])
    assert first["dist_swa"]["num_averaged"] == 13  # from step 28 of 40 on
    best, averaged = names["best"], names["averaged"]
    monitored = float(best.best_model_score)
    assert float(names["trainer"].callback_metrics["val_loss"]) == pytest.approx(monitored, rel=1e-6)
    with torch.no_grad():
        averaged.eval()
        losses = [averaged(batch.to(averaged.device)).square().mean() for batch in names["loader"]]
    assert float(torch.stack(losses).mean()) == pytest.approx(monitored, rel=1e-6)
    checkpoint.export(best.best_model_path, "best")
    assert same_bits(load_file("best/model.safetensors"), averaged.state_dict())


def test_a_second_fit_starts_a_new_average() -> None:
    module, swa = Module(), SWACallback(**SCHEDULE)
    with pytest.raises(ZeroDivisionError):
        fit(module, [swa, Stop(7)])
    assert swa_of(swa).num_averaged == 5
    trained = module.steps[-1]
    module.steps.clear()
    fit(module, [swa], validate=True)
    assert same_bits(module.validated[0], trained)  # the sanity check comes before the new average
    torch.testing.assert_close(read(module.net), mean_of(module.steps[2:]))


class Scheduled(Module):
    """Records the learning rate of every step."""

    def __init__(self, build: Callable[[Any], Any], **options: Any) -> None:
        super().__init__()
        self.build, self.options, self.rates = build, options, list[float]()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.rates.append(optimizer.param_groups[0]["lr"]))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.build(optimizer), **self.options}}

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self.log("loss", 1.0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_the_swa_phase_overrides_a_scheduler(interval: str) -> None:
    module = Scheduled(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), interval=interval)
    fit(module, [SWACallback(swa_start="5ba", schedule_swa_lr=True, swa_lr=0.2, anneal_steps=2)])
    before = [0.1 * 0.5**step for step in range(6)] if interval == "step" else [0.1] * 4 + [0.05] * 2
    start = before[5]  # the scheduler steps before the phase begins, after the fifth step
    torch.testing.assert_close(module.rates, [*before[:5], (start + 0.2) / 2, *[0.2] * 6])


def test_the_swa_phase_overrides_a_plateau_scheduler() -> None:
    def build(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1.0)

    module = Scheduled(build, monitor="loss")
    fit(module, [SWACallback(schedule_swa_lr=True, swa_start="3ba")])
    torch.testing.assert_close(module.rates, [0.1] * 12)


def test_a_second_callback_is_refused() -> None:
    with pytest.raises(RuntimeError, match="needs one SWACallback, got num_callbacks=2; pass several averages"):
        fit(Module(), [SWACallback(), SWACallback()])


def test_another_strategy_is_refused() -> None:
    it: Any = SimpleNamespace(callbacks=[], strategy=object.__new__(DeepSpeedStrategy))
    with pytest.raises(ValueError, match=r"got strategy=DeepSpeedStrategy; use one of .*ModelParallelStrategy"):
        SWACallback().setup(it, Module(), "fit")


@on_ranks(2)
def test_a_model_that_is_sharded_later_is_refused() -> None:
    class Late(Module):
        def configure_model(self) -> None:
            fully_shard(self.net[3])

        def on_train_start(self) -> None:
            fully_shard(self.net[0])

    with pytest.raises(ValueError, match=r"layout of parameter='net.0.weight'; build the average after"):
        fit(Late(), [SWACallback(**SCHEDULE)], "fsdp2")


def test_a_phase_of_several_optimizers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs one optimizer, got num_optimizers=2; leave it out"):
        fit(Manual(), [SWACallback(schedule_swa_lr=True, **SCHEDULE)])


def test_an_unknown_value_of_evaluate_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluate needs to be 'averaged' or 'trained', got evaluate='both'"):
        SWACallback(evaluate="both")


def test_without_lightning_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "dist_swa.integrations.lightning")
    with pytest.raises(ImportError, match=r"needs lightning, got .*; pip install 'dist_swa\[lightning\]'"):
        importlib.import_module("dist_swa.integrations.lightning")
