"""`sparkinstall doctor`: explain what `verify` and the preflight find; masked, so that it can be made public."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from msgspec.structs import replace
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparkinstall.cli import options
from sparkinstall.cli.live_output import asking
from sparkinstall.cli.run_command import NODE, CommandResult, Output, verb
from sparkinstall.cli.text_output import console
from sparkinstall.core.session import Target, open_session, open_state, pointed
from sparkinstall.core.verify import VerifyOptions
from sparkinstall.errors import Exit, Problem
from sparkinstall.support import identity
from sparkinstall.support.doctor import Checkup, Item, Weight, examine
from sparkinstall.support.mask import Mask

_HEADINGS: Mapping[Weight, tuple[str, str, str]] = {
    "broken": ("✗", "red", "Broken"),
    "look-at": ("!", "yellow", "Worth a look"),
    "ok": ("✓", "green", "Ok"),
    "skipped": ("·", "dim", "Skipped"),
}
_MANY_LINES = 6


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
            found = examine(session, chosen, emit)
        code = Exit.DRIFT if found.wrong else Exit.GOOD
        return CommandResult(code, _data(found), lambda: _show(found, output.verbose))


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


def _data(found: Checkup) -> dict[str, Any]:
    groups = {weight.replace("-", "_"): found.of(weight) for weight in _HEADINGS}
    return {"machine": found.machine, "installed": found.installed, **groups, "masked": found.masked}


def _show(found: Checkup, verbose: bool) -> None:

    out = console()
    out.print(", ".join(_named(name, value) for name, value in found.machine.items()), markup=False)
    if not found.installed:
        out.print(f"sparkinstall has set nothing up here; run `sparkinstall all{found.root_option}`", markup=False)
    out.print()
    for weight in ("broken", "look-at"):
        _show_bad(found, weight, out, verbose)
    _show_well(found, out)
    _show_rest(found, out)
    if found.items:
        out.print()
    out.print(_conclusion(found))
    masked = f"masked, so that it can be made public: {found.masked}" if found.masked else "nothing had to be masked"
    out.print(f"[dim]{masked}[/]")


def _named(name: str, value: str) -> str:
    return value if name in ("machine", "gpu", "os") else f"{name} {value}"


def _heading(weight: Weight, count: int) -> str:
    mark, colour, words = _HEADINGS[weight]
    return f"[{colour}]{mark}[/] [bold]{words}[/] ({count})"


def _show_bad(found: Checkup, weight: Weight, out: Console, verbose: bool) -> None:
    items = found.of(weight)
    if not items:
        return
    out.print(_heading(weight, len(items)))
    for same in _together(items):
        _show_same(same, out, verbose)
    out.print()


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


def _show_well(found: Checkup, out: Console) -> None:

    items = found.of("ok")
    if items:
        names = ", ".join(dict.fromkeys(item.name for item in items))
        out.print(f"{_heading('ok', len(items))}: {escape(names)}")


def _show_rest(found: Checkup, out: Console) -> None:
    """Print what was skipped, by reason."""

    items = found.of("skipped")
    if not items:
        return
    out.print(f"{_heading('skipped', len(items))}")
    for reason in dict.fromkeys((item.found, item.hint) for item in items):
        names = ", ".join(item.name for item in items if (item.found, item.hint) == reason)
        do = f" [dim]→[/] {escape(reason[1])}" if reason[1] else ""
        out.print(Padding(f"{escape(names)}: [dim]{escape(reason[0])}[/]{do}", (0, 0, 0, 2), expand=False))


def _conclusion(found: Checkup) -> str:
    broken, worth = len(found.of("broken")), len(found.of("look-at"))
    if broken:
        things = "1 thing is broken" if broken == 1 else f"{broken} things are broken; begin with the first"
        return f"[red bold]✗[/] {things}{_and_look_at(worth)}"
    if found.wrong:
        return "[yellow bold]![/] no problem found, but some checks need root"
    return f"{_good(found)}{_and_look_at(worth)}"


def _good(found: Checkup) -> str:
    seen = [item for item in found.items if item.weight != "skipped"]
    if not seen:
        return "[dim]·[/] nothing was checked"
    if not found.installed and any(item.kind == "preflight" for item in seen):
        return "[green bold]✓[/] this node is ready to be set up"
    return "[green bold]✓[/] no problem found in what was checked"


def _and_look_at(worth: int) -> str:
    return f"; {worth} worth a look" if worth else ""
