"""The code blocks of all Markdown files as programs, and how to run them.

A block of python or bash is a program that runs as it stands, in an empty folder. A comment on the line before the
block may say otherwise:

    <!-- test: continues -->              it belongs to the program of the block before it
    <!-- test: NAME -->                   it runs inside the setup NAME of markdown_setups.py
    <!-- test: tests/FILE.py::test_X -->  that test runs it, and gets it from `code_for`
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PYTHON_PATH = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
_BLOCK = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```[ ]*$", re.DOTALL | re.MULTILINE)
_TEST = re.compile(r"<!-- test: (.*) -->\s*\Z")


class Program(NamedTuple):
    """The code of a block and of those that continue it, on the lines that it has in the file."""

    file: str
    line: int  # of the first block
    language: str
    test: str
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def markdown_files() -> list[Path]:
    """Return all Markdown files of the repository."""
    found: list[Path] = []
    for folder, subfolders, files in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in ("build", "dist")]
        found += [Path(folder, name) for name in files if name.endswith(".md")]
    return sorted(found)


def without_blocks(text: str) -> str:
    return _BLOCK.sub("", text)


def programs() -> list[Program]:
    return [program for path in markdown_files() for program in _programs_of(path)]


def _programs_of(path: Path) -> Iterator[Program]:
    text, file = path.read_text(), str(path.relative_to(ROOT))
    program: Program | None = None
    for block in _BLOCK.finditer(text):
        line, code = text.count("\n", 0, block.start(3)) + 1, dedent(block[3])
        marked = _TEST.search(text[: block.start()])
        test = marked[1] if marked else ""
        if test != "continues":
            if program:
                yield program
            program = Program(file, line, block[2], test, "\n" * (line - 1) + code)
        else:
            assert program is not None, f"{file}:{line} continues nothing"
            assert program.language == block[2], f"{file}:{line} continues a program in {program.language}"
            program = program._replace(code=program.code + "\n" * (line - 1 - program.code.count("\n")) + code)
    if program:
        yield program


def code_for(test: str) -> str:
    """Return the code that `test`, such as "tests/FILE.py::test_X", is to run."""
    (program,) = [program for program in programs() if program.test == test]
    return program.code


def execute(code: str, file: str, names: dict[str, Any]) -> None:
    """Run Python code with the globals `names`."""
    names["__name__"] = "__main__"
    exec(compile(code, file, "exec"), names)


def run_with_bash(script: str, folder: Path) -> None:
    """Run commands of a shell in `folder`; raise if one of them fails."""
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | PYTHON_PATH | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
