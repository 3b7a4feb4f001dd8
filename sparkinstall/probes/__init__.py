"""Behaviour: what really runs, measured; never what was written down."""

from collections.abc import Callable
from typing import Literal, get_args

from msgspec import Struct

from sparkinstall.fixes import Fix
from sparkinstall.system import Reader

Verdict = Literal["pass", "warn", "fail", "skip"]
Level = Literal["static", "node", "gpu", "link", "cluster", "serving"]
# From what costs nothing to what needs everything; `verify --level` goes as far as the one it names.
LEVELS: tuple[Level, ...] = get_args(Level)


class Finding(Struct, frozen=True):
    """What a probe found. Every fail and warn has a `hint`: what to do."""

    verdict: Verdict
    found: str
    expected: str = ""
    hint: str = ""


def passed(found: str, expected: str = "") -> Finding:
    return Finding("pass", found, expected)


def warned(found: str, hint: str, expected: str = "") -> Finding:
    return Finding("warn", found, expected, hint)


def failed(found: str, hint: str, expected: str = "") -> Finding:
    return Finding("fail", found, expected, hint)


def skipped(why: str) -> Finding:
    return Finding("skip", why)


class Probe(Struct, frozen=True):
    """A named measurement. `name` is stable: `--ignore`, `--only` and scripts use it.

    `level`: `static` reads files only, so that even a run with nothing to do can afford it; `node` asks
    the system and small processes; `gpu` loads vLLM's parts, and uses a GPU where there is one; `link`
    and `cluster` need the other nodes; `serving` needs a model that is served.
    `impact`: what a failure means for the user, one sentence. `fix`: the fix that it proves.
    `needs_node`: why a rehearsal skips it; empty: it does not.
    `others`: it needs the other nodes too, which may come up after this one.
    `load`: it keeps the GPU or the link busy, so it runs only with `--measure`.
    `to_install`: a node that is set up needs it only to reinstall something.
    """

    name: str
    title: str
    look: Callable[[Reader], Finding]
    level: Level
    impact: str = ""
    fix: Fix | None = None
    needs_node: str = ""
    others: bool = False
    load: bool = False
    to_install: bool = False
