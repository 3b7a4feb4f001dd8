"""The project's documents, by page, section and table row."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("patches/*.md")])


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def section(name: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level or of a higher one."""
    level = len(heading.split(" ")[0])
    text = re.split(rf"^{re.escape(heading)}$", page(name), flags=re.M)[1]
    # Not a single #: comments in a block of commands begin with one.
    return re.split(rf"^#{{2,{level}}} ", text, maxsplit=1, flags=re.M)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the table rows whose first cell is a name or a number, without the header."""
    lines = re.findall(r"^\| (`[^`]+`|\d+) \|(.*)\|$(?!\n\|---)", text, re.MULTILINE)
    return [[first.strip("`"), *(cell.strip() for cell in rest.split("|"))] for first, rest in lines]


def words(name: str, heading: str) -> set[str]:
    return {row[0] for row in rows(section(name, heading))}


def workflows() -> list[Any]:
    return [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page("docs/ci.md"), re.DOTALL)]


def commands_of(value: Any) -> Iterator[str]:
    """Every `sparkinstall` command anywhere in a workflow."""
    if isinstance(value, dict):
        for each in value.values():
            yield from commands_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from commands_of(each)
    elif isinstance(value, str):
        yield from (line for line in value.splitlines() if line.startswith("sparkinstall "))
