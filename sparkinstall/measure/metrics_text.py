"""What a server's /metrics says, in Prometheus' text format: the numbers that `facts/vllm.py` names, and no others."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from msgspec import Struct, field

from sparkinstall.facts import vllm
from sparkinstall.facts.vllm import Metric

Buckets = Mapping[str, float]
"""How many observations are not above a bound, by the bound in seconds as it is written: `0.5`, ..., `+Inf`."""

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")
_INFINITE = "+Inf"
_NUMBERS = {**vllm.GAUGES, **vllm.COUNTERS, **vllm.OF_SPECULATION}


class Told(Struct, frozen=True):
    """What a server tells of itself, by our own names (`vllm.GAUGES` and the others); what is not there, it lacks.

    `started`: when it was started, in seconds of the epoch; None: unknown. `models`: the names that it serves.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Buckets] = field(default_factory=dict)
    started: float | None = None
    models: tuple[str, ...] = ()


class Line(NamedTuple):
    """One sample of the format."""

    name: str
    labels: Mapping[str, str]
    value: float


def told(text: str) -> Told:
    """Return what a text of /metrics tells; values of several engines are one. Lines that make no sense are left."""
    kept: dict[str, list[Line]] = {}
    for line in wanted(text):
        kept.setdefault(line.name, []).append(line)
    values = {key: _together(lines, metric) for key, metric in _NUMBERS.items() if (lines := _of(kept, metric))}
    histograms = {
        key: _buckets(lines) for key, each in vllm.HISTOGRAMS.items() if (lines := _of(kept, each, "_bucket"))
    }
    started = next((line.value for line in kept.get(vllm.STARTED, ())), None)
    models = dict.fromkeys(line.labels.get("model_name", "") for lines in kept.values() for line in lines)
    return Told(values, histograms, started, tuple(each for each in models if each))


def _of(kept: Mapping[str, list[Line]], metric: Metric, suffix: str = "") -> list[Line]:
    return next((lines for name in metric.names if (lines := kept.get(name + suffix))), [])


def _together(lines: Iterable[Line], metric: Metric) -> float:
    numbers = [line.value for line in lines]
    return max(numbers) if metric.together == "max" else sum(numbers)


def _buckets(lines: Iterable[Line]) -> Buckets:
    found: dict[str, float] = {}
    for line in lines:
        bound = line.labels.get("le", "")
        found[bound] = found.get(bound, 0.0) + line.value
    return {bound: found[bound] for bound in sorted(found, key=_number)}


_WANTED = frozenset((
    *(name for metric in _NUMBERS.values() for name in metric.names),
    *(f"{name}_bucket" for metric in vllm.HISTOGRAMS.values() for name in metric.names),
    vllm.STARTED,
))  # fmt: skip


def wanted(text: str) -> Iterator[Line]:
    """Yield the samples that are wanted: a text has thousands of others."""
    for line in text.splitlines():
        name = line.partition(" ")[0].partition("{")[0]
        if name not in _WANTED:
            continue
        labels, _, rest = line[len(name) :].rpartition("}")
        value = _number((rest.split() or [""])[0])
        if not math.isnan(value):
            yield Line(name, {key: _ESCAPED.sub(_plain, said) for key, said in _LABEL.findall(labels)}, value)


def _plain(escaped: re.Match[str]) -> str:
    return "\n" if escaped[1] == "n" else escaped[1]


def _number(word: str) -> float:
    """Return a number of the format, NaN if it is none: Prometheus writes NaN for an unknown value."""
    try:
        return math.inf if word == _INFINITE else float(word)
    except ValueError:
        return math.nan
