"""Layers that cannot run here skip loudly, and fail in CI (tests/lab/layers.py)."""

from tests.lab.layers import pytest_runtest_setup, pytest_terminal_summary  # noqa: F401
