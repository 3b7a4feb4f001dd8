"""Fixtures of several files of this folder."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.far_nodes import copied
from tests.support.rehearsals import SETTINGS
from tests.support.tiny_stack import no_index, small_stack

_MEMORY = Path("/dev/shm")


@pytest.fixture
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new folder in memory, where the machine has that; for the hundreds of small files of a node's network, which
    take most of the time of their tests on a disk."""
    around = _MEMORY if _MEMORY.is_mount() and os.access(_MEMORY, os.W_OK) else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(prefix="node-", dir=around) as folder:
        yield Path(folder)


@pytest.fixture
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache of who runs the tests: what a verb says of a vLLM that is not installed depends on the wheels there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "no-cache"))


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
