"""Imports go to lower packages only, `import dist_swa` loads little, and private members of others are listed."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections import Counter
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
    "options": 4,
    "__init__": 4,
    "checkpoint": 5,
    **dict.fromkeys(("integrations", "__main__"), 6),
}
FRAMEWORKS = ["accelerate", "transformers", "lightning", "composer"]
FSDP = ["torch.distributed.fsdp._flat_param", "dist_swa.sharding.fsdp1", "dist_swa.sharding.fsdp2"]
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


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The modules that `import dist_swa` loads. The frameworks are empty, so that an import in a ``try`` shows too."""
    folder = tmp_path_factory.mktemp("frameworks")
    for framework in FRAMEWORKS:
        (folder / f"{framework}.py").touch()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT.parent)])}
    code = "import sys, dist_swa; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split())


@pytest.mark.parametrize("module", [*FRAMEWORKS, *FSDP])
def test_import_does_not_load(loaded: set[str], module: str) -> None:
    assert "dist_swa.swa" in loaded
    assert module not in loaded


@pytest.mark.parametrize("framework", ["accelerate", "transformers"])
def test_a_missing_framework_names_the_extra(tmp_path: Path, framework: str) -> None:
    (tmp_path / f"{framework}.py").write_text(f"raise ModuleNotFoundError(name={framework!r})")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT.parent)])}
    command = [sys.executable, "-c", f"import dist_swa.integrations.{framework}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    error = f"needs {framework}, got no {framework}; pip install 'dist_swa[{framework}]'"
    assert result.stderr.splitlines()[-1].endswith(error)


# Private members: what begins with one underscore and is not this package's own. Where, which, how often.

ALLOWED = ("sharding.", "batch_norm.layers", "storage.metadata", "integrations.")
PRIVATE: dict[str, dict[str, int]] = {
    "batch_norm.layers": {"_BatchNorm": 1},
    "integrations.accelerate": {"_is_accelerate_prepared": 1, "_optimizers": 1},
    "integrations.trainer_options": {"_inner_training_loop": 1, "_save_checkpoint": 1},
    "integrations.transformers": {
        "_dataloaders": 1,
        "_get_output_dir": 1,
        "_inner_training_loop": 2,
        "_save_checkpoint": 2,
    },
    "sharding.find": {
        "_buffers": 3,
        "_flat_param": 1,
        "_local_tensor": 1,
        "_non_persistent_buffers_set": 1,
        "_parameters": 2,
        "_version": 2,
    },
    "sharding.fqn": {
        "_checkpoint_wrapped_module": 1,
        "_forward_module": 1,
        "_fsdp_wrapped_module": 1,
        "_orig_mod": 1,
        "_original_module": 1,
    },
    "sharding.fsdp1": {
        "_common_utils": 2,
        "_flat_param": 1,
        "_fqns": 1,
        "_handle": 3,
        "_inter_node_pg": 1,
        "_is_root": 1,
        "_params": 2,
        "_prefetched": 1,
        "_shapes": 1,
        "_shard_param_infos": 1,
        "_shared_param_infos": 1,
        "_skip_writeback_check": 1,
        "_training_state": 1,
        "_use_orig_params": 1,
        "_writeback_orig_params": 1,
    },
    "sharding.fsdp2": {
        "_comm_ctx": 2,
        "_fsdp_param_group": 2,
        "_fsdp_param_groups": 2,
        "_get_fsdp_state": 2,
        "_modules_to_run_forward": 1,
        "_post_forward_indices": 1,
        "_state_ctx": 2,
        "_training_state": 5,
        "_unsharded_param": 2,
    },
    "sharding.model": {"_save_to_state_dict": 2},
    "sharding.shard": {"_dtensor_spec": 2, "_local_tensor": 1},
    "sharding.wrappers": {"_buffers": 2, "_forward_module": 1, "_orig_mod": 1},
    "storage.metadata": {
        "_MEM_FORMAT_ENCODING": 1,
        "_StorageInfo": 3,
        "_StoragePrefix": 1,
        "_Unpickler": 3,
        "_get_layout": 1,
    },
}


# torch._foreach_lerp_ and the like have no public name; the other two are documented as public.
PUBLIC = re.compile("_foreach_.*|_fields|_extra_state")


def is_private(name: str) -> bool:
    return re.fullmatch("_[A-Za-z][A-Za-z0-9_]*", name) is not None and not PUBLIC.fullmatch(name)


def own_names(file: str) -> set[str]:
    """Names that a file, or a base class of this package, defines: in a ``def`` or ``class``, or assigns to `self`."""
    names: set[str] = set()
    for node in NODES[file]:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
    bases = {base for cls in classes(file) for base in cls.__mro__ if base.__module__.startswith("dist_swa.")}
    modules = {base.__module__.removeprefix("dist_swa.") for base in bases} - {file}
    return names.union(*map(own_names, modules))


def classes(file: str) -> list[type]:
    """The classes that a file defines; none where its framework is not installed."""
    name = f"dist_swa.{file}".removesuffix(".__init__")
    try:
        module = importlib.import_module(name)
    except ImportError:
        return []
    return [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == name]


def overridden(file: str) -> list[str]:
    """Private members of other packages that a class of a file overrides."""
    foreign = [
        (cls, {name for base in cls.__mro__ if not base.__module__.startswith("dist_swa.") for name in vars(base)})
        for cls in classes(file)
    ]
    mine = own_names(file)  # without what Python itself adds to a class
    return [name for cls, names in foreign for name in vars(cls) if name in names and name in mine]


def private_members(file: str) -> Counter[str]:
    """Private members of other packages: imported, overridden, read or assigned as attributes, or named in a text."""
    foreign = overridden(file)
    own = own_names(file) - set(foreign)
    used = [part for name in imports(file) if not name.startswith("dist_swa.") for part in name.split(".")]
    in_f_strings = {id(part) for node in NODES[file] if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in NODES[file]:
        match node:
            case ast.Attribute(attr=name) if name not in own:
                used.append(name)
            case ast.Constant(value=str(name)) if name not in own and id(node) not in in_f_strings:
                used.append(name)
    return Counter(name for name in [*foreign, *used] if is_private(name))


@pytest.mark.parametrize("file", sorted(FILES))
def test_private_members_are_listed(file: str) -> None:
    used = private_members(file)
    assert used == PRIVATE.get(file, {})
    assert not used or file.startswith(ALLOWED)
