"""Nouns: a file, the packages, a Python environment, a built library, a patched file.

A resource answers `check()` (is it so? what would change?) and `apply()` (make it so).
"""

from typing import Protocol

from msgspec import Struct

from sparkinstall.system import Reader, System


class Ok(Struct, frozen=True, tag_field="state", tag="ok"):
    """It is so. `note` says what a reader may want to know of it."""

    note: str = ""


class Drift(Struct, frozen=True, tag_field="state", tag="drift"):
    """It is not so. `before` and `after` are text to be compared line by line; may be empty."""

    summary: str
    before: str = ""
    after: str = ""


class Unknown(Struct, frozen=True, tag_field="state", tag="unknown"):
    """It cannot be told before the step `waits_for` has been done."""

    waits_for: str


class NodeOnly(Struct, frozen=True, tag_field="state", tag="node_only"):
    """Only a real node can do this; a rehearsal does not, and says so."""

    reason: str


class Conflict(Struct, frozen=True, tag_field="state", tag="conflict"):
    """It is not so and will not be made so: something stands in the way that is not ours to move."""

    message: str
    hint: str = ""


State = Ok | Drift | Unknown | NodeOnly | Conflict


def describe(state: State) -> tuple[str, str]:
    """The sign and the sentence of a state, the same in every view."""
    match state:
        case Ok(note):
            return "unchanged", note
        case Drift(summary):
            return "drift", summary
        case Unknown(waits_for):
            return "blocked", f"known after {waits_for}"
        case NodeOnly(reason):
            return "node_only", f"node only: {reason}"
        case Conflict(message, hint):
            return "failed", f"{message} - {hint}" if hint else message


class Resource(Protocol):
    """A thing that should be so, declared once; `key` names it in plans, logs and the journal."""

    @property
    def key(self) -> str: ...

    def check(self, on: Reader) -> State: ...

    def apply(self, on: System) -> None: ...
