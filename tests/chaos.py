"""Kill training at random moments, saves included, resume it, and compare with a run that nobody has killed.

    launch/chaos [KILLS] [--seed N]        # so many kills of each of the two below; the seed draws all but the timing

"example": examples/train.py on a constant number of ranks has to end with the same bits as without kills.
"trajectory": this file, averaging given weights on 1, 2 or 3 ranks, another number after each kill, has to end with
the bits of one process, every update counted once.

A kill is SIGKILL, of one rank (torchrun ends the others) or of torchrun (then of the ranks that it leaves behind).
After each, the newest checkpoint has to be whole, and no older than the one before.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dist_swa import EMA, SWA, Polynomial, ShardedAverage
from dist_swa.checkpoint import CheckpointFolder, open_checkpoint
from models import build, same_bits, trajectory, wrap, write

ROOT = Path(__file__).parents[1]
NUM_STEPS = 120  # of the trajectory
TIMEOUT_S = 300


@dataclass
class Figures:
    """What happened to one of the two."""

    runs: int = 0  # that were started
    kills: int = 0
    kills_of_launcher: int = 0
    kills_during_a_save: int = 0  # which have left an unfinished checkpoint
    ends: int = 0  # runs that came to the end of the training
    other_bits: int = 0  # ends with another result than without kills
    lost_updates: int = 0  # lost or counted twice

    def __str__(self) -> str:
        return (
            f"{self.runs} runs, {self.kills} kills ({self.kills_of_launcher} of the launcher,"
            f" {self.kills_during_a_save} during a save); came to the end: {self.ends}, with other bits:"
            f" {self.other_bits}, lost updates: {self.lost_updates}"
        )


class Run:
    """torchrun with a script on some ranks, in a folder."""

    def __init__(self, script: list[str], ranks: int, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *script],
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )

    def ranks(self) -> list[int]:
        """Return the processes that torchrun has started."""
        pid = self.launcher.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def wait_for(self, fact: Callable[[], bool]) -> bool:
        """Wait until `fact` or the end of the run; return whether the run goes on."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.launcher.poll() is None and not fact():
            if time.monotonic() > deadline:
                self.kill(self.launcher.pid)
                raise TimeoutError(f"the run hangs:\n{self.log.read_text()[-5000:]}")
            time.sleep(0.0005)
        return self.launcher.poll() is None

    def finish(self) -> None:
        """Wait for the end, which has to be a good one."""
        self.wait_for(lambda: False)
        if self.launcher.returncode:
            raise RuntimeError(f"a run that nobody killed failed:\n{self.log.read_text()[-5000:]}")

    def kill(self, victim: int) -> None:
        """Kill `victim`, and see to it that nothing of the run is left."""
        ranks: list[int] = []
        with contextlib.suppress(ProcessLookupError):  # one that ended in this moment
            if victim == self.launcher.pid:
                os.kill(victim, signal.SIGSTOP)  # it starts no more ranks
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


@dataclass
class Chaos:
    """Kills of runs of `script`, whose checkpoints are in `folder`/checkpoints."""

    script: list[str]
    ranks: tuple[int, ...]  # to choose from
    folder: Path
    check: Callable[[Figures], None]  # of what a run has written that came to the end
    draw: random.Random
    figures: Figures = field(default_factory=Figures)
    newest: int = -1

    def go(self, kills: int) -> Figures:
        with tqdm(total=kills, unit="kill", disable=None) as bar:
            while self.figures.kills < kills:
                self.once(is_spared=False)
                bar.update(self.figures.kills - bar.n)
        self.once(is_spared=True)  # what was begun comes to its end
        return self.figures

    def once(self, is_spared: bool) -> None:
        """Start or resume the training, and kill it, unless it is spared or comes to its end."""
        run = Run(self.script, self.draw.choice(self.ranks), self.folder)
        self.figures.runs += 1
        if is_spared or not run.wait_for(self.moment()):
            run.finish()
            self.figures.ends += 1
            self.check(self.figures)
            for path in sorted(self.checkpoints.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            self.newest = -1
            return
        victims = [run.launcher.pid, *run.ranks() * 2]
        victim = self.draw.choice(victims)
        run.kill(victim)
        self.figures.kills += 1
        self.figures.kills_of_launcher += victim == run.launcher.pid
        self.figures.kills_during_a_save += bool(list(self.checkpoints.glob(".step-*.partial")))
        self.look_at_checkpoints()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def moment(self) -> Callable[[], bool]:
        """Return whether the moment to kill has come: after the start, after the resume, or in a save."""
        after_s = self.draw.choice([0.0, 0.0, 0.002, 0.01]) + self.draw.random() * 0.005
        kind = self.draw.choice(["start", "resume", "save", "save", "save"])
        lock, started_ns = self.checkpoints / ".lock", time.time_ns()
        is_there: Callable[[], bool] = {
            "start": lambda: True,
            "resume": lambda: lock.exists() and lock.stat().st_mtime_ns > started_ns,
            "save": lambda: bool(list(self.checkpoints.glob(".step-*.partial"))),
        }[kind]
        after_s += {"start": 8, "resume": 3, "save": 0}[kind] * self.draw.random()
        number = self.draw.randint(1, 2) if kind == "save" else 1  # of the save
        since: list[float] = []
        was_there = [kind == "save" and is_there()]  # a leftover

        def has_come() -> bool:
            now = is_there()
            if now and not was_there[0]:
                since.append(time.monotonic())
            was_there[0] = now
            return len(since) >= number and time.monotonic() - since[number - 1] >= after_s

        return has_come

    def look_at_checkpoints(self) -> None:
        steps = sorted(self.checkpoints.glob("step-*"))
        for path in steps:
            open_checkpoint(path).verify()
        newest = int(steps[-1].name.removeprefix("step-")) if steps else -1
        if newest < self.newest:
            raise RuntimeError(f"a checkpoint is lost: the newest was {self.newest}, and is {newest}")
        self.newest = newest


def numbers_averaged(checkpoints: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in sorted(checkpoints.glob("step-*")):
        reader = open_checkpoint(path)
        found |= {f"{path.name} {key}": int(reader.read(key)) for key in reader.keys if key.endswith("num_averaged")}
    return found


def on_example(kills: int, draw: random.Random, folder: Path) -> Figures:
    """Kill the example, on two ranks."""
    script = [str(ROOT / "examples/train.py"), "--epochs=3", "--swa-start=0.3dur", "--checkpoint-every=1"]
    script += ["--checkpoint-dir=checkpoints", "--save=weights.pt", "--plot=plot.png"]
    for name in ("uninterrupted", "killed"):
        (folder / name).mkdir()
    Run(script, 2, folder / "uninterrupted").finish()

    def result(name: str) -> tuple[dict[str, Tensor], dict[str, int]]:
        return torch.load(folder / name / "weights.pt"), numbers_averaged(folder / name / "checkpoints")

    expected_weights, expected_numbers = result("uninterrupted")

    def check(figures: Figures) -> None:
        weights, numbers = result("killed")
        figures.other_bits += not same_bits(weights, expected_weights)
        figures.lost_updates += sum(abs(numbers[key] - expected_numbers[key]) for key in expected_numbers)
        (folder / "killed/weights.pt").unlink()

    return Chaos(script, (2,), folder / "killed", check, draw).go(kills)


def on_trajectory(kills: int, draw: random.Random, folder: Path) -> Figures:
    """Kill this file, on another number of ranks each time."""
    follow_trajectory(folder / "expected.pt", None)
    expected = torch.load(folder / "expected.pt")

    def check(figures: Figures) -> None:
        found = torch.load(folder / "result.pt")
        figures.other_bits += not same_bits(found, expected)
        figures.lost_updates += sum(int(abs(found[key] - expected[key])) for key in found if "num_averaged" in key)
        (folder / "result.pt").unlink()

    return Chaos([__file__, "--trajectory"], (1, 2, 3), folder, check, draw).go(kills)


def follow_trajectory(result: Path, checkpoints: Path | None) -> None:
    """Average given weights, from the newest checkpoint on if there is one, and write the averages to `result`."""
    model = wrap(build(), "fsdp2") if dist.is_initialized() else build()
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba", rule=Polynomial(2.0))
    ema = ShardedAverage(model, EMA(decay=0.9))
    state: dict[str, Any] = {"swa": swa, "ema": ema}
    folder = CheckpointFolder(checkpoints, keep=2) if checkpoints else None
    done = folder.load_latest(state) or 0 if folder else 0
    for step, values in enumerate(trajectory(NUM_STEPS, build())[done:], start=done + 1):
        write(model, values)
        swa.step()
        ema.update()
        if folder and step % 4 == 0:
            (folder.save_async if step % 8 else folder.save)(step, state)
            time.sleep(0.02)
    if folder:
        folder.wait()
    tensors: dict[str, Tensor] = {}
    for name, average in (("swa", swa.average), ("ema", ema)):
        tensors |= {f"{name} {key}": value for key, value in average.full_state_dict().items()}
        tensors[f"{name} num_averaged"] = torch.tensor(average.num_averaged)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(tensors, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    parser.add_argument("--trajectory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trajectory:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        follow_trajectory(Path("result.pt"), Path("checkpoints"))
        dist.barrier()
        time.sleep(0.1)  # see the README, "The end of a script"
        dist.destroy_process_group()
        return
    print(f"chaos: seed {args.seed}", flush=True)
    is_good = True
    for name, kill in (("example", on_example), ("trajectory", on_trajectory)):
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            figures = kill(args.kills, random.Random(args.seed), Path(folder))
            print(f"{name}: {figures} ({time.monotonic() - start:.0f} s)", flush=True)
            is_good &= not (figures.other_bits or figures.lost_updates)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
