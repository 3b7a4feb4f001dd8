"""What a server's /metrics says, in Prometheus' text format: the numbers that `facts/vllm.py` names, and no others."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct, field
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from sparkinstall.facts import vllm
from sparkinstall.facts.vllm import Metric

Buckets = Mapping[str, float]
"""How many observations are not above a bound, by the bound in seconds as it is written: `0.5`, ..., `+Inf`."""

_NAME = re.compile(r"[\w:]+")
_NUMBERS = {**vllm.GAUGES, **vllm.COUNTERS, **vllm.OF_SPECULATION}


class Told(Struct, frozen=True):
    """What a server tells of itself, by our own names (`vllm.GAUGES` and the others); what is not there, it lacks.

    `started`: when it was started, in seconds of the epoch; None: unknown. `models`: the names that it serves.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Buckets] = field(default_factory=dict)
    started: float | None = None
    models: tuple[str, ...] = ()


def told(text: str) -> Told:
    """Return what a text of /metrics tells; values of several engines are one. Lines that make no sense are left."""
    kept: dict[str, list[Sample]] = {}
    for line in wanted(text):
        kept.setdefault(line.name, []).append(line)
    values = {key: _together(lines, metric) for key, metric in _NUMBERS.items() if (lines := _of(kept, metric))}
    histograms = {
        key: _buckets(lines) for key, each in vllm.HISTOGRAMS.items() if (lines := _of(kept, each, "_bucket"))
    }
    started = next((line.value for line in kept.get(vllm.STARTED, ())), None)
    models = dict.fromkeys(line.labels.get("model_name", "") for lines in kept.values() for line in lines)
    return Told(values, histograms, started, tuple(each for each in models if each))


def _of(kept: Mapping[str, list[Sample]], metric: Metric, suffix: str = "") -> list[Sample]:
    return next((lines for name in metric.names if (lines := kept.get(name + suffix))), [])


def _together(lines: Iterable[Sample], metric: Metric) -> float:
    numbers = [line.value for line in lines]
    return max(numbers) if metric.together == "max" else sum(numbers)


def _buckets(lines: Iterable[Sample]) -> Buckets:
    found: dict[str, float] = {}
    for line in lines:
        bound = line.labels["le"]
        found[bound] = found.get(bound, 0.0) + line.value
    return {bound: found[bound] for bound in sorted(found, key=float)}


_WANTED = frozenset((
    *(name for metric in _NUMBERS.values() for name in metric.names),
    *(f"{name}_bucket" for metric in vllm.HISTOGRAMS.values() for name in metric.names),
    vllm.STARTED,
))  # fmt: skip


def wanted(text: str) -> Iterator[Sample]:
    """Yield the samples that are wanted and have a number. A text has thousands of others, which are not parsed."""
    for line in text.split("\n"):
        name = _NAME.match(line)
        if name and name[0] in _WANTED and (sample := _parsed(line)):
            yield sample


def _parsed(line: str) -> Sample | None:
    """Return the sample of a line, None if it is none, its value is no number (NaN, Inf) or its bucket has no bound.

    A line by itself: of a whole text the library yields nothing after one that makes no sense.
    """
    try:
        (family,) = text_string_to_metric_families(line)
        (sample,) = family.samples
        value = float(sample.value)
        bound = float(sample.labels["le"]) if sample.name.endswith("_bucket") else 0.0
    except (ValueError, LookupError, OverflowError):
        return None
    return sample._replace(value=value) if math.isfinite(value) and not math.isnan(bound) else None
