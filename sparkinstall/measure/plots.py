"""Plots as geometry: what stands where. The template of the report draws it as SVG."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import median

from msgspec import Struct, field

from sparkinstall.measure.bench import Benchmark
from sparkinstall.measure.results import LevelResult, Percentiles

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 74, 14, 14, 52
_TICKS = 5
_SCENARIO, _AT_ONCE = "tokens of the prompt / generated", "requests at once"
# Of what lies beside another, part of the width of a category.
_BESIDE = 0.16
# What a letter takes below a category, and what is between the words of two.
_LETTER, _APART = 7, 8
# Of light and of dark pages: each is far enough from its background, and the dashes tell them apart in print.
COLOURS = (
    *(("#0072b2", "#56b4e9"), ("#c24e00", "#ff9d5c"), ("#00785a", "#3fd0a0")),
    *(("#a4478a", "#e59fc5"), ("#5b3fa0", "#b9a3ff"), ("#7a5c00", "#f0c945")),
)
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


class Point(Struct, frozen=True):
    """A place in the drawing, and what a pointer on it says."""

    x: float
    y: float
    text: str


class Series(Struct, frozen=True):
    """Points of one kind: the results; `dots`: single values. `colour`: which one of COLOURS.

    `joined`: those of the results that a line joins, each in the order of the categories: of one text.
    """

    name: str
    colour: int
    dash: str
    line: Sequence[Point]
    joined: Sequence[Sequence[Point]] = ()
    dots: Sequence[Point] = ()


class Plot(Struct, frozen=True):
    """A drawing of `width`, which is WIDTH or more, by HEIGHT.

    `ticks` and `labels`: places and words along the left, and below, where each has one or more lines.
    """

    title: str
    below: str
    width: int
    ticks: Sequence[tuple[float, str]]
    labels: Sequence[tuple[float, Sequence[str]]]
    series: Sequence[Series]


class _Values(Struct, frozen=True):
    """A series before it has places: by category one value that is joined, and single ones."""

    name: str
    middle: dict[str, float]
    single: dict[str, Sequence[float]] = field(default_factory=dict)


def plots(records: Sequence[tuple[str, Benchmark]]) -> list[Plot]:
    """Return the plots of records, each with its name."""
    found = [
        _plot("Time to first token, one at a time, ms", _SCENARIO, _by_scenario(records, "ttft")),
        _plot("Decode, one at a time, tokens a second", _SCENARIO, _by_scenario(records, "decode")),
        _plot("Prefill, one at a time, tokens a second", _SCENARIO, _by_scenario(records, "prefill")),
        _plot("Throughput, generated tokens a second", _AT_ONCE, _throughput(records)),
        _plot("Time to first token, ms", _AT_ONCE, _latency(records, "ttft")),
        _plot("Time of a token after the first (TPOT), ms", _AT_ONCE, _latency(records, "per_token")),
        _plot("Whole request (E2E), ms", _AT_ONCE, _latency(records, "total")),
    ]
    return [each for each in found if each is not None]


def _by_scenario(records: Sequence[tuple[str, Benchmark]], metric: str) -> list[_Values]:
    found = []
    for name, record in records:
        single = {each.name: getattr(each, metric) for each in record.scenarios if getattr(each, metric)}
        found.append(_Values(name, {where: median(values) for where, values in single.items()}, single))
    return found


def _throughput(records: Sequence[tuple[str, Benchmark]]) -> list[_Values]:
    return [_Values(name, {_level(each): each.tokens_per_second for each in of.levels}) for name, of in records]


def _latency(records: Sequence[tuple[str, Benchmark]], metric: str) -> list[_Values]:
    """Of one record three percentiles, of several the p95 of each."""
    one = len(records) == 1
    return [
        _Values(f"p{percentile}" if one else f"{name}, p{percentile}", dict(_at(record, metric, percentile)))
        for name, record in records
        for percentile in ((50, 95, 99) if one else (95,))
    ]


def _at(record: Benchmark, metric: str, percentile: int) -> Iterator[tuple[str, float]]:
    for level in record.levels:
        found = getattr(level, metric)
        if isinstance(found, Percentiles):
            yield _level(level), found.at(percentile)


def _level(of: LevelResult) -> str:
    return f"{of.concurrency} {of.text}"


def _plot(title: str, below: str, of: Sequence[_Values]) -> Plot | None:
    categories = list(dict.fromkeys(where for each in of for where in each.middle))
    texts = {where.rpartition(" ")[2] for where in categories}
    lines = {where: where.split(" ")[: 1 if len(texts) == 1 else 2] for where in categories}
    longest = max((len(line) for each in lines.values() for line in each), default=0)
    width = max(WIDTH, LEFT + RIGHT + (_LETTER * longest + _APART) * len(categories))
    highest = max((value for each in of for value in _all(each)), default=0.0)
    if not categories or not highest:
        return None
    step = _step(highest)
    top = step * math.ceil(highest / step)
    count = round(top / step)
    wide = (width - LEFT - RIGHT) / len(categories)
    places = {where: LEFT + wide * (at + 0.5) for at, where in enumerate(categories)}
    beside = [_beside(places, of, at, wide, below) for at in range(len(of))]
    series = [_placed(each, at, beside[at], top, below == _AT_ONCE) for at, each in enumerate(of) if each.middle]
    ticks = [(_y(step * at, top), f"{step * at:,.10g}") for at in range(count + 1)]
    labels = [(x, lines[where]) for where, x in places.items()]
    return Plot(title, below, width, ticks, labels, series)


def _beside(places: dict[str, float], of: Sequence[_Values], at: int, wide: float, below: str) -> dict[str, float]:
    """Move the values of several records of one category apart."""
    aside = wide * _BESIDE * (at - (len(of) - 1) / 2) if below == _SCENARIO else 0.0
    return {where: x + aside for where, x in places.items()}


def _all(of: _Values) -> Iterator[float]:
    yield from of.middle.values()
    for values in of.single.values():
        yield from values


def _step(highest: float) -> float:
    """Return a round distance of ticks, so that there are about five."""
    raw = highest / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= raw * 0.999)


def _y(value: float, top: float) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top, 1)


def _placed(of: _Values, at: int, places: dict[str, float], top: float, ordered: bool) -> Series:
    def point(where: str, value: float) -> Point:
        return Point(round(places[where], 1), _y(value, top), f"{of.name}, {where}: {value:,.4g}")

    line = {where: point(where, value) for where, value in of.middle.items()}
    dots = [point(where, value) for where, values in of.single.items() for value in values]
    joined = [list(each) for _, each in groupby(line, lambda where: where.rpartition(" ")[2])] if ordered else []
    lines = [[line[where] for where in each] for each in joined]
    return Series(of.name, at % len(COLOURS), _DASHES[at % len(_DASHES)], list(line.values()), lines, dots)
