"""What the engine says while it works; the CLI turns these into a screen or plain lines."""

from collections.abc import Callable

from sparkinstall.records import dataclass


@dataclass(frozen=True)
class StepStarted:
    step: str


@dataclass(frozen=True)
class ResourceApplied:
    step: str
    key: str
    summary: str


@dataclass(frozen=True)
class LineRead:
    """One line that a program printed."""

    step: str
    line: str


@dataclass(frozen=True)
class Progressed:
    """`done` of `total` units (files of a build, bytes of a download); `total` 0 = not known."""

    step: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True)
class StepEnded:
    """`outcome` is one of: unchanged, changed, left, failed, held."""

    step: str
    outcome: str
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class ProbeStarted:
    name: str


@dataclass(frozen=True)
class WaitedFor:
    """The run waits for something outside itself."""

    what: str


Event = StepStarted | ResourceApplied | LineRead | Progressed | StepEnded | ProbeStarted | WaitedFor
Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """An `Emit` for callers who do not look."""
    del event
