"""Lightning's Trainer with `SWACallback`: validation of averaged weights, and the BatchNorm statistics at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from cases import read
from dist_swa.integrations.lightning import SWACallback
from lightning_run import SCHEDULE, STEPS, STRATEGIES, Module, Stop, fit, lightnings_own_warnings, swa_of, trainer
from models import same_bits
from ranks import on_ranks
from small_run import GLOBAL_BATCH, loader, loss_of, mean_of, samples, statistics_of

both_strategies = pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])


@both_strategies
@on_ranks(2)
def test_validation_uses_the_average_and_changes_nothing(strategy: str) -> None:
    trained, averaged = Module(), Module()
    for module, evaluate in ((trained, "trained"), (averaged, "averaged")):
        fit(module, [SWACallback(evaluate=evaluate, **SCHEDULE)], strategy, validate=True, val_check_interval=2)
    assert all(same_bits(one, other) for one, other in zip(averaged.steps, trained.steps, strict=True))
    assert same_bits(read(averaged.net), read(trained.net))
    assert same_bits(averaged.validated[0], trained.validated[0])
    # After the two batches of the sanity check: the weights in the first batch of each validation.
    seen_trained, seen_averaged = trained.validated[2::STEPS], averaged.validated[2::STEPS]
    for step, weights in zip(range(2, 13, 2), seen_trained, strict=True):
        assert same_bits(weights, trained.steps[step - 1])
    assert same_bits(seen_averaged[0], averaged.steps[1])  # averaging has not started
    for step, weights in zip(range(4, 13, 2), seen_averaged[1:], strict=True):
        torch.testing.assert_close(weights, mean_of(averaged.steps[2:step]))


def test_validate_outside_fit_uses_the_trained_weights() -> None:
    module, swa = Module(), SWACallback(**SCHEDULE)
    with pytest.raises(ZeroDivisionError):
        fit(module, [swa, Stop(7)])
    with lightnings_own_warnings():
        trainer([swa]).validate(module, loader(STEPS, False), verbose=False)
    assert same_bits(module.validated[-1], module.steps[-1])


class Fails(Module):
    """Raises in the validation after the first epoch."""

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if len(self.steps) == STEPS and dist.get_rank() == 0:
            raise ZeroDivisionError
        if len(self.steps) == STEPS:
            raise FloatingPointError


@both_strategies
@on_ranks(2)
def test_an_error_in_a_validation_restores_the_trained_weights(strategy: str, tmp_path: Path) -> None:
    module = Fails()
    keep = ModelCheckpoint(tmp_path, save_on_exception=True, filename="{step}")
    with pytest.raises((ZeroDivisionError, FloatingPointError)):
        fit(module, [SWACallback(**SCHEDULE), keep], strategy, validate=True)
    torch.testing.assert_close(module.validated[-1], mean_of(module.steps[2:]))
    assert same_bits(read(module.net), module.steps[-1])
    (path,) = tmp_path.iterdir()  # one checkpoint of both ranks
    swa = SWACallback(**SCHEDULE)
    it = fit(Module(), [swa], strategy, resume=path)
    assert swa_of(swa).num_averaged + 2 == swa_of(swa).schedule.now.batches == it.global_step


class Saves(Module):
    """Saves a checkpoint in the validation after the first epoch, as Lightning does on a signal of SLURM."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if len(self.steps) == STEPS and batch_idx == 0:
            self.trainer.save_checkpoint(self.path)


class Resumed(Callback):
    """Records weights and average at the start of training."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Module)
        (swa,) = (one for one in trainer.callbacks if isinstance(one, SWACallback))  # type: ignore[attr-defined]
        self.weights, self.average = read(pl_module.net), swa_of(swa).average.full_state_dict()


@pytest.mark.parametrize("strategy", STRATEGIES)
@on_ranks(2)
def test_a_checkpoint_during_a_validation_has_both_weights(strategy: str, tmp_path: Path) -> None:
    module, resumed, scored = Saves(tmp_path / "saved"), Resumed(), Module()
    fit(module, [SWACallback(**SCHEDULE)], strategy, validate=True)
    expected = mean_of(module.steps[2:STEPS])
    torch.testing.assert_close(module.validated[2], expected)  # after two of the sanity check
    assert same_bits(module.validated[3], module.validated[2])  # the validation goes on as before
    fit(Module(), [SWACallback(**SCHEDULE), resumed], strategy, resume=tmp_path / "saved")
    assert same_bits(resumed.weights, module.steps[STEPS - 1])
    with lightnings_own_warnings():
        trainer([], strategy).validate(scored, loader(STEPS, True), tmp_path / "saved", verbose=False)
    assert same_bits(scored.validated[0], module.validated[2])
    if dist.get_rank() == 0:
        torch.testing.assert_close(resumed.average, {f"net.{name}": value for name, value in expected.items()})


class Shifted(Module):
    """Changes every batch before and after it goes to the device."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 3, batch[1]]


@both_strategies
@on_ranks(2)
def test_batch_norm_is_recalibrated_from_the_training_batches(strategy: str) -> None:
    module = Shifted(with_norm=True)
    fit(module, [SWACallback(**SCHEDULE)], strategy, validate=True, limit_train_batches=3)
    given = samples(STEPS).tensors[0][: 3 * GLOBAL_BATCH] * 2 + 3
    mean, variance = statistics_of(read(module.net), given)
    torch.testing.assert_close(module.net[1].running_mean, mean)
    torch.testing.assert_close(module.net[1].running_var, variance)
    assert module.training


class TwoLoaders(Module):
    """Takes batches of two loaders at once, and has no ``forward``."""

    forward = pl.LightningModule.forward

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:  # type: ignore[override]
        return loss_of(self.net, batch["a"]) + loss_of(self.net, batch["b"])


class RecordMeans(Callback):
    """Records the running mean of BatchNorm after each step."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.means.append(pl_module.net[1].running_mean.clone())


def test_batch_norm_without_a_forward_warns_at_the_start() -> None:
    data = {"a": loader(STEPS, False), "b": loader(STEPS, False)}
    message = r"BatchNorm needs a forward at the end, got TwoLoaders without one; .*options="
    with pytest.warns(UserWarning, match=message), pytest.raises(ZeroDivisionError):
        fit(TwoLoaders(with_norm=True), [SWACallback(**SCHEDULE), Stop(1)], data=data)


def test_batch_norm_is_recalibrated_from_several_loaders() -> None:
    module = TwoLoaders(with_norm=True)
    options = {"forward": lambda module, batch: module.net(torch.cat([batch["a"][0], batch["b"][0]]))}
    swa = SWACallback(**SCHEDULE, finalize_options=options)
    fit(module, [swa], data={"a": loader(STEPS, False), "b": loader(STEPS, False)})
    norm: Any = module.net[1]
    mean, variance = statistics_of(read(module.net), torch.cat([samples(STEPS).tensors[0]] * 2))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [Module, TwoLoaders])
def test_averaged_statistics_are_kept_at_the_end(build: Any) -> None:
    module, swa = build(with_norm=True), SWACallback(**SCHEDULE, buffers=["*.running_*"])
    record = RecordMeans()
    is_two = build is TwoLoaders
    fit(module, [swa, record], data={"a": loader(STEPS, False), "b": loader(STEPS, False)} if is_two else None)
    torch.testing.assert_close(module.net[1].running_mean, torch.stack(record.means[2:]).mean(0))
