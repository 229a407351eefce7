"""Hooks that end the ranks of `@on_ranks` tests."""

from ranks import pytest_runtest_teardown, pytest_sessionfinish

__all__ = ["pytest_runtest_teardown", "pytest_sessionfinish"]
