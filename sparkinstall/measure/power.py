"""What the GPU takes while requests are answered, as its driver tells it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean

from msgspec import Struct, field

from sparkinstall.errors import Interrupted
from sparkinstall.facts.gpu import first_gpu
from sparkinstall.measure.results import Power
from sparkinstall.system import Reader

_PAUSE = 1.0
_NO_GPU = "nvidia-smi does not tell it on this machine"
_ELSEWHERE = "the server is on another machine"
_TOO_SHORT = "the round was too short for a reading"


class Readings(Struct):
    """Watts by time (CLOCK_MONOTONIC). `why`: there are none."""

    why: str = ""
    watts: list[tuple[float, float]] = field(default_factory=list)

    def between(self, began: float, ended: float) -> Power:
        """Return the mean of a time."""
        found = [watts for at, watts in self.watts if began <= at <= ended]
        if not found:
            return Power(None, 0, self.why or _TOO_SHORT)
        return Power(round(mean(found), 2), len(found))


@contextmanager
def reading(on: Reader | None) -> Iterator[Readings]:
    """Read the power once a second during the context; `on`: the server's machine, None if that is another."""
    first = first_gpu(on) if on else None
    if on is None or first is None or first.watts is None:
        yield Readings(_NO_GPU if on else _ELSEWHERE)
        return
    found, ended = Readings(), threading.Event()
    reader = threading.Thread(target=_read, args=(on, found, ended), daemon=True)
    reader.start()
    try:
        yield found
    finally:
        ended.set()
        reader.join()


def _read(on: Reader, found: Readings, ended: threading.Event) -> None:
    try:
        while not ended.wait(_PAUSE):
            at, now = time.monotonic(), first_gpu(on)
            if now and now.watts is not None:
                found.watts.append((at, now.watts))
    except Interrupted:
        # Ctrl-C: no program is started any more.
        return
