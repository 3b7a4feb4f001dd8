"""`sparkinstall health`: the slow poisons of this node, one line each; changes nothing."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from sparkinstall.cli import options
from sparkinstall.cli.hints import pointed
from sparkinstall.cli.live_output import asking
from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.text_output import console, show_line, shown, sign
from sparkinstall.core.session import Target, open_session
from sparkinstall.errors import Exit
from sparkinstall.measure.health import Health, Item, examine

Interval = Annotated[
    float, typer.Option("--interval", metavar="SECONDS", help="From one reading to the next.", min=0, max=600)
]


@verb("health", "root", "config", reads_only=True)
def health(target: Target, output: Output, interval: Interval = 5.0, strict: options.Strict = False) -> CommandResult:
    """Tell what makes this node slow or unsafe while it serves; exit 3 if anything does."""
    session = open_session(target)
    with asking(output.json) as emit:
        found = examine(session, interval, strict, emit)
    code = Exit.GOOD if found.healthy else Exit.DRIFT
    return CommandResult(code, found, lambda: _show(found, session.root_option, output.verbose))


def _show(found: Health, root: str, verbose: bool) -> None:
    out = console()
    for each in found.findings:
        _show_line(each, out)
        for mark, text in (("means:", each.means), ("→", pointed(each.hint, root))):
            show_line(f"    {mark} {shown(text)}", out, "dim")
    for each in found.unreadable:
        _show_line(each, out, "unreadable: ")
    for each in found.ok if verbose else ():
        _show_line(each, out)
    _conclude(found, out)


def _show_line(item: Item, out: Console, before: str = "") -> None:
    line = Text.assemble(sign(item.verdict), " ", (item.name, "bold"), f"  {before}{shown(item.found)}")
    out.print(line, soft_wrap=not out.is_terminal)


def _conclude(found: Health, out: Console) -> None:
    unread = f"; {len(found.unreadable)} could not be read" if found.unreadable else ""
    if found.findings:
        count = len(found.findings)
        out.print(f"[red bold]✗[/] {count} finding{'s' if count > 1 else ''}, the worst first{unread}")
    elif not found.healthy:
        out.print(f"[red bold]✗[/] not all could be read, and --strict was given: {_names(found.unreadable)}")
    else:
        out.print(f"[green bold]✓[/] {len(found.ok)} rules find nothing{unread}")


def _names(items: Sequence[Item]) -> str:
    return ", ".join(each.name for each in items)
