"""Two kills of each kind of run; `launch/chaos` makes thirty."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos import Figures, kill_example, kill_trajectory


@pytest.mark.parametrize("kill", [kill_example, kill_trajectory])
def test_killed_runs_end_with_the_same_bits_as_one_that_was_not_killed(
    tmp_path: Path, kill: Callable[[int, random.Random, Path], Figures]
) -> None:
    figures = kill(2, random.Random(0), tmp_path)
    print(figures)
    assert (figures.kills, figures.other_bits, figures.lost_updates) == (2, 0, 0)
    assert figures.ends == figures.runs - 2 >= 1
