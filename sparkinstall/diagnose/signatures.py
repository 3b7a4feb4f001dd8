"""Known failures as the logs show them: one entry of `knowledge/logs/*.yaml` each, and what may be said of it.

How they are found in a log is in log_search.py; how to add one is told in knowledge/README.md.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from msgspec import Struct

from sparkinstall import safe_yaml
from sparkinstall.assets import asset

FOLDER = "knowledge/logs"
ANY = "any"
"""In `consequence_of`: whatever other failure there is has caused this one."""

Severity = Literal["failure", "warning"]

_NEEDED = frozenset({"name", "title", "anchors", "regex", "why", "hint", "links", "example"})
_OTHERS = frozenset({"fix", "severity", "concerns", "consequence_of", "harmless"})
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class MalformedSignature(Exception):
    """A file of `knowledge/logs` cannot be used as it is written. Says which entry, and why."""


class Signature(Struct, frozen=True):
    """One known failure. A line is it if one of the `anchors` stands there and `pattern` is found around it.

    `fix` is the number of a fix, or None. `consequence_of` names the failures that cause this one, or holds `ANY`.
    `harmless` are lines that look alike and must not match.
    """

    name: str
    title: str
    severity: Severity
    anchors: tuple[str, ...]
    pattern: re.Pattern[str]
    why: str
    hint: str
    links: tuple[str, ...]
    example: tuple[str, ...]
    fix: int | None = None
    concerns: str = ""
    consequence_of: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()

    @property
    def is_warning(self) -> bool:
        return self.severity == "warning"


def load(folder: Path | None = None) -> tuple[Signature, ...]:
    """Every signature of the folder (those of the tool by default), in the order of files and entries.

    Raises:
        MalformedSignature: an entry is not as it must be, or two have one name.
    """
    found = [
        _signature(entry, f"{file.name}, entry {number}")
        for file in sorted((folder or asset(FOLDER)).glob("*.yaml"))
        for number, entry in enumerate(_entries(file), 1)
    ]
    _refuse_bad_references(found)
    return tuple(found)


def _entries(file: Path) -> Sequence[Any]:
    import yaml

    try:
        entries = safe_yaml.load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as failure:
        raise MalformedSignature(f"{file.name}: {failure}") from failure
    if not isinstance(entries, list):
        raise MalformedSignature(f"{file.name}: it must be a list of signatures")
    return entries


def _signature(entry: Any, where: str) -> Signature:
    if not isinstance(entry, dict) or not entry.keys() >= _NEEDED or not entry.keys() <= _NEEDED | _OTHERS:
        raise MalformedSignature(f"{where}: it needs {', '.join(sorted(_NEEDED))}; and may have {', '.join(_OTHERS)}")
    name, severity, fix = entry["name"], entry.get("severity", "failure"), entry.get("fix")
    if not _NAME.fullmatch(str(name)) or severity not in get_args(Severity) or fix not in (None, *range(1, 9)):
        raise MalformedSignature(f"{where}: the name, the severity or the fix cannot be: {name}, {severity}, {fix}")
    return Signature(
        name, _text(entry, "title"), severity, _texts(entry, "anchors", where), _pattern(entry, where),
        _text(entry, "why"), _text(entry, "hint"), _texts(entry, "links", where), _texts(entry, "example", where),
        fix, _text(entry, "concerns"), _texts(entry, "consequence_of", where), _texts(entry, "harmless", where),
    )  # fmt: skip


def _pattern(entry: Mapping[str, Any], where: str) -> re.Pattern[str]:
    try:
        return re.compile(str(entry["regex"]))
    except re.error as failure:
        raise MalformedSignature(f"{where}: regex: {failure}") from failure


def _text(entry: Mapping[str, Any], key: str) -> str:
    """One line, however the YAML file has folded it."""
    return " ".join(str(entry.get(key, "")).split())


def _texts(entry: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = entry.get(key, [])
    if not isinstance(values, list) or not all(isinstance(each, str) and each for each in values):
        raise MalformedSignature(f"{where}: {key} must be a list of texts")
    if key in _NEEDED and not values:
        raise MalformedSignature(f"{where}: {key} must not be empty")
    return tuple(values)


def _refuse_bad_references(signatures: Sequence[Signature]) -> None:
    names = [each.name for each in signatures]
    if twice := {name for name in names if names.count(name) > 1}:
        raise MalformedSignature(f"two signatures are called {', '.join(sorted(twice))}")
    for each in signatures:
        if unknown := set(each.consequence_of) - {ANY, *names}:
            raise MalformedSignature(f"{each.name}: consequence_of names {', '.join(sorted(unknown))}")
    _refuse_circles(signatures)


def _refuse_circles(signatures: Iterable[Signature]) -> None:
    """Of failures that explain each other none would be left as the cause."""
    from graphlib import CycleError, TopologicalSorter

    first = [each.name for each in signatures if ANY not in each.consequence_of]
    after = {
        each.name: [name for name in each.consequence_of if name != ANY] + (first if ANY in each.consequence_of else [])
        for each in signatures
    }
    try:
        TopologicalSorter(after).prepare()
    except CycleError as circle:
        raise MalformedSignature(f"these explain each other in a circle: {', '.join(circle.args[1])}") from circle
