"""Lightning's Trainer with `SWACallback`: several optimizers, finders, several calls and several Trainers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from cases import read
from dist_swa.integrations.lightning import SWACallback
from lightning_run import EPOCHS, SCHEDULE, STEPS, Module, Stop, fit, lightnings_own_warnings, swa_of, trainer
from models import same_bits
from ranks import on_ranks
from small_run import GLOBAL_BATCH, loader, loss_of, mean_of, samples, sgd

# Several optimizers


class Gan(Module):
    """Steps a discriminator in every batch, twice, and then a generator in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.made: list[list[dict[str, Tensor]]] = [[], []]  # the weights after the steps of each optimizer

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        generator, discriminator = optimizers
        for optimizer in [discriminator, discriminator] + [generator] * (batch_idx % 2):
            optimizer.zero_grad()
            self.manual_backward(loss_of(self, batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizers = [sgd(self.net[0]), sgd(self.net[2:])]
        for optimizer, made in zip(optimizers, self.made, strict=True):
            optimizer.register_step_post_hook(lambda *_, made=made: made.append(read(self.net)))
        return optimizers


class AtEndOfBatch(Callback):
    """Records the weights after each batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(read(pl_module.net))


@pytest.mark.parametrize(
    ("optimizer", "num_steps", "batches"),
    [(0, 6, (6, 8, 10, 12)), (1, 24, (5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12))],
)
def test_the_steps_of_one_optimizer_are_counted(optimizer: int, num_steps: int, batches: Sequence[int]) -> None:
    """The average has a model for each step. Of a batch with two steps, the model is the one at its end."""
    module, record, swa = Gan(), AtEndOfBatch(), SWACallback(optimizer=optimizer, swa_start="0.4dur")
    fit(module, [swa, record])
    assert len(module.made[optimizer]) == swa_of(swa).schedule.now.batches == num_steps
    assert swa_of(swa).num_averaged == len(batches)
    torch.testing.assert_close(read(module.net), mean_of([record.weights[batch - 1] for batch in batches]))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("batch", [7, 8])
@pytest.mark.parametrize("schedule", [{"swa_start": "0.4dur"}, {"swa_start": "0.2dur", "swa_end": "0.5dur"}])
def test_a_resumed_run_counts_the_steps_of_one_optimizer(schedule: dict[str, Any], batch: int, tmp_path: Path) -> None:
    options = {"optimizer": 0, **schedule}
    module, swa = Gan(), SWACallback(**options)
    fit(module, [swa])
    with lightnings_own_warnings():
        it = trainer([SWACallback(**options), Stop(2 * batch + batch // 2)])
        with pytest.raises(ZeroDivisionError):
            it.fit(Gan(), loader(STEPS, False))
    it.save_checkpoint(tmp_path / "a.ckpt")
    resumed, again = SWACallback(**options), Gan()
    fit(again, [resumed], resume=tmp_path / "a.ckpt")
    assert swa_of(resumed).schedule.state_dict() == swa_of(swa).schedule.state_dict()
    assert swa_of(resumed).num_averaged == swa_of(swa).num_averaged
    if batch % STEPS == 0:  # within an epoch, Lightning continues with other data
        assert same_bits(read(again.net), read(module.net))


def test_a_second_fit_counts_on_the_steps_of_one_optimizer() -> None:
    swa, data, module = SWACallback(optimizer=0, swa_start="8ba"), loader(STEPS, False), Gan()
    it = fit(module, [swa], data=data, max_epochs=4)
    with lightnings_own_warnings():
        it.fit_loop.max_epochs = 5
        it.fit(module, data)
    assert swa_of(swa).schedule.now.batches == len(module.made[0]) == 10
    assert swa_of(swa).num_averaged == 2


class Stateless(Gan):
    """Has optimizers without a state, which make a step at a rate of 0 whenever their state is saved."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        super().training_step(batch, batch_idx)
        self.net.zero_grad()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2:])]
        for optimizer, made in zip(optimizers, self.made, strict=True):
            optimizer.register_step_post_hook(lambda *_, made=made: made.append(read(self.net)))
        return optimizers


class SaveEachBatch(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / str(trainer.global_step))


@on_ranks(2)
def test_steps_that_a_save_makes_do_not_count(tmp_path: Path) -> None:
    module, swa = Stateless(), SWACallback(optimizer=0, swa_start="1ba")
    fit(module, [swa, SaveEachBatch(tmp_path)], "fsdp2")
    assert len(module.made[0]) > 6
    assert swa_of(swa).schedule.now.batches == 6


def test_what_is_counted_of_several_optimizers_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    swa = SWACallback(**SCHEDULE)
    fit(Gan(), [swa])
    texts = [record.message for record in caplog.records if "SWACallback" in record.message]
    assert len(texts) == 1
    assert "counts the steps of all 2 optimizers, as trainer.global_step does; SWACallback(optimizer=0)" in texts[0]
    assert swa_of(swa).schedule.now.batches == 30
    caplog.clear()
    fit(Gan(), [SWACallback(optimizer=0, **SCHEDULE)])
    fit(Module(), [SWACallback(**SCHEDULE)])
    assert not [record for record in caplog.records if "SWACallback" in record.message]


@pytest.mark.parametrize("optimizer", [-1, True, "0", 1.0])
def test_another_optimizer_than_an_index_is_refused(optimizer: Any) -> None:
    with pytest.raises(ValueError, match=r"needs the index of an optimizer, got optimizer=.*; 0 is the first"):
        SWACallback(optimizer=optimizer)


def test_an_optimizer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="an optimizer, got optimizer=2 with num_optimizers=2; 0 is the first"):
        fit(Gan(), [SWACallback(optimizer=2)])


def test_the_phase_of_one_of_several_optimizers() -> None:
    module, swa = Gan(), SWACallback(optimizer=0, swa_start="2ba", schedule_swa_lr=True, swa_lr=0.2, anneal_steps=1)
    it = fit(module, [swa])
    assert [optimizer.param_groups[0]["lr"] for optimizer in it.optimizers] == [0.2, 0.1]


# Finders


class Tunable(Module):
    """Has its own loader, a learning rate and a batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate, self.batch_size = 0.1, 4

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(4), batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), self.learning_rate, momentum=0.9)
        optimizer.register_step_post_hook(lambda *_: self.steps.append(read(self.net)))
        return optimizer


class AtEpoch(LearningRateFinder):
    """Looks for a learning rate at the start of the second epoch, as the class in Lightning's documentation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    def on_fit_start(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            assert isinstance(pl_module, Tunable)
            self.before = read(pl_module.net)
            self.lr_find(trainer, pl_module)
            self.after = read(pl_module.net)
            pl_module.steps.clear()


FINDERS: dict[str, Any] = {
    "learning rate": lambda: LearningRateFinder(num_training_steps=5),
    "batch size": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=4, max_val=8),
}


@pytest.mark.parametrize("finder", FINDERS.values(), ids=FINDERS)
def test_a_finder_before_training_changes_nothing(finder: Any, tmp_path: Path) -> None:
    module, swa = Tunable(), SWACallback(swa_start="2ba")
    with lightnings_own_warnings():
        it = trainer([finder(), swa], default_root_dir=tmp_path)
        it.fit(module)
    steps = module.steps[-it.global_step :]
    assert swa_of(swa).schedule.now.batches == it.global_step == len(steps)
    assert swa_of(swa).num_averaged == len(steps) - 1
    torch.testing.assert_close(read(module.net), mean_of(steps[1:]))


def test_a_tuner_before_fit_changes_nothing(tmp_path: Path) -> None:
    module, swa = Tunable(), SWACallback(swa_start="2ba")
    with lightnings_own_warnings():
        it = trainer([swa], default_root_dir=tmp_path)
        Tuner(it).lr_find(module, num_training=5)
        Tuner(it).scale_batch_size(module, max_trials=2, steps_per_trial=1, max_val=8)
        module.steps.clear()
        it.fit(module)
    assert swa_of(swa).num_averaged == len(module.steps) - 1
    torch.testing.assert_close(read(module.net), mean_of(module.steps[1:]))


def test_a_finder_in_the_middle_of_averaging_restores_the_trained_weights(tmp_path: Path) -> None:
    module, swa, finder = Tunable(), SWACallback(swa_start="2ba"), AtEpoch(num_training_steps=3)
    with lightnings_own_warnings():
        it = trainer([finder, swa], default_root_dir=tmp_path)
        it.fit(module)
    assert finder.before
    assert same_bits(finder.after, finder.before)
    assert swa_of(swa).num_averaged == it.global_step - 1


# Several calls and Trainers


class Predicts(Module):
    def predict_step(self, batch: Sequence[Tensor]) -> Tensor:
        out: Tensor = self(batch[0])
        return out


def test_calls_around_fits_do_not_warn() -> None:
    module, swa, data = Predicts(), SWACallback(**SCHEDULE), DataLoader(samples(STEPS), batch_size=GLOBAL_BATCH)
    with lightnings_own_warnings():
        it = trainer([swa])
        for _ in range(2):
            it.validate(module, data, verbose=False)
            it.predict(module, data)
            module.steps.clear()
            it.fit_loop.max_epochs = it.current_epoch + EPOCHS
            it.fit(module, data, data)
        it.validate(module, data, verbose=False)
    assert same_bits(module.validated[-1], read(module.net))
    assert swa_of(swa).schedule.now.batches == it.global_step == 2 * EPOCHS * STEPS


def test_one_callback_serves_several_trainers(tmp_path: Path) -> None:
    swa, data = SWACallback(**SCHEDULE), loader(STEPS, False)
    ended = []
    for _ in range(2):
        module = Module()
        fit(module, [swa], validate=True)
        ended.append(read(module.net))
    stopped = Module()
    with lightnings_own_warnings():
        raised = trainer([swa, Stop(9)])
        with pytest.raises(ZeroDivisionError):
            raised.fit(stopped, data)
    raised.save_checkpoint(tmp_path / "stopped.ckpt")
    module = Module()
    fit(module, [swa], validate=True)
    ended.append(read(module.net))
    assert same_bits(ended[0], ended[1])
    assert same_bits(ended[0], ended[2])
    saved = torch.load(tmp_path / "stopped.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(saved, mean_of(stopped.steps[2:], "net."))
    raised.save_checkpoint(tmp_path / "again.ckpt")  # the callback has left this Trainer
    saved = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert same_bits({name.removeprefix("net."): value for name, value in saved.items()}, stopped.steps[-1])


# Bad options


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"swa_strt": "1ep"}, "got swa_strt='1ep'; did you mean swa_start"),
    "time": ({"swa_start": "soon"}, "got swa_start='soon'"),
    "unit": ({"swa_start": "100sp"}, "needs a schedule in ep, ba or dur"),
    "rule": ({"rule": 3}, "got rule=3"),
    "name": ({"rule": {"a": None}}, "got rule=None"),
    "buffers": ({"buffers": 3}, "got buffers=3"),
    "recalibrate_on": ({"recalibrate_on": 3}, "batches that can be read again, got recalibrate_on=3"),
    "an iterator": ({"recalibrate_on": iter([1])}, "batches that can be read again"),
    "no mapping": ({"finalize_options": 3}, "finalize_options needs a mapping, got finalize_options=3"),
    "device": ({"device": "nonsense"}, "needs a device, got device='nonsense'"),
    "type of device": ({"device": 3.5}, "needs a device, got device=3.5"),
    "group": ({"process_group": 3}, "got process_group=3"),
    "finalize_options": ({"finalize_options": {"forwad": print}}, "did you mean forward"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_options_raise_where_the_callback_is_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        SWACallback(**options)


def test_counts_of_one_optimizer_are_those_of_the_trainer() -> None:
    swa, data = SWACallback(optimizer=0, swa_start="1ba"), loader(STEPS, False)
    first = Gan()
    it = fit(first, [swa], data=data)
    fit(Gan(), [swa], data=data, max_epochs=1)
    with lightnings_own_warnings():
        it.fit_loop.max_epochs = EPOCHS + 1
        it.fit(first, data)
    assert swa_of(swa).schedule.now.batches == 2  # of this fit: another Trainer came between
