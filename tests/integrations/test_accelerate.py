"""Accelerate: DDP and its own FSDP1 and FSDP2 code, beside plain loops that know nothing of it."""

import contextlib
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from accelerate_on_cpu import enter_fsdp, launched
from dist_swa import SWA, recalibrate_batch_norm
from dist_swa.integrations.accelerate import AcceleratedSWA, prepare_swa
from models import same_bits
from ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
GLOBAL_BATCH, STEPS, STOP, START = 24, 8, 5, 3
OPTIONS: dict[str, Any] = {"max_duration": f"{STEPS}ba", "swa_start": f"{START}ba"}
OPTIMIZERS: dict[str, Any] = {
    "ddp": torch.optim.AdamW,
    "fsdp1": torch.optim.SGD,  # from SHARDED_STATE_DICT accelerate loads no optimizer state under FSDP1
    "fsdp1 flat": torch.optim.SGD,
    "fsdp2": torch.optim.AdamW,
    "fsdp2 sgd": torch.optim.SGD,
}
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp1": FullyShardedDataParallel, "fsdp2": FSDPModule}


@contextlib.contextmanager
def accelerated(kind: str, **options: Any) -> Iterator[Accelerator]:
    """A new accelerator of that kind on this rank."""
    environment = {"FSDP_VERSION": kind[4:5] or "1", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    environment |= {"ACCELERATE_USE_FSDP": str(kind != "ddp").lower(), "FSDP_USE_ORIG_PARAMS": str(kind == "fsdp1")}
    with launched(**environment):
        yield Accelerator(**options)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch(step: int) -> Tensor:
    """This rank's part of a global batch."""
    given = torch.randn(GLOBAL_BATCH, 4, generator=torch.Generator().manual_seed(step))
    return given.chunk(dist.get_world_size())[dist.get_rank()]


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = OPTIMIZERS[kind](model.parameters(), lr=0.05)
    return optimizer


def plain_loop(kind: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The average by `SWA` itself in a loop without accelerate, and the whole models that were averaged."""
    model = build()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind.startswith("fsdp2"):
        fully_shard(model)
    else:
        model = FullyShardedDataParallel(model, use_orig_params=kind == "fsdp1", device_id=torch.device("cpu"))
    optimizer = optimizer_of(model, kind)
    swa = SWA(model, optimizer, swa_end=None, update_interval="1ba", **OPTIONS)
    models = []
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
        if swa.step():
            last = SWA(model, swa_start="0ba", swa_end=None, update_interval="1ba")
            last.step()
            models.append(last.average.full_state_dict())
    return swa.average.full_state_dict(), models


def prepared(accelerator: Accelerator, kind: str, **options: Any) -> tuple[nn.Module, Any, AcceleratedSWA]:
    model = build()
    if kind == "fsdp1 flat":
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(optimizer_of(model, kind))
    else:
        model, optimizer = accelerator.prepare(model, optimizer_of(model, kind))
    return model, optimizer, prepare_swa(accelerator, model, optimizer, **(OPTIONS | options))


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, swa: SWA, first: int, last: int) -> None:
    for step in range(first, last):
        accelerator.backward(model(batch(step)).square().mean())
        optimizer.step()
        optimizer.zero_grad()  # or DCP would not step the optimizer to save it
        swa.step()


def stopped(folder: Path) -> None:
    """A run of each kind that ends after its checkpoint, which was written over another one."""
    enter_fsdp()
    for kind in OPTIMIZERS:
        with accelerated(kind) as accelerator:
            model, optimizer, swa = prepared(accelerator, kind)
            assert isinstance(model, WRAPPERS[kind[:5]])
            train(accelerator, model, optimizer, swa, 0, START)
            accelerator.save_state(str(folder / kind))
            train(accelerator, model, optimizer, swa, START, STOP)
            accelerator.save_state(str(folder / kind))
            assert not swa.step()  # DCP has stepped an optimizer without a state to save it
            assert swa.schedule.now.batches == STOP


def resumed(folder: Path) -> dict[str, Any]:
    enter_fsdp()
    averages = {}
    for kind in OPTIMIZERS:
        with accelerated(kind) as accelerator:
            model, optimizer, swa = prepared(accelerator, kind)
            optimizer.step()  # not to be counted, since what follows goes back to the checkpoint
            optimizer.zero_grad()
            accelerator.load_state(str(folder / kind))
            assert not swa.step()
            assert swa.schedule.now.batches == STOP
            assert swa.num_averaged == STOP - START + 1
            train(accelerator, model, optimizer, swa, STOP, STEPS)
            averages[kind] = swa.average.full_state_dict()
            assert swa.num_averaged == STEPS - START + 1
    return averages


def plain_loops() -> dict[str, Any]:
    return {kind: plain_loop(kind) for kind in OPTIMIZERS}


def test_resumed_it_averages_as_a_plain_loop(tmp_path: Path) -> None:
    plain = run_on_ranks(plain_loops, 2)[0]
    run_on_ranks(stopped, 2, tmp_path)
    for ranks in (2, 3):
        averages = run_on_ranks(resumed, ranks, tmp_path)[0]
        for kind, (expected, models) in plain.items():
            if ranks == 2:
                assert same_bits(averages[kind], expected), kind
            assert len(models) == STEPS - START + 1
            for name, average in averages[kind].items():
                mean = torch.stack([model[name].double() for model in models]).mean(0)
                torch.testing.assert_close(average.double(), mean, rtol=0, atol=1e-6 if ranks == 2 else 1e-5)


def micro_batches() -> dict[str, list[int]]:
    """The steps counted after each micro-batch; `step` is called after every one, and after some optimizer steps."""
    counts: dict[str, list[int]] = {}
    with accelerated("ddp", gradient_accumulation_steps=3) as accelerator:
        model, optimizer, swa = prepared(accelerator, "ddp")
        counts["accumulate"] = []
        for step in range(7):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch(step)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                swa.step()
            counts["accumulate"].append(swa.schedule.now.batches)
    with accelerated("ddp") as accelerator:
        model, optimizer, swa = prepared(accelerator, "ddp")
        counts["by hand"] = []
        for step in range(5):
            accelerator.backward(model(batch(step)).square().mean())
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
            swa.step(samples=GLOBAL_BATCH)
            counts["by hand"].append(swa.schedule.now.batches)
        assert swa.schedule.now.samples == 4 * GLOBAL_BATCH
    for fused in (False, True):
        with accelerated("ddp") as accelerator:
            accelerator.scaler = GradScaler("cpu", init_scale=4.0)
            model = build()
            model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=fused))
            swa = prepare_swa(accelerator, model, optimizer, **OPTIONS)
            name = f"scaler, {fused=}"
            counts[name] = []
            for step in range(4):
                loss = model(batch(step)).square().mean()
                accelerator.backward(loss * (torch.inf if step in (1, 2) else 1))
                optimizer.step()
                optimizer.zero_grad()
                swa.step()
                counts[name].append(swa.schedule.now.batches)
    return counts


def looks_that_end_early() -> dict[str, int]:
    """The steps of two epochs of 5 batches, 3 for a step and 2 for the last one, with a look in each."""
    steps = {}
    for look in ("none", "whole", "part"):
        with accelerated("ddp", gradient_accumulation_steps=3) as accelerator:
            model = nn.Sequential(build(), nn.BatchNorm1d(3))
            rows = [batch(step)[i] for step in range(5) for i in range(4)]
            loaders: list[Any] = [torch.utils.data.DataLoader(rows, 2) for _ in range(2)]  # type: ignore[arg-type]
            model, optimizer, *loaders = accelerator.prepare(model, torch.optim.SGD(model.parameters()), *loaders)
            swa = prepare_swa(accelerator, model, optimizer, swa_start="0ba")
            for _ in range(2):
                for i, given in enumerate(loaders[0]):
                    with accelerator.accumulate(model):
                        accelerator.backward(model(given).square().mean())
                        optimizer.step()
                        optimizer.zero_grad()
                        swa.step()
                    if i == 2 and look != "none":
                        with swa.swapped_in():
                            recalibrate_batch_norm(model, loaders[1], max_batches=2 if look == "part" else None)
            steps[look] = swa.schedule.now.batches
    return steps


def test_a_look_that_leaves_its_loader_early_does_not_change_the_run() -> None:
    assert run_on_ranks(looks_that_end_early, 2)[1] == dict.fromkeys(("none", "whole", "part"), 4)


def trainings_one_after_the_other(folder: Path) -> None:
    """`find_executable_batch_size` frees what a training that did not fit has prepared."""
    with accelerated("ddp") as accelerator:
        for _ in range(2):
            model, optimizer, swa = prepared(accelerator, "ddp")
            train(accelerator, model, optimizer, swa, 0, START)
            assert swa.num_averaged == 1
            accelerator.save_state(str(folder))
            accelerator.free_memory()
    gone = weakref.ref(accelerator)
    del accelerator, model, optimizer, swa
    gc.collect()
    assert gone() is None


def test_free_memory_makes_room_for_another_training(tmp_path: Path) -> None:
    run_on_ranks(trainings_one_after_the_other, 2, tmp_path)


def test_counts_real_optimizer_steps() -> None:
    assert run_on_ranks(micro_batches, 2)[1] == {
        "accumulate": [0, 0, 1, 1, 1, 2, 2],
        "by hand": [0, 1, 1, 2, 2],
        "scaler, fused=False": [1, 1, 1, 2],
        "scaler, fused=True": [1, 1, 1, 2],
    }


def wrong_uses(folder: Path) -> None:
    enter_fsdp()
    for kind in ("ddp", "fsdp1", "fsdp2"):
        with accelerated(kind) as accelerator:
            bare = build()
            with pytest.raises(
                ValueError, match=r"what accelerator.prepare returned, got a Sequential and a AdamW that"
            ):
                prepare_swa(accelerator, bare, torch.optim.AdamW(bare.parameters()), **OPTIONS)
            model, optimizer, swa = prepared(accelerator, kind, num_processes=2)
            for wrong in ((model, optimizer.optimizer), (build(), optimizer)):
                with pytest.raises(ValueError, match=r"not prepared; call it after prepare"):
                    prepare_swa(accelerator, *wrong, **OPTIONS)
            with pytest.raises(ValueError, match=r"needs num_processes=4, got 2 of them, .*see launch/accelerate"):
                prepare_swa(accelerator, model, optimizer, num_processes=4, **OPTIONS)
            with pytest.raises(RuntimeError, match=r"got name='dist_swa' twice; pass another name="):
                prepare_swa(accelerator, model, optimizer, **OPTIONS)
            ema = prepare_swa(accelerator, model, optimizer, name="ema", **OPTIONS)
            train(accelerator, model, optimizer, swa, 0, START)
            assert not ema.step()  # one of these
            accelerator.save_state(str(folder / kind))
            with swa.swapped_in(), pytest.raises(RuntimeError, match="inside swapped_in; leave it first"):
                accelerator.save_state(str(folder / kind))
            assert (folder / kind / "dist_swa/.metadata").exists()  # that of the save before
            swa.detach()
            accelerator.save_state(str(folder / f"{kind} detached"))
            assert not (folder / f"{kind} detached/dist_swa").exists()
            assert (folder / f"{kind} detached/ema").exists()
            for name in ("", ".", "..", "a/b", "/tmp", 5):  # what is there is removed before a save
                with pytest.raises(ValueError, match="needs a name for a folder in each checkpoint"):
                    prepare_swa(accelerator, model, optimizer, name=name, **OPTIONS)  # type: ignore[arg-type]
            swa = prepare_swa(accelerator, model, optimizer, **OPTIONS)  # its name is free again
            train(accelerator, model, optimizer, swa, 0, START)
            assert swa.num_averaged == 1
            with pytest.warns(UserWarning, match="dist_swa is not there: averaging starts anew") as caught:
                accelerator.load_state(str(folder / f"{kind} detached"))
            assert sum("averaging" in str(warning.message) for warning in caught) == 1
            assert not swa.step()
            assert (swa.schedule.now.batches, swa.num_averaged) == (0, 0)
            assert (ema.schedule.now.batches, ema.num_averaged) == (1, 0)
            next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
            with pytest.raises(ValueError, match=r"got distributed_type=DEEPSPEED; FSDP2 .* shards as .*ZeRO-3"):
                prepare_swa(accelerator, model, optimizer, name="zero", **OPTIONS)
            del next(model.parameters()).ds_id  # type: ignore[attr-defined]
            for name in ("DEEPSPEED", "MEGATRON_LM"):
                accelerator.state.distributed_type = DistributedType(name)
                with pytest.raises(ValueError, match=rf"in DDP, FSDP1, FSDP2 or one process, got .*={name}; FSDP2"):
                    prepare_swa(accelerator, model, optimizer, name="zero", **OPTIONS)


def test_wrong_uses_say_what_to_do(tmp_path: Path) -> None:
    run_on_ranks(wrong_uses, 2, tmp_path)


def learning_rates() -> list[tuple[float, float]]:
    """The rates that the scheduler wrote, and those that the optimizer has after `swa.step`."""
    rates = []
    with accelerated("ddp") as accelerator:
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        phase: dict[str, Any] = {"schedule_swa_lr": True, "swa_lr": 0.01, "anneal_steps": 2}
        swa = prepare_swa(accelerator, model, optimizer, **OPTIONS, **phase)
        for step in range(STEPS):
            optimizer.zero_grad()
            accelerator.backward(model(batch(step)).square().mean())
            optimizer.step()
            scheduler.step()
            written = optimizer.param_groups[0]["lr"]
            swa.step()
            rates.append((written, optimizer.param_groups[0]["lr"]))
            optimizer.optimizer.param_groups[0]["lr"] = written
            swa.step()  # without a step of the optimizer, as when gradients accumulate
            assert optimizer.param_groups[0]["lr"] == rates[-1][1]
    return rates


def test_the_rate_of_swa_wins_over_a_scheduler_that_goes_on() -> None:
    written, rates = zip(*run_on_ranks(learning_rates, 2)[0], strict=True)
    assert written == pytest.approx([1 / (1 + 2 * step) for step in range(1, STEPS + 1)])  # two ranks, two steps each
    assert rates[: START - 1] == written[: START - 1]
    assert rates[START - 1 :] == pytest.approx([(1 / 7 + 0.01) / 2, *[0.01] * (STEPS - START)])


def run_example(folder: Path, *launch: str) -> list[str]:
    """What the example printed, after a clean end."""
    result = subprocess.run(
        [sys.executable, *launch, "examples/train_accelerate.py", "--epochs=2", "--checkpoint", str(folder / "saved")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-3:]


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_the_example_runs_with_each_launch_file(tmp_path: Path, kind: str) -> None:
    """(`FSDP` is printed only where accelerate's own code for it ran.)"""
    launch = ["-m", "accelerate.commands.launch", f"--config_file=launch/accelerate/{kind}_cpu.yaml"]
    printed = run_example(tmp_path, *launch, *(["tests/accelerate_on_cpu.py"] if kind != "ddp" else []))
    assert printed[0] == f"2 processes, {'MULTI_CPU' if kind == 'ddp' else 'FSDP'}"
    last, averaged = (float(line.split()[-2]) for line in printed[1:])
    assert averaged > max(70, last)
    assert (tmp_path / "saved/dist_swa/.metadata").exists()
    if kind == "ddp":
        resumed = run_example(tmp_path)  # in a single process; there is nothing left to train
        assert resumed[0] == "1 processes, NO"
        assert float(resumed[2].split()[-2]) == pytest.approx(averaged, abs=2)


def test_launch_files_for_the_cpu_are_those_for_gpus() -> None:
    for kind in ("ddp", "fsdp1", "fsdp2"):
        gpu, cpu = (
            yaml.safe_load((ROOT / f"launch/accelerate/{name}.yaml").read_text()) for name in (kind, f"{kind}_cpu")
        )
        for key in ("fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states"):
            cpu.get("fsdp_config", {}).pop(key, None)
        assert cpu == gpu
