"""Layers that cannot run here skip loudly, and fail in CI (tests/lab/layers.py)."""

from tests.lab.layers import (  # noqa: F401
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
