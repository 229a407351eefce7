"""Lightning's Trainer with `SWACallback`: checkpoints, and runs that resume from them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cases import read
from dist_swa import EMA, Equal, Window, checkpoint
from dist_swa.integrations.lightning import SWACallback
from lightning_run import EPOCHS, SCHEDULE, STEPS, STRATEGIES, Module, Stop, fit, lightnings_own_warnings, swa_of
from models import same_bits
from ranks import on_ranks, run_on_ranks
from small_run import averages_of, loader, loss_of, mean_of, network, plain_loop, sgd

SEVERAL = {**SCHEDULE, "rule": {"swa": Equal(), "ema": EMA(decay=0.8), "last": Window(3)}, "transfer": "swa"}


def run_and_kill(folder: Path, strategy: str) -> dict[str, Tensor]:
    """Compare an uninterrupted run with a plain loop, and stop another one in its last epoch."""
    model: nn.Module = network()
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model[0])  # type: ignore[index]
        fully_shard(model)
    averages, steps = plain_loop(model, EPOCHS, STEPS, **SEVERAL)
    equal = {name: value for name, value in averages.items() if name.startswith("swa.")}
    torch.testing.assert_close(equal, mean_of(steps[2:], "swa."))
    module, swa = Module(), SWACallback(**SEVERAL)
    fit(module, [swa], strategy, validate=True)
    assert all(same_bits(mine, theirs) for mine, theirs in zip(module.steps, steps, strict=True))
    assert same_bits(averages_of(swa_of(swa)), averages)
    assert same_bits({f"swa.{name}": value for name, value in read(module.net).items()}, equal)

    with pytest.raises(ZeroDivisionError):
        fit(Module(), [SWACallback(**SEVERAL), Stop(10), ModelCheckpoint(folder, filename="{step}")], strategy)
    return averages


def resume(path: Path, strategy: str) -> dict[str, Tensor]:
    swa = SWACallback(**SEVERAL)
    it = fit(Module(), [swa], strategy, resume=path)
    assert it.global_step == EPOCHS * STEPS
    return averages_of(swa_of(swa))


@pytest.fixture(scope="module")
def run_killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """Return the checkpoint of a killed run on two ranks, and the averages of one that was not killed."""

    @functools.cache
    def run(strategy: str) -> tuple[Path, dict[str, Tensor]]:
        folder = tmp_path_factory.mktemp("killed")
        averages = run_on_ranks(run_and_kill, 2, folder, strategy)[0]
        (path,) = folder.iterdir()
        assert path.is_dir() == (strategy == "fsdp2")
        return path, averages

    return run


RESUMPTIONS = [(strategy, strategy, ranks) for strategy in STRATEGIES for ranks in (2, 4)] + [("ddp", "fsdp2", 4)]


@pytest.mark.parametrize(("before", "after", "ranks"), RESUMPTIONS)
def test_a_resumed_run_ends_as_a_plain_loop(run_killed: Any, before: str, after: str, ranks: int) -> None:
    """With the same bits on as many ranks; on others, up to the order of sums."""
    path, expected = run_killed(before)
    for averages in run_on_ranks(resume, ranks, path, after):
        if ranks == 2:
            assert same_bits(averages, expected)
        torch.testing.assert_close(averages, expected)


class FSDP1(FSDPStrategy):
    """Lightning's strategy without the offload to the CPU, which crashes where the model is on the CPU."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=self._state_dict_type == "full")
        return get_model_state_dict(cast(nn.Module, self.model), options=options)


def start_fsdp1(swa: SWACallback, strategy: FSDP1, path: Path | None = None) -> Any:
    """Return a stand-in for a Trainer with FSDPStrategy, which refuses the CPU, after the calls that start its fit."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu"), device_mesh=mesh)
    strategy.connect(cast(pl.LightningModule, model))
    length = {"num_training_batches": 6, "max_epochs": 1, "max_steps": -1, "accumulate_grad_batches": 1}
    length["estimated_stepping_batches"] = 6

    def save(path: Path) -> None:
        saved: dict[str, Any] = {"state_dict": strategy.lightning_module_state_dict()}
        swa.on_save_checkpoint(it, Module(), saved)
        if any(isinstance(value, DTensor) for value in saved["state_dict"].values()):
            dcp_save({"model": saved["state_dict"]}, checkpoint_id=path)
        elif dist.get_rank() == 0:
            torch.save(saved, path)
        dist.barrier()

    it: Any = SimpleNamespace(
        callbacks=[swa],
        model=model,
        lightning_module=model,
        save_checkpoint=save,
        optimizers=[sgd(model)],
        strategy=strategy,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        global_step=0,
        current_epoch=0,
        ckpt_path=path,
        **length,
    )
    swa.setup(it, Module(), "fit")
    if path is not None:  # as Lightning loads it
        saved: dict[str, Any] = {} if path.is_dir() else torch.load(path, weights_only=True)
        if path.is_dir():
            weights = {"model": get_model_state_dict(model)}
            dcp_load(weights, checkpoint_id=path)
        options = StateDictOptions(full_state_dict=not path.is_dir())
        set_model_state_dict(model, weights["model"] if path.is_dir() else saved["state_dict"], options=options)
        swa.on_load_checkpoint(it, Module(), saved)
    swa.on_train_start(it, Module())
    return it


@pytest.mark.parametrize("state_dict_type", ["full", "sharded"])
@on_ranks(2)
def test_fsdp1_attaches_and_resumes(state_dict_type: Any, tmp_path: Path) -> None:
    first, again = SWACallback(**SCHEDULE), SWACallback(**SCHEDULE)
    it = start_fsdp1(first, FSDP1(state_dict_type=state_dict_type))
    for _ in range(3):
        loss_of(it.model, (torch.ones(2, 4) * dist.get_rank(), torch.zeros(2, 4))).backward()
        first.on_train_batch_start(it)
        it.optimizers[0].step()
        it.global_step += 1
        first.on_train_batch_end(it)
    trained = read(it.model)
    it.save_checkpoint(tmp_path / "saved")
    scored = checkpoint.open_checkpoint(tmp_path / "saved").read if state_dict_type == "sharded" else None
    weights = {} if scored else torch.load(tmp_path / "saved", weights_only=True)["state_dict"]
    averaged = swa_of(first).average.full_state_dict()
    found = {name: scored(f"model.{name}") if scored else weights[name] for name in averaged}
    assert same_bits(found, averaged)
    resumed = start_fsdp1(again, FSDP1(state_dict_type=state_dict_type), tmp_path / "saved")
    assert same_bits(read(resumed.model), trained)
    assert swa_of(again).num_averaged == 2
    assert same_bits(swa_of(again).average.full_state_dict(), swa_of(first).average.full_state_dict())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@on_ranks(2)
def test_a_checkpoint_without_an_average_warns(strategy: str, tmp_path: Path) -> None:
    fit(Module(), [ModelCheckpoint(tmp_path, filename="{step}")], strategy, max_epochs=1)
    swa = SWACallback(swa_start="0.5dur")
    nothing = "(no averaging state: averaging starts anew|nothing under .*: these entries are reset)"
    with pytest.warns(UserWarning, match=f"{nothing}; the schedule starts at step 4$") as caught:
        fit(Module(), [swa], strategy, resume=tmp_path / "step=4.ckpt")
    assert sum("schedule" in str(warning.message) for warning in caught) == 1
    assert swa_of(swa).schedule.now.epochs == EPOCHS
    assert swa_of(swa).schedule.now.batches == EPOCHS * STEPS
    assert swa_of(swa).num_averaged == 7  # from step 6 of 12 on; the first four were those of the checkpoint


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Return the checkpoint after the last step, and the state dict of the model after ``fit``."""
    folder, module = tmp_path_factory.mktemp("ended"), Module(with_norm=True)
    fit(module, [SWACallback(**SCHEDULE), ModelCheckpoint(folder, filename="{step}")])
    assert not same_bits(read(module.net), module.steps[-1])
    return folder / f"step={EPOCHS * STEPS}.ckpt", module.net.state_dict()


def resume_the_end(path: Path, strategy: str) -> dict[str, Tensor]:
    module = Module(with_norm=True)
    fit(module, [SWACallback(**SCHEDULE)], strategy, resume=path)
    assert not module.steps
    return dict(module.net.state_dict())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_killed_before_the_end_of_fit_is_finished(ended: tuple[Path, Any], ranks: int) -> None:
    path, expected = ended
    for resumed in run_on_ranks(resume_the_end, ranks, path, "" if ranks == 1 else "ddp"):
        assert same_bits(resumed, expected, [name for name, _ in network(with_norm=True).named_parameters()])
        for name in ("1.running_mean", "1.running_var"):
            torch.testing.assert_close(resumed[name], expected[name])


def test_a_longer_run_continues_the_average_of_one_that_ended(tmp_path: Path) -> None:
    first, module, again = SWACallback(swa_start="8ba"), Module(), Module()
    it = fit(module, [first])
    it.save_checkpoint(tmp_path / "ended.ckpt")  # as with save_last: the model has the averaged weights
    longer = SWACallback(swa_start="8ba")
    fit(again, [longer], resume=tmp_path / "ended.ckpt", max_epochs=EPOCHS + 1)
    assert swa_of(longer).num_averaged == 9
    torch.testing.assert_close(read(again.net), mean_of(module.steps[7:] + again.steps))


def test_a_second_fit_of_a_trainer_averages_its_own_steps() -> None:
    swa, module = SWACallback(swa_start="8ba"), Module()
    it = fit(module, [swa])
    with lightnings_own_warnings():
        it.fit_loop.max_epochs = EPOCHS + 2
        it.fit(module, loader(STEPS, False))
    assert swa_of(swa).schedule.now.batches == it.global_step == (EPOCHS + 2) * STEPS
    assert swa_of(swa).num_averaged == 2 * STEPS
    torch.testing.assert_close(read(module.net), mean_of(module.steps[EPOCHS * STEPS :]))
