"""Nouns: a file, the packages, a Python environment, a built library, a patched file.

A resource answers `check()` (is it so? what would change?) and `apply()` (make it so).
"""

from typing import Protocol

from sparkinstall.records import dataclass
from sparkinstall.system import Reader, System


@dataclass(frozen=True)
class Ok:
    """It is so. `note` says what a reader may want to know of it."""

    note: str = ""


@dataclass(frozen=True)
class Drift:
    """It is not so. `before` and `after` are text to be compared line by line; may be empty."""

    summary: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Unknown:
    """It cannot be told before the step `waits_for` has been done."""

    waits_for: str


@dataclass(frozen=True)
class NodeOnly:
    """Only a real node can do this; a rehearsal does not, and says so."""

    reason: str


@dataclass(frozen=True)
class Conflict:
    """It is not so and will not be made so: something stands in the way that is not ours to move."""

    message: str
    hint: str = ""


State = Ok | Drift | Unknown | NodeOnly | Conflict


class Resource(Protocol):
    """A thing that should be so, declared once; `key` names it in plans, logs and the journal."""

    @property
    def key(self) -> str: ...

    def check(self, on: Reader) -> State: ...

    def apply(self, on: System) -> None: ...
