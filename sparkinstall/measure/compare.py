"""Compare records of `bench`: what differs around them, and which differences of numbers are more than noise."""

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Literal

from msgspec import Struct

from sparkinstall.errors import BadUsage
from sparkinstall.measure.bench import Benchmark
from sparkinstall.measure.results import (
    LEAST_FOR_A_RATE,
    LevelResult,
    Request,
    ScenarioResult,
    between,
)

Verdict = Literal["noise", "better", "worse"]

SMALLEST = 0.02
"""Part by which two runs of the same server differ anyway: less is noise, whatever the spread within a run."""
# Three values lie apart from three others by chance once in ten times, so that such a difference must be larger.
_FEW, _SMALLEST_OF_FEW = 6, 0.10
_RESAMPLES = 1000
_INTERVAL = (0.005, 0.995)
# KiB.
_LARGE_BLOCK = 32 << 10
# Variables of the server that differ from start to start, or only say where something is.
_NOT_SETTINGS = ("INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID", "MEMORY_PRESSURE_WATCH", "PWD", "OLDPWD", "_")
_HOT = 10.0


class NotComparable(BadUsage):
    """The records are of different work, so that no difference of them means anything."""


class Differs(Struct, frozen=True):
    """Something that was not the same: "" where it was not there."""

    what: str
    base: str
    other: str


class Change(Struct, frozen=True):
    """A number of both records. `change`: relative to the base; `low` and `high`: what it would be with other requests
    of the same runs, in 99 of 100 cases. `verdict`: `noise` if 0 is between these, or if it is less than 2 % (of fewer
    than 6 requests: 10 %)."""

    name: str
    metric: str
    unit: str
    base: float
    other: float
    change: float
    low: float
    high: float
    verdict: Verdict


class Comparison(Struct, frozen=True):
    """A record against the base. `left_out`: results that only one has, or that are not to be used."""

    base: str
    file: str
    differs: Sequence[Differs]
    changes: Sequence[Change]
    left_out: Sequence[str]


_Result = ScenarioResult | LevelResult


def require_comparable(base: Benchmark, other: Benchmark, names: tuple[str, str], anyway: bool) -> None:
    """Check that two records are of the same work.

    Args:
        anyway: compare different models, or different work.

    Raises:
        NotComparable: they are not; it says what differs.
    """
    found = list(_work(base, other))
    if found and not anyway:
        said = "; ".join(f"{each.what}: {each.base or 'none'} / {each.other or 'none'}" for each in found)
        raise NotComparable(
            f"{names[1]} is not comparable with {names[0]}", cause=said, hint="--anyway compares them nevertheless"
        )
    if not _common(base, other):
        raise NotComparable(f"{names[0]} and {names[1]} have no result in common", hint="measure the same scenarios")


def _work(base: Benchmark, other: Benchmark) -> Iterator[Differs]:
    yield from _differ("model", _model(base), _model(other))
    yield from _differ("revision", base.served.revision or "", other.served.revision or "")
    yield from _differ("tool", base.tool, other.tool)
    yield from _differ("texts of the prompts", base.prompts, other.prompts)
    cached = tuple("sent before" if each.options.cached else "new" for each in (base, other))
    yield from _differ("prompts", *cached)
    if base.options.cached:
        yield from _differ("prefix cache", base.served.prefix_cache, other.served.prefix_cache)


def _model(of: Benchmark) -> str:
    """Return the model's own name: a folder may be another on each node."""
    return PurePosixPath(of.served.root).name or of.served.model


def _differ(what: str, base: object, other: object) -> Iterator[Differs]:
    if base != other:
        yield Differs(what, _text(base), _text(other))


def _text(value: object) -> str:
    return "" if value is None else str(value)


def compare(base: Benchmark, other: Benchmark, names: tuple[str, str]) -> Comparison:
    """Compare a record with the base; they must be comparable."""
    changes, left = list[Change](), list[str]()
    pairs = _common(base, other)
    for one, two in pairs:
        wrong = [name for name, each in zip(names, (one, two), strict=True) if _is_wrong(each)]
        if wrong:
            left.append(f"{one.name}: not to be used in {' and '.join(wrong)}")
        else:
            changes += _changes(one, two)
    both = {one.name for one, _ in pairs}
    for name, each in zip(names, (base, other), strict=True):
        left += [f"{result.name}: only in {name}" for result in _results(each) if result.name not in both]
    return Comparison(names[0], names[1], tuple(circumstances(base, other)), tuple(changes), tuple(left))


def _results(of: Benchmark) -> Sequence[_Result]:
    return (*of.scenarios, *of.levels)


def _common(base: Benchmark, other: Benchmark) -> list[tuple[_Result, _Result]]:
    """Return the results of the same work in both."""
    known = {(each.name, each.prompt_tokens, each.tokens): each for each in _results(other)}
    found = ((each, known.get((each.name, each.prompt_tokens, each.tokens))) for each in _results(base))
    return [(one, two) for one, two in found if two is not None]


def _is_wrong(of: _Result) -> bool:
    return not of.raw or any(note.weight == "error" for note in of.notes)


# --- numbers


_Statistic = Callable[[Sequence[float], Iterable[Sequence[int]]], list[float]]
"""Of values in ascending order: what it is for each of these draws, which have the places drawn, in order."""


def _changes(base: _Result, other: _Result) -> Iterator[Change]:
    for metric, value in (("TTFT", _ttft), ("TPOT", _tpot), ("E2E", _total)):
        values = [each for each in map(value, base.raw) if each is not None]
        others = [each for each in map(value, other.raw) if each is not None]
        if not values or not others or (value is _tpot and base.tokens < LEAST_FOR_A_RATE):
            continue
        yield _change(base.name, f"{metric} p50", "ms", values, others, _percentile(50))
        if isinstance(base, LevelResult):
            yield _change(base.name, f"{metric} p95", "ms", values, others, _percentile(95))
    if isinstance(base, LevelResult) and isinstance(other, LevelResult):
        yield from _throughput(base, other)


def _throughput(base: LevelResult, other: LevelResult) -> Iterator[Change]:
    """Yield the change of the tokens a second. With a fixed number at once it is the inverse of the mean time of a
    request, which is where its spread is from."""
    if not base.tokens_per_second or not other.tokens_per_second:
        return
    times = _change(base.name, "", "", [each.total for each in base.raw], [each.total for each in other.raw], _mean)
    change = other.tokens_per_second / base.tokens_per_second - 1
    low, high = 1 / (1 + times.high) - 1, 1 / (1 + times.low) - 1
    count = min(len(base.raw), len(other.raw))
    verdict = _verdict(change, (min(low, change), max(high, change)), count, higher_is_better=True)
    yield Change(
        base.name, "throughput", "tok/s", base.tokens_per_second, other.tokens_per_second,
        round(change, 4), round(min(low, change), 4), round(max(high, change), 4), verdict,
    )  # fmt: skip


def _ttft(of: Request) -> float | None:
    return of.ttft


def _tpot(of: Request) -> float | None:
    return of.per_token


def _total(of: Request) -> float | None:
    return of.total


def _percentile(percentile: int) -> _Statistic:
    def statistic(ordered: Sequence[float], draws: Iterable[Sequence[int]]) -> list[float]:
        low, high, part = between(len(ordered), percentile)
        return [(one := ordered[each[low]]) + (ordered[each[high]] - one) * part for each in draws]

    return statistic


def _mean(ordered: Sequence[float], draws: Iterable[Sequence[int]]) -> list[float]:
    return [sum(map(ordered.__getitem__, each)) / len(ordered) for each in draws]


@lru_cache(maxsize=8)
def _draws(count: int, side: int) -> Sequence[Sequence[int]]:
    """Return what is drawn of `count` values, as often as many, with repetition. Each side has draws of its own, but
    the same each time, so that a comparison can be repeated."""
    drawn = random.Random(side)
    return [array("L", sorted(drawn.choices(range(count), k=count))) for _ in range(_RESAMPLES)]


def _change(
    name: str, metric: str, unit: str, base: Sequence[float], other: Sequence[float], statistic: _Statistic
) -> Change:
    """Return a change, with the interval that other requests of the same runs would give (bootstrap)."""
    sides = [sorted(base), sorted(other)]
    ((before,), (after,)) = (statistic(each, [range(len(each))]) for each in sides)
    drawn = (statistic(each, _draws(len(each), side)) for side, each in enumerate(sides))
    found = sorted(map(_relative, *drawn))
    low, high = (found[int(part * (len(found) - 1))] for part in _INTERVAL)
    change = _relative(before, after)
    verdict = _verdict(change, (low, high), min(len(base), len(other)), higher_is_better=False)
    return Change(
        name, metric, unit, round(before, 3), round(after, 3), round(change, 4), round(low, 4), round(high, 4), verdict
    )


def _relative(before: float, after: float) -> float:
    return after / before - 1 if before else 0.0


def _verdict(change: float, interval: tuple[float, float], count: int, *, higher_is_better: bool) -> Verdict:
    smallest = SMALLEST if count >= _FEW else _SMALLEST_OF_FEW
    if interval[0] <= 0 <= interval[1] or abs(change) < smallest:
        return "noise"
    return "better" if (change > 0) == higher_is_better else "worse"


# --- circumstances


def circumstances(base: Benchmark, other: Benchmark) -> Iterator[Differs]:
    """Yield what was not the same around two measurements."""
    yield from _work(base, other)
    one, two = base.served, other.served
    yield from _differ("vLLM", one.vllm, two.vllm)
    yield from _differ("served context", one.context, two.context)
    if not base.options.cached:
        yield from _differ("prefix cache", one.prefix_cache, two.prefix_cache)
    yield from _differ("recipe", one.recipe, two.recipe)
    yield from _differ("speculative decoding", one.speculative, two.speculative)
    yield from _of_names("package", one.versions, two.versions)
    if one.process and two.process:
        yield from _of_words(one.process.argv, two.process.argv)
    # The engine has written its title over some of its own.
    if (first := one.process) and (second := two.process):
        yield from _of_names("variable", _settings(first.env), _settings(second.env))
    yield from _of_hosts(base, other)
    yield from _differ("sparkinstall", base.sparkinstall, other.sparkinstall)


def _settings(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in _NOT_SETTINGS}


def _of_names(kind: str, base: Mapping[str, str], other: Mapping[str, str]) -> Iterator[Differs]:
    for name in sorted({*base, *other}):
        yield from _differ(f"{kind} {name}", base.get(name), other.get(name))


def _of_words(base: Sequence[str], other: Sequence[str]) -> Iterator[Differs]:
    """Yield the words of the command lines that only one has."""
    only, also = ([each for each in one if each not in two] for one, two in ((base, other), (other, base)))
    if only or also:
        yield Differs("command line", " ".join(only), " ".join(also))


def _of_hosts(base: Benchmark, other: Benchmark) -> Iterator[Differs]:
    one, two = base.host, other.host
    if one is None or two is None:
        yield from _differ("machine of the server", _known(one), _known(two))
        return
    for what in ("product", "system", "kernel", "kho", "firmware", "driver", "gpu", "cores"):
        yield from _differ(what, getattr(one, what), getattr(two, what))
    # In GiB: the kernel itself takes a little more or less at each boot.
    yield from _differ("memory", f"{one.memory >> 20} GiB", f"{two.memory >> 20} GiB")
    if base.before and other.before:
        yield from _of_states(base, other)


def _known(host: object) -> str:
    return "another one, unknown" if host is None else "recorded"


def _of_states(base: Benchmark, other: Benchmark) -> Iterator[Differs]:
    """Yield what can slow a machine down: how full and how fragmented its memory is, heat, clocks, other work."""
    one, two = base.before, other.before
    assert one and two, "both are there"
    for name in ("clocks.max.sm", "clocks.mem"):
        yield from _differ(name, one.gpu.get(name, ""), two.gpu.get(name, ""))
    large = [
        any(size >= _LARGE_BLOCK and count for size, count in each.memory.free_blocks.items()) for each in (one, two)
    ]
    words = ["some" if each else "none" for each in large]
    yield from _differ("free blocks of 32 MiB and more", *words)
    hottest = [max((*each.temperatures.values(), *_gpu_degrees(each.gpu)), default=0.0) for each in (one, two)]
    if abs(hottest[0] - hottest[1]) > _HOT:
        yield Differs("hottest sensor at the begin", *(f"{each:.0f} °C" for each in hottest))
    busy = [", ".join(sorted({each.name for each in found.busy})) for found in (base, other)]
    yield from _differ("other busy processes", *busy)


def _gpu_degrees(of: Mapping[str, str]) -> Iterator[float]:
    text = of.get("temperature.gpu", "")
    if text.isdigit():
        yield float(text)
