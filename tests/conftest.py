"""Layers that cannot run here skip loudly, and fail in CI (tests/lab/layers.py)."""

import signal

import pytest

from tests.lab.layers import (  # noqa: F401
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where several files run side by side, what takes longest goes first: a long file that begins last is waited for alone.
LONGEST_FIRST = ("tests/builds/", "tests/nodes/", "tests/lab/", "tests/fast/test_killed.py", "tests/fast/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by `LONGEST_FIRST`, and those of one entry as they are."""
    items.sort(key=lambda item: next(at for at, folder in enumerate(LONGEST_FIRST) if folder in str(item.path)))
