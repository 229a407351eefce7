"""The source distribution, the wheel that is built from it, and the texts that are published with them."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
import yaml

import dist_swa
from test_imports import FILES, imports

ROOT = Path(__file__).parents[1]
VERSION = dist_swa.__version__


def python(*arguments: str | Path, folder: Path, interpreter: str | Path = sys.executable) -> str:
    """Run Python in `folder` without the path of this process, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(interpreter), *map(str, arguments)]
    ran = subprocess.run(
        command, cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    python("-m", "hatchling", "build", "--target", "sdist", "--directory", folder, folder=ROOT)
    with tarfile.open(folder / f"dist_swa-{VERSION}.tar.gz") as file:
        file.extractall(folder, filter="data")
    return folder / f"dist_swa-{VERSION}"


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    python("-m", "hatchling", "build", "--target", "wheel", folder=source)
    return source / f"dist/dist_swa-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel. It finds the dependencies among the packages of this Python."""
    folder = tmp_path_factory.mktemp("installed")
    python("-m", "venv", "--without-pip", "venv", folder=folder)
    (site,) = folder.glob("venv/lib/*/site-packages")
    packages = [path for path in sys.path if path.endswith("-packages")]
    (site / "dependencies.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in packages))
    pip = ("-m", "pip", "--python", "venv/bin/python", "--disable-pip-version-check")
    python(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, folder=folder)
    return folder / "venv"


@pytest.mark.parametrize(
    "name",
    [
        *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md", "pyproject.toml"),
        *("examples/train.py", "launch/accelerate/ddp.yaml", "launch/constraints.txt", "launch/setup", "launch/test"),
        *("tests/conftest.py", "tests/ranks.py", "tests/storage/data/version-1-of-1-rank/.metadata"),
    ],
)
def test_the_source_distribution_has(source: Path, name: str) -> None:
    assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    assert os.access(source / name, os.X_OK) == os.access(ROOT / name, os.X_OK)


OLD_CHECKPOINT = "test_a_version_1_checkpoint_continues_under_any_wrapper[1 rank-version-1-of-1-rank-plain-dcp]"


@pytest.mark.parametrize("test", ["averaging/test_rules.py", f"storage/test_version_1.py::{OLD_CHECKPOINT}"])
def test_the_tests_of_the_source_distribution_pass(source: Path, test: str) -> None:
    printed = python("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{test}", folder=source)
    assert re.search(r"\d+ passed", printed)


def test_the_wheel_has_the_package_only(wheel: Path) -> None:
    found = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(f"dist_swa-{VERSION}.dist-info")}
    package = ROOT / "dist_swa"
    expected = {str(path.relative_to(ROOT)) for path in package.rglob("*") if path.suffix == ".py"}
    assert found == expected | {"dist_swa/py.typed"}


def test_the_wheel_averages_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    lines = (
        "import dist_swa, torch",
        "average = dist_swa.ShardedAverage(torch.nn.Linear(2, 2))",
        "average.update()",
        "print(dist_swa.__file__, average.num_averaged)",
    )
    printed = python("-c", "\n".join(lines), folder=tmp_path, interpreter=installed / "bin/python")
    (package,) = installed.glob("lib/*/site-packages/dist_swa")
    assert printed == f"{package / '__init__.py'} 1\n"


def test_the_command_of_the_wheel_knows_its_version(installed: Path) -> None:
    (facts,) = installed.glob("lib/*/site-packages/dist_swa-*.dist-info")
    assert PathDistribution(facts).version == VERSION
    assert (
        subprocess.check_output([installed / "bin/dist-swa", "--version"], text=True)
        == f"dist-swa, version {VERSION}\n"
    )


def test_what_is_imported_is_a_dependency(installed: Path) -> None:
    (facts,) = installed.glob("lib/*/site-packages/dist_swa-*.dist-info")
    declared = {re.split("[^a-z]", line)[0] for line in PathDistribution(facts).requires or [] if "extra" not in line}
    names = {name.partition(".")[0] for file in FILES if not file.startswith("integrations") for name in imports(file)}
    assert names - sys.stdlib_module_names - {"dist_swa"} <= declared


def test_the_newest_release_has_the_version_of_the_package() -> None:
    headings = re.findall(r"^## \[(.*)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert headings[0] == ("Unreleased", "")
    assert headings[1] == (VERSION, f" - {citation['date-released']}")
    assert citation["version"] == VERSION


def test_hosted_ci_and_pre_commit_use_the_declared_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r"3\.\d+$", line)]
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    assert job["strategy"]["matrix"] == {"python": pythons, "torch": ["oldest", "pinned", "newest"]}
    assert project["requires-python"] == f">={pythons[0]}"
    assert "launch/test" in [step.get("run") for step in job["steps"]]
    (ruff,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"\nruff=={ruff['rev'].removeprefix('v')}\n" in (ROOT / "launch/constraints.txt").read_text()
