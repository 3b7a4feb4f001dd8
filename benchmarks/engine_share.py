"""Run sparkinstall, and write down for how long none of its tools was running: `engine_share.py REPORT VERB ...`

Started with sparkinstall's own interpreter. What is left when the time of the tools (uv, make, tar, ...) is taken
away is the engine's: checks, journal, reading of libraries, drawing, waiting for threads. A single file, since
nothing of the checkout may stand on that interpreter's path.
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
    """Seconds in which at least one of them was open: tools run in parallel."""
    seconds, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        seconds += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return seconds


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Wall and CPU seconds of the run into REPORT; ends with sparkinstall's exit code."""
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
