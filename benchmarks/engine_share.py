"""Run sparkinstall, and record for how long none of its tools was running: `engine_share.py REPORT VERB ...`

It runs with sparkinstall's own interpreter. The time without tools (uv, make, tar, ...) is the engine's: checks,
journal, reading of libraries, output, waiting for threads. It is a single file, because the checkout must not be on
that interpreter's path.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_intervals: list[tuple[float, float]] = []


def _timed(tool: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        started = time.monotonic()
        try:
            return tool(*arguments, **options)
        finally:
            _intervals.append((started, time.monotonic()))

    return call


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds covered by at least one interval: tools run in parallel."""
    seconds, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        seconds += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return seconds


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Write wall and CPU seconds of the run to REPORT; end with sparkinstall's exit code."""
    report, sys.argv = Path(sys.argv[1]), ["sparkinstall", *sys.argv[2:]]
    started = time.monotonic()
    from sparkinstall.__main__ import main as sparkinstall
    from sparkinstall.system import processes

    for name in ("stream", "answer"):
        setattr(processes, name, _timed(getattr(processes, name)))
    try:
        sparkinstall()
    finally:
        found = {
            "seconds": time.monotonic() - started,
            "tools": covered(_intervals),
            "own_cpu": _cpu(resource.RUSAGE_SELF),
            "tools_cpu": _cpu(resource.RUSAGE_CHILDREN),
        }
        report.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
