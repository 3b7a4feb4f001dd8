"""Probes measure behaviour: what actually runs, not what was written to a file."""

from collections.abc import Callable
from typing import Literal, get_args

from msgspec import Struct

from sparkinstall.fixes import Fix
from sparkinstall.system import Reader

Verdict = Literal["pass", "warn", "fail", "skip"]
Level = Literal["static", "node", "gpu", "link", "cluster", "serving"]
# By cost; `verify --level` runs all levels up to the named one.
LEVELS: tuple[Level, ...] = get_args(Level)


class Finding(Struct, frozen=True):
    """The result of a probe. Every fail and warn has a `hint`: what to do."""

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

    `level`: `static` reads only files, so that a converged run can afford it; `node` runs small programs;
    `gpu` loads parts of vLLM, and uses a GPU if there is one; `link` and `cluster` need the other nodes;
    `serving` needs a served model.
    `impact`: the effect of a failure on the user, one sentence. `fix`: the fix that it verifies.
    `needs_node`: why a rehearsal skips it, or "".
    `others`: it needs the other nodes, which may start later.
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
