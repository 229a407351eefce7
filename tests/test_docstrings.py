"""The docstring of each public name has an example that runs, and mentions all arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from public import ADAPTERS, MODULES, public_names, run_examples, undocumented

ROOT = Path(__file__).parents[1]
NAMES = [name for module in MODULES for name in public_names(module)]
NAMES_OF_ADAPTERS = [name for module in ADAPTERS for name in public_names(module)]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_examples(name)


@pytest.mark.filterwarnings("ignore")  # those of the frameworks
@pytest.mark.parametrize("name", NAMES_OF_ADAPTERS)
def test_the_example_of_an_adapter_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_examples(name)


@pytest.mark.parametrize("name", [*NAMES, *NAMES_OF_ADAPTERS])
def test_all_arguments_are_documented(name: str) -> None:
    assert undocumented(name) == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, set[str]]:
    """The anchors of each page that launch/docs writes."""
    folder = tmp_path_factory.mktemp("api")
    command = [sys.executable, str(ROOT / "launch/api_pages.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    written = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (written.returncode, written.stderr) == (0, "")
    return {page: set(re.findall(r'id="([^"]+)"', page.read_text())) for page in folder.rglob("*.html")}


@pytest.mark.parametrize("name", [*NAMES, *NAMES_OF_ADAPTERS, "dist_swa.integrations.composer.SWA"])
def test_the_pages_have(pages: dict[Path, set[str]], name: str) -> None:
    module, _, member = name.rpartition(".")
    (found,) = (ids for page, ids in pages.items() if str(page).endswith(f"/{module.replace('.', '/')}.html"))
    assert member in found


def test_links_between_the_pages_lead_somewhere(pages: dict[Path, set[str]]) -> None:
    for page in pages:
        for file, anchor in re.findall(r'<a [^>]*href="(?!http|\$)([^"#]*)#?([^"]*)"', page.read_text()):
            target = (page.parent / file).resolve() if file else page
            assert anchor in {"", *pages[target]}, (page.name, file, anchor)
