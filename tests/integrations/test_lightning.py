"""Lightning's Trainer with `SWACallback`, against a plain loop over the same steps."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment  # type: ignore[attr-defined]
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from cases import read
from dist_swa import EMA, SWA, Equal, Window
from dist_swa.integrations.lightning import SWACallback
from models import same_bits
from ranks import on_ranks, run_on_ranks
from small_run import GLOBAL_BATCH, averages_of, loader, network, samples, sgd

README = Path(__file__).parents[2] / "README.md"
EPOCHS, STEPS = 3, 4  # epochs of a run, optimizer steps of an epoch
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": DDPStrategy,
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1),
    "fsdp2, one file": lambda: ModelParallelStrategy(dist.get_world_size(), 1, save_distributed_checkpoint=False),
}
SCHEDULE: dict[str, Any] = {"swa_start": "0.25dur", "update_interval": "1ba"}
SEVERAL = {**SCHEDULE, "rule": {"swa": Equal(), "ema": EMA(decay=0.8), "last": Window(3)}, "transfer": "swa"}
LIGHTNINGS_OWN_WARNINGS = (
    "`isinstance.treespec, LeafSpec.` is deprecated",
    ".* does not have many workers",
    "Be aware that when using `ckpt_path`",
    "You defined a `validation_step` but have no `val_dataloader`",
)


def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


class Module(pl.LightningModule):
    """Keeps the weights after every optimizer step, and those that every validation saw."""

    def __init__(self, with_norm: bool = False) -> None:
        super().__init__()
        self.net = network(with_norm)
        self.steps: list[dict[str, Tensor]] = []
        self.looks: list[dict[str, Tensor]] = []

    def configure_model(self) -> None:
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None:
            fully_shard(self.net[0], mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.net(given)
        return out

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return loss_of(self, batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self(batch[0])
        self.looks.append(read(self.net))

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.net)
        optimizer.register_step_post_hook(lambda *_: self.steps.append(read(self.net)))
        return optimizer


class Stop(Callback):
    """Breaks a run off."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after:
            raise ZeroDivisionError


class Ranks(ClusterEnvironment):
    """The process group that is there already."""

    creates_processes_externally = True
    main_address = main_port = ""  # type: ignore[assignment]

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return dist.get_rank()

    def node_rank(self) -> int:
        return 0


def trainer(callbacks: list[Callback], strategy: str = "", **options: Any) -> pl.Trainer:
    if strategy:
        options |= {"strategy": STRATEGIES[strategy](), "devices": dist.get_world_size(), "plugins": [Ranks()]}
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    quiet["enable_checkpointing"] = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    quiet["use_distributed_sampler"] = False  # it shuffles
    return pl.Trainer(callbacks=callbacks, **(quiet | {"devices": 1, "max_epochs": EPOCHS} | options))


@contextmanager
def lightnings_own_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in LIGHTNINGS_OWN_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


def fit(
    module: Module,
    callbacks: list[Callback],
    strategy: str = "",
    *,
    data: Any = None,
    look: bool = False,
    resume: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    data = loader(STEPS, bool(strategy)) if data is None else data
    with lightnings_own_warnings():
        it = trainer(callbacks, strategy, **options)
        it.fit(module, data, loader(STEPS, bool(strategy)) if look else None, ckpt_path=resume)
    return it


def plain_loop(strategy: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return the averages of a run in a loop of its own, and the weights after every step."""
    model: nn.Module = network()
    if strategy.startswith("fsdp2"):
        fully_shard(model[0])  # type: ignore[index]
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = sgd(model)
    swa = SWA(model, optimizer, max_duration=f"{EPOCHS}ep", steps_per_epoch=STEPS, swa_end=None, **SEVERAL)
    steps = []
    given, wanted = (tensor[dist.get_rank() :: dist.get_world_size()] for tensor in samples(STEPS).tensors)
    for _ in range(EPOCHS):
        for batch in zip(given.chunk(STEPS), wanted.chunk(STEPS), strict=True):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            swa.step()
            steps.append(read(model))
    swa.finalize()
    return averages_of(swa), steps


def mean(steps: Sequence[Mapping[str, Tensor]], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: torch.stack([step[name].double() for step in steps]).mean(0).float() for name in steps[0]}


def run_and_be_killed(folder: Path, strategy: str) -> dict[str, Tensor]:
    """Compare an uninterrupted run with a plain loop, and break off another in its last epoch."""
    averages, steps = plain_loop(strategy)
    equal = {name: value for name, value in averages.items() if name.startswith("swa.")}
    torch.testing.assert_close(equal, mean(steps[2:], "swa."))
    module, swa = Module(), SWACallback(**SEVERAL)
    fit(module, [swa], strategy, look=True)
    assert all(same_bits(mine, theirs) for mine, theirs in zip(module.steps, steps, strict=True))
    assert same_bits(averages_of(swa.swa), averages)
    assert same_bits({f"swa.{name}": value for name, value in read(module.net).items()}, equal)

    with pytest.raises(ZeroDivisionError):
        fit(Module(), [SWACallback(**SEVERAL), Stop(10), ModelCheckpoint(folder, filename="{step}")], strategy)
    return averages


def resume(path: Path, strategies: Sequence[str]) -> list[dict[str, Tensor]]:
    averages = []
    for strategy in strategies:
        module, swa = Module(), SWACallback(**SEVERAL)
        it = fit(module, [swa], strategy, resume=path)
        assert it.global_step == EPOCHS * STEPS
        averages.append(averages_of(swa.swa))
    return averages


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_ends_as_a_plain_loop(tmp_path: Path, strategy: str) -> None:
    """Bit for bit on as many ranks, and but for the order of sums on others and under another strategy."""
    plain = run_on_ranks(run_and_be_killed, 2, tmp_path, strategy)
    (path,) = tmp_path.iterdir()
    assert path.is_dir() == (strategy == "fsdp2")
    for (averages,) in run_on_ranks(resume, 2, path, [strategy]):
        assert same_bits(averages, plain[0])
    for several in run_on_ranks(resume, 4, path, ["ddp", "fsdp2"] if strategy == "ddp" else [strategy]):
        for averages in several:
            torch.testing.assert_close(averages, plain[0])


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


class Endless(IterableDataset[Any]):
    """Does not tell how many samples it has."""

    def __iter__(self) -> Iterator[Any]:
        return iter(samples(5))


# name: module, schedule, options of the Trainer, the steps (from 1) that are averaged
RUNS: dict[str, tuple[Callable[[], Module], dict[str, Any], dict[str, Any], Sequence[int]]] = {
    "max_epochs": (Module, SCHEDULE, {}, range(3, 13)),
    "every epoch": (Module, {"swa_start": "2ep", "update_interval": "1ep"}, {}, (8, 12)),
    "max_steps": (Module, SCHEDULE, {"max_steps": 8, "max_epochs": -1}, range(2, 9)),
    "max_steps before max_epochs": (Module, SCHEDULE, {"max_steps": 8}, range(2, 9)),
    "max_epochs before max_steps": (Module, SCHEDULE, {"max_steps": 100}, range(3, 13)),
    "given": (Module, {**SCHEDULE, "max_duration": "20ba"}, {}, range(5, 13)),
    "limit_train_batches": (Module, SCHEDULE, {"limit_train_batches": 2}, range(2, 7)),
    # 5 batches an epoch: the last one steps alone
    "accumulation": (Module, SCHEDULE, {"accumulate_grad_batches": 2, "batches": 5}, range(3, 10)),
    "accumulation, every epoch": (
        Module,
        {"swa_start": "1ep", "update_interval": "1ep"},
        {"accumulate_grad_batches": 2, "batches": 5},
        (3, 6, 9),
    ),
    "other accumulation later": (
        Module,
        {"swa_start": "1ep", "update_interval": "1ep"},
        {"accumulation": {0: 1, 1: 2}},
        (4, 6, 8),
    ),
    "no length": (Module, {"swa_start": "0.5dur", "update_interval": "1ep"}, {"endless": True}, (10, 15)),
    "manual": (Manual, {"swa_start": "1ep"}, {}, (6, 6, 8, 8, 10, 10, 12, 12)),
    "manual, max_steps": (Manual, SCHEDULE, {"max_steps": 8, "max_epochs": -1}, (2, 4, 4, 6, 6, 8, 8)),
    "end": (Module, {**SCHEDULE, "swa_end": "8ba"}, {}, range(3, 9)),
}


@pytest.mark.parametrize("run", RUNS)
def test_every_optimizer_step_counts_once(run: str, tmp_path: Path) -> None:
    build, schedule, options, averaged = RUNS[run]
    module, swa, options = build(), SWACallback(**schedule), dict(options)
    callbacks: list[Callback] = [swa]
    if scheduling := options.pop("accumulation", None):
        callbacks.append(GradientAccumulationScheduler(scheduling))
    endless, num_batches = options.pop("endless", False), options.pop("batches", STEPS)
    data = DataLoader(Endless(), GLOBAL_BATCH) if endless else loader(num_batches, False)
    it = fit(module, callbacks, data=data, look=True, **options)
    assert swa.swa is not None
    assert swa.swa.schedule.now.batches == it.global_step == len(module.steps)
    assert swa.swa.num_averaged == len(averaged)
    assert swa.swa.completed
    average = swa.swa.average.full_state_dict()
    expected = mean([module.steps[step - 1] for step in averaged])
    torch.testing.assert_close({name.removeprefix("net."): value for name, value in average.items()}, expected)
    if "swa_end" not in schedule:
        torch.testing.assert_close(read(module.net), expected)


def test_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(import lightning.*?)```", README.read_text(), re.DOTALL)
    assert "max_epochs=90" in code
    options = "max_epochs=4, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator='cpu'"
    code = code.replace("max_epochs=90", f"{options}, enable_checkpointing=False")
    names: dict[str, Any] = {"module": Module(), "loader": loader(STEPS, False)}
    with lightnings_own_warnings():
        exec(compile(code, "README.md", "exec"), names)
    (swa,) = (one for one in names["trainer"].callbacks if isinstance(one, SWACallback))
    assert swa.swa is not None
    assert swa.swa.num_averaged == 5  # from step 12 of 16 on
    torch.testing.assert_close(read(names["module"].net), mean(names["module"].steps[11:]))


@on_ranks(2)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_validation_sees_the_average_and_changes_nothing(strategy: str) -> None:
    trained = Module()
    fit(trained, [SWACallback(evaluate="trained", **SCHEDULE)], strategy, look=True, val_check_interval=2)
    module = Module()
    fit(module, [SWACallback(**SCHEDULE)], strategy, look=True, val_check_interval=2)
    assert all(same_bits(one, other) for one, other in zip(module.steps, trained.steps, strict=True))
    assert same_bits(read(module.net), read(trained.net))
    looks = module.looks[2::STEPS]  # after the sanity check, one of each validation
    assert len(looks) == 6
    assert same_bits(module.looks[0], trained.looks[0])
    assert same_bits(looks[0], module.steps[1])  # not started yet
    for last, look in zip(range(4, 13, 2), looks[1:], strict=True):
        torch.testing.assert_close(look, mean(module.steps[2:last]))
    for last, look in zip(range(2, 13, 2), trained.looks[2::STEPS], strict=True):
        assert same_bits(look, trained.steps[last - 1])


@on_ranks(2)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_error_in_a_validation_gives_the_trained_weights_back(strategy: str, tmp_path: Path) -> None:
    class Fails(Module):
        def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if len(self.steps) == STEPS and dist.get_rank() == 0:
                raise ZeroDivisionError
            if len(self.steps) == STEPS:
                raise FloatingPointError

    module = Fails()
    keep = ModelCheckpoint(tmp_path, save_on_exception=True, filename="{step}")
    with pytest.raises((ZeroDivisionError, FloatingPointError)):
        fit(module, [SWACallback(**SCHEDULE), keep], strategy, look=True)
    torch.testing.assert_close(module.looks[-1], mean(module.steps[2:]))
    assert same_bits(read(module.net), module.steps[-1])
    (path,) = tmp_path.iterdir()  # the checkpoint of both
    swa = SWACallback(**SCHEDULE)
    it = fit(Module(), [swa], strategy, resume=path)
    assert swa.swa is not None
    assert swa.swa.num_averaged + 2 == swa.swa.schedule.now.batches == it.global_step


@on_ranks(2)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_checkpoint_inside_of_a_validation_has_the_trained_weights(strategy: str, tmp_path: Path) -> None:
    class Saves(Module):
        def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if len(self.steps) == STEPS and batch_idx == 0:  # as Lightning does on a signal of SLURM
                with pytest.warns(UserWarning, match="ends the look at them"):
                    self.trainer.save_checkpoint(tmp_path / "saved")

    class Beginning(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert isinstance(pl_module, Module)
            assert swa.swa is not None
            self.weights, self.average = read(pl_module.net), swa.swa.average.full_state_dict()

    module, swa, beginning = Saves(), SWACallback(**SCHEDULE), Beginning()
    fit(module, [swa], strategy, look=True)
    torch.testing.assert_close(module.looks[2], mean(module.steps[2:STEPS]))  # after two of the sanity check
    assert same_bits(module.looks[3], module.steps[STEPS - 1])
    swa = SWACallback(**SCHEDULE)
    fit(Module(), [swa, beginning], strategy, resume=tmp_path / "saved")
    assert same_bits(beginning.weights, module.steps[STEPS - 1])
    if dist.get_rank() == 0:
        torch.testing.assert_close(beginning.average, mean(module.steps[2:STEPS], "net."))


@on_ranks(2)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_batch_norm_is_recalibrated_from_the_training_batches(strategy: str) -> None:
    class Shifted(Module):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 3, batch[1]]

    module = Shifted(with_norm=True)
    fit(module, [SWACallback(**SCHEDULE)], strategy, look=True, limit_train_batches=3)
    norm = module.net[1]
    weights = read(module.net)
    seen = (samples(STEPS).tensors[0][: 3 * GLOBAL_BATCH] + 3).double() @ weights["0.weight"].double().T + weights[
        "0.bias"
    ]
    torch.testing.assert_close(norm.running_mean, seen.mean(0).float())
    torch.testing.assert_close(norm.running_var, seen.var(0).float())
    assert module.training


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_the_phase_has_the_last_word_on_the_learning_rate(interval: str) -> None:
    rates: list[float] = []

    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    phase: dict[str, Any] = {"schedule_swa_lr": True, "swa_lr": 0.2, "anneal_steps": 2}
    fit(Scheduled(), [SWACallback(swa_start="5ba", **phase)])
    before = [0.1 * 0.5**step for step in range(6)] if interval == "step" else [0.1] * 4 + [0.05] * 2
    start = before[5]  # it has stepped when the phase begins, after the fifth step
    torch.testing.assert_close(rates, [*before[:5], (start + 0.2) / 2, *[0.2] * 6])


def test_what_a_plateau_scheduler_writes_holds_for_one_step() -> None:
    rates: list[float] = []

    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}

        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)

    fit(Scheduled(), [SWACallback(schedule_swa_lr=True, swa_start="3ba")])
    torch.testing.assert_close(rates, [*[0.1] * 4, *[0.05, 0.1, 0.1, 0.1] * 2])


@on_ranks(2)
def test_fsdp1_attaches_and_resumes(tmp_path: Path) -> None:
    """FSDPStrategy refuses the CPU: here its wrapper is, and the calls that Lightning would make."""

    def run(swa: SWACallback, saved: dict[str, Any] | None, path: Path) -> tuple[Any, nn.Module]:
        model = FullyShardedDataParallel(
            network(), use_orig_params=True, device_id=torch.device("cpu"), device_mesh=init_device_mesh("cpu", (2,))
        )
        it: Any = SimpleNamespace(callbacks=[swa], model=model, optimizers=[sgd(model)], global_step=0, max_epochs=1)
        it.strategy, it.is_global_zero = object.__new__(FSDPStrategy), dist.get_rank() == 0
        it.num_training_batches, it.max_steps, it.accumulate_grad_batches = 6, -1, 1
        it.current_epoch, it.ckpt_path = 0, None
        module: Any = SimpleNamespace(automatic_optimization=True)
        swa.setup(it, module, "fit")
        if saved is not None:
            it.ckpt_path = path
            swa.on_load_checkpoint(it, module, saved)
        swa.on_train_start(it, module)
        return it, model

    def train(it: Any, swa: SWACallback, model: nn.Module) -> None:
        for _ in range(3):
            loss_of(model, (torch.ones(2, 4) * dist.get_rank(), torch.zeros(2, 4))).backward()
            it.optimizers[0].step()
            it.global_step += 1
            swa.on_train_batch_end(it)

    first = SWACallback(**SCHEDULE)
    it, model = run(first, None, tmp_path)
    train(it, first, model)
    assert first.swa is not None
    for is_sharded in (False, True):
        saved: dict[str, Any] = {"state_dict": get_model_state_dict(model) if is_sharded else {}}
        first.on_save_checkpoint(it, None, saved)  # type: ignore[arg-type]
        if is_sharded:
            dcp_save({"model": saved.pop("state_dict")}, checkpoint_id=tmp_path / "folder")
        everyones: list[Any] = [saved]
        dist.broadcast_object_list(everyones)  # what Lightning reads from its file
        again = SWACallback(**SCHEDULE)
        run(again, everyones[0], tmp_path / ("folder" if is_sharded else "file"))
        assert again.swa is not None
        assert again.swa.num_averaged == 2
        assert same_bits(again.swa.average.full_state_dict(), first.swa.average.full_state_dict())


def test_a_second_fit_starts_anew_and_validate_leaves_the_model_alone() -> None:
    module, swa = Module(), SWACallback(**SCHEDULE)
    with pytest.raises(ZeroDivisionError):
        fit(module, [swa, Stop(7)])
    assert swa.swa is not None
    assert swa.swa.num_averaged == 5
    with lightnings_own_warnings():
        trainer([swa]).validate(module, loader(STEPS, False), verbose=False)
    assert same_bits(module.looks[-1], module.steps[-1])
    module.steps.clear()
    fit(module, [swa], look=True)  # its sanity check comes before the average is there
    assert same_bits(module.looks[STEPS], module.looks[0])
    torch.testing.assert_close(read(module.net), mean(module.steps[2:]))


def test_a_checkpoint_without_an_average_warns(tmp_path: Path) -> None:
    fit(Module(), [ModelCheckpoint(tmp_path, filename="{step}")], max_epochs=1)
    swa = SWACallback(swa_start="0.5dur")
    with pytest.warns(UserWarning, match="no averaging state: averaging starts anew"):
        fit(Module(), [swa], resume=tmp_path / "step=4.ckpt")
    assert swa.swa is not None
    assert swa.swa.num_averaged == 7  # from the sixth step of the run, though the first four were another's


def resume_a_folder_without_average(path: Path) -> int:
    fit(Module(), [ModelCheckpoint(path, filename="{step}")], "fsdp2", max_epochs=1)
    swa = SWACallback(swa_start="0.5dur")
    with pytest.warns(UserWarning, match="nothing under .*: these entries are reset"):
        fit(Module(), [swa], "fsdp2", resume=path / "step=4.ckpt")
    assert swa.swa is not None
    assert swa.swa.schedule.now.batches == EPOCHS * STEPS
    return swa.swa.num_averaged


def test_a_folder_without_an_average_warns(tmp_path: Path) -> None:
    assert run_on_ranks(resume_a_folder_without_average, 2, tmp_path) == [7, 7]


def resume_the_end(path: Path) -> dict[str, Tensor]:
    """The model after a run that resumes where nothing is left."""
    module = Module(with_norm=True)
    fit(module, [SWACallback(**SCHEDULE)], "ddp" if dist.is_initialized() else "", resume=path)
    assert not module.steps
    return dict(module.net.state_dict())


def test_a_run_killed_before_its_end_is_finished_when_resumed(tmp_path: Path) -> None:
    """Its last checkpoint has no step left to train; Lightning then tells of no end."""
    module = Module(with_norm=True)
    fit(module, [SWACallback(**SCHEDULE), ModelCheckpoint(tmp_path, filename="{step}")])
    assert not same_bits(read(module.net), module.steps[-1])
    expected = dict(module.net.state_dict())
    parameters = [name for name, _ in module.net.named_parameters()]
    path = tmp_path / f"step={EPOCHS * STEPS}.ckpt"
    for resumed in (resume_the_end(path), *run_on_ranks(resume_the_end, 2, path)):
        assert same_bits(resumed, expected, parameters)
        for name in ("1.running_mean", "1.running_var"):
            torch.testing.assert_close(resumed[name], expected[name])


def test_a_longer_run_goes_on_with_the_average_of_one_that_ended(tmp_path: Path) -> None:
    first, module = SWACallback(swa_start="8ba"), Module()
    it = fit(module, [first])
    it.save_checkpoint(tmp_path / "ended.ckpt")  # as with save_last: the model is the average, which was completed
    longer, again = SWACallback(swa_start="8ba"), Module()
    fit(again, [longer], resume=tmp_path / "ended.ckpt", max_epochs=EPOCHS + 1)
    assert longer.swa is not None
    assert longer.swa.num_averaged == 9
    expected = mean(module.steps[7:] + again.steps)
    torch.testing.assert_close(read(again.net), expected)
    once_more = fit(module, [first])  # another Trainer begins at its step 0
    assert once_more.global_step == EPOCHS * STEPS
    with lightnings_own_warnings():
        it.fit_loop.max_epochs = EPOCHS + 2
        it.fit(module, loader(STEPS, False))
    assert first.swa is not None
    assert first.swa.schedule.now.batches == it.global_step == (EPOCHS + 2) * STEPS
    assert first.swa.num_averaged == 2 * STEPS


class Two(Module):
    """Takes batches of two loaders at once, in `training_step` alone."""

    forward = pl.LightningModule.forward

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:  # type: ignore[override]
        return loss_of(self.net, batch["a"]) + loss_of(self.net, batch["b"])


def test_several_loaders_recalibrate_and_a_forward_is_asked_for_in_time() -> None:
    data = {"a": loader(STEPS, False), "b": loader(STEPS, False)}
    module = Two(with_norm=True)
    begin = pytest.warns(UserWarning, match=r"BatchNorm needs a forward at the end, got Two without one; .*options=")
    with begin, pytest.raises(ZeroDivisionError):
        fit(module, [SWACallback(**SCHEDULE), Stop(1)], data=data)
    options = {"forward": lambda module, batch: module.net(torch.cat([batch["a"][0], batch["b"][0]]))}
    fit(module, [SWACallback(**SCHEDULE, finalize_options=options)], data=data)
    weights = read(module.net)
    seen = torch.cat([samples(STEPS).tensors[0]] * 2).double() @ weights["0.weight"].double().T + weights["0.bias"]
    norm: Any = module.net[1]
    torch.testing.assert_close(norm.running_mean, seen.mean(0).float())
    torch.testing.assert_close(norm.running_var, seen.var(0).float(), rtol=1e-4, atol=1e-5)


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


def test_what_validation_sees_is_checked() -> None:
    with pytest.raises(ValueError, match="evaluate needs to be 'averaged' or 'trained', got evaluate='both'"):
        SWACallback(evaluate="both")


def test_without_lightning_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "dist_swa.integrations.lightning")
    with pytest.raises(ImportError, match=r"needs lightning, got .*; pip install 'dist_swa\[lightning\]'"):
        importlib.import_module("dist_swa.integrations.lightning")
