"""`sparkinstall bench`: how fast the served model is, and what made the numbers."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Annotated, get_args

import click
import msgspec
import typer
from msgspec import UNSET, Struct, UnsetType
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from sparkinstall.cli import options, output_file
from sparkinstall.cli.run_command import CommandResult, Output, problem_of, verb
from sparkinstall.cli.text_output import console, headed, show_line, shown
from sparkinstall.core.ask import server_of
from sparkinstall.core.session import Target, open_session
from sparkinstall.errors import BadUsage, Exit, Problem, Storage
from sparkinstall.given import absolute
from sparkinstall.measure import bench as use
from sparkinstall.measure import rounds
from sparkinstall.measure.compare import Change, Comparison, compare, require_comparable
from sparkinstall.measure.report import html, markdown, number, percent
from sparkinstall.measure.results import LevelResult, Note, Percentiles, ScenarioResult
from sparkinstall.schema import either, show

_MOST_AT_ONCE, _MOST_REQUESTS = 1024, 10000
_SEED = 1 << 31
_ENDING = ".json"
_FEW_FOR_P99 = 100
_ANY_WIDTH = 1000
# Of the cores: vLLM itself keeps one or two busy while it waits.
_LOADED = 0.5
_CONCURRENCY = ",".join(map(str, rounds.CONCURRENCY))


class _Group(TyperGroup):
    """What is no verb is a scenario or an option, and means `bench run`."""

    otherwise = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        verb_or_help = bool(args) and (args[0] in self.commands or args[0] in ("-h", "--help"))
        return super().parse_args(ctx, args if verb_or_help else [self.otherwise, *args])


app = typer.Typer(
    add_completion=False,
    cls=_Group,
    help="Measure the served model with vLLM's own benchmark: `bench [SCENARIO...]`.",
    subcommand_metavar="[SCENARIO]... | COMMAND [ARGS]...",
)


@app.callback()
def _bench() -> None:
    """A group also while it has a single verb."""


Scenarios = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SCENARIO]...",
        help="Tokens of the prompt and generated ones, such as 1834/32; with cached ones before it: 2048/32@0,8192.",
        show_default=False,
    ),
]
Url = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="Measure another server, such as http://HOST:8000.")
]
Model = Annotated[str | None, typer.Option("--model", metavar="NAME", help="One of several served models.")]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", metavar="FILE", help="The file with the API's key.", readable=False)
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="prose|code", help="What the prompts are (may repeat); default: prose."),
]
Concurrency = Annotated[
    str, typer.Option("--concurrency", metavar="N,N", help="How many requests at once, one after the other; or none.")
]
Requests = Annotated[
    int | None,
    typer.Option(
        "--requests", metavar="N", help="Requests of each such level; default: 8 for each at once, 16 or more.",
        min=1, max=_MOST_REQUESTS,
    ),
]  # fmt: skip
SloText = Annotated[
    str | None, typer.Option("--slo", metavar="LIMITS", help="An objective, such as ttft=500ms,itl=250ms.")
]
SloPercentile = Annotated[
    int, typer.Option("--slo-percentile", metavar="P", help="The percentile that the objective is for.")
]
Cached = Annotated[
    bool, typer.Option("--cached", help="Send each prompt once before, so that the prefix cache has it.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", metavar="N", help="The same prompts as a run with this seed; default: new ones.", min=0, max=_SEED
    ),
]
Limit = Annotated[int, typer.Option("--limit", metavar="SECONDS", help="How long a round may take.", min=1, max=86400)]
Python = Annotated[
    Path | None,
    typer.Option(
        "--python", metavar="FILE", help="The Python with the vLLM that sends the requests; default: this node's."
    ),
]
File = Annotated[
    Path | None,
    options.output("--output", "-o", metavar="FILE", help="The record, a .json; default: in the current folder."),
]


class Measured(Struct, frozen=True):
    """Result of `bench run`: the record, and its file, if it was written."""

    file: str
    record: use.Benchmark | UnsetType = UNSET


@app.command()
@verb("bench run", "root", "config", reads_only=True)
def run(
    target: Target,
    output: Output,
    scenario: Scenarios = None,
    url: Url = None,
    model: Model = None,
    key_file: KeyFile = None,
    text: Texts = None,
    concurrency: Concurrency = _CONCURRENCY,
    requests: Requests = None,
    slo: SloText = None,
    slo_percentile: SloPercentile = 95,
    cached: Cached = False,
    seed: Seed = None,
    limit: Limit = 1800,
    python: Python = None,
    file: File = None,
    yes: options.Yes = False,
) -> CommandResult:
    """Measure the served model: one request at a time, then several at once. `run` may be left out."""
    asked = rounds.BenchOptions(
        scenarios=_scenarios_of(scenario, cached) if scenario else rounds.FIELD,
        texts=_texts(text),
        concurrency=_levels(concurrency),
        requests=requests,
        slo=rounds.slo_of(slo, slo_percentile) if slo is not None else None,
        cached=cached,
        seed=int(time.time()) % _SEED if seed is None else seed,
        limit=limit,
        python=str(_python(python)) if python else "",
    )
    named = file or Path(time.strftime("sparkinstall-bench-%Y%m%d-%H%M%S.json"))
    path = output_file.choose(named, _ENDING, agreed=yes)
    session = open_session(target)
    bench = use.Bench(session, server_of(session, url, key_file), asked, model or "")
    try:
        with _watching(output) as tell:
            found = bench.run(tell)
    except (Exception, KeyboardInterrupt) as error:
        return _ended_early(bench, problem_of(error), path, output.verbose)
    return _kept(found, path, (), output.verbose)


def _ended_early(bench: use.Bench, problem: Problem, path: Path, verbose: bool) -> CommandResult:
    """Keep what was measured before, marked as a part."""
    bench.stopped(problem.message)
    found = bench.found
    if found is None or not (found.scenarios or found.levels):
        return CommandResult(problem.exit_code, problems=(problem,))
    return _kept(found, path, (problem,), verbose)


def _kept(found: use.Benchmark, path: Path, problems: tuple[Problem, ...], verbose: bool) -> CommandResult:
    try:
        output_file.write(path, _ENDING, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    except Storage as problem:
        problems = (*problems, problem)
    if found.wrong and not problems:
        problems = (
            use.BenchFailed(
                "a number is not to be used", cause="; ".join(found.wrong), hint="remove the cause, and measure again"
            ),
        )
    code = problems[0].exit_code if problems else Exit.GOOD
    return CommandResult(code, Measured(str(path), found), lambda: show_benchmark(found, str(path), verbose), problems)


Records = Annotated[
    list[Path],
    typer.Argument(metavar="RECORD...", help="Records that `bench` has written.", show_default=False, readable=False),
]
Anyway = Annotated[bool, typer.Option("--anyway", help="Compare also different models, or different work.")]
Detailed = Annotated[bool, typer.Option("--detailed-exitcode", help="Exit 3 if a number is worse.")]


class Compared(Struct, frozen=True):
    """Result of `bench compare`: each other record against the first."""

    comparisons: tuple[Comparison, ...]


@app.command("compare")
@verb("bench compare", reads_only=True)
def compare_(
    _target: Target, output: Output, record: Records, anyway: Anyway = False, detailed_exitcode: Detailed = False
) -> CommandResult:
    """Compare records with the first one: which differences are more than noise, and what was not the same."""
    if len(record) < 2:
        raise BadUsage("there is nothing to compare it with", hint="name two records or more, the older one first")
    named = _named(record)
    found = _comparisons(named, anyway)
    worse = any(change.verdict == "worse" for each in found for change in each.changes)
    code = Exit.DRIFT if detailed_exitcode and worse else Exit.GOOD
    return CommandResult(code, Compared(found), lambda: _show_comparisons(found, output.verbose))


def _named(files: Sequence[Path]) -> list[tuple[str, use.Benchmark]]:
    """Return the records, each with a name that no other has."""
    paths = [absolute(each, "the record") for each in files]
    short = [each.stem for each in paths]
    names = short if len(set(short)) == len(short) else list(map(str, paths))
    if len(set(names)) < len(names):
        raise BadUsage("a record is named twice", hint="name each once")
    return [(name, use.read_record(path)) for name, path in zip(names, paths, strict=True)]


def _comparisons(named: Sequence[tuple[str, use.Benchmark]], anyway: bool) -> tuple[Comparison, ...]:
    (first, base), *others = named
    for name, each in others:
        require_comparable(base, each, (first, name), anyway)
    return tuple(compare(base, each, (first, name)) for name, each in others)


def _show_comparisons(found: Sequence[Comparison], verbose: bool) -> None:
    out = console()
    for each in found:
        out.print(Text(shown(f"{each.file} against {each.base}"), style="bold"))
        told = [change for change in each.changes if verbose or change.verdict != "noise"]
        if told:
            wide = _changes(told)
            out.print(wide if _fits(wide, out) else _narrow_changes(told))
        noise = sum(change.verdict == "noise" for change in each.changes)
        count = len(each.changes)
        many = f"{noise} of {count} numbers differ by no more than noise" if count else "no number can be compared"
        show_line(many, out, "dim")
        for text in each.left_out:
            show_line(shown(f"left out: {text}"), out)
        for differs in each.differs:
            show_line(shown(f"differs: {differs.what}: {differs.base or 'none'} -> {differs.other or 'none'}"), out)


def _changes(changes: Sequence[Change]) -> Table:
    table = headed("", "", "before", "after", "change", "interval", "")
    for each in changes:
        values = (f"{number(each.base)} {each.unit}", f"{number(each.other)} {each.unit}", percent(each.change))
        table.add_row(each.name, each.metric, *values, _interval(each), _verdict(each))
    return table


def _narrow_changes(changes: Sequence[Change]) -> Table:
    """Return the same with a row for each result's name, and the interval below each number's name."""
    table = headed("number and interval", "before", "after", "change", "")
    for name, of_one in groupby(changes, lambda each: each.name):
        table.add_row(Text(name, style="bold"))
        for each in of_one:
            values = (number(each.base), number(each.other), percent(each.change))
            table.add_row(f"{each.metric} {each.unit}", *values, _verdict(each))
            table.add_row(f"  {_interval(each)}")
    return table


def _interval(of: Change) -> str:
    return f"{percent(of.low)} ... {percent(of.high)}"


def _verdict(of: Change) -> Text:
    return Text(of.verdict, style={"better": "green", "worse": "red", "noise": "dim"}[of.verdict])


def _fits(table: Table, out: Console) -> bool:
    """Whether no cell of the table would be wrapped."""
    return Measurement.get(out, out.options.update(max_width=_ANY_WIDTH), table).maximum <= out.width


ReportFile = Annotated[
    Path | None,
    options.output("--output", "-o", metavar="FILE", help="The page, .html or .md; default: in the current folder."),
]


class Reported(Struct, frozen=True):
    """Result of `bench report`."""

    file: str


@app.command()
@verb("bench report", reads_only=True)
def report(
    _target: Target,
    _output: Output,
    record: Records,
    anyway: Anyway = False,
    file: ReportFile = None,
    yes: options.Yes = False,
) -> CommandResult:
    """Write one page of records, with plots: HTML that loads nothing from a network, or Markdown."""
    named = _named(record)
    path = output_file.choose(file or Path(f"{named[0][0].rpartition('/')[2]}.html"), ".html", agreed=yes)
    if path.suffix not in _PAGES:
        raise BadUsage(f"{path} is neither .html nor .md", hint="name the page so: `--output FILE.html`")
    text = _PAGES[path.suffix](named, _comparisons(named, anyway))
    output_file.write(path, path.suffix, text.encode())
    return CommandResult(data=Reported(str(path)), show=lambda: print(f"✓ {shown(str(path))}"))


_PAGES = {".html": html, ".md": markdown}


# --- the options


def _scenarios_of(words: Sequence[str], cached: bool) -> tuple[rounds.Scenario, ...]:
    found = tuple(dict.fromkeys(each for word in words for each in rounds.scenarios_of(word)))
    if cached and (deep := next((each for each in found if each.depth), None)):
        raise BadUsage(
            f"with --cached the whole prompt of {deep.name} would be in the prefix cache",
            hint="omit --cached: what stands before the @ is new, what stands after it is cached",
        )
    return found


def _texts(words: Sequence[str] | None) -> tuple[rounds.Text, ...]:
    known: tuple[rounds.Text, ...] = get_args(rounds.Text)
    chosen = tuple(each for each in known if each in (words or known[:1]))
    if wrong := next((each for each in words or () if each not in known), None):
        raise BadUsage(f"--text {show(wrong)} is not known", hint=f"use {either(known)}")
    return chosen


def _levels(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    parts = [each.strip() for each in text.split(",")]
    if not all(each.isascii() and each.isdigit() and 0 < int(each[:9]) <= _MOST_AT_ONCE for each in parts):
        raise BadUsage(f"--concurrency {show(text)} is no list of numbers", hint="use one such as 1,2,4,8, or none")
    return tuple(dict.fromkeys(map(int, parts)))


def _python(file: Path) -> Path:
    path = absolute(file, "--python")
    if not os.access(path, os.X_OK) or path.is_dir():
        raise BadUsage(f"--python {path} is no program", hint="name one such as /opt/venv/bin/python")
    return path


@contextmanager
def _watching(output: Output) -> Iterator[Callable[[use.Progress], None]]:
    """Yield a function that shows on stderr which round is measured."""
    if output.json:
        yield lambda _: None
        return
    if not sys.stderr.isatty():
        yield lambda now: print(f"{now.place}/{now.count} {now.name}", file=sys.stderr, flush=True)
        return
    with console(stderr=True).status("[dim]loading vLLM's benchmark[/]", spinner="dots") as status:
        yield lambda now: status.update(Text(f"{now.place}/{now.count} {now.name}", style="dim"))


# --- text


def show_benchmark(found: use.Benchmark, file: str, verbose: bool = False) -> None:
    """Show a record's results."""
    out, served = console(), found.served
    cache = {True: "prefix cache on", False: "prefix cache off", None: "prefix cache unknown"}[served.prefix_cache]
    sent = "prompts sent before" if found.options.cached else "new prompts"
    out.print(Text(shown(served.model), style="bold"), Text(f"vLLM {served.vllm}, {cache}, {sent}", style="dim"))
    if found.scenarios:
        out.print(_scenarios(found.scenarios))
    if found.levels:
        wide = _levels_table(found.levels)
        out.print(wide if _fits(wide, out) else _narrow_levels(found.levels))
    for line in _remarks(found, verbose):
        show_line(shown(line), out)
    state = "[green bold]✓[/]" if found.complete and not found.wrong else "[yellow]![/]"
    part = "" if found.complete else " (a part: see above)"
    out.print(f"{state} {escape(shown(file))}{part}", soft_wrap=True)


def _scenarios(results: Sequence[ScenarioResult]) -> object:
    table = headed("one at a time", "TTFT ms", "total ms", "prefill tok/s", "decode tok/s", "failed")
    for each in results:
        cells = (_middle(each.ttft), _middle(each.total), _middle(each.prefill), _middle(each.decode))
        table.add_row(each.name, *cells, str(each.failed or ""))
    return table


def _middle(values: Sequence[float] | None) -> str:
    """Return the median, and the distance of the farthest value."""
    if not values:
        return "-"
    middle = median(values)
    spread = max(abs(each - middle) for each in values)
    return f"{number(middle)} ± {number(spread)}"


def _levels_table(results: Sequence[LevelResult]) -> Table:
    table = headed(
        "at once", "tok/s", "TTFT ms p50", "p95", "p99", "ITL ms p50", "p95", "p99", "E2E ms p50", "p95", "p99", "good",
        "SLO",
    )  # fmt: skip
    for each in results:
        cells = [cell for found in (each.ttft, each.itl, each.total) for cell in _three(found)]
        table.add_row(f"{each.concurrency} {each.text}", number(each.tokens_per_second), *cells, *_objective(each))
    return table


def _narrow_levels(results: Sequence[LevelResult]) -> object:
    """Return the same with a row for each latency."""
    table = headed("at once", "tok/s", "ms", "p50", "p95", "p99", "good", "SLO")
    for each in results:
        first = (f"{each.concurrency} {each.text}", number(each.tokens_per_second))
        table.add_row(*first, "TTFT", *_three(each.ttft), *_objective(each))
        table.add_row("", "", "ITL", *_three(each.itl))
        table.add_row("", "", "E2E", *_three(each.total))
    return table


def _objective(of: LevelResult) -> tuple[str, str]:
    """Return how many requests were within the objective, and whether it was met."""
    good = "" if of.good is None else f"{of.good}/{of.requests}"
    return good, {True: "met", False: "missed", None: ""}[of.met]


def _three(found: Percentiles | None) -> tuple[str, str, str]:
    if found is None:
        return "-", "-", "-"
    # Of few values it is about the largest one.
    mark = "*" if found.count < _FEW_FOR_P99 else ""
    return number(found.p50), number(found.p95), number(found.p99) + mark


def _remarks(found: use.Benchmark, verbose: bool) -> Iterator[str]:
    results = (*found.scenarios, *found.levels)
    if any(each.count < _FEW_FOR_P99 for level in found.levels for each in (level.ttft, level.total) if each):
        yield f"* of fewer than {_FEW_FOR_P99} values: about the slowest one"
    for level in found.levels:
        if level.why:
            yield f"{level.name}: {level.why}"
    yield from _power(found.levels)
    for each in results:
        if each.speculation and each.speculation.acceptance is not None:
            said = each.speculation
            yield f"{each.name}: speculative decoding, {said.acceptance:.0%} accepted, {said.length} tokens a step"
    merged = [each for each in results for note in each.notes if note.weight == "note"]
    if merged and not verbose:
        yield f"· notes on {', '.join(dict.fromkeys(each.name for each in merged))}: `-v` shows them"
    notes = ((each.name, note) for each in results for note in each.notes if verbose or note.weight != "note")
    yield from (f"{_sign(note)} {name}: {note.text}" for name, note in notes)
    yield from (f"left out: {each.name}: {each.why}" for each in found.left_out)
    if found.busy:
        yield "! other processes were busy: " + ", ".join(f"{each.name} {each.cores:.2f} cores" for each in found.busy)
    load = found.before.load.partition(" ")[0] if found.before else ""
    if found.host and float(load or 0) > _LOADED * found.host.cores:
        yield f"! the machine had a load of {load} on {found.host.cores} cores before"
    if not found.complete:
        yield f"! a part only: {found.why}"


def _power(levels: Sequence[LevelResult]) -> Iterator[str]:
    for each in levels:
        if each.power.watts and each.per_watt and each.energy:
            yield (
                f"{each.name}: {each.power.watts:.0f} W of the GPU, {each.per_watt:.2f} tok/s each watt, "
                f"{each.energy:.2f} kWh for a million tokens"
            )
    unread = sorted({each.power.why for each in levels if each.power.watts is None})
    if unread:
        yield f"power cannot be read: {unread[0]}"


def _sign(note: Note) -> str:
    return {"error": "✗", "warning": "!", "note": "·"}[note.weight]
