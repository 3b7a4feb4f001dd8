"""A plugin of pytest: processes that collect the same files at once compile each file in one of them only."""

import os
from collections.abc import Generator

import pytest

_NUMBER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Let each process begin with another part of a folder: what one has compiled, the others read.

    `pytest_collection_modifyitems` of tests/conftest.py gives all of them the same order again.
    """
    report = yield
    if isinstance(collector, pytest.Directory):
        first = len(report.result) * _NUMBER // _PROCESSES
        report.result = report.result[first:] + report.result[:first]
    return report
