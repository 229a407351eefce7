"""launch/ray_train.py with real workers of Ray, one of which dies."""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_swa import checkpoint
from models import same_bits
from processes import kill_all
from ranks import run_on_ranks

ROOT = Path(__file__).parents[2]


def uninterrupted(folder: Path) -> None:
    sys.path.append(str(ROOT / "launch"))
    import ray_train

    ray_train.train(folder, torch.device("cpu"), report=lambda metrics: None)


@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray, got none; pip install 'ray[train]'")
def test_a_run_whose_worker_died_resumes_to_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    run_on_ranks(uninterrupted, 2, tmp_path / "expected")
    checkpoint.export(tmp_path / "expected/step-000000060", tmp_path / "expected.safetensors", key="swa")

    with tempfile.TemporaryDirectory() as ray_folder:  # a short path, for sockets
        environment = {"RAY_TMPDIR": ray_folder, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
        environment |= {"OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "tests", "launch"))}
        try:
            done = subprocess.run(
                [sys.executable, ROOT / "tests/ray_run.py", tmp_path],
                cwd=tmp_path,
                env=os.environ | environment,
                capture_output=True,
                text=True,
                timeout=150,
            )
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        finally:
            kill_all(f"RAY_TMPDIR={ray_folder}")
    assert (tmp_path / "died").exists()
    assert same_bits(load_file(tmp_path / "averaged.safetensors"), load_file(tmp_path / "expected.safetensors"))
