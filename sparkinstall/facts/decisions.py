"""Decisions that are expensive to make and cheap to keep: JSON files with what each was made from."""

import json
from collections.abc import Mapping
from typing import Any

from sparkinstall.system import Reader


def recorded(on: Reader, path: str) -> dict[str, Any]:
    """What was decided and written to `path`; empty where there is nothing readable."""
    try:
        found = json.loads(on.read(path) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def as_text(decision: Mapping[str, Any]) -> str:
    """A decision as the lines that it is stored and compared in."""
    return json.dumps(dict(decision), indent=2, sort_keys=True) + "\n" if decision else ""
