"""The readings of a node: what two samples of it say together, over a window of time."""

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import pairwise

from msgspec import Struct

from sparkinstall.facts import vllm
from sparkinstall.measure import histogram
from sparkinstall.measure.histogram import Latency
from sparkinstall.measure.samples import Machine, Sample

_COUNTERS = (*vllm.COUNTERS, *vllm.OF_SPECULATION)


class Usage(Struct, frozen=True):
    """A share from 0 to 1: now, and the average and the peak of the samples of the window."""

    now: float
    average: float
    peak: float


class Readings(Struct, frozen=True, kw_only=True):
    """One node over the last `seconds`, which are 0 until there is a second sample.

    A latency is None if the server lacks it, with a count of 0 if no request gave one. `rate_seconds`: what the tokens
    a second are taken over, less than the window. `prefill`: tokens of prompts that were computed, not those from the
    cache. `prefix_hits`: share of the tokens looked up in the prefix cache that were there; `acceptance`: share of the
    drafted tokens that the model took; both None if there were none. `speculates`: None if that is unknown.
    `waited`: how many waited at each sample. `note`: why the window has just begun.
    """

    node: str
    at: float
    seconds: float
    rate_seconds: float
    trouble: str | None = ""
    note: str = ""
    models: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    ttft: Latency | None = None
    itl: Latency | None = None
    e2e: Latency | None = None
    prefill: float | None = None
    decode: float | None = None
    running: float | None = None
    waiting: float | None = None
    waited: tuple[float, ...] = ()
    preemptions: float | None = None
    kv_cache: Usage | None = None
    prefix_hits: float | None = None
    speculates: bool | None = None
    acceptance: float | None = None
    still_seconds: float | None = None
    machine: Machine | None = None
    link_errors: Mapping[str, int] | None = None


class Window:
    """The samples of one node within the last `seconds`, of one life of its server."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._samples: deque[Sample] = deque()
        self._note = ""
        self._last: Sample | None = None
        self._links: deque[tuple[float, Mapping[str, int]]] = deque()
        self._moved_at: float | None = None

    def take(self, sample: Sample) -> Readings:
        """Add a sample, and return the readings that end with it."""
        self._last = sample
        self._count_links(sample)
        if sample.trouble == "":
            self._add(sample)
            return self._readings(sample)
        return Readings(
            node=sample.node, at=sample.at, seconds=0, rate_seconds=0, trouble=sample.trouble, note=self._note,
            machine=sample.machine, link_errors=self._link_errors(),
        )  # fmt: skip

    def _add(self, sample: Sample) -> None:
        before = self._samples[-1] if self._samples else None
        if before and (why := _why_again(before, sample)):
            self._samples.clear()
            self._note, self._moved_at, before = why, None, None
        self._samples.append(sample)
        # One sample before the window remains: the counters of its begin.
        while len(self._samples) > 2 and self._samples[1].at <= sample.at - self._seconds:
            self._samples.popleft()
        if len(self._samples) > 2 and sample.at - self._samples[0].at >= self._seconds:
            self._note = ""
        busy = any(sample.told.values.get(each, 0) for each in ("running", "waiting"))
        if before is None or not busy or _moved(before, sample) or self._moved_at is None:
            self._moved_at = sample.at

    def _count_links(self, sample: Sample) -> None:
        if sample.machine:
            self._links.append((sample.at, sample.machine.link_errors))
            while len(self._links) > 2 and self._links[1][0] <= sample.at - self._seconds:
                self._links.popleft()

    def _link_errors(self) -> Mapping[str, int] | None:
        if not self._links or not self._links[-1][1]:
            return None
        first, last = self._links[0][1], self._links[-1][1]
        more = {name: count - first.get(name, count) for name, count in last.items()}
        return {name: count for name, count in more.items() if count > 0}

    def _readings(self, sample: Sample) -> Readings:
        first = self._samples[0]
        recent = self._samples[-2] if len(self._samples) > 1 else first
        seconds, rate_seconds = sample.at - first.at, sample.at - recent.at
        values = sample.told.values
        more = {key: values[key] - first.told.values.get(key, 0.0) for key in _COUNTERS if key in values}
        lately = {key: values[key] - recent.told.values.get(key, 0.0) for key in _COUNTERS if key in values}
        latencies = dict(_latencies(first, sample))
        speculates = None if "generated_tokens" not in values else "drafted_tokens" in values
        return Readings(
            node=sample.node, at=sample.at, seconds=seconds, rate_seconds=rate_seconds, note=self._note,
            models=sample.told.models, lacking=tuple(_lacking(sample)),
            ttft=latencies.get("ttft"), itl=latencies.get("itl"), e2e=latencies.get("e2e"),
            prefill=_rate(_computed(lately), rate_seconds), decode=_rate(lately.get("generated_tokens"), rate_seconds),
            running=values.get("running"), waiting=values.get("waiting"), waited=tuple(self._of("waiting")),
            preemptions=more.get("preemptions"), kv_cache=self._usage(), speculates=speculates,
            prefix_hits=_share(more, "prefix_hits", "prefix_queries"),
            acceptance=_share(more, "accepted_tokens", "drafted_tokens"),
            still_seconds=sample.at - self._moved_at if self._moved_at is not None else None,
            machine=sample.machine, link_errors=self._link_errors(),
        )  # fmt: skip

    def _of(self, key: str) -> Iterator[float]:
        yield from (each.told.values[key] for each in self._samples if key in each.told.values)

    def _usage(self) -> Usage | None:
        shares = list(self._of("kv_cache"))
        return Usage(shares[-1], sum(shares) / len(shares), max(shares)) if shares else None


def _why_again(before: Sample, after: Sample) -> str:
    """Return why the window begins again with the sample `after`; "" if it does not."""
    starts = before.told.started, after.told.started
    # Of several processes each has its own start, and any of them may answer.
    fell = any(after.told.values.get(key, 0.0) < before.told.values.get(key, 0.0) for key in _COUNTERS)
    reset = any(
        histogram.grown(before.told.histograms.get(key, {}), each) is None
        for key, each in after.told.histograms.items()
    )
    if not (fell or reset):
        same_process = None in starts or starts[0] == starts[1]
        # A new process that has counted as much as the old one: nothing but its start tells.
        return "" if same_process else "the server was restarted"
    return "the server was restarted" if None not in starts and starts[0] != starts[1] else "its counters were reset"


def _moved(before: Sample, after: Sample) -> bool:
    keys = ("generated_tokens", "prompt_tokens", "preemptions", "kv_cache")
    return any(before.told.values.get(key) != after.told.values.get(key) for key in keys)


def _latencies(first: Sample, last: Sample) -> Iterator[tuple[str, Latency]]:
    for key in vllm.HISTOGRAMS:
        if key in last.told.histograms:
            counts = histogram.grown(first.told.histograms.get(key, {}), last.told.histograms[key])
            yield key, histogram.latency(counts or {})


def _lacking(sample: Sample) -> Iterator[str]:
    """Yield the newest names of the metrics that this release does not have."""
    for metrics, found in (
        (vllm.GAUGES, sample.told.values), (vllm.COUNTERS, sample.told.values),
        (vllm.HISTOGRAMS, sample.told.histograms),
    ):  # fmt: skip
        yield from (metric.names[0] for key, metric in metrics.items() if key not in found)


def _computed(more: Mapping[str, float]) -> float | None:
    """Return the tokens of prompts that were computed; without the number from the cache, all."""
    if "prompt_tokens" not in more:
        return None
    return max(0.0, more["prompt_tokens"] - more.get("cached_tokens", 0.0))


def _rate(count: float | None, seconds: float) -> float | None:
    return count / seconds if count is not None and seconds > 0 else None


def _share(more: Mapping[str, float], part: str, whole: str) -> float | None:
    return more[part] / more[whole] if more.get(whole) and part in more else None


def grew(values: tuple[float, ...]) -> bool:
    """Whether there are three or more, none of them is 0, and they mostly grew from the first to the last."""
    if len(values) < 3 or not all(values) or values[-1] <= values[0]:
        return False
    steps = [after - before for before, after in pairwise(values)]
    return sum(each > 0 for each in steps) > sum(each < 0 for each in steps)
