"""Tests of a layer that cannot run here are skipped and reported, and fail in CI (tests/lab/layers.py)."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import hypothesis
import pytest

from tests.lab.layers import (  # noqa: F401
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

# Tests write and remove many small files: in memory, where the machine has plenty of it and programs may be run there.
MEMORY, ROOM = Path("/dev/shm"), 8 << 30
if "TMPDIR" not in os.environ and MEMORY.is_mount() and os.access(MEMORY, os.W_OK):
    found = os.statvfs(MEMORY)
    if not found.f_flag & os.ST_NOEXEC and found.f_bavail * found.f_frsize > ROOM:
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

# The tests start sparkinstall thousands of times: it is compiled once a run, and not beside its sources.
if "PYTHONPYCACHEPREFIX" not in os.environ:
    os.environ["PYTHONPYCACHEPREFIX"] = bytecode = tempfile.mkdtemp(prefix="bytecode-")
    atexit.register(shutil.rmtree, bytecode, ignore_errors=True)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Neither how fast a machine is nor chance must decide a test: without SPARKINSTALL_FUZZ each run has the same examples.
hypothesis.settings.register_profile(
    "any machine",
    deadline=None,
    derandomize="SPARKINSTALL_FUZZ" not in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("any machine")

# A shell that starts the tests in the background makes them, and every program that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where files run in parallel, the longest start first: at the end nothing waits for one long file.
LONGEST_FIRST = (
    *(f"/test_{name}.py" for name in ("pair", "fresh_node", "serving", "serving_pair", "offline", "ray_units")),
    *("tests/nodes/", "tests/lab/", "tests/fast/test_killed.py", "tests/fast/"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by `LONGEST_FIRST`; those of one entry by their paths."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> tuple[int, str]:
    path = str(item.path)
    return next(at for at, folder in enumerate(LONGEST_FIRST) if folder in path), path
