"""Lightning Fabric: averages of the modules that it returns, and checkpoints beside its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.checkpointing import load_custom_state, save_custom_state
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy  # type: ignore[attr-defined]
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from dist_swa import SWA, ShardedAverage, checkpoint, recalibrate_batch_norm
from lightning_run import STEPS, Ranks
from markdown_blocks import code_for, execute
from models import build, same_bits, trajectory, wrap, write
from ranks import on_ranks, run_on_ranks
from small_run import loader, loss_of, network, samples, sgd

STRATEGIES = ("single", "ddp", "fsdp2", "fsdp2, one file")
BARE = {"single": "plain", "ddp": "ddp", "fsdp2": "fsdp2", "fsdp2, one file": "fsdp2"}  # wrappers of `wrap`
SCHEDULE: dict[str, Any] = {"swa_start": "0ba", "max_duration": "4ba"}
NEEDS_EVERY_RANK = r"needs .* every rank, got caller='{}\..*; .*\.checkpoint\.save\(\{{'swa': swa\}}, path\)"
every_strategy = pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
is_compiled = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def shard(model: nn.Module, mesh: DeviceMesh) -> Any:
    return fully_shard(model, mesh=mesh["data_parallel"])


def fabric_of(strategy: str, precision: Any = None) -> Fabric:
    """Return a Fabric on all ranks with one of `STRATEGIES`; "single" is one device on each rank by itself."""
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "precision": precision}
    if strategy == "ddp":
        options["strategy"] = DDPStrategy()
    elif strategy != "single":
        is_folder = strategy == "fsdp2"
        options["strategy"] = ModelParallelStrategy(shard, dist.get_world_size(), 1, is_folder)
    if strategy != "single":
        options |= {"devices": dist.get_world_size(), "plugins": [Ranks()]}
    fabric = Fabric(**options)
    fabric.launch()
    return fabric


def set_up(strategy: str, compiled: bool = False) -> nn.Module:
    model: nn.Module = build()
    if compiled:
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    module: nn.Module = fabric_of(strategy).setup_module(model)
    return module


# The module of Fabric is unwrapped


@is_compiled
@every_strategy
@on_ranks(2)
def test_names_are_those_of_the_bare_model(strategy: str, compiled: bool) -> None:
    model = set_up(strategy, compiled)
    average = ShardedAverage(model)
    average.update()
    bare = ShardedAverage(wrap(build(), BARE[strategy]))
    bare.update()
    full, expected = average.full_state_dict(), bare.full_state_dict()
    assert same_bits(full, expected)
    assert full.keys() in ({}.keys(), build().state_dict().keys())
    assert [*average.state_dict()["slots"]["0"]] == [*bare.state_dict()["slots"]["0"]]


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.inner(given)
        return out


@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
@on_ranks(2)
def test_names_of_a_module_of_fabric_inside_of_a_model(strategy: str) -> None:
    model = Outer(set_up(strategy))
    average = ShardedAverage(model)
    average.update()
    recalibrate_batch_norm(model, [torch.randn(8, 4)], skip="inner.norm")
    slots = average.state_dict()["slots"]["0"]
    assert [*slots] == [f"inner.{name}" for name in ShardedAverage(build()).state_dict()["slots"]["0"]]
    if full := average.full_state_dict():
        Outer(build()).load_state_dict(full)


def test_the_learning_rate_of_an_optimizer_of_fabric() -> None:
    fabric, model = fabric_of("single"), nn.Linear(2, 1)
    module, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    options: dict[str, Any] = {"schedule_swa_lr": True, "swa_lr": 0.01, "anneal_steps": 2}
    swa, rates = SWA(module, optimizer, swa_start="2ba", max_duration="6ba", **options), list[float]()
    for _ in range(6):
        fabric.backward(module(torch.ones(3, 2)).sum())
        optimizer.step()
        swa.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.055, 0.01, 0.01, 0.01, 0.01])


@every_strategy
@on_ranks(2)
def test_an_average_equals_that_of_the_bare_model(strategy: str) -> None:
    """Updates, swaps, BatchNorm statistics and the end of a run have the same bits."""
    models = [set_up(strategy), wrap(build(), BARE[strategy])]
    averages = [SWA(model, **SCHEDULE) for model in models]
    loader = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3 + dist.get_rank())]
    found: list[list[Any]] = [[], []]
    for model, swa, log in zip(models, averages, found, strict=True):
        trainable: Any = model.module if isinstance(model, _FabricModule) else model
        for values in trajectory(4, build()):
            write(trainable, values)
            swa.step()
        with swa.swapped_in():
            recalibrate_batch_norm(model, loader)
            log.append(outputs(model))
        log.append(outputs(model))
        swa.finalize(loader)
        log.append(outputs(model))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][1])
    assert same_bits(averages[0].average.full_state_dict(), averages[1].average.full_state_dict())


def outputs(model: nn.Module) -> Tensor:
    """Return what `model` gives in evaluation mode."""
    model.eval()
    given: Tensor = model(torch.ones(2, 4)).detach()
    model.train()
    return given


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@every_strategy
@on_ranks(2)
def test_batches_are_converted_to_the_precision_of_fabric(strategy: str, precision: str) -> None:
    model = fabric_of(strategy, precision).setup_module(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    swa = SWA(model, swa_start="0ba")
    swa.step()
    given = torch.full((6, 4), 2.0 + dist.get_rank()) + torch.arange(6.0)[:, None]
    swa.finalize([given] * (1 + dist.get_rank()))  # float32, and another number on each rank
    layer: Any = model.module.get_submodule("1")
    assert layer.num_batches_tracked == 3
    assert bool((layer.running_mean != 0).all())


@pytest.mark.parametrize(
    ("saved", "loaded", "strategy", "other"),
    [
        ("fabric", "bare", "ddp", "fsdp2"),
        ("fabric", "bare", "fsdp2", "single"),
        ("bare", "fabric", "fsdp2", "ddp"),
        ("bare", "fabric", "ddp", "fsdp2"),
        ("fabric", "fabric", "ddp", "single"),
    ],
)
def test_a_checkpoint_loads_with_fabric_and_without(
    tmp_path: Path, saved: str, loaded: str, strategy: str, other: str
) -> None:
    (full, *_) = run_on_ranks(save_average, 2, tmp_path, strategy, saved)
    ranks = 1 if other == "single" else 3
    (again, *_) = run_on_ranks(load_average, ranks, tmp_path, other, loaded)
    assert same_bits(full, again)


def averaged(strategy: str, kind: str) -> tuple[SWA, nn.Module]:
    model = set_up(strategy) if kind == "fabric" else wrap(build(), BARE[strategy])
    return SWA(model, **SCHEDULE), model


def save_average(folder: Path, strategy: str, kind: str) -> dict[str, Tensor]:
    swa, model = averaged(strategy, kind)
    for values in trajectory(3, build()):
        write(getattr(model, "module", model) if kind == "fabric" else model, values)
        swa.step()
    checkpoint.save({"swa": swa}, folder / "swa")
    return swa.average.full_state_dict()


def load_average(folder: Path, strategy: str, kind: str) -> dict[str, Tensor]:
    swa, _ = averaged(strategy, kind)
    checkpoint.load({"swa": swa}, folder / "swa")
    assert swa.num_averaged == 3
    return swa.average.full_state_dict()


# Checkpoints of Fabric


@pytest.mark.parametrize("kind", ["SWA", "ShardedAverage"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2, one file"])
@on_ranks(2)
def test_fabric_save_of_a_sharded_average_raises_on_every_rank(tmp_path: Path, strategy: str, kind: str) -> None:
    fabric, path = fabric_of(strategy), tmp_path / "x.ckpt"
    model = fabric.setup_module(build())
    average = SWA(model, **SCHEDULE) if kind == "SWA" else ShardedAverage(model)
    with pytest.raises(RuntimeError, match=NEEDS_EVERY_RANK.format("lightning.fabric")):
        fabric.save(path, {"model": model, "swa": average})
    assert not path.exists()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@on_ranks(2)
def test_other_savers_of_one_rank_raise_too(tmp_path: Path, wrapper: str) -> None:
    """As accelerator.register_for_checkpointing calls them."""
    swa, plain = SWA(wrap(build(), wrapper), **SCHEDULE), SWA(build(), **SCHEDULE)
    folder = str(tmp_path / str(dist.get_rank()))
    Path(folder).mkdir()
    PartialState()
    save_custom_state(plain, folder, save_on_each_node=True)
    load_custom_state(plain, folder)
    for action in (save_custom_state, load_custom_state):
        with pytest.raises(RuntimeError, match=NEEDS_EVERY_RANK.format("accelerate")):
            action(swa, folder)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2, one file"])
@on_ranks(1)
def test_fabric_save_of_an_average_on_one_rank_has_all_of_it(tmp_path: Path, strategy: str) -> None:
    model = set_up(strategy)
    first, again = (ShardedAverage(model) for _ in range(2))
    first.update()
    fabric_of(strategy).save(tmp_path / "saved", {"model": model, "average": first})
    again.load_state_dict(torch.load(tmp_path / "saved", weights_only=False)["average"])
    assert same_bits(again.full_state_dict(), first.full_state_dict())


@on_ranks(2)
def test_the_part_of_another_rank_is_not_loaded(tmp_path: Path) -> None:
    """Fabric writes the state of the first rank, where an average is inside of another entry."""
    model = set_up("fsdp2")
    average = ShardedAverage(model)
    average.update()
    expected = average.full_state_dict()
    saved: list[Any] = [average.state_dict()]
    dist.broadcast_object_list(saved)
    if dist.get_rank():
        with pytest.raises(ValueError, match=r"needs this rank's part of .*, got that of another rank; load"):
            average.load_state_dict(saved[0])
    assert same_bits(average.full_state_dict(), expected)


def test_fabric_save_on_one_device_has_the_average(tmp_path: Path) -> None:
    fabric = fabric_of("single")
    swa, resumed = (SWA(fabric.setup_module(build()), **SCHEDULE) for _ in range(2))
    swa.step()
    fabric.save(tmp_path / "x.ckpt", {"swa": swa})
    fabric.load(tmp_path / "x.ckpt", {"swa": resumed})
    assert resumed.num_averaged == 1
    assert same_bits(resumed.average.full_state_dict(), swa.average.full_state_dict())


# The flow of the guide


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2, one file"])
def test_the_readme_runs(tmp_path: Path, strategy: str) -> None:
    """Stop after two of four epochs, resume on another number of ranks, load the best and score it again."""
    run_on_ranks(run_the_readme, 2, tmp_path, strategy, 2)
    run_on_ranks(run_the_readme, 4, tmp_path, strategy, 4)


def run_the_readme(folder: Path, strategy: str, epochs: int) -> None:
    os.chdir(folder)
    fabric = fabric_of(strategy)
    model = fabric.setup_module(network(with_norm=True))
    optimizer: Any = fabric.setup_optimizers(sgd(model))
    batches = loader(STEPS, is_distributed=True)

    def train_epoch(swa: SWA) -> None:
        for batch in batches:
            optimizer.zero_grad()
            fabric.backward(loss_of(model, batch))
            optimizer.step()
            swa.step()

    def evaluate(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            loss = loss_of(model, samples(STEPS)[:]).item()
        model.train()
        return loss

    names = {"fabric": fabric, "model": model, "optimizer": optimizer, "loader": batches, "epochs": epochs}
    names |= {"train_epoch": train_epoch, "evaluate": evaluate}
    execute(code_for("tests/integrations/test_fabric.py::test_the_readme_runs"), "README.md", names)
    assert names["swa"].num_averaged == epochs * STEPS
    losses = names["state"]["losses"]
    assert evaluate(model) == pytest.approx(min(losses), rel=1e-6)
    for epoch, loss in enumerate(losses, start=1):  # those of the first launch, too
        getattr(model.module, "reshard", int)()  # Fabric needs it after a forward without a backward
        fabric.load(f"averaged-{epoch}.ckpt", {"model": model})
        assert evaluate(model) == pytest.approx(loss, rel=1e-6)
    assert len(set(losses)) == epochs
