"""Fixtures of several files of this folder."""

from pathlib import Path

import pytest

from tests.support.far_nodes import copied
from tests.support.rehearsals import SETTINGS
from tests.support.tiny_stack import no_index, small_stack


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of this checkout for nodes that are folders, and its digest."""
    return copied(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Options of a rehearsal whose stack is installed in a moment; without the index, as the variables say."""
    stack = small_stack(tmp_path_factory.mktemp("stack"))
    for name, value in no_index(stack).items():
        monkeypatch.setenv(name, value)
    return (*SETTINGS, "--stack", str(stack), "--platform", "x86_64", "--set", "fp8.fallback=on")
