"""Programs for the node's Python environment, sent as text: sparkinstall cannot be imported there."""

import re
from pathlib import Path

_SIBLING = re.compile(r"^from sparkinstall\.payloads\.(\w+) import (?:\([^)]*\)|.*)$", re.MULTILINE)
_MAIN = '\n\nif __name__ == "__main__":'


def source(name: str) -> str:
    """Return the text of `payloads/NAME.py`, with the imports of siblings replaced by their text."""
    text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return _SIBLING.sub(lambda found: source(found[1]).partition(_MAIN)[0], text)


def as_file(name: str) -> bytes:
    """Return the same text as the content of a file on the node."""
    return f"# Created by sparkinstall.\n{source(name)}".encode()
