"""Wall time of commands that take turns, so that a busy moment of the machine hits all of them alike."""

import os
import resource
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.environments import plain_environ


@dataclass(frozen=True)
class Command:
    """What is timed. `env` stands on top of the plain environment."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None

    def run(self) -> str:
        """Its stdout. Raises `RuntimeError` with the last words of a command that fails."""
        ended = subprocess.run(self.argv, env=plain_environ(**self.env), cwd=self.cwd, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"{self.argv[0]} ended with {ended.returncode}: {(ended.stdout + ended.stderr)[-2000:]}")
        return ended.stdout

    def seconds(self) -> float:
        started = time.perf_counter()
        self.run()
        return time.perf_counter() - started


@dataclass(frozen=True)
class Spread:
    """Seconds of several runs."""

    median: float
    lowest: float
    highest: float

    def times(self, other: "Spread") -> float:
        """How many times as long as `other`, by the medians."""
        return self.median / other.median


class Timed(Protocol):
    """What can be run and timed."""

    def seconds(self) -> float: ...


def in_turns(commands: Mapping[str, Timed], rounds: int) -> dict[str, Spread]:
    """Run all commands `rounds` times, A B C A B C; a first round that warms the caches does not count."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            seconds = command.seconds()
            if turn:
                taken[name].append(seconds)
    return {name: Spread(statistics.median(each), min(each), max(each)) for name, each in taken.items()}


@dataclass(frozen=True)
class Long:
    """One run of minutes: its wall time, and how many cores other programs of the machine took meanwhile."""

    seconds: float
    others: float


def once(command: Command) -> tuple[Long, str]:
    """Run it; its stdout too. Long runs cannot take turns, so each says how much of the machine it had."""
    started, busy, ours = time.perf_counter(), _busy(), _children()
    said = command.run()
    seconds = time.perf_counter() - started
    others = (_busy() - busy) - (_children() - ours)
    return Long(seconds, max(0.0, others / seconds)), said


def _busy() -> float:
    """CPU seconds of the whole machine since it was started (proc(5): all but idle and iowait)."""
    with open("/proc/stat") as stat:
        ticks = [int(each) for each in stat.readline().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
