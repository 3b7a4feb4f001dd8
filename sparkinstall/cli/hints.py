"""Complete the command lines in a hint."""

import re
from functools import cache

import click

from sparkinstall.cli.app import VERBS, command

_COMMAND = re.compile(r"`sparkinstall ([^`]+)`")


def pointed(text: str, root: str) -> str:
    """Add `root`, the `--root` of this run as an option, to the commands in `text`: they mean the same node then."""

    def complete(found: re.Match[str]) -> str:
        given = "--root" in found[1] or not _takes_root(*found[1].split()[:2])
        return found[0] if given else f"`sparkinstall {found[1]}{root}`"

    return _COMMAND.sub(complete, text) if root else text


@cache
def _takes_root(verb: str, word: str = "") -> bool:
    if verb not in VERBS:
        return False
    found: click.Command | None = command(verb)
    if isinstance(found, click.Group):
        # What is no verb of `bench` is a scenario, and means `bench run`.
        found = found.commands.get(word) or found.commands.get(getattr(found, "otherwise", ""))
    return found is not None and any(each.name == "root" for each in found.params)
