"""Behaviour: what really runs, measured; never what was written down."""

from collections.abc import Callable
from typing import Literal

from sparkinstall.records import dataclass
from sparkinstall.system import Reader

Verdict = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """What a probe found. `mend` is what to do, and stands on every fail and warn."""

    verdict: Verdict
    found: str
    expected: str = ""
    mend: str = ""


def passed(found: str, expected: str = "") -> Finding:
    return Finding("pass", found, expected)


def warned(found: str, mend: str, expected: str = "") -> Finding:
    return Finding("warn", found, expected, mend)


def failed(found: str, mend: str, expected: str = "") -> Finding:
    return Finding("fail", found, expected, mend)


def skipped(why: str) -> Finding:
    return Finding("skip", why)


@dataclass(frozen=True)
class Probe:
    """A named measurement. `name` is stable: `--ignore`, `--only` and scripts use it.

    `quick`: it reads files only, so that even a run with nothing to do can afford it. `others`: it
    needs the other nodes too, which may come up after this one.
    """

    name: str
    title: str
    look: Callable[[Reader], Finding]
    quick: bool = False
    others: bool = False
