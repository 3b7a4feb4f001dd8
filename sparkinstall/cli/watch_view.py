"""The view of `sparkinstall watch`: readings of one or several nodes, and below them what the red ones mean."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from msgspec import Struct
from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparkinstall.cli.text_output import console
from sparkinstall.errors import brief
from sparkinstall.measure.advice import Advice, advice, limit_of
from sparkinstall.measure.histogram import Latency, Percentile
from sparkinstall.measure.readings import Readings, Window
from sparkinstall.measure.rounds import Slo
from sparkinstall.measure.samples import Sample

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK = 24
_GIB = 1 << 30
_WIDE, _WIDEST = 124, 130
_COLOURS = {"red": "bold red", "yellow": "yellow"}
_LATENCIES = {"ttft": "TTFT", "itl": "ITL", "e2e": "E2E"}
_NAMES = {
    **_LATENCIES, "server": "server", "running": "running", "waiting": "waiting", "kv_cache": "KV cache",
    "preemptions": "preempted", "acceptance": "drafts taken", "gpu": "GPU", "memory": "memory", "link": "link",
}  # fmt: skip
Trends = Mapping[str, Iterable[float]]


class Seen(Struct, frozen=True):
    """The readings of one node, and what they mean. `trends`: recent tokens a second, by `prefill` and `decode`."""

    readings: Readings
    advice: tuple[Advice, ...]
    trends: Trends

    @property
    def levels(self) -> Mapping[str, str]:
        """The colour of each reading that has one."""
        return {each.reading: _COLOURS[each.level] for each in reversed(self.advice)}


class Watched:
    """The nodes that are watched, as they were last seen. `order`: their names as the user gave them, if so."""

    def __init__(self, window: float, slo: Slo, order: Sequence[str] = ()) -> None:
        self.slo = slo
        self._order = order
        self._nodes: dict[str, Seen] = {}
        self._window = window
        self._windows: dict[str, Window] = {}
        self._trends: dict[str, dict[str, deque[float]]] = {}

    @property
    def nodes(self) -> Sequence[Seen]:
        """The nodes in the user's order, others in that of their first sample."""
        named = [self._nodes[each] for each in self._order if each in self._nodes]
        return [*named, *(seen for name, seen in self._nodes.items() if name not in self._order)]

    def take(self, sample: Sample) -> Seen:
        """Add a sample to those of its node."""
        readings = self._windows.setdefault(sample.node, Window(self._window)).take(sample)
        trends = self._trends.setdefault(sample.node, {})
        for name, rate in (("prefill", readings.prefill), ("decode", readings.decode)):
            if rate is not None:
                trends.setdefault(name, deque(maxlen=_SPARK)).append(rate)
        seen = Seen(readings, advice(readings, self.slo), {name: tuple(each) for name, each in trends.items()})
        self._nodes[sample.node] = seen
        return seen


def show(watched: Watched) -> None:
    """Print the view once."""
    out = console()
    for seen in watched.nodes:
        out.print(view(seen, watched.slo, out.width))


@contextmanager
def shown_live(watched: Watched) -> Iterator[Callable[[Seen], None]]:
    """Yield what shows the newest readings: the whole view, renewed, on a terminal; one line each elsewhere."""
    if not sys.stdout.isatty():
        yield lambda seen: print(line(seen), flush=True)
        return
    out = console()
    with Live(console=out, auto_refresh=False) as live:
        # Drawn only when there is something new: drawing takes more processor time than a sample.
        yield lambda _: live.update(
            Group(*(view(each, watched.slo, out.width) for each in watched.nodes)), refresh=True
        )


# --- one node


def view(seen: Seen, slo: Slo, width: int) -> RenderableType:
    """Return all readings of a node for a terminal of this width, and below them what they mean."""
    of = seen.readings
    parts: list[RenderableType] = [_heading(of, width)]
    if of.trouble == "":
        left, right = _latencies(seen, slo), _load(seen)
        parts.append(_beside(left, right) if width >= _WIDE else Group(left, Text(), right))
        parts.append(Text())
    parts += [_machine(seen), *_meanings(seen, slo)]
    return Group(*parts, Text())


def _beside(left: RenderableType, right: RenderableType) -> Table:
    table = Table.grid(padding=(0, 4, 0, 0))
    table.add_row(left, right)
    return table


def _heading(of: Readings, width: int) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(of.at))
    window = f"last {of.seconds:.0f} s" if of.seconds else "the first sample"
    named = Text.assemble((brief(of.node), "bold"), "  ", brief(", ".join(of.models)))
    said = f"{clock}, {window}{f' ({of.note})' if of.note else ''}" if of.trouble == "" else clock
    gap = max(2, min(width, _WIDEST) - named.cell_len - len(said) - 1)
    return Text.assemble(named, " " * gap, (said, "dim"), "\n")


def _latencies(seen: Seen, slo: Slo) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("", min_width=9, no_wrap=True)
    for heading in ("p50", "p95", "p99", "p99/p50", "count"):
        table.add_column(heading, justify="right", min_width=7, no_wrap=True)
    for key, name in _LATENCIES.items():
        found: Latency | None = getattr(seen.readings, key)
        if found is None:
            table.add_row(name, Text("this release does not tell", style="dim"))
        elif not found.count:
            table.add_row(name, *(Text("-", style="dim") for _ in range(4)), Text("0", style="dim"))
        else:
            table.add_row(name, *_percentiles(found, limit_of(slo, key), seen.levels.get(key, "")), f"{found.count:,}")
    return table


def _percentiles(of: Latency, limit: float | None, colour: str) -> Iterator[Text]:
    for each in (of.p50, of.p95, of.p99):
        text = words(each, limit)
        yield Text(text, style=colour if each is of.p95 or (each is of.p99 and of.tail) else "")
    yield Text(f"{of.tail:.1f}" if of.tail else "-")


def words(of: Percentile | None, limit: float | None = None) -> str:
    """Return a percentile in words: with ~ if its bucket has the limit in it, its bound if nothing else is known."""
    if of is None:
        return "-"
    if of.high is None:
        return f"> {seconds(of.low)}"
    if of.value is None:
        return f"< {seconds(of.high)}"
    return ("~" if limit is not None and of.compared(limit) == "unknown" else "") + seconds(of.value)


def seconds(value: float) -> str:
    """`4.1 ms`, `41 ms`, `410 ms`, `4.1 s`, `410 s`: no more digits than a bucket has."""
    number, unit = (value * 1000, "ms") if value < 1 else (value, "s")
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def _load(seen: Seen) -> Table:
    of, table = seen.readings, _rows()
    for name in ("prefill", "decode"):
        rate: float | None = getattr(of, name)
        table.add_row(name, _number(rate, " tokens/s"), spark(seen.trends.get(name, ())))
    waiting = Text.assemble(_number(of.waiting, " waiting", seen.levels.get("waiting", "")), ", ",
                            _number(of.preemptions, " preempted", seen.levels.get("preemptions", "")))  # fmt: skip
    table.add_row("requests", _number(of.running, " running", seen.levels.get("running", "")), waiting)
    if usage := of.kv_cache:
        now = Text(f"{usage.now:.1%}", style=seen.levels.get("kv_cache", ""))
        table.add_row("KV cache", now, Text(f"{usage.average:.1%} on average, {usage.peak:.1%} at most", style="dim"))
    if of.prefix_hits is None:
        table.add_row("prefix hits", Text("-", style="dim"), Text("nothing was looked up", style="dim"))
    else:
        table.add_row("prefix hits", f"{of.prefix_hits:.0%}")
    table.add_row("drafts taken", *_speculation(seen))
    return table


def _speculation(seen: Seen) -> tuple[Text, Text]:
    of = seen.readings
    if of.acceptance is not None:
        return Text(f"{of.acceptance:.0%}", style=seen.levels.get("acceptance", "")), Text()
    return Text("-"), Text("no speculative decoding" if of.speculates is False else "none in this time", style="dim")


def _rows() -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=12, no_wrap=True)
    table.add_column(min_width=14, justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _number(value: float | None, unit: str, style: str = "") -> Text:
    if value is None:
        return Text("-", style="dim")
    digits = f"{value:,.1f}" if value < 100 and value != round(value) else f"{value:,.0f}"
    return Text(digits + unit, style=style)


def spark(values: Iterable[float]) -> Text:
    """Return a line of blocks, the highest for the highest value."""
    known = list(values)
    top = max(known, default=0.0)
    marks = (_BLOCKS[min(len(_BLOCKS) - 1, int(each / top * len(_BLOCKS)))] if top else _BLOCKS[0] for each in known)
    return Text("".join(marks), style="cyan")


def _machine(seen: Seen) -> Table:
    of, table = seen.readings.machine, _rows()
    if of is None:
        table.add_row("machine", Text("skipped: another machine", style="dim"))
        return table
    left = Text(f"{of.available / _GIB:.1f} GiB left", style=seen.levels.get("memory", ""))
    table.add_row("memory", left, Text(f"of {of.memory / _GIB:.1f} GiB", style="dim"))
    gpu = of.gpu
    if gpu is None:
        table.add_row("GPU", Text("-", style="dim"), Text("nvidia-smi tells nothing", style="dim"))
    else:
        style = seen.levels.get("gpu", "")
        clock = f"{gpu.mhz:,.0f}" if gpu.mhz is not None else "?"
        known = (
            f"{clock} of {gpu.max_mhz:,.0f} MHz" if gpu.max_mhz else f"{clock} MHz",
            f"{gpu.watts:.0f} W" if gpu.watts is not None else "",
            f"{gpu.celsius:.0f} °C" if gpu.celsius is not None else "",
        )
        busy = f"{gpu.busy:.0f} % busy" if gpu.busy is not None else "-"
        table.add_row("GPU", Text(busy, style=style), Text(", ".join(filter(None, known)), style=style))
    grown = seen.readings.link_errors
    if grown is not None:
        count = sum(grown.values())
        table.add_row(
            "link", Text(f"{count:,} errors", style=seen.levels.get("link", "")), Text(brief(", ".join(grown)))
        )
    return table


def _meanings(seen: Seen, slo: Slo) -> Iterator[RenderableType]:
    of = seen.readings
    notes = []
    if any(words(found.p95, limit_of(slo, key)).startswith("~") for key in _LATENCIES if (found := getattr(of, key))):
        notes.append("~ the limit lies within this bucket of the histogram: whether it is kept is not known")
    counted = [found.count for key in _LATENCIES if (found := getattr(of, key))]
    if counted and of.seconds and not any(counted):
        notes.append("no traffic: in this time no request has given a latency")
    if of.lacking:
        notes.append(f"this release lacks {', '.join(of.lacking)}")
    for note in notes:
        yield Padding(Text(note, style="dim"), (1, 0, 0, 0))
    for each in seen.advice:
        yield Text()
        sign = Text("✗ " if each.level == "red" else "! ", style=_COLOURS[each.level])
        yield Text.assemble(sign, (_NAMES[each.reading], "bold"), f"  {brief(each.found)}")
        lines = Table.grid(padding=(0, 1, 0, 0))
        lines.add_row("", each.means)
        lines.add_row(Text("→", style="dim"), each.do)
        yield lines


def line(seen: Seen) -> str:
    """Return the readings in one line, for a log."""
    of = seen.readings
    clock = time.strftime("%H:%M:%S", time.localtime(of.at))
    if of.trouble:
        return f"{clock} {brief(of.node)}: {brief(of.trouble)}"
    said = [f"({of.note})"] if of.note else []
    said += [f"{name} {'/'.join(map(words, (found.p50, found.p95, found.p99)))}" for key, name in _LATENCIES.items()
            if (found := getattr(of, key))]  # fmt: skip
    said += [f"{name} {_number(rate, ' tokens/s')}" for name, rate in (("prefill", of.prefill), ("decode", of.decode))]
    said += [str(_number(of.running, " running")), str(_number(of.waiting, " waiting"))]
    said += [f"KV cache {of.kv_cache.now:.0%}"] if of.kv_cache else []
    said += [f"{each.level}: {_NAMES[each.reading]}: {each.found}" for each in seen.advice]
    return f"{clock} {brief(of.node)}: {brief(', '.join(said))}"
