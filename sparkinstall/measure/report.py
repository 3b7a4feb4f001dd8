"""One page of records: HTML with plots that needs no network, and Markdown."""

import re
import shlex
from collections.abc import Iterator, Sequence
from statistics import median

import jinja2
from msgspec import Struct

from sparkinstall import __version__
from sparkinstall.assets import asset
from sparkinstall.errors import visible
from sparkinstall.measure.bench import Benchmark
from sparkinstall.measure.compare import Change, Comparison
from sparkinstall.measure.plots import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, WIDTH, plots
from sparkinstall.measure.results import Percentiles

_MARKS = re.compile(r"[\\`*\[\]|]")
_TEMPLATE = "bench-report.html.j2"
_SIZE = {"height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM}
# From here on a plot has a row of its own.
_WIDER = 1.2
_NONE_COMMON, _NONE_DIFFERS = "no result is in both and to be used", "nothing that made the numbers differs"


class Table(Struct, frozen=True):
    """Headings, and rows of as many cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Page(Struct, frozen=True):
    """A record in words. `notes` with their weight, `made`: what made the numbers."""

    name: str
    about: str
    tables: Sequence[Table]
    notes: Sequence[tuple[str, str]]
    made: Sequence[tuple[str, str]]


def html(records: Sequence[tuple[str, Benchmark]], comparisons: Sequence[Comparison]) -> str:
    """Return the whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(asset("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent)
    text = environment.get_template(_TEMPLATE).render(
        title=_title(records),
        pages=[page(name, record) for name, record in records],
        comparisons=comparisons,
        plots=plots(records),
        colours=COLOURS,
        size=_SIZE,
        wide=WIDTH * _WIDER,
        none_common=_NONE_COMMON,
        none_differs=_NONE_DIFFERS,
        version=__version__,
    )
    return visible(text)


def markdown(records: Sequence[tuple[str, Benchmark]], comparisons: Sequence[Comparison]) -> str:
    """Return the same without plots, for an issue or a README."""
    return "\n".join([f"# {_plain(_title(records))}", *_markdown_pages(records), *_markdown_of(comparisons), ""])


def _title(records: Sequence[tuple[str, Benchmark]]) -> str:
    names = dict.fromkeys(record.served.model for _, record in records)
    return f"Benchmark of {', '.join(names)}"


def page(name: str, record: Benchmark) -> Page:
    """Return a record in words."""
    tables = [each for each in (_scenarios(record), _levels(record)) if each.rows]
    return Page(name, _about(record), tables, tuple(_notes(record)), tuple(_made(record)))


def _about(record: Benchmark) -> str:
    served = record.served
    cache = {True: "prefix cache on", False: "prefix cache off", None: "prefix cache unknown"}[served.prefix_cache]
    sent = "prompts sent before" if record.options.cached else "new prompts"
    state = "" if record.complete else f", only a part: {record.why}"
    return f"{served.model}, vLLM {served.vllm or 'unknown'}, {cache}, {sent}, {record.began}{state}"


def _scenarios(record: Benchmark) -> Table:
    rows = [
        [
            each.name,
            *(_middle(values) for values in (each.ttft, each.total, each.prefill, each.decode)),
            f"{each.completed} of {each.requests}",
        ]
        for each in record.scenarios
    ]
    return Table(("one at a time", "TTFT ms", "total ms", "prefill tok/s", "decode tok/s", "requests"), rows)


def _middle(values: Sequence[float] | None) -> str:
    """Return the median, and the lowest and highest value."""
    if not values:
        return "-"
    return f"{number(median(values))} ({number(min(values))} - {number(max(values))})"


def _levels(record: Benchmark) -> Table:
    rows = [
        [
            each.name,
            number(each.tokens_per_second),
            *(_three(found) for found in (each.ttft, each.itl, each.per_token, each.total)),
            f"{each.completed} of {each.requests}",
            "" if each.good is None else f"{each.good} good, {'met' if each.met else 'missed'}",
            "" if each.per_watt is None else f"{each.per_watt:.2f}",
            "" if each.energy is None else f"{each.energy:.2f}",
        ]
        for each in record.levels
    ]
    head = ("several at once", "tok/s", "TTFT ms", "ITL ms", "TPOT ms", "E2E ms", "requests", "objective")
    return _without_empty(Table((*head, "tok/s/W", "kWh/M tokens"), rows))


def _without_empty(of: Table) -> Table:
    """Leave out the columns that have nothing, such as those of a power that cannot be read."""
    kept = [at for at in range(len(of.head)) if any(row[at] for row in of.rows)]
    return Table([of.head[at] for at in kept], [[row[at] for at in kept] for row in of.rows])


def _three(found: Percentiles | None) -> str:
    """Return p50, p95 and p99."""
    return " / ".join(number(each) for each in (found.p50, found.p95, found.p99)) if found else "-"


def _notes(record: Benchmark) -> Iterator[tuple[str, str]]:
    if record.levels:
        yield "note", "latencies of several at once: p50 / p95 / p99"
    for level in record.levels:
        if level.why:
            yield "note", f"{level.name}: {level.why}"
    for each in (*record.scenarios, *record.levels):
        if each.speculation and each.speculation.acceptance is not None:
            said = each.speculation
            yield (
                "note",
                f"{each.name}: speculative decoding, {said.acceptance:.0%} accepted, {said.length} tokens a step",
            )
        yield from ((note.weight, f"{each.name}: {note.text}") for note in each.notes)
    for why in sorted({each.power.why for each in record.levels if each.power.watts is None}):
        yield "note", f"power cannot be read: {why}"
    yield from (("note", f"left out: {each.name}: {each.why}") for each in record.left_out)


def _made(record: Benchmark) -> Iterator[tuple[str, str]]:
    served, host = record.served, record.host
    yield "sent by", f"{record.tool}, {record.client}; prompts {record.prompts}, seed {record.options.seed}"
    yield "server", f"{served.url}, {served.root or 'model unknown'}, context {served.context or 'unknown'}"
    if served.recipe:
        yield "recipe", served.recipe + (f" at {served.revision}" if served.revision else "")
    if served.process:
        yield "command", shlex.join(served.process.argv)
        yield "variables", " ".join(f"{name}={value}" for name, value in sorted(served.process.env.items()))
    if served.versions:
        yield "packages", ", ".join(f"{name} {version}" for name, version in served.versions.items())
    if served.ready is not None:
        yield "time to ready", f"{served.ready:.0f} s"
    yield "decode ceiling", f"{served.ceiling:.1f} tok/s" if served.ceiling else f"unknown: {served.no_ceiling}"
    if host is None:
        yield "machine", "another one, which was not read"
        return
    yield (
        "machine",
        f"{host.product or 'unknown'}, {host.system}, {host.cores} cores, {host.memory / (1 << 20):.1f} GiB",
    )
    yield "kernel", " ".join(filter(None, (host.kernel, host.kho)))
    for name, text in (("driver", host.driver), ("GPU", host.gpu), ("firmware", host.firmware)):
        yield name, text or "none"
    yield from _states(record)


def _states(record: Benchmark) -> Iterator[tuple[str, str]]:
    for name, state in (("before", record.before), ("after", record.after)):
        if state:
            free = f"{state.memory.available / (1 << 20):.1f} GiB available"
            gpu = ", ".join(f"{key} {value}" for key, value in state.gpu.items())
            hottest = f", hottest sensor {max(state.temperatures.values()):.0f} °C" if state.temperatures else ""
            yield (
                name,
                f"up {state.uptime / 3600:.1f} h, load {state.load}, {free}{hottest}" + (f"; {gpu}" if gpu else ""),
            )
    if record.busy:
        yield "other processes", ", ".join(f"{each.name} {each.cores:.2f} cores" for each in record.busy)


def number(value: float) -> str:
    """Return a number with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(value: float) -> str:
    """Return a part as a change in percent."""
    return f"{value:+.1%}"


# --- Markdown


def _markdown_pages(records: Sequence[tuple[str, Benchmark]]) -> Iterator[str]:
    for name, record in records:
        found = page(name, record)
        yield f"\n## {_plain(found.name)}\n\n{_plain(found.about)}"
        for table in found.tables:
            yield "\n" + _markdown_table(table)
        yield ""
        yield from (f"- {'**error** ' if weight == 'error' else ''}{_plain(text)}" for weight, text in found.notes)
        yield "\n" + _markdown_table(Table(("what made the numbers", ""), [list(each) for each in found.made]))


def _markdown_of(comparisons: Sequence[Comparison]) -> Iterator[str]:
    for each in comparisons:
        yield f"\n## {_plain(each.file)} against {_plain(each.base)}\n"
        head = ("what", "number", "before", "after", "change", "interval", "")
        changes = [_cells(change) for change in each.changes]
        yield _markdown_table(Table(head, changes)) if changes else _NONE_COMMON
        yield ""
        yield from (f"- left out: {_plain(text)}" for text in each.left_out)
        rows = [(differs.what, differs.base, differs.other) for differs in each.differs]
        yield "\n" + (_markdown_table(Table(("what differs", each.base, each.file), rows)) if rows else _NONE_DIFFERS)


def _cells(of: Change) -> Sequence[str]:
    values = (f"{number(of.base)} {of.unit}", f"{number(of.other)} {of.unit}", percent(of.change))
    return of.name, of.metric, *values, f"{percent(of.low)} ... {percent(of.high)}", of.verdict


def _markdown_table(of: Table) -> str:
    rows = [of.head, ["---"] * len(of.head), *of.rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows)


def _plain(text: str) -> str:
    """Return a text that Markdown takes for nothing else, such as a picture that a reader's browser would load."""
    return _MARKS.sub(r"\\\g<0>", visible(text)).replace("<", "&lt;").replace("\n", " ")
