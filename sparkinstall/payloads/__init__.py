"""Programs for the node's own Python environment. They are sent as text: sparkinstall cannot be imported there."""

import re
from pathlib import Path

_SIBLING = re.compile(r"^from sparkinstall\.payloads\.(\w+) import (?:\([^)]*\)|.*)$", re.MULTILINE)
_MAIN = '\n\nif __name__ == "__main__":'


def source(name: str) -> str:
    """The text of `payloads/NAME.py`; the text of a sibling stands in place of its import."""
    text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return _SIBLING.sub(lambda found: source(found[1]).partition(_MAIN)[0], text)


def as_file(name: str) -> bytes:
    """The same as a file that stays on the node."""
    return f"# Made by sparkinstall.\n{source(name)}".encode()
