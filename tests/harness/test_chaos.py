"""Three kills of each kind of run; `launch/chaos` does thirty, and says more."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos import Figures, on_example, on_trajectory


@pytest.mark.parametrize("kill", [on_example, on_trajectory])
def test_killed_runs_end_with_the_bits_of_one_that_nobody_killed(
    tmp_path: Path, kill: Callable[[int, random.Random, Path], Figures]
) -> None:
    figures = kill(3, random.Random(0), tmp_path)
    print(figures)
    assert (figures.kills, figures.other_bits, figures.lost_updates) == (3, 0, 0)
    assert figures.ends == figures.runs - 3 >= 1
