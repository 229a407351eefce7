"""launch/slurm.sh with real torchruns, ranks and signals, and stand-ins for the commands of SLURM."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from models import same_bits
from processes import kill_all, started_with
from trajectory_run import NUM_STEPS, average_trajectory

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 100
# srun starts a torchrun for each node on this machine, and passes signals on, as SLURM's own does.
STAND_INS = {
    "srun": """
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do "$@" & tasks+=($!); done
        trap 'kill -USR1 "${tasks[@]}"' USR1
        status=0
        rm -f srun_ended
        for task in "${tasks[@]}"; do
            while wait "$task"; [[ -e /proc/$task ]]; do :; done
            wait "$task" || status=$?
        done
        touch srun_ended
        exit "$status"
    """,
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$*" $(ls srun_ended) >requeued; fi',
    "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
}


class Job:
    """A job that runs tests/trajectory_run.py in `folder`, on `nodes` of this machine."""

    def __init__(self, folder: Path, nodes: int, ranks_per_node: int) -> None:
        self.folder, self.num_ranks = folder, nodes * ranks_per_node
        self.variable = f"SLURM_SUBMIT_DIR={folder}"
        for name, script in STAND_INS.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (folder / name).chmod(0o700)
        (folder / "requeued").unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        job = {"JOB_ID": "7", "JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": str(nodes), "SUBMIT_DIR": str(folder)}
        environment = {f"SLURM_{name}": value for name, value in job.items()}
        environment |= {"SLURM_GPUS_ON_NODE": str(ranks_per_node), "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        environment |= {"PATH": f"{folder}:{os.environ['PATH']}"}
        environment |= {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "tests", "examples"))}
        with (folder / "log").open("w") as log:
            self.script = subprocess.Popen(
                [ROOT / "launch/slurm.sh", ROOT / "tests/trajectory_run.py"],
                cwd=folder,
                env=os.environ | environment,
                stdout=log,
                stderr=log,
            )

    def signal_when(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds`, and send what SLURM sends before the time limit: SIGUSR1 to the script alone."""
        deadline = time.monotonic() + TIMEOUT_S
        while not holds():
            assert self.script.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.001)
        self.script.send_signal(signal.SIGUSR1)

    def end(self) -> bool:
        """Wait for the end of the job; return whether it was requeued."""
        status = self.script.wait(TIMEOUT_S)
        requeued = self.folder / "requeued"
        assert (status != 0) == requeued.exists(), self.log
        return requeued.exists() and requeued.read_text() == "requeue 7 srun_ended\n"

    def ranks_import_torch(self) -> bool:
        importing = 0
        for pid in started_with(self.variable):
            with contextlib.suppress(OSError):
                proc = Path(f"/proc/{pid}")
                importing += b"-u\0" in (proc / "cmdline").read_bytes() and "libtorch" in (proc / "maps").read_text()
        return importing == self.num_ranks

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()[-8000:]


@contextlib.contextmanager
def job(folder: Path, nodes: int = 1, ranks_per_node: int = 2) -> Iterator[Job]:
    """Start a job. On exit none of its processes is left."""
    it = Job(folder, nodes, ranks_per_node)
    try:
        yield it
    finally:
        kill_all(it.variable)
        it.script.wait()


def test_a_job_that_is_signalled_and_requeued_ends_with_the_bits_of_an_uninterrupted_run(tmp_path: Path) -> None:
    average_trajectory(tmp_path / "expected.pt")
    checkpoints, result = tmp_path / "checkpoints", tmp_path / "result.pt"

    def steps() -> list[str]:
        return sorted(path.name for path in checkpoints.glob("step-*"))

    with job(tmp_path) as running:
        running.signal_when(running.ranks_import_torch)
        assert running.end(), running.log
    assert steps() == []

    with job(tmp_path, nodes=2, ranks_per_node=1) as running:
        running.signal_when(lambda: "step-000000012" in steps())
        running.signal_when(lambda: "closing signal SIGUSR1" in running.log)  # once more, while the ranks end
        assert running.end(), running.log
    stopped = int(steps()[-1].removeprefix("step-"))
    assert 12 <= stopped < NUM_STEPS
    assert not result.exists()

    with job(tmp_path, ranks_per_node=3) as running:
        running.signal_when(lambda: any(checkpoints.glob(".step-*.partial")))  # during a save
        assert running.end(), running.log
    assert stopped < int(steps()[-1].removeprefix("step-")) < NUM_STEPS
    assert not any(checkpoints.glob(".step-*"))

    with job(tmp_path, ranks_per_node=1) as running:
        running.signal_when(result.exists)  # after the end of the training
        running.end()
    with job(tmp_path, ranks_per_node=1) as running:
        assert not running.end(), running.log
    assert same_bits(torch.load(result), torch.load(tmp_path / "expected.pt"))
