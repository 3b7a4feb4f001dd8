"""Findings that are expensive to make and cheap to keep: a JSON file with what they were made from."""

import json
from collections.abc import Mapping
from typing import Any

from sparkinstall.system import Reader, System


def recorded(on: Reader, path: str) -> dict[str, Any]:
    """What was found and written to `path`; empty where there is nothing readable."""
    try:
        found = json.loads(on.read(path) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def record(on: System, path: str, finding: Mapping[str, Any]) -> None:
    """Write a finding to `path`."""
    on.write(path, as_text(finding).encode())


def as_text(finding: Mapping[str, Any]) -> str:
    """A finding as the lines that it is stored and compared in."""
    return json.dumps(dict(finding), indent=2, sort_keys=True) + "\n" if finding else ""
