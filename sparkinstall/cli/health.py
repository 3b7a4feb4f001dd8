"""`sparkinstall health`: the slow poisons of this node, one line each, once or from a timer for node_exporter."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from sparkinstall.cli import options
from sparkinstall.cli.hints import pointed
from sparkinstall.cli.live_output import asking
from sparkinstall.cli.parts import install_part, withdrawn_part
from sparkinstall.cli.run_command import CommandResult, Output, confirm, verb
from sparkinstall.cli.text_output import console, show_line, shown, sign
from sparkinstall.core import parts
from sparkinstall.core.catalogue import named
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.errors import BadUsage, Exit
from sparkinstall.facts.health import last_run, metrics, summary
from sparkinstall.facts.life import life_state
from sparkinstall.measure.health import Health, Item, examine
from sparkinstall.services import LIFE

_STEP = "health"
_SETTINGS = ("health.timer", "health.every_minutes", "health.folder")

Interval = Annotated[
    float,
    typer.Option(
        "--interval", metavar="SECONDS", help="From one reading to the next.", min=0, max=600, callback=options.a_number
    ),
]
Metrics = Annotated[
    bool, options.output("--metrics", help="Print the result as metrics for node_exporter's textfile collector.")
]
_timer = partial(typer.Option, rich_help_panel="The timer")
Install = Annotated[bool, _timer("--install", help="Run it from a timer that writes metrics for node_exporter.")]
Uninstall = Annotated[bool, _timer("--uninstall", help="Undo --install.")]
Every = Annotated[
    int | None, _timer("--every", metavar="MINUTES", help="With --install: from one run to the next (5).")
]
Folder = Annotated[
    str | None,
    _timer("--folder", metavar="FOLDER", help="With --install: the folder that node_exporter reads (Debian's)."),
]


@verb("health", "root", "config")
def health(
    target: Target,
    output: Output,
    interval: Interval = 5.0,
    strict: options.Strict = False,
    metrics: Metrics = False,
    install: Install = False,
    uninstall: Uninstall = False,
    every: Every = None,
    folder: Folder = None,
    yes: options.Yes = False,
) -> CommandResult:
    """Tell what makes this node slow or unsafe while it serves; exit 3 if anything does."""
    more = every is not None or folder is not None
    _refuse_together(install, uninstall, metrics=metrics, json=output.json, more=more)
    if install:
        return _install(target, output, every, folder, yes)
    if uninstall:
        return _uninstall(target, yes)
    session = open_session(target)
    with asking(output.json or metrics) as emit:
        found = examine(session, interval, strict, emit)
    code = Exit.GOOD if found.healthy else Exit.DRIFT
    if metrics:
        return CommandResult(code, found, lambda: print(_metrics(session, found), end=""))
    return CommandResult(code, found, lambda: _show(found, session.root_option, output.verbose))


def _refuse_together(install: bool, uninstall: bool, *, metrics: bool, json: bool, more: bool) -> None:
    """Refuse options that contradict each other.

    Raises:
        BadUsage: some do.
    """
    if install and uninstall:
        raise BadUsage("--install and --uninstall contradict each other", hint="name one of them")
    if metrics and (install or uninstall or json):
        other = "--json" if json else "--install" if install else "--uninstall"
        raise BadUsage(f"--metrics and {other} contradict each other", hint="name one of them")
    if more and not install:
        raise BadUsage("--every and --folder are for the timer", hint="add --install")


def _metrics(session: Session, found: Health) -> str:
    items = (*found.findings, *found.unreadable, *found.ok)
    life = life_state(session.system) if LIFE.wanted(session.node) else None
    return metrics(sorted((each.name, each.verdict) for each in items), life, time.time())


# --- the timer


def _install(target: Target, output: Output, every: int | None, folder: str | None, yes: bool) -> CommandResult:
    values = {"health.timer": True, "health.every_minutes": every, "health.folder": folder}
    return install_part(target, named(_STEP), values, "health --install", output, yes, _show_installed)


def _show_installed(session: Session) -> None:
    settings, path = session.node.config.health, session.node.health_metrics
    run = None if session.node.rehearsal else last_run(session.system, path)
    minutes = "minute" if settings.every_minutes == 1 else f"{settings.every_minutes} minutes"
    where = "On a node, " if session.node.rehearsal else ""
    print(f"✓ {where}`sparkinstall health` runs every {minutes}; node_exporter reads the result from {path}.")
    if run:
        print(f"  Now it {summary(run)}.")
    print(f"    sparkinstall health --uninstall{session.root_option}   undoes this")


def _uninstall(target: Target, yes: bool) -> CommandResult:
    question = "Stop the timer of `health`, and remove it with its result?"

    def agree() -> None:
        confirm(question, agreed=yes or target.root is not None, default=True)

    done = parts.withdraw(target, named(_STEP), _SETTINGS, "health --uninstall", agree)
    return withdrawn_part(done, "the timer of `health`")


# --- text


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
    good, unread = len(found.ok), len(found.unreadable)
    total = len(found.findings) + good + unread
    blind = f"{unread} of {total} rules could not be read here" if unread else ""
    if found.findings:
        count = len(found.findings)
        rest = f"; {blind}" if blind else ""
        out.print(f"[red bold]✗[/] {count} finding{'s' if count > 1 else ''}, the worst first{rest}")
    elif not found.healthy:
        out.print(f"[red bold]✗[/] {blind}, and --strict was given: {_names(found.unreadable)}")
    elif 2 * unread >= total:
        out.print(f"[yellow bold]! {blind}, so this says little[/]: the other {good} find nothing (--strict: exit 3)")
    else:
        out.print(f"[green bold]✓[/] {good} rules find nothing{'; ' if blind else ''}{blind}")


def _names(items: Sequence[Item]) -> str:
    return ", ".join(each.name for each in items)
