"""The language model: FSDP2 with tensor parallelism, tied weights, and three averages."""

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import language_model as example
from ranks import run_on_ranks

ROOT = Path(__file__).parents[1]
EXAMPLE = str(ROOT / "examples" / "language_model.py")
OPTIONS = ["--steps=12", "--batch=6", "--context=16", "--layers=1", "--width=64", "--eval-batches=1"]
OPTIONS += ["--swa-start=4ba", "--update-interval=2ba", "--half-life=3ba", "--window=3"]
UPDATES = [4, 6, 8, 10, 12]  # the steps after which a model is averaged
DECAY = 0.5 ** (2 / 3)
COEFFICIENTS = {
    "swa": [1 / 5] * 5,
    "ema": [DECAY**4, *((1 - DECAY) * DECAY**age for age in (3, 2, 1, 0))],
    "window": [0, 0, 1 / 3, 1 / 3, 1 / 3],
}


def start(ranks: int, folder: Path) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [sys.executable, *torchrun, EXAMPLE, *OPTIONS, f"--save={folder}/{ranks}.pt"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, float]:
    """Wait for a clean end; return the table that the example printed."""
    try:
        stdout, stderr = process.communicate(timeout=100)
    finally:
        process.terminate()
    assert process.returncode == 0, stderr
    assert not re.search("warn|error|traceback|terminate called", stderr, re.IGNORECASE), stderr
    header, *rows, last = stdout.splitlines()
    assert header.split() == ["bits", "per", "byte"]
    assert re.fullmatch(r"12 steps, 5 models averaged: \d+ s", last)
    return {row[:16].rstrip(): float(row[16:]) for row in rows}


Launched = dict[int, tuple[dict[str, float], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Return what the example printed and saved, on four ranks and on one."""
    folder = tmp_path_factory.mktemp("launched")
    processes = {ranks: start(ranks, folder) for ranks in (4, 1)}
    return {ranks: (finish(process), torch.load(folder / f"{ranks}.pt")) for ranks, process in processes.items()}


class Record(NamedTuple):
    """What the example did in a process group, on rank 0."""

    names: list[str]  # of the parameters
    iterates: list[list[Tensor]]  # every full parameter in float64, after each of UPDATES
    mesh_shapes: set[tuple[int, ...]]  # of the parameters
    figures: dict[str, float]
    averages: dict[str, dict[str, Tensor]]
    num_parameters: int  # in the average


def record() -> Record:
    iterates: list[list[Tensor]] = []
    mesh_shapes: set[tuple[int, ...]] = set()
    steps = itertools.count(1)

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if next(steps) in UPDATES:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            iterates.append([parameter.full_tensor().double() for parameter in parameters])
            mesh_shapes.update(tuple(parameter.device_mesh.shape) for parameter in parameters)

    hook = register_optimizer_step_post_hook(keep)
    figures, swa = example.run(example.parse_args(OPTIONS), torch.device("cpu"))
    hook.remove()
    averages = {name: swa.average.full_state_dict(name) for name in swa.average.names}
    num_parameters = int(swa.average.state_dict()["swa"]["num_parameters"])
    names = [name for name, _ in build().named_parameters()]
    return Record(names, iterates, mesh_shapes, figures, averages, num_parameters)


def build() -> Any:
    args = example.parse_args(OPTIONS)
    return example.GPT(args.layers, args.width, args.context)


def bits_per_byte(weights: dict[str, Tensor]) -> float:
    """Return the expected figure of these weights in the example's table."""
    model, (_, held_out) = build(), example.load_text()
    model.load_state_dict(weights)
    windows = torch.stack([held_out[16 * i : 16 * i + 17] for i in range(64)])
    with torch.no_grad():
        return float(model(windows)) / (64 * 16) / math.log(2)


def test_four_ranks_print_the_same_figures_as_one(launched: Launched) -> None:
    (table, weights), (alone, weights_alone) = launched[4], launched[1]
    assert list(table) == list(alone) == ["last iterate", "swa", "ema", "window"]
    assert all(0 < bits < 8 for bits in table.values())
    assert len(set(table.values())) == 4
    assert table == pytest.approx(alone, abs=2e-4)
    assert weights.keys() == weights_alone.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, weights_alone[name], rtol=0, atol=1e-4)


def test_the_saved_model_has_the_printed_figure(launched: Launched) -> None:
    for table, weights in launched.values():
        assert weights.keys() == build().state_dict().keys()
        assert torch.equal(weights["tokens.weight"], weights["head.weight"])
        assert bits_per_byte(weights) == pytest.approx(table["swa"], abs=1e-4)


@pytest.mark.parametrize(("ranks", "mesh_shape"), [(4, (2, 2)), (3, (3,))])
def test_each_average_is_the_mean_of_the_recorded_iterates(ranks: int, mesh_shape: tuple[int, ...]) -> None:
    names, iterates, mesh_shapes, figures, averages, num_parameters = run_on_ranks(record, ranks)[0]
    assert mesh_shapes == {mesh_shape}
    assert len(iterates) == len(UPDATES)
    assert num_parameters == len(names) == len(build().state_dict()) - 1  # the tied weight is averaged once
    assert averages.keys() == COEFFICIENTS.keys()
    for name, coefficients in COEFFICIENTS.items():
        weights = averages[name]
        assert weights.keys() == build().state_dict().keys()
        assert torch.equal(weights["tokens.weight"], weights["head.weight"])
        for i, parameter in enumerate(names):
            models = torch.stack([parameters[i] for parameters in iterates])
            mean = torch.einsum("n,n...->...", torch.tensor(coefficients, dtype=torch.float64), models)
            torch.testing.assert_close(weights[parameter].double(), mean, rtol=1e-6, atol=1e-7)
        assert bits_per_byte(weights) == pytest.approx(figures[name], abs=1e-5)
    last = dict(zip(names, (value.float() for value in iterates[-1]), strict=True))
    last["head.weight"] = last["tokens.weight"]
    assert bits_per_byte(last) == pytest.approx(figures["last iterate"], abs=1e-5)
