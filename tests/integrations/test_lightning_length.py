"""Lightning's Trainer with `SWACallback`, where the number of optimizer steps is not known before training."""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch import Tensor

from cases import read
from dist_swa.integrations.lightning import SWACallback
from lightning_run import STEPS, Module, fit, swa_of
from models import same_bits
from small_run import loss_of, mean_of, sgd


class Manual(Module):
    """Steps `num_optimizers` in the batches `first`, `first + every`, ... of each epoch."""

    def __init__(self, num_optimizers: int = 1, every: int = 1, first: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.num_optimizers, self.every, self.first = num_optimizers, every, first

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        if batch_idx % self.every != self.first:
            return
        optimizers: Any = self.optimizers()
        for optimizer in optimizers if self.num_optimizers > 1 else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(loss_of(self, batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = [self.net] if self.num_optimizers == 1 else [self.net[0], self.net[2:]]
        optimizers = [sgd(part) for part in parts]
        for optimizer in optimizers:
            optimizer.register_step_post_hook(lambda *_: self.steps.append(read(self.net)))
        return optimizers


gan = functools.partial(Manual, num_optimizers=2)
first_of_two = functools.partial(Manual, every=2)
last_of_two = functools.partial(Manual, every=2, first=1)
gan_first_of_two = functools.partial(Manual, num_optimizers=2, every=2)


@dataclass
class Run:
    build: Any
    epochs: int
    averaged: Sequence[int]  # the step, from 1, of each averaged model: the last step of its batch
    schedule: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    accumulation: dict[int, int] = field(default_factory=dict)  # of a GradientAccumulationScheduler


HALF = {"swa_start": "0.5dur"}
RUNS = {
    "one optimizer, 1 epoch": Run(Manual, 1, (3, 4)),
    "one optimizer, 2 epochs": Run(Manual, 2, (6, 7, 8)),
    "one optimizer, 3 epochs": Run(Manual, 3, (9, 10, 11, 12)),
    # a model that two optimizers made counts twice; of the first pair only the second step is in time
    "two optimizers, 1 epoch": Run(gan, 1, (6, 8, 8)),
    "two optimizers, 2 epochs": Run(gan, 2, (12, 14, 14, 16, 16)),
    "two optimizers, 3 epochs": Run(gan, 3, (18, 18, 20, 20, 22, 22, 24, 24)),
    # of 12 batches, numbers 9 to 12 are in time
    "first of two batches, 1 epoch": Run(first_of_two, 1, (2,)),
    "first of two batches, 2 epochs": Run(first_of_two, 2, (4,)),
    "first of two batches, 3 epochs": Run(first_of_two, 3, (5, 6)),
    "last of two batches, 1 epoch": Run(last_of_two, 1, (2,)),
    "last of two batches, 2 epochs": Run(last_of_two, 2, (3, 4)),
    "last of two batches, 3 epochs": Run(last_of_two, 3, (5, 6)),
    "two optimizers, first of two batches": Run(gan_first_of_two, 3, (10, 10, 12, 12)),
    "max_steps": Run(gan, -1, (6, 6, 8, 8, 10, 10), HALF, {"max_steps": 10}),
    "max_steps before max_epochs": Run(gan, 3, (6, 6, 8, 8, 10, 10), HALF, {"max_steps": 10}),
    "max_epochs before max_steps": Run(gan, 1, (6, 8, 8), {}, {"max_steps": 100}),
    "limit_train_batches": Run(Manual, 2, (2, 3, 4), HALF, {"limit_train_batches": 2}),
    "every epoch": Run(first_of_two, 2, (2, 4), {**HALF, "update_interval": "1ep"}),
    "swa_start in epochs": Run(Manual, 3, range(5, 13), {"swa_start": "1ep"}),
    "swa_end": Run(gan, 3, (12, 14, 14, 16, 16, 18, 18), {**HALF, "swa_end": "0.75dur"}),
    "max_duration": Run(Manual, 3, range(5, 13), {**HALF, "max_duration": "10ba"}),
    "steps_per_epoch": Run(last_of_two, 3, (5, 6), {"steps_per_epoch": 2}),
    "accumulation that rises": Run(Module, 3, (7, 8), accumulation={0: 1, 1: 2}),
    "accumulation that falls": Run(Module, 3, range(5, 10), {"swa_start": "5ba"}, accumulation={0: 4, 1: 1}),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_dur_is_the_part_of_the_batches_or_steps_that_the_trainer_knows(run: Run) -> None:
    module, swa = run.build(), SWACallback(**run.schedule)
    schedulers = [GradientAccumulationScheduler(run.accumulation)] if run.accumulation else []
    with warnings.catch_warnings():
        if "max_duration" in run.schedule:
            warnings.filterwarnings("ignore", "max_duration=10ba was reached before step 11")
        it = fit(module, [swa, *schedulers], max_epochs=run.epochs, **run.trainer)
    assert swa_of(swa).schedule.now.batches == it.global_step == len(module.steps)
    assert swa_of(swa).num_averaged == len(run.averaged)
    expected = mean_of([module.steps[step - 1] for step in run.averaged], "net.")
    torch.testing.assert_close(swa_of(swa).average.full_state_dict(), expected)


class Save(Callback):
    """Saves a checkpoint after a batch of the run, from 1, and raises ZeroDivisionError."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)
            raise ZeroDivisionError


RESUMED = {"two optimizers": gan, "first of two batches": first_of_two, "last of two batches": last_of_two}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("batch", [2, 3, 7, 8, 9, 11, 12])
@pytest.mark.parametrize("swa_end", [None, "0.8dur"])
@pytest.mark.parametrize("build", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_where_an_uninterrupted_one_is(
    build: Any, swa_end: str | None, batch: int, tmp_path: Path
) -> None:
    whole, killed, resumed = (SWACallback(swa_end=swa_end) for _ in range(3))
    fit(build(), [whole])
    with pytest.raises(ZeroDivisionError):
        fit(build(), [killed, Save(batch, tmp_path / "a.ckpt")])
    fit(build(), [resumed], resume=tmp_path / "a.ckpt")
    found, expected = swa_of(resumed), swa_of(whole)
    assert found.num_averaged == expected.num_averaged > 0
    assert found.schedule.state_dict() == expected.schedule.state_dict()
    if batch % STEPS == 0:  # within an epoch, Lightning continues with other data
        assert same_bits(found.average.full_state_dict(), expected.average.full_state_dict())


def test_an_average_that_is_switched_on_starts_at_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(gan(), [Save(8, tmp_path / "a.ckpt")])
    swa, module = SWACallback(), gan()
    with pytest.warns(UserWarning, match="averaging starts anew; the schedule starts at step 16$") as warned:
        fit(module, [swa], resume=tmp_path / "a.ckpt")
    assert sum("averaging" in str(warning.message) for warning in warned) == 1
    assert swa_of(swa).num_averaged == 8
    torch.testing.assert_close(read(module.net), mean_of([module.steps[i] for i in (1, 3, 5, 7)]))


# --- What is told


def schedule_warnings(module: Module, swa: SWACallback, **options: Any) -> list[str]:
    """Return the warnings of the schedule in a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [swa], **options)
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "max_duration" in text or "epoch has ended" in text]


@pytest.mark.parametrize("build", [Module, Manual])
def test_a_start_after_the_end_of_the_run_is_told_once(build: Any) -> None:
    (text,) = schedule_warnings(build(), SWACallback(swa_start="4ep"))
    assert text.startswith("averaging never starts: ")


@pytest.mark.parametrize("build", [Module, Manual])
def test_a_max_duration_that_is_shorter_than_the_run_is_told_once(build: Any) -> None:
    (text,) = schedule_warnings(build(), SWACallback(max_duration="5ba"))
    assert text.startswith("max_duration=5ba was reached before step 6; ")


@pytest.mark.parametrize("build", [Module, Manual, gan])
def test_epochs_that_lightning_ends_are_no_reason_to_warn(build: Any) -> None:
    swa = SWACallback(swa_start="1ba", update_interval="1ep")
    assert schedule_warnings(build(), swa) == []
    assert swa_of(swa).num_averaged == 3
