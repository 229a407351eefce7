"""Lightning's Trainer with `SWACallback`: a checkpoint has the averaged model that was scored."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from cases import read
from dist_swa import EMA, Equal, Window
from dist_swa.integrations.lightning import SWACallback
from lightning_run import (
    EPOCHS,
    STEPS,
    STRATEGIES,
    Module,
    Stop,
    fit,
    lightnings_own_warnings,
    trainer,
)
from models import same_bits
from ranks import on_ranks, run_on_ranks
from small_run import loader, loss_of, mean_of, samples, statistics_of

LATE: dict[str, Any] = {"swa_start": "6ba"}  # in the middle of the second epoch


class Scored(Module):
    """Logs the loss of each validation, and keeps the values."""

    def __init__(self, with_norm: bool = True, frozen: bool = False) -> None:
        super().__init__(with_norm)
        self.net[2].requires_grad_(not frozen)
        self.losses: list[Tensor] = []
        self.scores: list[float] = []

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        loss = loss_of(self, batch)
        self.losses.append(loss)
        self.log("val_loss", loss, sync_dist=True)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self.scores.append(torch.stack(self.losses).mean().item())
        self.losses.clear()


def score(
    module: Scored, strategy: str, path: Any = None, by: str = "validate", callbacks: Sequence[Callback] = ()
) -> float:
    """Return the loss of `module`, or of the checkpoint `path`, in a new Trainer."""
    with lightnings_own_warnings():
        it = trainer([*callbacks], strategy)
        (found,) = getattr(it, by)(module, loader(STEPS, bool(strategy)), ckpt_path=path, verbose=False)
    return float(found["val_loss"])


def full(module: Scored) -> dict[str, Tensor]:
    state: dict[str, Any] = get_model_state_dict(module.net, options=StateDictOptions(full_state_dict=True))
    return {name: value.clone() for name, value in state.items()}


class Record(Callback):
    """Records the weights and buffers at the start of training and after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.states.append(full(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.states.append(full(pl_module))


def best_of(folder: Path, **options: Any) -> ModelCheckpoint:
    defaults: dict[str, Any] = {"monitor": "val_loss", "mode": "max", "save_top_k": -1, "filename": "{step}"}
    return ModelCheckpoint(folder, **(defaults | options))


def train(folder: Path, strategy: str) -> tuple[str, float, list[dict[str, Tensor]]]:
    """Train and stop after step 10; return the best checkpoint, its score, and the states after all steps of a run."""
    whole = Record()
    fit(Scored(), [SWACallback(**LATE), whole], strategy, validate=True)
    keep = best_of(folder)
    with pytest.raises(ZeroDivisionError):
        fit(Scored(), [SWACallback(**LATE), keep, Stop(10)], strategy, validate=True)
    assert keep.best_model_score is not None
    return keep.best_model_path, float(keep.best_model_score), whole.states


def resume_and_score(path: str, strategy: str) -> tuple[list[dict[str, Tensor]], float, dict[str, float]]:
    """Resume from a checkpoint of averaged weights; return the states after each step, and scores of the best."""
    module, record, swa = Scored(), Record(), SWACallback(**LATE)
    keep = best_of(Path(path).parent)
    it = fit(module, [swa, record, keep], strategy, validate=True, resume=Path(path))
    scores = {}
    with lightnings_own_warnings():
        (found,) = it.validate(ckpt_path="best", dataloaders=loader(STEPS, bool(strategy)), verbose=False)
        scores["the same Trainer"] = float(found["val_loss"])
        (found,) = it.test(ckpt_path="best", dataloaders=loader(STEPS, bool(strategy)), verbose=False)
        scores["test"] = float(found["val_loss"])
    best = keep.best_model_path
    scores["a new Trainer"] = score(Scored(), strategy, best, "test")
    scores["a new Trainer with the callback"] = score(Scored(), strategy, best, callbacks=[SWACallback()])
    if Path(best).is_file():
        scores["load_from_checkpoint"] = score(
            Scored.load_from_checkpoint(best, weights_only=True), "" if not strategy else "ddp"
        )
    assert keep.best_model_score is not None
    return record.states, float(keep.best_model_score), scores


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what `train` returns on two ranks."""

    @functools.cache
    def run(strategy: str) -> tuple[str, float, list[dict[str, Tensor]]]:
        result: tuple[str, float, list[dict[str, Tensor]]] = run_on_ranks(
            train, 2, tmp_path_factory.mktemp("stopped"), strategy
        )[0]
        return result

    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_best_checkpoint_has_the_model_that_was_scored(stopped: Any, strategy: str) -> None:
    path, monitored, _ = stopped(strategy)
    assert f"step={2 * STEPS}" in path
    again = run_on_ranks(score, 4, Scored(), strategy, path)
    torch.testing.assert_close(again, [monitored] * 4)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_goes_on_from_the_trained_weights(stopped: Any, strategy: str, ranks: int) -> None:
    path, monitored, states = stopped(strategy)
    found, best, scores = run_on_ranks(resume_and_score, ranks, path, strategy)[0]
    rest = states[2 * STEPS :]
    assert len(found) == len(rest) == STEPS + 1
    assert same_bits(found[0], rest[0])
    if ranks == 2:  # the statistics of a batch differ on other numbers of ranks
        assert all(same_bits(one, other) for one, other in zip(found, rest, strict=True))
    assert best >= monitored
    torch.testing.assert_close(scores, dict.fromkeys(scores, best))


SHARED: dict[str, Any] = {"swa_start": "2ba"}
OPTIONS: dict[str, dict[str, Any]] = {
    "equal": {},
    "average of the statistics": {"buffers": "average"},
    "window": {"rule": Window(3)},
    "several": {"rule": {"one": Equal(), "other": EMA(decay=0.8)}, "transfer": "other"},
    "recalibrated": {"recalibrate_on": loader(3, False)},
    "half precision": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("weights_only", [False, True], ids=["checkpoint", "weights only"])
def test_one_file(options: dict[str, Any], weights_only: bool, tmp_path: Path) -> None:
    module, keep = Scored(frozen=True), best_of(tmp_path, save_weights_only=weights_only)
    fit(module, [SWACallback(**SHARED, **options), keep], validate=True)
    assert len(keep.best_k_models) == EPOCHS
    for path, monitored in keep.best_k_models.items():
        loaded = Scored.load_from_checkpoint(path, weights_only=True)
        assert score(loaded, "") == pytest.approx(float(monitored), rel=1e-6)
        saved = torch.load(path, weights_only=True)
        assert ("dist_swa" in saved) == (not weights_only)
        if not weights_only:
            trained = {name.removeprefix("net."): value for name, value in saved["dist_swa"]["trained"].items()}
            assert "2.weight" not in trained
            step = saved["global_step"]
            assert same_bits(trained, module.steps[step - 1], trained.keys() & module.steps[0])
            assert not torch.equal(saved["state_dict"]["net.0.weight"], trained["0.weight"])


def test_a_checkpoint_between_validations_has_the_average_so_far(tmp_path: Path) -> None:
    module = Scored(with_norm=False)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(module, [SWACallback(swa_start="6ba"), keep])
    for step in range(1, EPOCHS * STEPS + 1):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        expected = mean_of(module.steps[5:step]) if step > 5 else module.steps[step - 1]
        torch.testing.assert_close(saved["state_dict"], {f"net.{name}": value for name, value in expected.items()})
        assert ("trained" in saved["dist_swa"]) == (step > 6)  # an average of one model is that model


def test_evaluating_the_trained_weights_keeps_them_in_the_checkpoint(tmp_path: Path) -> None:
    module, keep, resumed = Scored(), best_of(tmp_path), Scored()
    fit(module, [SWACallback(evaluate="trained", **SHARED), keep], validate=True)
    path = tmp_path / f"step={2 * STEPS}.ckpt"
    saved = torch.load(path, weights_only=True)
    names = [name for name, _ in module.net.named_parameters()]
    weights = {name.removeprefix("net."): value for name, value in saved["state_dict"].items()}
    assert same_bits(weights, module.steps[2 * STEPS - 1], names)
    assert "trained" not in saved["dist_swa"]
    assert score(Scored(), "", path) == pytest.approx(float(keep.best_k_models[str(path)]), rel=1e-6)
    fit(resumed, [SWACallback(**SHARED)], validate=True, resume=path)  # as one of version 0.2
    assert same_bits(read(resumed.net), read(module.net))


def test_a_run_that_stops_early_ends_with_the_average(tmp_path: Path) -> None:
    module, keep = Scored(), best_of(tmp_path, mode="min")
    stop = EarlyStopping("val_loss", mode="min", patience=1)
    data = loader(STEPS, False)
    it = fit(module, [SWACallback(swa_start="2ba"), stop, keep], validate=True, data=data, max_epochs=30)
    assert stop.stopped_epoch > 0
    monitored = [float(value) for value in module.scores[1:]]  # after the sanity check
    assert float(keep.best_model_score or 0) == pytest.approx(min(monitored), rel=1e-6)
    with lightnings_own_warnings():
        (found,) = it.test(ckpt_path="best", dataloaders=data, verbose=False)
    assert found["val_loss"] == pytest.approx(min(monitored), rel=1e-6)


def test_without_the_callback_training_goes_on_from_the_average(tmp_path: Path) -> None:
    fit(Scored(with_norm=False), [SWACallback(**SHARED), best_of(tmp_path)], validate=True)
    path, record = tmp_path / f"step={2 * STEPS}.ckpt", Record()
    fit(Scored(with_norm=False), [record], resume=path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert same_bits({f"net.{name}": value for name, value in record.states[0].items()}, saved)


def test_frozen_weights_are_saved_once(tmp_path: Path) -> None:
    class Large(Scored):
        def __init__(self) -> None:
            super().__init__(with_norm=False)
            self.large = torch.nn.Linear(500, 500).requires_grad_(False)

    fit(Large(), [SWACallback(**SHARED), best_of(tmp_path)], validate=True)
    assert (tmp_path / f"step={2 * STEPS}.ckpt").stat().st_size < 1.2 * 500 * 501 * 4


def test_a_checkpoint_after_fit_has_the_averaged_model_only(tmp_path: Path) -> None:
    module = Scored()
    it = fit(module, [SWACallback(**SHARED)], validate=True)
    it.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert same_bits({f"net.{name}": value for name, value in module.net.state_dict().items()}, saved["state_dict"])
    assert "trained" not in saved["dist_swa"]


@on_ranks(2)
def test_statistics_are_recalibrated_before_each_validation_of_the_average() -> None:
    module, record, seen = Scored(), Record(), []

    class Look(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(full(pl_module))

    swa = SWACallback(recalibrate_on=loader(3, True), **LATE)
    fit(module, [swa, record, Look()], "fsdp2", validate=True)
    assert same_bits(seen[1], record.states[STEPS])  # nothing is averaged yet
    for step, state in zip((8, 12), seen[2:], strict=True):
        torch.testing.assert_close(state["0.weight"], mean_of(module.steps[5:step])["0.weight"])
        mean, variance = statistics_of(state, samples(3).tensors[0])
        torch.testing.assert_close(state["1.running_mean"], mean)
        torch.testing.assert_close(state["1.running_var"], variance)
    again = Record()
    fit(Scored(), [SWACallback(evaluate="trained", **LATE), again], "fsdp2", validate=True)
    assert all(same_bits(one, other) for one, other in zip(record.states, again.states, strict=True))


class Renamed(Scored):
    """Saves its weights without "net.", and loads them so."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name.removeprefix("net."): value for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({f"net.{name}": value for name, value in state_dict.items()}, *args, **kwargs)


class Rewritten(Scored):
    """Saves its weights itself, without the frozen ones, and loads them itself."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"my.{name}": value for name, value in self.net.state_dict().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        names = {name: name.replace("my.", "net.") for name in weights}
        checkpoint["state_dict"] = {names[name]: value for name, value in weights.items()}


@pytest.mark.parametrize("build", [Renamed, Rewritten])
def test_a_module_may_save_in_its_own_way(build: Any, tmp_path: Path) -> None:
    whole, keep, module, again = Record(), best_of(tmp_path), build(), Record()
    fit(module, [SWACallback(**SHARED), whole, keep], validate=True)
    for best, monitored in keep.best_k_models.items():
        assert score(build.load_from_checkpoint(best), "") == pytest.approx(float(monitored), rel=1e-6)
    path = tmp_path / f"step={2 * STEPS}.ckpt"
    fit(build(), [SWACallback(**SHARED), again], validate=True, resume=path)
    assert all(same_bits(one, other) for one, other in zip(again.states, whole.states[2 * STEPS :], strict=True))


class NotLoaded(Renamed):
    """Loads its weights in ``on_load_checkpoint``, and ignores them in ``load_state_dict``."""

    strict_loading = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.net.load_state_dict(checkpoint["state_dict"])

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return Scored.load_state_dict(self, state_dict, *args, **kwargs)


def test_trained_weights_that_a_module_does_not_load_raise(tmp_path: Path) -> None:
    fit(NotLoaded(), [SWACallback(**SHARED), best_of(tmp_path)], validate=True)
    with pytest.raises(RuntimeError, match=r"takes what its state_dict returns, got another value of 0\.weight; write"):
        fit(NotLoaded(), [SWACallback(**SHARED)], resume=tmp_path / f"step={2 * STEPS}.ckpt")
