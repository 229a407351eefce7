"""The docstring of Composer's adapter has an example that runs, and mentions all arguments."""

from pathlib import Path

import pytest

from public import run_examples, undocumented

NAME = "dist_swa.integrations.composer.SWA"


@pytest.mark.filterwarnings("ignore")  # those of Composer
def test_the_example_of_the_docstring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_examples(NAME)


def test_all_arguments_are_documented() -> None:
    assert undocumented(NAME) == []
