"""Waits of tests: for a condition, bounded by a time that no working machine needs."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

LONGEST = 600.0


def until(
    holds: Callable[[], object],
    seconds: float = LONGEST,
    *,
    pause: float = 0.1,
    during: "subprocess.Popen[Any] | None" = None,
) -> None:
    """Wait until the condition holds. `during`: a process after whose end it cannot begin to hold.

    Raises:
        AssertionError: it did not hold within `seconds`, or when the process had ended.
    """
    limit = time.monotonic() + seconds
    while True:
        # Asked before the condition: what the process did last counts.
        ended = during is not None and during.poll() is not None
        if holds():
            return
        assert not ended, f"still false when the process had ended: {during!r}"
        assert time.monotonic() < limit, f"still false after {seconds:g} s"
        time.sleep(pause)
