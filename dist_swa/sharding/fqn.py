"""Which names does a pattern mean? The same answer for parameters and for layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

NamePattern: TypeAlias = "str | Callable[[str], bool] | Sequence[NamePattern]"
"""A shell-style pattern of dotted names ("head.*"), a function of a name, or several of them."""


def select(names: Collection[str], pattern: NamePattern, argument: str) -> set[str]:
    """Return those of `names` that `pattern`, the value of `argument`, means.

    Raises ValueError for a pattern of no name at all, which is a typing error, and TypeError for anything else.
    """
    if isinstance(pattern, str):
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            some = ", ".join(list(names)[:5])
            raise ValueError(f"{argument} needs a pattern that a name matches, got {argument}={pattern!r}; as {some}")
        return found
    if callable(pattern):
        return {name for name in names if pattern(name)}
    if isinstance(pattern, Sequence):
        return set().union(*(select(names, one, argument) for one in pattern))
    raise TypeError(
        f"{argument} needs a pattern such as 'head.*', a function of a name, or several, got {argument}={pattern!r};"
        " leave it out"
    )
