"""Fully qualified names (FQNs): those of the unwrapped model, and those that a pattern matches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import nn

NamePattern: TypeAlias = str | Callable[[str], bool] | Sequence["NamePattern"]
"""A shell-style pattern of FQNs ("head.*"), a function of an FQN, or several of them."""

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def clean_name(name: str) -> str:
    """Return `name` without the parts that torch.compile, activation checkpointing and FSDP1 add."""
    return ".".join(part for part in name.split(".") if part and part not in _WRAPPERS)


def named_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside `module` by FQN. A wrapper and the module in it share one, which means the latter."""
    return {clean_name(name): part for name, part in module.named_modules()}


def select(names: Collection[str], pattern: NamePattern, argument: str) -> set[str]:
    """Return the `names` that match `pattern`, the value of the argument named `argument`.

    Raises ValueError for a text that matches no name, and TypeError for a pattern of another type.
    """
    if isinstance(pattern, Sequence) and not isinstance(pattern, str):
        return set().union(*(select(names, one, argument) for one in pattern))
    found = {name for name in names if matches(name, pattern, argument)}
    if isinstance(pattern, str) and not found:
        some = ", ".join(list(names)[:5]) or "none"
        raise ValueError(f"{argument} needs a pattern that a name matches, got {argument}={pattern!r}; as {some}")
    return found


def matches(name: str, pattern: NamePattern, argument: str) -> bool:
    """Return whether `name` matches `pattern`, the value of the argument named `argument`. TypeError as `select`."""
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern)
    if callable(pattern):
        return bool(pattern(name))
    check_pattern(pattern, argument)
    return any(matches(name, one, argument) for one in pattern)


def check_pattern(pattern: NamePattern, argument: str) -> None:
    """Raise TypeError unless `pattern`, the value of the argument named `argument`, is a pattern."""
    if isinstance(pattern, Sequence) and not isinstance(pattern, str):
        for one in pattern:
            check_pattern(one, argument)
    elif not (isinstance(pattern, str) or callable(pattern)):
        raise TypeError(
            f"{argument} needs a pattern such as 'head.*', a function of a name, or several, got"
            f" {argument}={pattern!r}; leave it out"
        )
