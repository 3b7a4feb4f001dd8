"""Wall time of commands that take turns, so that a busy moment of the machine hits all of them alike."""

import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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


def in_turns(commands: Mapping[str, Command], rounds: int) -> dict[str, Spread]:
    """Run all commands `rounds` times, A B C A B C; a first round that warms the caches does not count."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            seconds = command.seconds()
            if turn:
                taken[name].append(seconds)
    return {name: Spread(statistics.median(each), min(each), max(each)) for name, each in taken.items()}
