"""Text output: plans, diffs, findings, problems."""

import difflib
import io
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparkinstall.cli.hints import pointed
from sparkinstall.errors import Problem, brief
from sparkinstall.probes import Verdict
from sparkinstall.redaction import redact
from sparkinstall.resources import Drift, describe

# Not loaded by a list of recipes or models, which is shown at once.
if TYPE_CHECKING:
    from sparkinstall.core.checks import ProbeResult
    from sparkinstall.core.engine import StepReport
    from sparkinstall.core.fixes import FixState

_MANY_LINES = 40
_LOG_WIDTH = 200
_NARROW = 110
_TRAILING = re.compile(" +\n")
_SIGNS = {
    "pass": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red"), "skip": ("·", "dim"),
    "unchanged": ("✓", "green"), "changed": ("✓", "green"), "node_only": ("·", "cyan"), "drift": ("+", "yellow"),
    "failed": ("✗", "red"), "blocked": ("·", "dim"), "proven": ("✓", "green"), "done": ("✓", "green"),
    "missing": ("+", "yellow"), "not_applicable": ("·", "dim"),
}  # fmt: skip


def console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; output to a log or pipe is not wrapped at 80."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(stderr=stderr, highlight=False)
    return Console(file=cast("TextIO", _Trimmed(stream)), highlight=False, width=_LOG_WIDTH)


class _Trimmed(io.TextIOBase):
    """A text stream without the trailing blanks with which rich pads tables."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_TRAILING.sub("\n", text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def shown(text: str) -> str:
    """Return a text as it is shown: without secrets, and of limited length."""
    return brief(redact(text))


def sign(of: str) -> Text:
    """Return the coloured sign at the beginning of a line."""
    mark, colour = _SIGNS[of]
    return Text(mark, style=colour)


def columns(*widths: int | None) -> Table:
    """Return a table without lines; a column with a width is at least that wide and never wrapped."""
    table = Table.grid(padding=(0, 2))
    for width in widths:
        table.add_column(min_width=width, no_wrap=width is not None, overflow="fold")
    return table


def headed(*headings: str) -> Table:
    """Return a table without lines, with headings."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def show_line(text: str, out: Console, style: str = "") -> None:
    """Print a line: a terminal wraps it between words, in a file or a pipe it stays one."""
    out.print(Text(text, style=style), soft_wrap=not out.is_terminal)


def show_rows(rows: Iterable[tuple[str, str]], out: Console, width: int) -> None:
    """Print names and texts; on a terminal a long text continues below itself, in a file or a pipe it is one line."""
    table = columns(width, None)
    for name, text in rows:
        if out.is_terminal:
            table.add_row(Text(name, style="dim"), Text(text))
        else:
            out.print(f"  {name:<{width}} {text}", markup=False, soft_wrap=True)
    _show_table(table, out)


def show_plan(reports: "Sequence[StepReport]", out: Console, verbose: bool = False, root: str = "") -> None:
    """Print what every step would do, then the differences."""
    table = columns(1, 12, None)
    for report in reports:
        for at, (mark, line) in enumerate(plan_lines(report)):
            table.add_row(sign(mark), report.name if at == 0 else "", Text(shown(pointed(line, root))))
    out.print(Padding(table, (0, 0, 0, 2), expand=False))
    for report in reports:
        for state in report.checked:
            if isinstance(state, Drift) and state.after:
                show_diff(state, out, verbose)


def plan_lines(report: "StepReport") -> list[tuple[str, str]]:
    """Return sign and sentence of each line of a step's plan."""
    if report.problem:
        return [("failed", report.problem.message)]
    lines = [describe(state) for state in report.checked]
    good = [line for mark, line in lines if mark == "unchanged"]
    rest = [each for each in lines if each[0] != "unchanged"]
    notes = "; ".join(note for note in good if note)
    if not rest:
        return [("unchanged", notes or "up to date")]
    return list(dict.fromkeys(rest))


def show_diff(drift: Drift, out: Console, verbose: bool) -> None:
    """Print a unified diff; a long one is shortened unless `verbose`."""
    # As a whole, like JSON: a secret in several lines is not recognised in one of them.
    before, after = redact(drift.before).splitlines(), redact(drift.after).splitlines()
    lines = list(difflib.unified_diff(before, after, "now", "then", lineterm="", n=2))[2:]
    if not lines:
        return
    out.print()
    out.print(f"  [bold]{escape(shown(drift.key))}[/]")
    kept = lines if verbose else lines[:_MANY_LINES]
    for line in kept:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "dim")
        out.print(Text("    " + shown(line), style=style))
    if len(kept) < len(lines):
        out.print(f"    [dim]... {len(lines) - len(kept)} more lines (-v shows them)[/]")


def show_findings(results: "Sequence[ProbeResult]", out: Console, only_bad: bool = False, root: str = "") -> None:
    """Print one line per probe, followed by its hint, if any."""
    table = columns(1, 16, None)
    for each in results:
        if only_bad and each.verdict in ("pass", "skip"):
            continue
        expected = (
            f" [dim](expected: {escape(shown(each.expected))})[/]" if each.expected and each.verdict != "pass" else ""
        )
        table.add_row(sign(each.verdict), each.name, escape(shown(each.found)) + expected)
        if each.hint and each.verdict in ("fail", "warn"):
            table.add_row("", "", f"[dim]→[/] {escape(shown(pointed(each.hint, root)))}")
    out.print(Padding(table, (0, 0, 0, 2), expand=False))


def show_proof(results: "Sequence[ProbeResult]", out: Console, root: str = "", verbose: bool = False) -> None:
    """Print every probe below its level, with the expected value and hint if it did not pass."""
    table = columns(7, 1, 16, None)
    level = ""
    for each in results:
        name = Text("" if each.level == level else each.level, style="dim")
        level = each.level
        took = f"  ({each.seconds:.1f} s)" if each.seconds >= 1 else ""
        table.add_row(name, sign(each.verdict), each.name, escape(shown(each.found)) + took)
        bad = each.verdict in ("fail", "warn")
        if each.expected and (bad or verbose) and each.expected != each.found:
            table.add_row("", "", "", Text(f"expected: {shown(each.expected)}", style="dim"))
        if each.hint and bad:
            table.add_row("", "", "", _hint(each, root))
    out.print(Padding(table, (0, 0, 0, 2), expand=False))


def _hint(result: "ProbeResult", root: str) -> str:
    of_fix = f"  [dim](fix {result.fix})[/]" if result.fix else ""
    return f"[dim]→[/] {escape(shown(pointed(result.hint, root)))}{of_fix}"


def show_preflight(results: "Sequence[ProbeResult]", out: Console) -> None:
    """Print how many checks passed, and those that did not."""
    counts = [each.verdict for each in results]
    words = [f"{counts.count('pass')} checks passed"]
    verdicts: tuple[tuple[Verdict, str], ...] = (
        ("fail", "failed"), ("warn", "with a warning"), ("skip", "on the node only"),
    )  # fmt: skip
    words += [f"{counts.count(verdict)} {word}" for verdict, word in verdicts if counts.count(verdict)]
    out.print(f"[bold]Preflight[/]  {', '.join(words)}")
    show_findings(results, out, only_bad=True)


def show_fixes(states: "Iterable[FixState]", out: Console, root: str = "") -> None:
    """Print one line per fix; on a narrow terminal a long note gets its own line."""
    narrow, said = out.width < _NARROW, ""
    table = columns(1, 1, 43, 8, *(() if narrow else (None,)))
    for state in states:
        mark = sign(state.standing)
        note = Text(shown(pointed(state.note, root)), style="dim")
        row = (mark, str(state.number), state.title, Text(state.standing, style=mark.style))
        table.add_row(*row, *(() if narrow else (note,)))
        if narrow and note.plain not in ("", said):
            _show_table(table, out)
            table, said = columns(1, 1, 43, 8), note.plain
            out.print(Padding(note, (0, 0, 0, 8)))
    _show_table(table, out)


def _show_table(table: Table, out: Console) -> None:
    if table.row_count:
        out.print(Padding(table, (0, 0, 0, 2), expand=False))


def show_problems(problems: Sequence[Problem], root: str = "") -> None:
    """Print problems on stderr."""
    out = console(stderr=True)
    for problem in problems:
        show_problem(problem, out, root=root)


def show_problem(problem: Problem, out: Console, where: str = "", root: str = "") -> None:
    """Print the message (after the markup `where`), cause, last lines of output, log and hint."""
    out.print(f"[red bold]✗[/] {where}{escape(shown(problem.message))}")
    if problem.cause:
        out.print(Padding(f"[dim]why[/]   {escape(shown(problem.cause))}", (0, 0, 0, 2), expand=False))
    for line in problem.output:
        out.print(Text(f"  │ {shown(line)}", style="dim"))
    if problem.log:
        out.print(f"  [dim]log[/]   {escape(problem.log)}")
    if problem.hint:
        out.print(Padding(f"[dim]do[/]    {escape(shown(pointed(problem.hint, root)))}", (0, 0, 0, 2), expand=False))
