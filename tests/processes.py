"""The processes that a test has started, also those whose parents have died or that have sessions of their own."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def started_with(variable: str) -> list[int]:
    """Return the ids of the processes whose environment has `variable`, such as "NAME=value", on Linux."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def kill_all(variable: str) -> None:
    """Kill the processes whose environment has `variable`, until none is left."""
    while pids := started_with(variable):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
