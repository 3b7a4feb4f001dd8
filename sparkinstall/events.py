"""Progress events of the engine. The CLI renders them as a live screen or plain lines."""

import time
from collections.abc import Callable

from msgspec import Struct


class StepStarted(Struct, frozen=True):
    step: str


class ResourceApplied(Struct, frozen=True):
    step: str
    key: str
    summary: str


class LineRead(Struct, frozen=True):
    """One line that a program printed."""

    step: str
    line: str


class Warned(Struct, frozen=True):
    """Something that the user should know, although the step goes on."""

    step: str
    text: str


class Progressed(Struct, frozen=True):
    """`done` of `total` units (files of a build, bytes of a download); `total` 0 = not known."""

    step: str
    done: int
    total: int
    unit: str


class StepEnded(Struct, frozen=True):
    """`outcome` as in a `StepReport`."""

    step: str
    outcome: str
    seconds: float
    note: str = ""


class ProbeStarted(Struct, frozen=True):
    name: str


class WaitedFor(Struct, frozen=True):
    """The run waits for something external."""

    what: str


Event = StepStarted | ResourceApplied | LineRead | Warned | Progressed | StepEnded | ProbeStarted | WaitedFor
Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """Discard the event."""
    del event


Tell = Callable[[int, int], None]
"""Called with the bytes so far, and their total."""


def seldom(tell: Tell, seconds: float = 0.2) -> Tell:
    """Return `tell` for a caller that has news thousands of times a second: it is called once every `seconds`."""
    told = float("-inf")

    def on_bytes(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > seconds:
            told = time.monotonic()
            tell(done, total)

    return on_bytes
