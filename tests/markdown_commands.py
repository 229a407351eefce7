"""Commands in Markdown files that no test runs there as they stand: why not, and what is checked instead."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import NamedTuple

import click

from dist_swa.__main__ import _cli, main
from markdown_blocks import ROOT

Words = list[str]


class Listed(NamedTuple):
    """Commands that match `pattern`. `check` gets their words, and fails if the command cannot work."""

    pattern: str
    reason: str
    check: Callable[[Words], None]


def _path(word: str) -> str:
    """Return the path of the repository that a word of a command means, or ""."""
    return word if re.match(r"(launch|examples|tests|dist_swa)/", word) else ""


def _paths_exist(words: Words) -> None:
    for path in filter(None, map(_path, words)):
        assert (ROOT / path.partition("::")[0]).exists(), path


def _script(words: Words) -> None:
    """The script of launch/ can be executed, and bash can parse it."""
    _paths_exist(words)
    (script,) = (ROOT / word for word in words if word.startswith("launch/"))
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def _example(words: Words) -> None:
    """The script has the options that follow it."""
    _paths_exist(words)
    scripts = r"examples/|launch/(train$|ray_train\.py)"
    (place,) = (i for i, word in enumerate(words) if re.match(scripts, word))
    script = "examples/train.py" if words[place] == "launch/train" else words[place]
    subprocess.run(
        [sys.executable, "launch/options.py", script, *words[place + 1 :]], check=True, cwd=ROOT, capture_output=True
    )


def _pytest(words: Words) -> None:
    """The files have tests with the words of -k. (Collecting them would take seconds.)"""
    _paths_exist(words)
    files = [ROOT / "tests/cases.py", *(ROOT / word for word in words if word.startswith("tests/"))]
    text = "".join(file.read_text() for file in files).lower()
    expression = words[words.index("-k") + 1] if "-k" in words else ""
    for word in set(expression.split()) - {"and", "or", "not"}:
        assert word.lower() in text, word


def _benchmark(words: Words) -> None:
    _paths_exist(words)
    (script,) = (word for word in words if word.startswith("tests/benchmarks/"))
    compile((ROOT / script).read_text(), script, "exec")


def _pip(words: Words) -> None:
    """The extras exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"\[(.*?)\]", " ".join(words)):
        assert set(named.split(",")) <= set(extras), named


def run_dist_swa(words: Words) -> None:
    """Run the command in this process: each start of a process would import torch."""
    arguments = [path for word in words[1:] for path in (sorted(glob(word)) or [word])]
    assert main(arguments) == 0, words


def options_of_dist_swa_exist(words: Words) -> None:
    """The subcommand and the options exist; for a command in the text, whose files do not."""
    if len(words) > 1 and not words[1].startswith("-"):
        with click.Context(_cli) as context:
            command = _cli.get_command(context, words[1])
        assert command is not None, words
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known | {"--help"}, words


LISTED = (
    Listed(r"launch/train\b", "takes minutes; tests/test_example.py runs the example", _example),
    Listed(r"launch/test(-composer)?\b", "runs this test", _script),
    Listed(r"launch/docs\b", "sets up an environment", _script),
    Listed(r"sbatch\b.* launch/slurm.sh", "needs SLURM; tests/launch/test_slurm.py runs it with stand-ins", _script),
    Listed(r"launch/chaos\b", "takes minutes; tests/harness/test_chaos.py runs a short one", _script),
    Listed(
        r"(torchrun|accelerate launch|python)\b.* (examples|launch)/", "takes minutes; tests run the scripts", _example
    ),
    Listed(r"(python -m )?pytest\b", "its tests run anyway", _pytest),
    Listed(r"python tests/benchmarks/", "takes minutes, and prints figures of an idle machine", _benchmark),
    Listed(r"pip install\b", "would change the environment of the tests", _pip),
)


def listed(command: str) -> Listed | None:
    """Return what is known of a command that is not run as it stands."""
    command = re.sub(r"^([A-Z_]+=\S* )+|\.venv/bin/", "", command)
    return next((one for one in LISTED if re.match(one.pattern, command)), None)


def words_of(command: str) -> Words:
    """Return the words of a command, without comments and variables before it."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words


def commands_of(script: str) -> list[str]:
    """Return the lines of a script, with continued ones joined, without empty lines and comments."""
    lines = re.sub(r"\\\n\s*", " ", script).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def run_commands(script: str, run: Callable[[str, Path], None], folder: Path) -> None:
    """Run the commands of a script in their order: check the listed ones, and pass the others to `run`."""
    others: list[str] = []
    for command in [*commands_of(script), ""]:
        known = listed(command)
        if not (known or command.startswith("dist-swa ") or not command):
            others.append(command)
            continue
        if others:
            run("\n".join(others), folder)
            others.clear()
        if known:
            known.check(words_of(command))
        elif command:
            run_dist_swa(words_of(command))
