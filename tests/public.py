"""The public names, and the examples and arguments in their docstrings."""

import doctest
import importlib
import inspect
import re
from typing import Any

MODULES = ("dist_swa", "dist_swa.checkpoint")
ADAPTERS = tuple(f"dist_swa.integrations.{name}" for name in ("accelerate", "transformers", "lightning"))


def public_names(module: str) -> list[str]:
    """Return ``__all__``; of a module without it, the functions and classes that it defines."""
    found = importlib.import_module(module)
    mine = (name for name, value in vars(found).items() if getattr(value, "__module__", None) == module)
    names = getattr(found, "__all__", None) or [name for name in mine if not name.startswith("_")]
    return [f"{module}.{name}" for name in names if callable(getattr(found, name))]


def lookup(name: str) -> Any:
    module, _, member = name.rpartition(".")
    return getattr(importlib.import_module(module), member)


def run_examples(name: str) -> int:
    """Run the examples of a public name as a user would: with nothing imported. Return the number of lines."""
    text = inspect.getdoc(lookup(name)) or ""
    test = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, name, None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    printed: list[str] = []
    runner.run(test, out=printed.append)
    assert not runner.failures, "".join(printed)
    return len(test.examples)


def members(value: Any) -> dict[str, Any]:
    """Return a public function or class, as "", and the public methods of a class that override none of a framework."""
    found = {"": value}
    bases = inspect.getmro(value) if isinstance(value, type) else ()
    foreign = {name for base in bases if not is_own(base) for name in vars(base)}
    for base in filter(is_own, reversed(bases)):
        for name, member in vars(base).items():
            if not name.startswith("_") and name not in foreign and (callable(member) or isinstance(member, property)):
                found[name] = member
    return found


def is_own(cls: type) -> bool:
    return cls.__module__.startswith("dist_swa")


def undocumented(name: str) -> list[str]:
    """Return the members of a public name without a docstring, and their arguments that it does not mention."""
    value, missing = lookup(name), []
    for member, found in members(value).items():
        text = inspect.getdoc(getattr(value, member) if member else value) or ""
        if not text:
            missing.append(member)
        for argument in arguments(found):
            mention = rf"`[^`\n]*\b{argument}\b[^`\n]*`|^ +(\w+, )*{argument}(, \w+)*:"
            if not re.search(mention, text, re.MULTILINE):
                missing.append(f"{member}({argument})")
    return missing


def arguments(value: Any) -> list[str]:
    if not callable(value) or (isinstance(value, type) and issubclass(value, Exception)):
        return []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(value).parameters.values()
    return [argument.name for argument in found if argument.kind not in variable and argument.name != "self"]
