"""Accelerate: DDP and its own FSDP1 and FSDP2 code, compared with plain loops."""

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
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from accelerate_on_cpu import enter_fsdp, launched
from dist_swa import SWA, checkpoint, recalibrate_batch_norm
from dist_swa.integrations.accelerate import AcceleratedSWA, prepare_swa
from markdown_blocks import code_for, execute
from models import same_bits
from ranks import on_ranks, run_on_ranks
from small_run import full_tensors, mean

ROOT = Path(__file__).parents[2]
GLOBAL_BATCH, STEPS, STOP, START = 24, 8, 5, 3
OPTIONS: dict[str, Any] = {"max_duration": f"{STEPS}ba", "swa_start": f"{START}ba"}
OPTIMIZERS: dict[str, Any] = {
    "ddp": torch.optim.AdamW,
    "fsdp1": torch.optim.SGD,  # under FSDP1, accelerate loads no optimizer state from SHARDED_STATE_DICT
    "fsdp1 flat": torch.optim.SGD,
    "fsdp2": torch.optim.AdamW,
    "fsdp2 sgd": torch.optim.SGD,
}
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp1": FullyShardedDataParallel, "fsdp2": FSDPModule}


@contextlib.contextmanager
def accelerated(kind: str, **options: Any) -> Iterator[Accelerator]:
    environment = {"FSDP_VERSION": kind[4:5] or "1", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    environment |= {"ACCELERATE_USE_FSDP": str(kind != "ddp").lower(), "FSDP_USE_ORIG_PARAMS": str(kind == "fsdp1")}
    with launched(**environment):
        yield Accelerator(**options)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch(step: int) -> Tensor:
    """Return this rank's part of a global batch."""
    given = torch.randn(GLOBAL_BATCH, 4, generator=torch.Generator().manual_seed(step))
    return given.chunk(dist.get_world_size())[dist.get_rank()]


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = OPTIMIZERS[kind](model.parameters(), lr=0.05)
    return optimizer


def plain_run(kind: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Train without accelerate. Return the average by `SWA`, and the full tensors of each averaged model."""
    model = build()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind.startswith("fsdp2"):
        fully_shard(model)
    else:
        model = FullyShardedDataParallel(model, use_orig_params=kind == "fsdp1", device_id=torch.device("cpu"))
    optimizer = optimizer_of(model, kind)
    swa = SWA(model, optimizer, **OPTIONS)
    models = []
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
        if swa.step():
            models.append(full_tensors(model))
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
        optimizer.zero_grad()  # with gradients, DCP would not make its lr=0 step in a save
        swa.step()


def stopped_run(kind: str, folder: Path) -> None:
    """Save two checkpoints into one folder, and end."""
    enter_fsdp()
    with accelerated(kind) as accelerator:
        model, optimizer, swa = prepared(accelerator, kind)
        assert isinstance(model, WRAPPERS[kind[:5]])
        train(accelerator, model, optimizer, swa, 0, START)
        accelerator.save_state(str(folder))
        train(accelerator, model, optimizer, swa, START, STOP)
        accelerator.save_state(str(folder))
        assert not swa.step()  # the lr=0 step that DCP makes to initialise optimizer state does not count
        assert swa.schedule.now.batches == STOP


def resumed_run(kind: str, folder: Path) -> dict[str, Tensor]:
    enter_fsdp()
    with accelerated(kind) as accelerator:
        model, optimizer, swa = prepared(accelerator, kind)
        optimizer.step()  # does not count, because load_state comes after it
        optimizer.zero_grad()
        accelerator.load_state(str(folder))
        assert not swa.step()
        assert swa.schedule.now.batches == STOP
        assert swa.num_averaged == STOP - START + 1
        train(accelerator, model, optimizer, swa, STOP, STEPS)
        assert swa.num_averaged == STEPS - START + 1
        return swa.average.full_state_dict()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resumed_run_has_the_average_of_a_plain_loop(tmp_path: Path, kind: str) -> None:
    expected, models = run_on_ranks(plain_run, 2, kind)[0]
    assert len(models) == STEPS - START + 1
    run_on_ranks(stopped_run, 2, kind, tmp_path)
    for ranks in (2, 3):
        average = run_on_ranks(resumed_run, ranks, kind, tmp_path)[0]
        if ranks == 2:
            assert same_bits(average, expected)
        for name, value in average.items():
            tolerance = 1e-6 if ranks == 2 else 1e-5
            torch.testing.assert_close(value.double(), mean(models, name), rtol=0, atol=tolerance)


@on_ranks(2)
def test_accumulated_batches_are_one_step() -> None:
    counts = []
    with accelerated("ddp", gradient_accumulation_steps=3) as accelerator:
        model, optimizer, swa = prepared(accelerator, "ddp")
        for step in range(7):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch(step)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                swa.step()
            counts.append(swa.schedule.now.batches)
    assert counts == [0, 0, 1, 1, 1, 2, 2]


@on_ranks(2)
def test_calls_without_an_optimizer_step_do_not_count_but_their_samples_do() -> None:
    counts = []
    with accelerated("ddp") as accelerator:
        model, optimizer, swa = prepared(accelerator, "ddp")
        for step in range(5):
            accelerator.backward(model(batch(step)).square().mean())
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
            swa.step(samples=GLOBAL_BATCH)
            counts.append(swa.schedule.now.batches)
        assert swa.schedule.now.samples == 4 * GLOBAL_BATCH
    assert counts == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("fused", [False, True])
@on_ranks(2)
def test_steps_that_a_gradient_scaler_skips_do_not_count(fused: bool) -> None:
    counts = []
    with accelerated("ddp") as accelerator:
        accelerator.scaler = GradScaler("cpu", init_scale=4.0)
        model = build()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=fused))
        swa = prepare_swa(accelerator, model, optimizer, **OPTIONS)
        for step in range(4):
            loss = model(batch(step)).square().mean()
            accelerator.backward(loss * (torch.inf if step in (1, 2) else 1))
            optimizer.step()
            optimizer.zero_grad()
            swa.step()
            counts.append(swa.schedule.now.batches)
    assert counts == [1, 1, 1, 2]


@pytest.mark.parametrize("evaluated", ["none", "all", "part"])
@on_ranks(2)
def test_evaluation_that_leaves_its_loader_early_does_not_change_accumulation(evaluated: str) -> None:
    """Two epochs of 5 batches, 3 for the first step and 2 for the last one."""
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
                if i == 2 and evaluated != "none":
                    with swa.swapped_in():
                        recalibrate_batch_norm(model, loaders[1], max_batches=2 if evaluated == "part" else None)
        assert swa.schedule.now.batches == 4


@on_ranks(2)
def test_free_memory_makes_room_for_another_training(tmp_path: Path) -> None:
    """`find_executable_batch_size` frees what a training that did not fit has prepared."""
    with accelerated("ddp") as accelerator:
        for _ in range(2):
            model, optimizer, swa = prepared(accelerator, "ddp")
            train(accelerator, model, optimizer, swa, 0, START)
            assert swa.num_averaged == 1
            accelerator.save_state(str(tmp_path))
            accelerator.free_memory()
    reference = weakref.ref(accelerator)
    del accelerator, model, optimizer, swa
    gc.collect()
    assert reference() is None


@on_ranks(2)
def test_a_step_after_max_duration_is_told_once() -> None:
    with accelerated("ddp") as accelerator:
        model, optimizer, swa = prepared(accelerator, "ddp")
        train(accelerator, model, optimizer, swa, 0, STEPS)
        with pytest.warns(UserWarning, match=f"max_duration={STEPS}ba was reached before step {STEPS + 1}; ") as caught:
            train(accelerator, model, optimizer, swa, STEPS, STEPS + 3)
        assert len(caught) == 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_each_average_has_its_own_folder_until_it_is_detached(tmp_path: Path, kind: str) -> None:
    enter_fsdp()
    with accelerated(kind) as accelerator:
        model, optimizer, swa = prepared(accelerator, kind)
        with pytest.raises(RuntimeError, match="got name='dist_swa' twice; pass another name="):
            prepare_swa(accelerator, model, optimizer, **OPTIONS)
        ema = prepare_swa(accelerator, model, optimizer, name="ema", **OPTIONS)
        train(accelerator, model, optimizer, swa, 0, START)
        assert not ema.step()  # one step, though the optimizer made several
        accelerator.save_state(str(tmp_path / "both"))
        with swa.swapped_in(), pytest.raises(RuntimeError, match="inside swapped_in; leave it first"):
            accelerator.save_state(str(tmp_path / "both"))
        assert (tmp_path / "both/dist_swa/.metadata").exists()  # the failed save has not removed it
        swa.detach()
        accelerator.save_state(str(tmp_path / "one"))
        assert not (tmp_path / "one/dist_swa").exists()
        assert (tmp_path / "one/ema").exists()
        swa = prepare_swa(accelerator, model, optimizer, **OPTIONS)  # its name is free again
        train(accelerator, model, optimizer, swa, 0, START)
        assert swa.num_averaged == 1
        message = r"dist_swa does not exist: averaging starts anew; the schedule .*, call swa.reset\(batches=\.\.\.\)$"
        with pytest.warns(UserWarning, match=message) as caught:
            accelerator.load_state(str(tmp_path / "one"))
        assert sum("averaging" in str(warning.message) for warning in caught) == 1
        assert not swa.step()
        assert (swa.schedule.now.batches, swa.num_averaged) == (0, 0)
        assert (ema.schedule.now.batches, ema.num_averaged) == (1, 0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_wrong_arguments_of_prepare_swa_say_what_to_do(kind: str) -> None:
    enter_fsdp()
    with accelerated(kind) as accelerator:
        bare = build()
        with pytest.raises(ValueError, match=r"what accelerator.prepare returned, got a Sequential and a AdamW that"):
            prepare_swa(accelerator, bare, torch.optim.AdamW(bare.parameters()), **OPTIONS)
        model, optimizer, _ = prepared(accelerator, kind, num_processes=2)
        for wrong in ((model, optimizer.optimizer), (build(), optimizer)):
            with pytest.raises(ValueError, match=r"not prepared; call it after prepare"):
                prepare_swa(accelerator, *wrong, **OPTIONS)
        with pytest.raises(ValueError, match=r"needs num_processes=4, got 2 of them, .*see launch/accelerate"):
            prepare_swa(accelerator, model, optimizer, num_processes=4, **OPTIONS)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp", 5])
@on_ranks(1)
def test_a_name_is_one_folder_because_a_save_removes_it(name: Any) -> None:
    with accelerated("ddp") as accelerator:
        model, optimizer, _ = prepared(accelerator, "ddp")
        with pytest.raises(ValueError, match="needs a name for a folder in each checkpoint"):
            prepare_swa(accelerator, model, optimizer, name=name, **OPTIONS)


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM", "ZeRO-3"])
@on_ranks(1)
def test_other_kinds_of_sharding_are_refused(name: str) -> None:
    with accelerated("ddp") as accelerator:
        model, optimizer, _ = prepared(accelerator, "ddp")
        if name == "ZeRO-3":
            next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
        else:
            accelerator.state.distributed_type = DistributedType(name)
        kind = "DEEPSPEED" if name == "ZeRO-3" else name
        message = rf"in DDP, FSDP1, FSDP2 or one process, got distributed_type={kind}; FSDP2 .* shards as .*ZeRO-3"
        with pytest.raises(ValueError, match=message):
            prepare_swa(accelerator, model, optimizer, name="other", **OPTIONS)


@on_ranks(2)
def test_rate_of_the_swa_phase_wins_over_the_scheduler() -> None:
    used: list[float] = []
    with accelerated("ddp") as accelerator:
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        phase: dict[str, Any] = {"schedule_swa_lr": True, "swa_lr": 0.01, "anneal_steps": 2}
        swa = prepare_swa(accelerator, model, optimizer, **OPTIONS, **phase)
        optimizer.optimizer.register_step_post_hook(lambda inner, *_: used.append(inner.param_groups[0]["lr"]))
        for step in range(STEPS):
            optimizer.zero_grad()
            accelerator.backward(model(batch(step)).square().mean())
            optimizer.step()
            swa.step()
            scheduler.step()  # after `swa.step`, which does not matter
            swa.step()  # without an optimizer step, as in gradient accumulation
    # accelerate steps a scheduler once a process.
    before = [1 / (1 + 2 * step) for step in range(START)]
    assert used == pytest.approx([*before, (before[-1] + 0.01) / 2, *[0.01] * (STEPS - START - 1)])


README = "tests/integrations/test_accelerate.py::test_the_readme_resumes_and_loads_what_was_scored"


def run_readme(kind: str, folder: Path, epochs: int) -> None:
    """Run the program of the guide up to a number of epochs, and check that it loads what it scored."""
    os.chdir(folder)
    enter_fsdp()
    code, loop = code_for(README), "EPOCHS + 1)"
    assert loop in code
    names: dict[str, Any] = {}
    with accelerated(kind):
        AcceleratorState._reset_state(reset_partial_state=True)  # the program makes its own Accelerator
        execute(code.replace(loop, f"{epochs} + 1)"), "dist_swa/integrations/README.md", names)
        assert isinstance(names["model"], WRAPPERS[kind[:5]])
        assert (names["epoch"], names["done"]) == (epochs, None if epochs == 3 else 3)
        (best,) = names["best"].steps()
        assert names["swa"].num_averaged == 10 * best - 11  # from step 12 on
        lowest = names["lowest"].item()
        assert names["evaluate"]() == pytest.approx(lowest, rel=1e-6)
        checkpoint.export(f"best/step-{best:09}", f"exported-{epochs}")
        plain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).eval()
        plain.load_state_dict(load_file(f"exported-{epochs}/model.safetensors"))
        found = plain(names["held_out"]) - names["held_out"].sum(1, keepdim=True)
        assert found.square().mean().item() == pytest.approx(lowest, rel=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_the_readme_resumes_and_loads_what_was_scored(tmp_path: Path, kind: str) -> None:
    run_on_ranks(run_readme, 2, kind, tmp_path, 3)
    run_on_ranks(run_readme, 3, kind, tmp_path, 4)


def run_example(folder: Path, *launch: str) -> list[str]:
    """Return the last lines that the example printed."""
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
    """`FSDP` is printed only if accelerate's own FSDP code ran."""
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


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_launch_files_for_the_cpu_are_those_for_gpus(kind: str) -> None:
    files = (ROOT / f"launch/accelerate/{name}.yaml" for name in (kind, f"{kind}_cpu"))
    gpu, cpu = (yaml.safe_load(file.read_text()) for file in files)
    for key in ("fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states"):
        cpu.get("fsdp_config", {}).pop(key, None)
    assert cpu == gpu
