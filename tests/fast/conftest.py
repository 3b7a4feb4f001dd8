"""Fixtures of several files of this folder."""

from pathlib import Path

import pytest

from tests.support.far_nodes import copied


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of this checkout for nodes that are folders, and its digest."""
    return copied(tmp_path_factory.mktemp("checkout"))
