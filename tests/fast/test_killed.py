"""Killed anywhere, it goes on: SIGKILL at every line of the journal, in every touch, and at random moments."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparkinstall.system import processes
from tests.support.rehearsals import (
    CHECKOUT,
    SETTINGS,
    Rehearsal,
    Tree,
    difference,
    environment,
    files_with_times,
    furnish,
    said,
    tree,
)

pytestmark = pytest.mark.network

DYING = "tests.support.dying_run"
# Two trees at work at once, each with first and last states of its own: paths are written into scripts.
SIDE_BY_SIDE = 2
RANDOM_MOMENTS = 8


@dataclass(frozen=True)
class Ground:
    """A root, how it was before, and how an undisturbed run leaves it."""

    node: Rehearsal
    furnished: bool
    first: Tree
    last: Tree
    lines: int
    seconds: float

    @property
    def around(self) -> Path:
        return self.node.root.parent

    def state(self) -> Tree:
        return tree(self.around, files_with_times)


def prepare(around: Path, furnished: bool) -> Ground:
    around.mkdir(parents=True)
    node = Rehearsal(around / "node", (*SETTINGS, "--ignore", "prefix"))
    if furnished:
        furnish(node.root)
    first = tree(around, files_with_times)
    began = time.monotonic()
    run = node.all()
    seconds = time.monotonic() - began
    assert run.returncode == 0, said(run)
    last, lines = node.installed(), len(node.records())
    ground = Ground(node, furnished, first, last, lines, seconds)
    take_back(ground)
    return ground


def take_back(ground: Ground) -> None:
    run = ground.node.uninstall()
    assert run.returncode == 0, said(run)
    assert ground.state() == ground.first, difference(ground.first, ground.state())


def go_on(ground: Ground, how: str) -> None:
    """The same command again comes to the same end; then everything is taken back."""
    run = ground.node.all()
    assert run.returncode == 0, f"{how}\n{said(run)}"
    last = ground.node.installed()
    assert last == ground.last, f"{how}\n{difference(ground.last, last)}"
    take_back(ground)


def in_turns(grounds: "list[Ground]", moments: Iterable[str], job: Callable[[Ground, str], None]) -> None:
    """Every moment on one of the grounds, as many at once as there are grounds."""
    waiting = iter(list(moments))

    def work(ground: Ground) -> None:
        for moment in waiting_safely(waiting):
            job(ground, moment)

    with ThreadPoolExecutor(len(grounds)) as pool:
        for done in [pool.submit(work, ground) for ground in grounds]:
            done.result()


def waiting_safely(moments: Iterator[str]) -> Iterator[str]:
    while (moment := next(moments, None)) is not None:
        yield moment


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> list[Ground]:
    """One root that is not there before, and one in which others have left things."""
    base = tmp_path_factory.mktemp("killed")
    return [prepare(base / f"{number}", furnished=number % 2 == 1) for number in range(SIDE_BY_SIDE)]


def test_killed_at_every_line_of_the_journal_it_goes_on(grounds: list[Ground]) -> None:
    for ground in grounds:
        assert ground.lines > 6

    def job(ground: Ground, moment: str) -> None:
        killed = ground.node.all(through=DYING, DYING_AT=moment)
        assert killed.returncode == -signal.SIGKILL, f"{moment}\n{said(killed)}"
        go_on(ground, moment)

    for ground in grounds:
        moments = [f"{when}:{n}" for n in range(1, ground.lines + 1) for when in ("before", "after")]
        moments.append(f"torn:{ground.lines // 2 + 1}")
        half = [ground]
        in_turns(half, moments, job)


def test_killed_at_every_line_and_taken_back_at_once(grounds: list[Ground]) -> None:
    def job(ground: Ground, moment: str) -> None:
        killed = ground.node.all(through=DYING, DYING_AT=moment)
        assert killed.returncode == -signal.SIGKILL, f"{moment}\n{said(killed)}"
        take_back(ground)

    for ground in grounds:
        in_turns([ground], [f"after:{n}" for n in range(1, ground.lines + 1)], job)
