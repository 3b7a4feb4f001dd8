"""`sparkinstall doctor`: what `verify` and the preflight find, told to a person; masked, so that it can be shown."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict, replace

from sparkinstall.cli import options
from sparkinstall.cli.run_command import Answer, answer
from sparkinstall.cli.verify import Choice, HowFar, Measure, Names, NotNames, known_level
from sparkinstall.core.session import Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from sparkinstall.core.session import Session
    from sparkinstall.support.doctor import Item, Weight
    from sparkinstall.support.mask import Mask

_HEADINGS: "dict[Weight, tuple[str, str, str]]" = {
    "broken": ("✗", "red", "Broken"),
    "look-at": ("!", "yellow", "To look at"),
    "ok": ("✓", "green", "Ok"),
    "skipped": ("·", "dim", "Skipped"),
}
_MANY_LINES = 6


class Checkup(Struct, frozen=True):
    """What the doctor found, masked. `wrong`: there is drift or a failure, or that could not be determined.

    `root_option` is masked as well: the folder of a rehearsal may be in somebody's home.
    """

    machine: dict[str, str]
    installed: bool
    items: "tuple[Item, ...]"
    wrong: bool
    masked: str
    root_option: str

    def of(self, weight: "Weight") -> "list[Item]":
        return [item for item in self.items if item.weight == weight]


def doctor(
    root: options.Root = None,
    config: options.ConfigFile = None,
    stack: options.Stack = None,
    set_: options.Set = None,
    platform: options.Platform = None,
    full: options.Full = None,
    level: HowFar = None,
    only: Names = None,
    skip: NotNames = None,
    measure: Measure = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Say what is wrong here, what that means and what to do, worst first; masked, to be shown in public."""
    asked = Target(root, config, stack, tuple(set_ or ()), platform, full, verbose)

    def body() -> Answer:
        with _problems_masked(asked):
            choice = Choice(tuple(only or ()), tuple(skip or ()), known_level(level), measure)
            return _doctor(asked, choice, json)

    answer("doctor", body, root=root, json=json, verbose=verbose)


@contextmanager
def _problems_masked(asked: Target) -> Iterator[None]:
    """What keeps the doctor from looking is pasted in public like all the rest."""
    from sparkinstall.cli.text_output import pointed
    from sparkinstall.core.session import open_state
    from sparkinstall.errors import Problem
    from sparkinstall.support import identity
    from sparkinstall.support.mask import Mask

    try:
        yield
    except Problem as problem:
        mask = Mask(identity.known(open_state(replace(asked, root=None)).system))
        # Pointed at the node before it is masked: the frame around the verb would add the folder as it is.
        hint = pointed(problem.hint, options.root_option(asked.root))
        problem.message, problem.cause, problem.hint = map(mask.text, (problem.message, problem.cause, hint))
        problem.output = tuple(map(mask.text, problem.output))
        raise


def _doctor(asked: Target, choice: Choice, json: bool) -> Answer:
    from sparkinstall.core.session import open_session
    from sparkinstall.errors import Exit
    from sparkinstall.support import doctor, identity
    from sparkinstall.support.mask import Mask

    session = open_session(asked)
    mask = Mask(identity.known(session.system))
    items, installed, wrong = _looked_at(session, choice, json)
    shown = tuple(_shown(item, session, mask) for item in items)
    machine: dict[str, str] = mask.data(doctor.machine_facts(session.node, session.system))
    broken = any(each.weight == "broken" for each in shown)
    root = mask.text(session.root_option)
    found = Checkup(machine, installed, shown, wrong or broken, mask.summary(), root)
    show = lambda: _show(found, asked.verbose)  # noqa: E731
    return Answer(Exit.DRIFT if found.wrong else Exit.GOOD, _data(found), show)


def _looked_at(session: "Session", choice: Choice, plain: bool) -> "tuple[list[Item], bool, bool]":
    """The items; whether anything of ours is here; whether `verify` would call it wrong."""
    from sparkinstall.cli.verify import looked_through
    from sparkinstall.errors import BadUsage, NotThere, Problem
    from sparkinstall.support import doctor

    try:
        result = looked_through(session, choice, plain)
    except BadUsage:
        raise
    except NotThere:
        return [*_before(session, choice, False), *_of_machine(session, choice)], False, False
    except Problem as problem:
        kept = doctor.of_problem(problem)
        return [kept, *_before(session, choice, True), *_of_machine(session, choice)], True, True
    checks = doctor.of_checks(result.reports)
    probes = doctor.of_probes(result.looked)
    return [*_before(session, choice, True), *checks, *probes], True, result.wrong


def _before(session: "Session", choice: Choice, installed: bool) -> "list[Item]":
    """The checks before an installation; who names one thing does not ask for them."""
    from sparkinstall.core import checks
    from sparkinstall.events import silent
    from sparkinstall.probes.preflight import preflight
    from sparkinstall.support import doctor

    if choice.only:
        return []
    return doctor.of_preflight(checks.look(preflight(session.node), session.system, silent), installed)


def _of_machine(session: "Session", choice: Choice) -> "list[Item]":
    """What can be said of the machine alone, with nothing of ours on it."""
    from sparkinstall.core import checks
    from sparkinstall.events import silent
    from sparkinstall.support import doctor

    chosen = checks.chosen(session.node, choice.only, choice.skip, choice.level, choice.measure)
    own = {probe.name for probe in checks.of_no_step(session.node)}
    probes = [probe for probe in chosen.probes if probe.name in own]
    return doctor.of_probes(checks.look(probes, session.system, silent))


def _shown(item: "Item", session: "Session", mask: "Mask") -> "Item":
    from sparkinstall.cli.text_output import pointed

    return replace(
        item,
        title=mask.text(item.title),
        found=mask.text(item.found),
        expected=mask.text(item.expected),
        hint=mask.text(pointed(item.hint, session.root_option)),
    )


def _data(found: Checkup) -> dict[str, Any]:
    groups = {weight.replace("-", "_"): [asdict(item) for item in found.of(weight)] for weight in _HEADINGS}
    return {"machine": found.machine, "installed": found.installed, **groups, "masked": found.masked}


def _show(found: Checkup, verbose: bool) -> None:
    from sparkinstall.cli.text_output import console

    out = console()
    out.print(", ".join(_named(name, value) for name, value in found.machine.items()), markup=False)
    if not found.installed:
        out.print(f"sparkinstall has set nothing up here; `sparkinstall all{found.root_option}` does it", markup=False)
    out.print()
    for weight in ("broken", "look-at"):
        _show_bad(found, weight, out, verbose)
    _show_well(found, out)
    _show_rest(found, out)
    if found.items:
        out.print()
    out.print(_conclusion(found))
    masked = (
        f"masked, so that it can be shown in public: {found.masked}" if found.masked else "nothing had to be masked"
    )
    out.print(f"[dim]{masked}[/]")


def _named(name: str, value: str) -> str:
    return value if name in ("machine", "gpu", "os") else f"{name} {value}"


def _heading(weight: "Weight", count: int) -> str:
    mark, colour, words = _HEADINGS[weight]
    return f"[{colour}]{mark}[/] [bold]{words}[/] ({count})"


def _show_bad(found: Checkup, weight: "Weight", out: "Console", verbose: bool) -> None:
    items = found.of(weight)
    if not items:
        return
    out.print(_heading(weight, len(items)))
    for same in _together(items):
        _show_same(same, out, verbose)
    out.print()


def _together(items: "Sequence[Item]") -> "list[list[Item]]":
    """Where one thing is missing, many find the same; it is told once, where it was met first."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.found, item.hint), []).append(item)
    return list(groups.values())


def _show_same(items: "Sequence[Item]", out: "Console", verbose: bool) -> None:
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

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


def item_rows(item: "Item", verbose: bool) -> Iterator[tuple[str, str]]:
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


def _show_well(found: Checkup, out: "Console") -> None:
    from rich.markup import escape

    items = found.of("ok")
    if items:
        names = ", ".join(dict.fromkeys(item.name for item in items))
        out.print(f"{_heading('ok', len(items))}: {escape(names)}")


def _show_rest(found: Checkup, out: "Console") -> None:
    """What was skipped, by its reason."""
    from rich.markup import escape
    from rich.padding import Padding

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
        return "[green bold]✓[/] nothing stands in the way of setting it up"
    return "[green bold]✓[/] no problem found in what was checked"


def _and_look_at(worth: int) -> str:
    return f"; {worth} worth a look" if worth else ""
