"""The example, end to end: with and without torchrun, ended by a signal, and resumed on other ranks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from matplotlib.image import imread
from torch.nn import functional as F

import train as example
from models import same_bits
from ranks import run_on_ranks

ROOT = Path(__file__).parents[1]
EXAMPLE = str(ROOT / "examples" / "train.py")
EPOCHS = 5
OPTIONS = [f"--epochs={EPOCHS}", "--swa-start=0.3dur"]
OPTIONS += ["--json=table.json", "--save=weights.pt", "--plot=plots/accuracy.png"]
ROWS = ["last iterate", "averaged, stale BatchNorm", "averaged, recalibrated"]


def start(folder: Path, *options: str, ranks: int | None = 2) -> subprocess.Popen[str]:
    """Start the example in `folder`; without `ranks`, as a plain Python program."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.Popen(
        [sys.executable, *torchrun, EXAMPLE, *OPTIONS, *options],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a clean end; return what the example printed."""
    try:
        stdout, stderr = process.communicate(timeout=100)
    finally:
        process.terminate()  # if it hangs; torchrun ends its ranks
    assert process.returncode == 0, stderr
    assert not re.search("warn|error|traceback|terminate called", stderr, re.IGNORECASE), stderr
    return stdout


def written(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    return json.loads((folder / "table.json").read_text()), torch.load(folder / "weights.pt")


def assert_same_results(folder: Path, expected_folder: Path) -> None:
    (results, weights), (expected_results, expected_weights) = written(folder), written(expected_folder)
    assert json.dumps(results) == json.dumps(expected_results)  # as text, since NaN is not equal to NaN
    assert same_bits(weights, expected_weights)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of an uninterrupted run on two ranks, and what it printed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, finish(start(folder))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run, ended by SIGTERM while averaging, with one incomplete checkpoint."""
    folder = tmp_path_factory.mktemp("ended")
    with start(folder, "--checkpoint-dir=checkpoints", "--checkpoint-every=2") as process:
        deadline = time.monotonic() + 100
        while not list(folder.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.terminate()
        process.communicate()
    assert process.returncode != 0
    assert not (folder / "table.json").exists()
    shutil.copytree(folder / "checkpoints/step-000000056", folder / "checkpoints/.step-000000999.partial")
    (folder / "checkpoints/.step-000000999.partial/.metadata").unlink()
    return folder


def run_until_a_signal(folder: Path, step: int | None) -> str:
    """Run the example, in which rank 1 alone gets SIGUSR1 after `step`. Return the name of the newest checkpoint."""
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *OPTIONS, "--checkpoint-dir=checkpoints"])
        load_batches = example.load_batches

        def interrupted(train: Any, seed: int, epoch: int, device: torch.device) -> Iterator[example.Data]:
            for i, batch in enumerate(load_batches(train, seed, epoch, device), start=epoch * example.STEPS_PER_EPOCH):
                if i == step and dist.get_rank() == 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                yield batch

        patch.setattr(example, "load_batches", interrupted)
        example.train(example.parse_args(), torch.device("cpu"))
    return max(path.name for path in Path("checkpoints").glob("step-*"))


def test_a_signal_on_one_rank_ends_all_with_a_checkpoint_from_which_the_bits_are_the_same(
    uninterrupted: tuple[Path, str], tmp_path: Path
) -> None:
    for step in (70, 84):  # in the middle of an epoch, and before its first step
        assert run_on_ranks(run_until_a_signal, 2, tmp_path, step) == 2 * [f"step-{step:09}"]
        assert not (tmp_path / "table.json").exists()
    run_on_ranks(run_until_a_signal, 2, tmp_path, None)
    assert_same_results(tmp_path, uninterrupted[0])


def test_prints_the_table_and_draws_the_picture(uninterrupted: tuple[Path, str]) -> None:
    folder, printed = uninterrupted
    table = written(folder)[0]["table"]
    lines = [f"{row:28}{table[row]['accuracy']:6.2f} %{table[row]['nll']:8.4f}" for row in ROWS]
    assert printed.splitlines()[-3:] == lines
    picture = imread(folder / "plots/accuracy.png")
    assert picture.shape[:2] == (600, 1050)
    assert picture[..., :3].std() > 0.05  # not blank


def test_the_saved_model_has_the_accuracy_of_the_last_row(uninterrupted: tuple[Path, str]) -> None:
    results, weights = written(uninterrupted[0])
    model, (images, labels) = example.build_model().eval(), example.load_data()[1]
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model(images)
    figures = results["table"]["averaged, recalibrated"]
    assert 100 * (logits.argmax(1) == labels).double().mean() == pytest.approx(figures["accuracy"])
    assert F.cross_entropy(logits, labels) == pytest.approx(figures["nll"], rel=1e-5)
    assert figures["accuracy"] > 90


def test_a_resumed_run_ends_with_the_same_bits(uninterrupted: tuple[Path, str], ended: Path, tmp_path: Path) -> None:
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    finish(start(tmp_path, "--checkpoint-dir=checkpoints"))
    assert_same_results(tmp_path, uninterrupted[0])


@pytest.mark.parametrize(("ranks", "wrapper"), [(None, "ddp"), (3, "hsdp")])
def test_resumes_on_other_ranks_under_another_wrapper(
    uninterrupted: tuple[Path, str], ended: Path, tmp_path: Path, ranks: int | None, wrapper: str
) -> None:
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    printed = finish(start(tmp_path, "--checkpoint-dir=checkpoints", f"--wrapper={wrapper}", ranks=ranks))
    assert all(row in printed for row in ROWS)
    results, expected = written(tmp_path)[0], written(uninterrupted[0])[0]
    assert json.dumps(results["history"][:2]) == json.dumps(expected["history"][:2])  # from the checkpoint
    recalibrated, expected_figures = (run["table"]["averaged, recalibrated"] for run in (results, expected))
    assert recalibrated["accuracy"] == pytest.approx(expected_figures["accuracy"], abs=3)
