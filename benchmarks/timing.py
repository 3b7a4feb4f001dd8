"""Wall time of commands that take turns, so that other load on the machine affects all of them alike."""

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
    """A command to time. `env` is added to the plain environment."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None

    def run(self) -> str:
        """Run it and return its stdout. Raises `RuntimeError` with the end of its output if it fails."""
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
        """The ratio of the medians, this to `other`."""
        return self.median / other.median


class Timed(Protocol):
    """A command that can be timed."""

    def seconds(self) -> float: ...


def in_turns(commands: Mapping[str, Timed], rounds: int) -> dict[str, Spread]:
    """Run all commands `rounds` times, A B C A B C, after a round that warms the caches."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            seconds = command.seconds()
            if turn:
                taken[name].append(seconds)
    return {name: Spread(statistics.median(each), min(each), max(each)) for name, each in taken.items()}


@dataclass(frozen=True)
class Long:
    """One run of minutes: its wall time, and the number of cores that other programs used meanwhile."""

    seconds: float
    others: float


def once(command: Command) -> tuple[Long, str]:
    """Run it, and return its stdout too. Long runs cannot take turns, so each has the load of other programs."""
    started, busy, ours = time.perf_counter(), _busy(), _children()
    output = command.run()
    seconds = time.perf_counter() - started
    others = (_busy() - busy) - (_children() - ours)
    return Long(seconds, max(0.0, others / seconds)), output


def _busy() -> float:
    """CPU seconds of the whole machine since its start (proc(5): all but idle and iowait)."""
    with open("/proc/stat") as stat:
        ticks = [int(each) for each in stat.readline().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
