"""Markdown files: every code block and command runs, every link has a target, and README stays short."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from cases import CASES
from markdown_blocks import (
    ROOT,
    Program,
    code_for,
    execute,
    markdown_files,
    programs,
    run_with_bash,
    without_blocks,
)
from markdown_commands import listed, options_of_dist_swa_exist, run_commands, words_of
from markdown_setups import SETUPS
from models import same_bits
from ranks import run_on_ranks
from titan_names import titan_names

FILES = {str(path.relative_to(ROOT)): path.read_text() for path in markdown_files()}
NOT_RUN = {"text", "bibtex"}  # languages of blocks that are output or data
HERE = [program for program in programs() if program.language not in NOT_RUN and ".py::" not in program.test]
ELSEWHERE = [program for program in programs() if ".py::" in program.test]
of_every_file = pytest.mark.parametrize("file", FILES)


@pytest.mark.parametrize("program", HERE, ids=str)
def test_a_program_runs_as_it_stands(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for ranks in launches(program):
        run_on_ranks(run_in_setup, ranks, program, tmp_path)
    if not launches(program):
        run_in_setup(program, tmp_path)


def launches(program: Program) -> tuple[int, ...]:
    return SETUPS[program.test].ranks if program.test else ()


def run_in_setup(program: Program, folder: Path) -> None:
    os.chdir(folder)
    names: dict[str, Any] = {}
    with SETUPS[program.test].enter(names) if program.test else nullcontext():
        if program.language == "bash":
            run_commands(program.code, run_with_bash, folder)
        else:
            assert program.language == "python", f"{program} is in {program.language!r}; name python, bash or text"
            execute(program.code, program.file, names)


@pytest.mark.parametrize("program", ELSEWHERE, ids=str)
def test_a_program_that_another_test_runs_is_run_there(program: Program) -> None:
    file, _, name = program.test.partition("::")
    test = (ROOT / file).read_text()
    assert f"def {name}(" in test
    assert f'"{program.test}"' in test
    assert "code_for(" in test


@of_every_file
def test_every_fence_belongs_to_a_block(file: str) -> None:
    assert not re.search(r"^ *(```|~~~)", without_blocks(FILES[file]), re.MULTILINE)


@of_every_file
def test_commands_in_the_text_can_work(file: str) -> None:
    text = without_blocks(FILES[file])
    for command in (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)):
        if known := listed(command):
            known.check(words_of(command))
        elif re.match(r"dist-swa \w", command):
            options_of_dist_swa_exist(words_of(command))


@of_every_file
def test_links_have_targets(file: str) -> None:
    text = re.sub(r"`[^`\n]*`", "", without_blocks(FILES[file]))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = (ROOT / file).parent / path if path else ROOT / file
        assert target.exists(), link
        assert target.resolve().is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    text = without_blocks(text)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*?) *$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading).lower()).replace(" ", "-")
        copies = (f"{slug}-{number}" for number in range(1, 100))
        found.add(slug if slug not in found else next(copy for copy in copies if copy not in found))
    return found


def test_readme_has_at_most_900_words() -> None:
    assert len(FILES["README.md"].split()) <= 900


def test_figures_of_readme_are_those_beside_their_commands() -> None:
    readme, digits, costs = (FILES[file] for file in ("README.md", "examples/README.md", "tests/benchmarks/README.md"))
    for row, figure in (("last iterate", "96.77"), ("averaged, recalibrated", "98.33")):
        assert re.search(rf"^{row} +{figure} %", digits, re.MULTILINE)
        assert f"{float(figure):.1f} %" in readme
    for row, figure in (
        ("GPT-2 (124 M in 148 tensors), float32 | dist_swa", "1.07"),
        ("GPT-2 (124 M in 148 tensors), float32 | torch AveragedModel", "7.57"),
        ("17 layers of a ResNet-18, 32 images of 32 x 32 | dist_swa", "1.02"),
    ):
        assert re.search(rf"^\| {re.escape(row)} \| [\d.]+ ms \| {figure} \|", costs, re.MULTILINE)
        assert figure in readme
    for row, figure in (("constant rate", "2.5365"), ("constant rate, EMA", "2.4619"), ("annealed rate", "2.4647")):
        assert re.search(rf"^{row} +{figure} ", digits, re.MULTILINE)
        assert f"{float(figure):.2f}" in readme


def test_the_table_of_the_matrix_names_every_case() -> None:
    table = FILES["tests/README.md"].partition("| model | variants |")[2].partition("\n\n")[0]
    named = []
    for family, variants in re.findall(r"^\| ([\w+. ]+?) \| (.*?) \|", table, re.MULTILINE):
        named += [
            family if variant == "alone" else f"{family}, {variant.strip('`')}" for variant in variants.split("; ")
        ]
    assert sorted(named) == sorted(CASES)


def titan(folder: Path, resume: str | None = None) -> dict[str, Any]:
    os.chdir(folder)
    names = titan_names(resume)
    execute(code_for(TITAN), "dist_swa/integrations/README.md", names)
    assert names["swa"].num_averaged == 4
    weights: dict[str, Any] = load_file("best/model.safetensors")
    set_model_state_dict(names["model"], weights, options=StateDictOptions(full_state_dict=True))
    assert names["evaluate"](names["model"]) == pytest.approx(names["best"][0].item(), rel=1e-6)
    return dict(names["swa"].average.full_state_dict())


TITAN = "tests/test_markdown.py::test_the_lines_for_torchtitan_resume_on_any_number_of_ranks"


def test_the_lines_for_torchtitan_resume_on_any_number_of_ranks(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    average = run_on_ranks(titan, 2, whole)[0]
    for ranks in (2, 3):
        folder = tmp_path / f"on {ranks}"
        shutil.copytree(whole / "checkpoints/step-8", folder / "checkpoints/step-8")
        resumed = run_on_ranks(titan, ranks, folder, "checkpoints/step-8")[0]
        if ranks == 2:
            assert same_bits(resumed, average)
        torch.testing.assert_close(resumed, average, rtol=0, atol=1e-5)


def test_help_of_launch_train_needs_no_set_up(tmp_path: Path) -> None:
    for folder in ("launch", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    start = time.monotonic()
    done = subprocess.run(
        [tmp_path / "launch/train", "--help"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin:/usr/local/bin"},
    )
    assert time.monotonic() - start < 5
    assert done.returncode == 0, done.stderr
    assert "--wrapper {fsdp2,hsdp,ddp}" in done.stdout
    assert not (tmp_path / ".venv").exists()
