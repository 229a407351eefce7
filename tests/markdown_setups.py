"""What programs in Markdown files find when they run: `SETUPS` by name. Each checks what the program did."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from accelerate_on_cpu import launched
from dist_swa import SWA, Equal, PowerEMA, ShardedAverage, checkpoint
from dist_swa.checkpoint import CheckpointFolder
from models import build, same_bits, trajectory, write

Names = dict[str, Any]  # the globals of a program
Enter = Callable[[Names], AbstractContextManager[None]]


class Setup(NamedTuple):
    enter: Enter
    ranks: tuple[int, ...]  # one launch for each number, in one folder; none: in the process of pytest, without a group


SETUPS: dict[str, Setup] = {}


def setup(*ranks: int) -> Callable[[Callable[[Names], Iterator[None]]], Enter]:
    """Register a generator function as a setup: it adds names, yields while the program runs, and checks."""

    def register(function: Callable[[Names], Iterator[None]]) -> Enter:
        enter = contextmanager(function)
        SETUPS[function.__name__] = Setup(enter, ranks)
        return enter

    return register


@contextmanager
def as_by_torchrun() -> Iterator[None]:
    """Leave the process group, for a program that makes its own from the variables that torchrun sets."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = [str(free.getsockname()[1])]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port[0]}
    yield
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store{size}", rank=rank, world_size=size)


@setup(2)
def readme_loop(names: Names) -> Iterator[None]:
    with as_by_torchrun():
        yield
    assert names["swa"].num_averaged == 91  # steps 210 to 300
    assert names["averaged"] < names["trained"]
    averaged, model = load_file("averaged/model.safetensors"), names["model"].state_dict()
    assert averaged.keys() == model.keys()
    for name, value in model.items():
        torch.testing.assert_close(averaged[name], value.full_tensor() if isinstance(value, DTensor) else value)


@setup()
def using(names: Names) -> Iterator[None]:
    for message in (
        "`isinstance.treespec, LeafSpec.` is deprecated",
        "`torch.jit.* is deprecated",
        "`torch.jit.* is not supported",
    ):
        warnings.filterwarnings("ignore", message)
    yield
    swa, model, given = names["swa"], names["model"], names["batches"][0]
    assert swa.num_averaged == 76  # steps 505 to 580
    assert all(Path("averaged", name).is_file() for name in ("model.safetensors",))
    with swa.swapped_in():
        averaged = model(given)
    assert not torch.equal(averaged, model(given))
    for copied in (names["program"].module(), names["traced"], torch.export.load("program.pt2").module()):
        torch.testing.assert_close(copied(given), averaged)
    names["inference"].load_state_dict(names["weights"])
    torch.testing.assert_close(names["inference"].eval()(given), averaged)
    best = sorted(Path().glob("best-*"))[-1]
    names["inference"].load_state_dict(load_file(best / "model.safetensors"))
    assert names["inference"](given).square().mean().item() == pytest.approx(names["best"], abs=1e-6)


@setup()
def checkpoints_of_a_folder(names: Names) -> Iterator[None]:
    folder, model = CheckpointFolder("checkpoints"), build()
    for step in (280, 560, 840):
        folder.save(step, {"model": model.state_dict()})
    yield


@setup(2, 3)
def state(names: Names) -> Iterator[None]:
    swa = SWA(nn.Linear(2, 2), swa_start="1ba")
    swa.step()
    steps = [path.name for path in Path("checkpoints").glob("step-*")]
    names["state"] = {"swa": swa}
    dist.barrier()
    yield
    assert names["step"] == (100 if steps else None)
    assert len(names["folder"].steps()) == 1 + len(steps)


@setup()
def checkpoints(names: Names) -> Iterator[None]:
    """Three checkpoints of a run with three averages, and two files of weights."""
    model = build()
    averages = ShardedAverage(model, {"mean": Equal(), "narrow": PowerEMA(0.05), "wide": PowerEMA(0.10)})
    for i, values in enumerate(trajectory(12, model), start=1):
        write(model, values)
        averages.update()
        if i % 4 == 0:
            checkpoint.save({"model": model.state_dict(), "swa": averages}, f"step-{i * 70}")
    for name in ("a", "b"):
        checkpoint.export(averages, f"{name}.safetensors", key="mean")
    yield
    assert {"merged", "deployed", "other", "c.safetensors"} <= set(os.listdir())
    assert load_file("deployed/model.safetensors")["up.weight"].dtype == torch.bfloat16


@setup(2)
def transformers(names: Names) -> Iterator[None]:
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator is found")
    with launched():
        yield
    assert any("eval_swa_loss" in entry for entry in names["trainer"].state.log_history)
    assert Path("run/checkpoint-15/dist_swa").is_dir()
    checkpoint.export("run/checkpoint-15", "best")  # as `dist-swa export` does
    for folder in ("averaged", "best"):
        assert type(names["model"]).from_pretrained(folder).num_parameters() == names["model"].num_parameters()


@setup(2, 3)
def transformers_best(names: Names) -> Iterator[None]:
    """The first launch stops at step 15, the second one resumes from there."""
    import transformers
    from transformers.trainer_callback import DefaultFlowCallback

    from dist_swa.integrations.transformers import add_swa

    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator is found")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 23, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    text = torch.arange(400).remainder(23).view(-1, 8)
    names |= {
        "model": transformers.GPT2LMHeadModel(config),
        "data": [{"input_ids": row, "labels": row} for row in text],
    }
    names |= {"TrainingArguments": transformers.TrainingArguments, "Trainer": transformers.Trainer}
    names |= {"add_swa": add_swa}
    is_first_launch = not Path("best-run").exists()
    on_step_end = DefaultFlowCallback.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = is_first_launch and state.global_step == 15
        return on_step_end(self, args, state, control, **kwargs)

    dist.barrier()
    with launched(), mock.patch.object(DefaultFlowCallback, "on_step_end", stop):
        yield
    dist.barrier()
    assert names["trainer"].state.global_step == (15 if is_first_launch else 20)
    saved, model = load_file("best/model.safetensors"), names["trainer"].model.state_dict()
    assert all(torch.equal(model[name], value) for name, value in saved.items())
    assert same_bits(names["trainer"].swa.average.full_state_dict() or model, model)
