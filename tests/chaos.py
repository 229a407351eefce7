"""Kill training at random moments, also during saves, resume it, and compare it with a run that was not killed.

    launch/chaos [KILLS] [--seed N]        # KILLS of each kind of run; the seed draws everything but the timing

"example": examples/train.py on two ranks has to end with the same bits as without kills.
"trajectory": tests/trajectory_run.py, on 1, 2 or 3 ranks, drawn again after each kill, has to end with the bits of one
process, and every update has to count once.

A kill is SIGKILL, of one rank (torchrun ends the others) or of torchrun (then also of the ranks that it leaves). After
each kill the newest checkpoint has to be complete, and at least as new as before.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dist_swa.checkpoint import open_checkpoint
from models import same_bits
from torchrun import ROOT, Run
from trajectory_run import average_trajectory


@dataclass
class Figures:
    """What happened to one kind of run."""

    runs: int = 0
    kills: int = 0
    kills_of_launcher: int = 0
    kills_during_a_save: int = 0  # which left an unfinished checkpoint
    ends: int = 0  # runs that finished the training
    other_bits: int = 0  # of these, the ones with another result than without kills
    lost_updates: int = 0  # lost or counted twice

    def __str__(self) -> str:
        return (
            f"{self.runs} runs, {self.kills} kills ({self.kills_of_launcher} of the launcher,"
            f" {self.kills_during_a_save} during a save); finished: {self.ends}, with other bits:"
            f" {self.other_bits}, lost updates: {self.lost_updates}"
        )


@dataclass
class Chaos:
    """Starts and kills runs of `script`, which saves in `folder`/checkpoints."""

    script: list[str]
    ranks: tuple[int, ...]  # to choose from
    folder: Path
    check: Callable[[Figures], None]  # counts differences in the result of a finished run
    draw: random.Random
    figures: Figures = field(default_factory=Figures)
    newest: int = -1  # step of the newest checkpoint

    def run(self, kills: int) -> Figures:
        with tqdm(total=kills, unit="kill", disable=None) as bar:
            while self.figures.kills < kills:
                self._run_once(kill=True)
                bar.update(self.figures.kills - bar.n)
        self._run_once(kill=False)  # finish the training
        return self.figures

    def _run_once(self, kill: bool) -> None:
        """Start or resume the training, and kill it unless it finishes first."""
        run = Run(self.script, self.draw.choice(self.ranks), self.folder)
        self.figures.runs += 1
        if not kill or not run.wait_for(self._moment_to_kill()):
            run.finish()
            self.figures.ends += 1
            self.check(self.figures)
            shutil.rmtree(self.checkpoints)
            self.newest = -1
            return
        victims = [run.launcher.pid, *run.ranks() * 2]
        victim = self.draw.choice(victims)
        run.kill(victim)
        self.figures.kills += 1
        self.figures.kills_of_launcher += victim == run.launcher.pid
        self.figures.kills_during_a_save += bool(list(self.checkpoints.glob(".step-*.partial")))
        self._verify_checkpoints()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _moment_to_kill(self) -> Callable[[], bool]:
        """Return a condition that holds at a random time after the start, after the resume, or within a save."""
        delay_s = self.draw.choice([0.0, 0.0, 0.002, 0.01]) + self.draw.random() * 0.005
        kind = self.draw.choice(["start", "resume", "save", "save", "save"])
        lock, started_ns = self.checkpoints / ".lock", time.time_ns()
        conditions: dict[str, Callable[[], bool]] = {
            "start": lambda: True,
            "resume": lambda: lock.exists() and lock.stat().st_mtime_ns > started_ns,
            "save": lambda: bool(list(self.checkpoints.glob(".step-*.partial"))),
        }
        holds = conditions[kind]
        delay_s += {"start": 8, "resume": 3, "save": 0}[kind] * self.draw.random()
        number = self.draw.randint(1, 2) if kind == "save" else 1  # of the save
        times: list[float] = []  # at which the condition began to hold
        held = kind == "save" and holds()  # an unfinished checkpoint of an earlier run

        def has_come() -> bool:
            nonlocal held
            before, held = held, holds()
            if held and not before:
                times.append(time.monotonic())
            return len(times) >= number and time.monotonic() - times[number - 1] >= delay_s

        return has_come

    def _verify_checkpoints(self) -> None:
        steps = sorted(self.checkpoints.glob("step-*"))
        for path in steps:
            open_checkpoint(path).verify()
        newest = int(steps[-1].name.removeprefix("step-")) if steps else -1
        if newest < self.newest:
            raise RuntimeError(f"a checkpoint is lost: the newest was step {self.newest}, now it is step {newest}")
        self.newest = newest


def numbers_averaged(checkpoints: Path) -> dict[str, int]:
    """Return every num_averaged in every checkpoint."""
    found: dict[str, int] = {}
    for path in sorted(checkpoints.glob("step-*")):
        reader = open_checkpoint(path)
        found |= {f"{path.name} {key}": int(reader.read(key)) for key in reader.keys if key.endswith("num_averaged")}
    return found


def kill_example(kills: int, draw: random.Random, folder: Path) -> Figures:
    """Kill the example on two ranks."""
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

    return Chaos(script, (2,), folder / "killed", check, draw).run(kills)


def kill_trajectory(kills: int, draw: random.Random, folder: Path) -> Figures:
    """Kill the averaging of a trajectory on 1, 2 or 3 ranks."""
    average_trajectory(folder / "expected.pt")
    expected = torch.load(folder / "expected.pt")

    def check(figures: Figures) -> None:
        found = torch.load(folder / "result.pt")
        figures.other_bits += not same_bits(found, expected)
        figures.lost_updates += sum(int(abs(found[key] - expected[key])) for key in found if "num_averaged" in key)
        (folder / "result.pt").unlink()

    return Chaos([str(ROOT / "tests/trajectory_run.py")], (1, 2, 3), folder, check, draw).run(kills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    args = parser.parse_args()
    print(f"chaos: seed {args.seed}", flush=True)
    is_good = True
    for name, kill in (("example", kill_example), ("trajectory", kill_trajectory)):
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            figures = kill(args.kills, random.Random(args.seed), Path(folder))
            print(f"{name}: {figures} ({time.monotonic() - start:.0f} s)", flush=True)
            is_good &= not (figures.other_bits or figures.lost_updates)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
