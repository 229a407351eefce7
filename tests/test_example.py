"""The example, end to end: with and without torchrun, ended by a signal, and resumed on other ranks."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch.nn import functional as F

import train as example

ROOT = Path(__file__).parents[1]
EXAMPLE = str(ROOT / "examples" / "train.py")
EPOCHS = 5
ROWS = ["last iterate", "averaged, stale BatchNorm", "averaged, recalibrated"]


def start(folder: Path, *options: str, ranks: int | None = 2) -> subprocess.Popen[str]:
    """Start the example in `folder`; without `ranks`, as a plain Python program."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    outputs = ["--json=table.json", "--save=weights.pt", "--plot=plots/accuracy.png"]
    return subprocess.Popen(
        [sys.executable, *torchrun, EXAMPLE, f"--epochs={EPOCHS}", "--swa-start=0.3dur", *outputs, *options],
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
    (results, weights), (expected_results, expected_weights) = written(tmp_path), written(uninterrupted[0])
    assert json.dumps(results) == json.dumps(expected_results)  # as text, since NaN is not equal to NaN
    assert weights.keys() == expected_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []


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
