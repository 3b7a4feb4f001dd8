"""Load the signatures of known failures from `knowledge/logs/*.yaml`.

search.py finds them in a log; knowledge/README.md explains how to add one.
"""

import re
from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from sparkinstall import schema
from sparkinstall.assets import asset
from sparkinstall.core.fixes import FIXES
from sparkinstall.diagnose.literals import required_literals
from sparkinstall.schema import Malformed

FOLDER = "knowledge/logs"
ANY = "any"
"""In `consequence_of`: any other failure found is a cause of this one."""

_SHORTEST = 4
_Line = Annotated[str, schema.like(r"[^\n]+", "one line of text")]
_Some = Annotated[tuple[_Line, ...], Meta(min_length=1, title="a list of text, at least one")]
_Anchor = Annotated[str, schema.like(rf"[^\n]{{{_SHORTEST},}}", f"text of at least {_SHORTEST} characters")]
_Name = Annotated[str, schema.like("[a-z0-9]+(-[a-z0-9]+)*", "words in lower case, joined by `-`")]


class KnownFailure(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a user is told about a known failure. `fix` is the number of a fix, or None."""

    name: _Name
    title: _Line
    severity: Literal["failure", "warning"] = "failure"
    fix: Annotated[int, Meta(ge=1, le=FIXES[-1].number, title="the number of a fix")] | None = None
    why: _Line
    hint: _Line
    concerns: str = ""
    links: _Some

    @property
    def is_warning(self) -> bool:
        return self.severity == "warning"

    def told(self) -> dict[str, Any]:
        """Return these fields alone."""
        return {name: getattr(self, name) for name in KnownFailure.__struct_fields__}


class Signature(KnownFailure, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to find a known failure. A line matches if it contains one of the `anchors` and `regex` matches around it.

    Where an entry gives no `anchors`, `load` derives them from the regex. `consequence_of` names the failures that
    cause this one, or contains `ANY`. `harmless` are similar lines that must not match.
    """

    regex: re.Pattern[str]
    example: _Some
    anchors: tuple[_Anchor, ...] = ()
    consequence_of: tuple[_Line, ...] = ()
    harmless: tuple[_Line, ...] = ()


def load(folder: Path | None = None) -> tuple[Signature, ...]:
    """Return every signature of the folder (the shipped ones by default), in the order of files and entries.

    Raises:
        Malformed: an entry is invalid, or two have the same name.
    """
    files = sorted((folder or asset(FOLDER)).glob("*.yaml"))
    found = [each for file in files for each in schema.read_file(tuple[Signature, ...], file)]
    found = [replace(each, anchors=each.anchors or _anchors(each)) for each in found]
    _refuse_bad_references(found)
    return tuple(found)


def _anchors(signature: Signature) -> tuple[str, ...]:
    found = required_literals(signature.regex.pattern)
    if not found or min(map(len, found)) < _SHORTEST:
        raise Malformed(FOLDER, f"{signature.name}: no literal text follows from the regex: give `anchors`")
    return found


def _refuse_bad_references(signatures: Sequence[Signature]) -> None:
    names = [each.name for each in signatures]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Malformed(FOLDER, f"two signatures are called {', '.join(sorted(twice))}")
    for each in signatures:
        if unknown := set(each.consequence_of) - {ANY, *names}:
            raise Malformed(FOLDER, f"{each.name}: consequence_of names {', '.join(sorted(unknown))}")
    _refuse_circles(signatures)


def _refuse_circles(signatures: Iterable[Signature]) -> None:
    """Raise Malformed if failures explain each other: none would remain as the cause."""
    first = [each.name for each in signatures if ANY not in each.consequence_of]
    after = {
        each.name: [name for name in each.consequence_of if name != ANY] + (first if ANY in each.consequence_of else [])
        for each in signatures
    }
    try:
        TopologicalSorter(after).prepare()
    except CycleError as circle:
        raise Malformed(FOLDER, f"these explain each other in a circle: {', '.join(circle.args[1])}") from circle
