"""Accelerate: DDP and its own FSDP1 and FSDP2 code, beside plain loops that know nothing of it."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fsdp_on_cpu
from dist_swa import SWA
from dist_swa.integrations.accelerate import AcceleratedSWA, prepare_swa
from models import same_bits
from ranks import on_ranks, run_on_ranks

GLOBAL_BATCH, STEPS, STOP, START = 24, 8, 5, 3
OPTIONS: dict[str, Any] = {"max_duration": f"{STEPS}ba", "swa_start": f"{START}ba"}
OPTIMIZERS: dict[str, Any] = {
    "ddp": torch.optim.AdamW,
    "fsdp1": torch.optim.SGD,  # accelerate loads no optimizer state under FSDP1, but for that of FULL_STATE_DICT
    "fsdp1 flat": torch.optim.SGD,
    "fsdp2": torch.optim.AdamW,
    "fsdp2 sgd": torch.optim.SGD,
}
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp1": FullyShardedDataParallel, "fsdp2": FSDPModule}


@contextlib.contextmanager
def accelerated(kind: str, **options: Any) -> Iterator[Accelerator]:
    """A new accelerator of that kind on this rank."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"ACCELERATE_USE_CPU": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    os.environ |= {"ACCELERATE_USE_FSDP": "false" if kind == "ddp" else "true", "FSDP_VERSION": kind[4:5] or "1"}
    os.environ |= {"FSDP_USE_ORIG_PARAMS": str(kind == "fsdp1"), "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    yield Accelerator(**options)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


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
        optimizer.zero_grad()
        accelerator.backward(model(batch(step)).square().mean())
        optimizer.step()
        swa.step()


def stopped(folder: Path) -> None:
    """A run of each kind that ends after its checkpoint, which was written over another one."""
    fsdp_on_cpu.enter()
    for kind in OPTIMIZERS:
        with accelerated(kind) as accelerator:
            model, optimizer, swa = prepared(accelerator, kind)
            assert isinstance(model, WRAPPERS[kind[:5]])
            train(accelerator, model, optimizer, swa, 0, START)
            accelerator.save_state(str(folder / kind))
            train(accelerator, model, optimizer, swa, START, STOP)
            accelerator.save_state(str(folder / kind))
            assert not swa.step()  # DCP has stepped the optimizer to save it
            assert swa.schedule.now.batches == STOP


def resumed(folder: Path) -> dict[str, Any]:
    fsdp_on_cpu.enter()
    averages = {}
    for kind in OPTIMIZERS:
        with accelerated(kind) as accelerator:
            model, optimizer, swa = prepared(accelerator, kind)
            accelerator.load_state(str(folder / kind))
            assert not swa.step()
            assert swa.num_averaged == STOP - START + 1
            train(accelerator, model, optimizer, swa, STOP, STEPS)
            averages[kind] = swa.average.full_state_dict()
            assert swa.num_averaged == STEPS - START + 1
    return averages


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accelerate")
    run_on_ranks(stopped, 2, folder)
    return folder


@pytest.mark.parametrize("ranks", [2, 3])
def test_resumed_it_averages_as_a_plain_loop(checkpoints: Path, ranks: int) -> None:
    averages = run_on_ranks(resumed, ranks, checkpoints)[0]
    for kind, (expected, models) in zip(OPTIMIZERS, run_on_ranks(plain_loops, 2)[0], strict=True):
        if ranks == 2:
            assert same_bits(averages[kind], expected), kind
        assert len(models) == STEPS - START + 1
        for name, average in averages[kind].items():
            mean = torch.stack([model[name].double() for model in models]).mean(0)
            torch.testing.assert_close(average.double(), mean, rtol=0, atol=1e-6 if ranks == 2 else 1e-5)


def plain_loops() -> list[Any]:
    return [plain_loop(kind) for kind in OPTIMIZERS]


def micro_batches() -> dict[str, list[int]]:
    """The steps counted after each micro-batch; `step` is called after every one, and after some optimizer steps."""
    counts = {}
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
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
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


def test_counts_real_optimizer_steps() -> None:
    assert run_on_ranks(micro_batches, 2)[1] == {
        "accumulate": [0, 0, 1, 1, 1, 2, 2],
        "by hand": [0, 1, 1, 2, 2],
        "scaler, fused=False": [1, 1, 1, 2],
        "scaler, fused=True": [1, 1, 1, 2],
    }
