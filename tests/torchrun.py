"""A run of torchrun that can be killed at any time, on Linux."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300


class Run:
    """A process of torchrun that runs a script in a folder."""

    def __init__(self, script: list[str], ranks: int, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *script],
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"},
                stdout=log,
                stderr=log,
            )

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks."""
        pid = self.launcher.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait for `condition` or for the end of the run; return whether the run is still active."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.launcher.poll() is None and not condition():
            if time.monotonic() > deadline:
                self.kill(self.launcher.pid)
                raise TimeoutError(f"the run hangs:\n{self.log.read_text()[-5000:]}")
            time.sleep(0.0005)
        return self.launcher.poll() is None

    def finish(self) -> None:
        """Wait for the end; raise if the run failed."""
        self.wait_for(lambda: False)
        if self.launcher.returncode:
            raise RuntimeError(f"a run that was not killed failed:\n{self.log.read_text()[-5000:]}")

    def kill(self, victim: int) -> None:
        """Kill `victim`, one of the processes, and wait until all have ended."""
        ranks: list[int] = []
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if victim == self.launcher.pid:
                os.kill(victim, signal.SIGSTOP)  # so that it starts no more ranks
            ranks = self.ranks()
            os.kill(victim, signal.SIGKILL)
        if victim == self.launcher.pid:
            time.sleep(0.05)
            for rank in filter(is_alive, ranks):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
        self.launcher.wait(TIMEOUT_S)
        while any(map(is_alive, ranks)):
            time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
