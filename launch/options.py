"""Check the options of a script of examples/, or print them: options.py SCRIPT [options, or --help]

It runs the script's `parse_args` with imports of the standard library only, so it needs nothing that is installed.
"""

import ast
import sys
from pathlib import Path
from typing import Any


def is_needed(node: ast.stmt) -> bool:
    """Whether `parse_args` may need a statement: an import of the standard library, or a constant."""
    match node:
        case ast.Import(names=names):
            return all(name.name.partition(".")[0] in sys.stdlib_module_names for name in names)
        case ast.ImportFrom(module=str(module)):
            return module.partition(".")[0] in sys.stdlib_module_names
        case ast.Assign(targets=[ast.Name(id=name) | ast.Tuple(elts=[ast.Name(id=name), *_])]):
            return name.isupper()
    return isinstance(node, ast.FunctionDef) and node.name == "parse_args"


def parse(script: Path) -> Any:
    """Return the options in `sys.argv`; for --help, and for wrong options, print and raise SystemExit."""
    tree = ast.parse(script.read_text())
    tree.body = [node for node in tree.body if is_needed(node)]
    names: dict[str, Any] = {}
    exec(compile(tree, script, "exec"), names)
    return names["parse_args"]()


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    parse(Path(sys.argv[0]))
