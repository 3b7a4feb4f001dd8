"""Percentiles of latencies that a server counts in buckets: between two moments, and no more exact than the buckets."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from msgspec import Struct

from sparkinstall.measure.metrics_text import Buckets

PERCENTILES = (50, 95, 99)
Comparison = Literal["within", "over", "unknown"]


class Percentile(Struct, frozen=True):
    """A percentile in seconds: it is above `low` and not above `high`, the bounds of its bucket.

    `value` is interpolated between them. None: nothing tells where it lies; in the first bucket because a server's
    overhead is not spread evenly from 0, in the last because it has no end (`high` is None).
    """

    low: float
    high: float | None
    value: float | None = None

    def compared(self, limit: float) -> Comparison:
        """Compare with a limit in seconds: `unknown` if the limit lies within the bucket."""
        if self.high is not None and self.high <= limit:
            return "within"
        return "over" if self.low >= limit else "unknown"


class Latency(Struct, frozen=True):
    """Percentiles of `count` observations; None if there were none. `tail`: the 99th over the 50th, None: unknown."""

    count: int
    p50: Percentile | None = None
    p95: Percentile | None = None
    p99: Percentile | None = None
    tail: float | None = None


def grown(before: Buckets, after: Buckets) -> Mapping[float, float] | None:
    """Return the observations between two moments by their bound, not above it; None if a counter was reset."""
    more = {_bound(each): count - before.get(each, 0.0) for each, count in after.items()}
    return None if any(count < 0 for count in more.values()) else more


def latency(counts: Mapping[float, float]) -> Latency:
    """Return the percentiles of observations that are counted by bound, each bound with those below it."""
    total = max(counts.values(), default=0.0)
    if total < 1:
        return Latency(0)
    low, middle, high = (percentile(counts, each / 100) for each in (50, 95, 99))
    return Latency(round(total), low, middle, high, _ratio(high, low))


def percentile(counts: Mapping[float, float], share: float) -> Percentile:
    """Return the percentile `share` (0 to 1) of at least one observation."""
    bounds = [(0.0, 0.0), *sorted(counts.items())]
    rank = share * bounds[-1][1]
    for (low, below), (high, until) in pairwise(bounds):
        if until >= rank and until > below:
            if math.isinf(high):
                return Percentile(low, None)
            return Percentile(low, high, low + (high - low) * (rank - below) / (until - below) if low else None)
    raise AssertionError("the last bucket has all observations")


def _ratio(high: Percentile, low: Percentile) -> float | None:
    return high.value / low.value if high.value and low.value else None


def _bound(text: str) -> float:
    return math.inf if text == "+Inf" else float(text)
