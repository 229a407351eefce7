"""A file imports only files above it, the core no trainer framework, and torch's private members stay in one file."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import dist_swa

ROOT = Path(dist_swa.__file__).parent
# A file imports only files that stand above it; `integrations` stands for all other files of that folder.
LEVELS = {
    **dict.fromkeys(("collectives", "schedule", "lr_phase"), 0),
    **dict.fromkeys(("sharding", "storage"), 1),
    **dict.fromkeys(("averaging", "batch_norm"), 2),
    "swa": 3,
    "__init__": 4,
    "checkpoint": 5,
    **dict.fromkeys(("integrations", "__main__"), 6),
}
FRAMEWORKS = ["accelerate", "transformers", "lightning", "composer"]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
NODES = {name: list(ast.walk(ast.parse(path.read_text()))) for name, path in FILES.items()}


def level(file: str) -> int:
    return LEVELS[file.partition(".")[0]]


def package(file: str) -> str:
    return file.partition(".")[0]


def imports(file: str) -> list[str]:
    """The full names of what a file imports, wherever in it."""
    package = f"dist_swa.{file}".rpartition(".")[0]
    names = [alias.name for node in NODES[file] if isinstance(node, ast.Import) for alias in node.names]
    for node in NODES[file]:
        if isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def file_of(name: str) -> str:
    """The file that has the member `name` of this package, or is it."""
    file = name.removeprefix("dist_swa").removeprefix(".")
    while file not in FILES and f"{file}.__init__".removeprefix(".") not in FILES:
        file = file.rpartition(".")[0]
    return file if file in FILES else f"{file}.__init__".removeprefix(".")


def own_imports(file: str) -> set[str]:
    names = [name for name in imports(file) if name.partition(".")[0] == "dist_swa"]
    return {file_of(name) for name in names} - {file}


@pytest.mark.parametrize("file", sorted(FILES))
def test_imports_go_to_lower_packages_only(file: str) -> None:
    others = [other for other in own_imports(file) if package(other) != package(file)]
    assert [other for other in others if level(other) >= level(file)] == []


def test_files_do_not_import_each_other_in_a_circle() -> None:
    TopologicalSorter({file: own_imports(file) for file in FILES}).prepare()


@pytest.mark.parametrize("file", ["averaging.rules", "schedule"])
def test_rules_and_schedule_need_python_only(file: str) -> None:
    assert {name.partition(".")[0] for name in imports(file)} <= sys.stdlib_module_names


def test_import_loads_no_trainer_framework(tmp_path: Path) -> None:
    """Empty modules of these names are there, so that an import inside a ``try`` shows as well."""
    for framework in FRAMEWORKS:
        (tmp_path / f"{framework}.py").touch()
    code = f"import sys, dist_swa; print([name for name in {FRAMEWORKS} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT.parent)])}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "[]\n"


@pytest.mark.parametrize("framework", ["accelerate", "transformers"])
def test_a_missing_framework_names_the_extra(tmp_path: Path, framework: str) -> None:
    (tmp_path / f"{framework}.py").write_text(f"raise ModuleNotFoundError(name={framework!r})")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT.parent)])}
    command = [sys.executable, "-c", f"import dist_swa.integrations.{framework}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    error = f"needs {framework}, got no {framework}; pip install 'dist_swa[{framework}]'"
    assert result.stderr.splitlines()[-1].endswith(error)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_foreach_")) and name != "_BatchNorm"


def own_members() -> set[str]:
    """Names that this package defines or assigns."""
    names: set[str] = set()
    for node in (node for nodes in NODES.values() for node in nodes):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
    return names


FRAMEWORKS_OWN = {  # what an adapter cannot do without, of its framework
    "integrations.accelerate": {"_optimizers"},
    "integrations.transformers": {"_dataloaders", "_get_output_dir"},
}


@pytest.mark.parametrize("file", sorted(file for file in FILES if not file.startswith("sharding.")))
def test_private_members_of_torch_are_for_shards_only(file: str) -> None:
    used = {node.attr for node in NODES[file] if isinstance(node, ast.Attribute)} - own_members()
    used -= FRAMEWORKS_OWN.get(file, set())
    used.update(part for name in imports(file) if name.startswith("torch.") for part in name.split("."))
    assert [name for name in used if is_private(name)] == []
