"""`sparkinstall doctor`: explain what `verify` and the preflight find; masked, so that it can be made public."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from msgspec.structs import replace
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparkinstall.cli import options
from sparkinstall.cli.hints import pointed
from sparkinstall.cli.live_output import asking
from sparkinstall.cli.run_command import NODE, CommandResult, Output, verb
from sparkinstall.cli.text_output import console
from sparkinstall.core.session import Target, open_session, open_state
from sparkinstall.core.verify import VerifyOptions
from sparkinstall.errors import Exit, Problem
from sparkinstall.support import identity
from sparkinstall.support.doctor import Examination, Item, Weight, examine
from sparkinstall.support.mask import Mask

_HEADINGS: Mapping[Weight, str] = {
    "broken": "[red]✗[/] [bold]Broken[/]",
    "look-at": "[yellow]![/] [bold]Worth a look[/]",
    "ok": "[green]✓[/] [bold]Ok[/]",
    "skipped": "[dim]·[/] [bold]Skipped[/]",
}
_MANY_LINES = 6
# Facts of the machine that explain themselves.
_UNNAMED = ("machine", "gpu", "os", "release")


@verb("doctor", *NODE, reads_only=True)
def doctor(
    target: Target,
    output: Output,
    level: options.HowFar = None,
    only: options.Names = None,
    skip: options.NotNames = None,
    measure: options.Measure = False,
) -> CommandResult:
    """Explain what is wrong, its impact and what to do, worst first; masked, so that it can be made public."""
    with _problems_masked(target):
        chosen = VerifyOptions(tuple(only or ()), tuple(skip or ()), options.known_level(level), measure)
        session = open_session(target)
        with asking(output.json) as emit:
            found = examine(session, chosen, lambda hint: pointed(hint, session.root_option), emit)
        code = Exit.DRIFT if found.wrong else Exit.GOOD
        return CommandResult(code, found.checkup, lambda: _show(found, output.verbose))


@contextmanager
def _problems_masked(target: Target) -> Iterator[None]:
    """Mask a problem that ends the run: it is made public like the rest."""
    try:
        yield
    except Problem as problem:
        mask = Mask(identity.known(open_state(Target()).system))
        # The frame around the verb would add an unmasked `--root`, so add it before masking.
        hint = pointed(problem.hint, target.root_option)
        problem.message, problem.cause, problem.hint = map(mask.text, (problem.message, problem.cause, hint))
        problem.output = tuple(map(mask.text, problem.output))
        raise


def _show(examined: Examination, verbose: bool) -> None:
    out, found = console(), examined.checkup
    facts = (value if name in _UNNAMED else f"{name} {value}" for name, value in found.machine.items())
    out.print(", ".join(facts), markup=False)
    if not found.installed:
        out.print(f"sparkinstall has set nothing up here; run `sparkinstall all{examined.root_option}`", markup=False)
    out.print()
    for items in filter(None, (found.broken, found.look_at)):
        out.print(_heading(items))
        for same in _together(items):
            _show_same(same, out, verbose)
        out.print()
    if found.ok:
        names = ", ".join(dict.fromkeys(item.name for item in found.ok))
        out.print(f"{_heading(found.ok)}: {escape(names)}")
    if found.skipped:
        _show_skipped(found.skipped, out)
    if found.ok or found.skipped or found.broken or found.look_at:
        out.print()
    out.print(_conclusion(examined))
    masked = f"masked, so that it can be made public: {found.masked}" if found.masked else "nothing had to be masked"
    out.print(f"[dim]{masked}[/]")


def _heading(items: Sequence[Item]) -> str:
    return f"{_HEADINGS[items[0].weight]} ({len(items)})"


def _together(items: Sequence[Item]) -> list[list[Item]]:
    """Drop repetitions: one missing thing is reported by many checks, and shown once."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.found, item.hint), []).append(item)
    return list(groups.values())


def _show_same(items: Sequence[Item], out: Console, verbose: bool) -> None:
    first, names = items[0], ", ".join(item.name for item in items)
    numbers = sorted({number for item in items for number in item.fixes})
    title = f"  {escape(first.title)}" if len(items) == 1 and first.title != first.name else ""
    of_fix = f"  [dim]fix {', '.join(map(str, numbers))}[/]" if numbers else ""
    out.print(Padding(f"[bold]{escape(names)}[/]{title}{of_fix}", (0, 0, 0, 2), expand=False))
    table = Table.grid(padding=(0, 2))
    if len({item.means for item in items}) > 1:
        first = replace(first, means="")
    for label, text in item_rows(first, verbose):
        table.add_row(Text(label, style="dim"), Text(text))
    out.print(Padding(table, (0, 0, 0, 4), expand=False))


def item_rows(item: Item, verbose: bool) -> Iterator[tuple[str, str]]:
    lines = item.found.splitlines()
    kept = (
        lines
        if verbose or len(lines) <= _MANY_LINES
        else [*lines[: _MANY_LINES - 1], f"... (-v shows all {len(lines)})"]
    )
    yield "found", "\n".join(kept)
    if item.expected and item.expected != item.found:
        yield "expected", item.expected
    if item.means:
        yield "means", item.means
    if item.hint:
        yield "do", item.hint


def _show_skipped(items: Sequence[Item], out: Console) -> None:
    """Print what was skipped, by reason."""
    out.print(_heading(items))
    for same in _together(items):
        names = ", ".join(item.name for item in same)
        do = f" [dim]→[/] {escape(same[0].hint)}" if same[0].hint else ""
        out.print(Padding(f"{escape(names)}: [dim]{escape(same[0].found)}[/]{do}", (0, 0, 0, 2), expand=False))


def _conclusion(examined: Examination) -> str:
    found = examined.checkup
    also = f"; {len(found.look_at)} worth a look" if found.look_at else ""
    if found.broken:
        count = len(found.broken)
        things = "1 thing is broken" if count == 1 else f"{count} things are broken; begin with the first"
        return f"[red bold]✗[/] {things}{also}"
    if examined.wrong:
        return "[yellow bold]![/] no problem found, but some checks need root"
    seen = (*found.look_at, *found.ok)
    if not seen:
        return "[dim]·[/] nothing was checked"
    if not found.installed and any(item.kind == "preflight" for item in seen):
        return f"[green bold]✓[/] this node is ready to be set up{also}"
    return f"[green bold]✓[/] no problem found in what was checked{also}"
