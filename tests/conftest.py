"""Layers that cannot run here skip loudly, and fail in CI (tests/lab/layers.py)."""

import signal

from tests.lab.layers import (  # noqa: F401
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
