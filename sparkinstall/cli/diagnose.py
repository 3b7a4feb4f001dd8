"""`sparkinstall diagnose`: find known failures in logs, with their cause and what to do."""

import contextlib
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated

import typer
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparkinstall import stacks
from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.text_output import console, headed, sign
from sparkinstall.core.session import Target, open_session
from sparkinstall.diagnose import judge, sources
from sparkinstall.diagnose.index import SignatureIndex, index_of
from sparkinstall.diagnose.judge import Diagnosis, Found
from sparkinstall.diagnose.search import ALIKE, MOST, Search
from sparkinstall.diagnose.sightings import Match, Place
from sparkinstall.diagnose.signatures import KnownFailure, load, steps
from sparkinstall.diagnose.sources import Log
from sparkinstall.errors import BadUsage, Exit, Problem
from sparkinstall.facts.decisions import installed_stack
from sparkinstall.redaction import redact

_SHOWN_TELLING = 8
_ENDED = "The cause is not known: what was recognized are consequences only."
_NO_REASON = (
    "The cause is in no line of this log: it was logged before or after these lines, in another log (of another node, "
    "the kernel, an earlier run), or not at all. What follows from it is below, with what to do next."
)

Logs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE|-]...", help="Logs of vLLM, Ray, NCCL or the journal; `-` is stdin.", show_default=False
    ),
]
Units = Annotated[
    list[str] | None,
    typer.Option(
        "--unit", "-u", metavar="NAME", help="Read the journal of a unit since its last start: vllm, ray-head, ..."
    ),
]
Boot = Annotated[bool, typer.Option("--boot", help="With --unit: read everything since the last boot.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Keep reading, and print each failure as it appears.")]
Known = Annotated[bool, typer.Option("--known", help="List the known failures.")]


class KnownFailures(Struct, frozen=True):
    """What `--known` lists."""

    known: tuple[KnownFailure, ...]


@verb("diagnose", "root", reads_only=True)
def diagnose(
    target: Target,
    output: Output,
    logs: Logs = None,
    unit: Units = None,
    boot: Boot = False,
    follow: Follow = False,
    known: Known = False,
) -> CommandResult:
    """Find known failures in logs: lines, cause and what to do; exit 3 if one was found."""
    if known:
        return _list_known()
    units, index = tuple(unit or ()), index_of(load(release=_installed_release(target)))
    named = _logs(tuple(logs or ()), units, follow, boot)
    if follow:
        found = judge.judge([_follow(named[0], index, not output.json)])
    else:
        found = judge.judge(judge.read(log, index) for log in named)
    silent = () if follow else _silent(found, units)
    code = Exit.DRIFT if found.shows_failure else Exit.FAILED if silent else Exit.GOOD
    return CommandResult(code, found, lambda: _show(found, output.verbose, already_shown=follow), silent)


def _installed_release(target: Target) -> str:
    """Return the vLLM of the shipped stack that is installed; "" where there is none, or it is unknown."""
    with contextlib.suppress(Problem):
        session = open_session(target)
        name = installed_stack(session.system, session.node.venv_stamp)
        return stacks.load(name).vllm if name in stacks.names() else ""
    return ""


def _silent(found: Diagnosis, units: Sequence[str]) -> tuple[Problem, ...]:
    """Return a problem for each unit without journal entries: silence proves nothing. Units are read last."""
    return tuple(
        Problem(
            f"the journal has no entries of unit `{unit}`",
            hint="check the name (`systemctl list-units --all`), that the unit was started since the last boot, "
            "and that you may read the journal (with `sudo`, or in the group adm)",
        )
        for unit, log in zip(units, found.logs[len(found.logs) - len(units) :], strict=True)
        if not log.lines
    )


def _logs(files: Sequence[str], units: Sequence[str], follow: bool, boot: bool) -> list[Log]:
    """Return the logs to read.

    Raises:
        BadUsage: no log was named, or more than one is to be followed.
        NeedsRoot: this user may not read the journal.
    """
    if boot and not units:
        raise BadUsage("--boot needs a unit", hint="name the unit: `--unit vllm --boot`")
    if not files and not units:
        if sys.stdin.isatty():
            raise BadUsage(
                "no log was named",
                hint="name a file (`sparkinstall diagnose vllm.log`) or a unit (`sparkinstall diagnose --unit vllm`)",
            )
        files = ("-",)
    if follow and len(files) + len(units) > 1:
        raise BadUsage("only one log can be followed at a time", hint="run the command once for each log")
    if files.count("-") > 1:
        raise BadUsage("stdin can be read only once", hint="name `-` once")
    return [
        *(sources.file_log(name, follow) for name in files),
        *(sources.unit_log(name, follow, boot) for name in units),
    ]


def _follow(log: Log, index: SignatureIndex, talk: bool) -> Search:
    """Read until the log ends or Ctrl-C, and print each failure as it appears."""
    search, out = Search(index, log.name), console()
    if talk:
        console(stderr=True).print(f"[dim]following {log.name}; Ctrl-C ends it[/]")
    try:
        for piece in log.pieces():
            for sighting in search.feed(piece):
                _print_new(sighting, search, talk, out)
    except KeyboardInterrupt:
        pass
    for sighting in search.end():
        _print_new(sighting, search, talk, out)
    return search


def _print_new(sighting: Match, search: Search, talk: bool, out: Console) -> None:
    """Print one failure as it appears, with its cause if that came before."""
    if not talk:
        return
    for each in judge.judge([search]).found:
        if each.name == sighting.signature.name:
            out.print(f"[dim]{time.strftime('%H:%M:%S')}[/]")
            _show_found(each, out, several=False)
            out.file.flush()


# --- text output


def _show(found: Diagnosis, verbose: bool, already_shown: bool) -> None:
    out = console()
    several = len(found.logs) > 1
    if not already_shown:
        for each in found.causes:
            _show_found(each, out, several)
        _show_telling(found, out, several, verbose)
        first = _first_known(found)
        _show_what_is_known(first, not found.telling, out, several)
        _show_consequences([each for each in found.consequences if each not in first], out, several, verbose)
        for each in found.warnings:
            _show_found(each, out, several)
    else:
        for each in (each for each in found.causes if each.general):
            _show_found(each, out, several)
        _show_telling(found, out, several, verbose)
    out.print(_summary(found), style="dim")


def _show_found(found: Found, out: Console, several: bool) -> None:
    out.print(
        sign("warn" if found.role == "warning" else "fail"), f"[bold]{escape(found.title)}[/]  [dim]{found.name}[/]"
    )
    _show_lines(found.lines, out, several)
    if found.count > len(found.lines):
        out.print(f"      [dim]{_count(found)} lines in all[/]")
    fields = {
        "after": f"a consequence of {', '.join(found.explained_by)}: fix that first" if found.explained_by else "",
        "in": found.where,
        "why": found.why,
        "do": found.hint + (f" (fix {found.fix})" if found.fix else ""),
        "for": found.concerns,
        "see": "\n".join(found.links),
    }
    table = _grid(7)
    for name, text in fields.items():
        if text:
            table.add_row(Text(name, style="dim"), _listed(text) if name == "do" else Text(redact(text)))
    out.print(table)
    out.print()


def _listed(hint: str) -> Text | Table:
    """Return what to do, each thing on a line of its own; semicolons stand between them."""
    told = [redact(each) for each in steps(hint)]
    if len(told) == 1:
        return Text(told[0])
    table = Table.grid(padding=(0, 1))
    for each in told:
        table.add_row(Text("-", style="dim"), Text(each))
    return table


def _show_lines(lines: Sequence[Place], out: Console, several: bool) -> None:
    for log, those in groupby(lines, lambda each: each.log):
        if several:
            out.print(Text(f"    {log}", style="dim"))
        table = _grid(9)
        for each in those:
            table.add_row(Text(f"{each.line} │", style="dim"), Text(redact(each.text)))
        out.print(table)


def _grid(width: int) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(min_width=width, justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _first_known(found: Diagnosis) -> list[Found]:
    """Return the consequences that no other explains, where no cause was found."""
    return [each for each in found.consequences if not (found.causes or each.explained_by)]


def _show_what_is_known(first: Sequence[Found], is_all: bool, out: Console, several: bool) -> None:
    """Show in full what failed first, where the cause is not known: what it means tells where to look further."""
    if first and is_all:
        out.print(f"[bold]{_NO_REASON}[/]")
    for each in first:
        _show_found(each, out, several)


def _show_consequences(others: Sequence[Found], out: Console, several: bool, verbose: bool) -> None:
    if not others:
        return
    out.print("[bold]Consequences[/]")
    for each in others:
        if verbose:
            _show_found(each, out, several)
            continue
        first = each.lines[0]
        where = f"{first.log}:{first.line}" if several else f"line {first.line}"
        again = f", {_count(each)} lines" if each.count > 1 else ""
        out.print(f"  [dim]·[/] {each.title}  [dim]{each.name}, {where}{again}[/]")
    out.print()


def _show_telling(found: Diagnosis, out: Console, several: bool, verbose: bool) -> None:
    """Show the most suspicious lines, where no cause was found, and beside a general one the others."""
    shown = {(place.log, place.line) for each in found.causes for place in each.lines}
    telling = [each for each in found.telling if (each.log, each.line) not in shown]
    if found.causes:
        if not telling:
            return
        out.print("This is what the kind of error means. Other suspicious lines:")
    elif found.consequences and found.telling:
        out.print(sign("fail"), f"[bold]{_ENDED}[/]")
        out.print("    The most suspicious lines:")
    elif found.telling:
        has_failed = (
            "The cause is not known: no rule knows what has failed."
            if found.shows_failure
            else "No known failure found."
        )
        out.print(f"{has_failed} The most suspicious lines:")
    else:
        return
    for each in telling if verbose else telling[:_SHOWN_TELLING]:
        _show_lines([each], out, several)
        if each.where:
            out.print(f"      [dim]in {escape(each.where)}[/]")
        if each.advice:
            table = _grid(7)
            table.add_row(Text("do", style="dim"), _listed("; ".join(each.advice)))
            out.print(table)
        if each.count > 1:
            # Of more lines of one shape not each is read.
            out.print(f"      [dim]{'at least ' * (each.count >= ALIKE)}{each.count} lines like this[/]")
    out.print()


def _count(found: Found) -> str:
    return f"{found.count:,} or more" if found.count >= MOST else f"{found.count:,}"


def _summary(found: Diagnosis) -> str:
    lines, size = sum(each.lines for each in found.logs), sum(each.bytes for each in found.logs)
    how_large = f" ({size / 1e6:,.1f} MB)" if size >= 1e5 else ""
    read = f"{_many(lines, 'line')}{how_large} read: "
    if found.causes:
        return f"{read}{_many(len(found.causes), 'cause')}, {_many(len(found.consequences), 'consequence')}"
    if found.consequences:
        return f"{read}cause not known, {_many(len(found.consequences), 'consequence')}"
    if found.telling:
        known = "cause not known" if found.shows_failure else "no known failure"
        return f"{read}{known}; see also `journalctl -k` and the logs of the other nodes"
    return f"{read}no known failure, and no suspicious lines" if lines else "the log is empty"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _list_known() -> CommandResult:
    signatures = load()

    def show() -> None:
        table = headed("failure", "fix", "title")
        for each in signatures:
            table.add_row(each.name, str(each.fix or ""), each.title + each.note)
        console().print(table)

    return CommandResult(data=KnownFailures(tuple(KnownFailure(**each.told()) for each in signatures)), show=show)
