"""From what `vllm bench serve` saved of each request to the numbers that are shown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Literal

from msgspec import Struct, field

from sparkinstall.facts import vllm
from sparkinstall.measure.rounds import PERCENTILES, Round, Slo, Text

Weight = Literal["error", "warning", "note"]

LEAST_FOR_A_RATE = 8
"""Fewer tokens than these, and the time between them is no rate: of two tokens it is a single gap."""
# Part of the prompts' tokens that came from the prefix cache, from which on TTFT tells nothing of the prefill.
_CACHED = 0.05
# Part of the depth that whole blocks of the cache must reach.
_MOSTLY = 0.8
_COLD = 2.0
# Tokens for others that do not matter: the proof of life asks for one now and then.
_FEW, _SHARE = 4, 0.01
_MERGED = 0.02
# Milliseconds: chunks that are nearer were waiting, because the program that reads them did not run.
_TOGETHER, _MANY = 0.05, 0.1


class Raw(Struct, frozen=True):
    """What the payload tells of a round, as vLLM saved it: one entry for each request, in seconds. `began`, `ended`:
    of the clock CLOCK_MONOTONIC. `before`, `after`: the server's counters; {} if it does not tell them."""

    duration: float
    completed: int
    failed: int
    input_lens: Sequence[int]
    output_lens: Sequence[int]
    ttfts: Sequence[float]
    itls: Sequence[Sequence[float]]
    errors: Sequence[str]
    began: float
    ended: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    start_times: Sequence[float] = ()
    latencies: Sequence[float] = ()
    request_goodput: float | None = None
    output_throughput: float = 0.0
    total_token_throughput: float = 0.0


class Request(Struct, frozen=True):
    """One whole answer. Milliseconds; `tokens` by the server's `usage`. `gaps`: between the chunks that arrived."""

    prompt_tokens: int
    tokens: int
    ttft: float
    total: float
    gaps: Sequence[float]

    @property
    def per_token(self) -> float | None:
        """Milliseconds of each token after the first."""
        return (self.total - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None


class Note(Struct, frozen=True):
    """What a reader of a number must know. `error`: the number is not to be used."""

    weight: Weight
    text: str


class Power(Struct, frozen=True):
    """What the GPU took by its own driver, not at the wall: mean of `samples`. None: it cannot be read."""

    watts: float | None
    samples: int
    why: str = ""


class Cache(Struct, frozen=True):
    """Tokens of prompts that were looked up in the prefix cache, and found there."""

    queries: int
    hits: int


class Speculation(Struct, frozen=True):
    """Speculative decoding. `acceptance`: part of the drafted tokens; `length`: tokens of a step."""

    drafts: int
    drafted: int
    accepted: int
    acceptance: float | None
    length: float | None


class Percentiles(Struct, frozen=True):
    """Milliseconds, of `count` values."""

    p50: float
    p90: float
    p95: float
    p99: float
    count: int

    def at(self, percentile: int) -> float:
        return float(getattr(self, f"p{percentile}"))


class Counted(Struct, frozen=True):
    """What each measured round has. `others`: generated tokens that were not for us; None: the server does not tell.

    `depth`: tokens at the beginning of each prompt that the prefix cache should have.
    """

    name: str
    text: Text
    prompt_tokens: int
    tokens: int
    requests: int
    completed: int
    failed: int
    errors: Sequence[str]
    notes: Sequence[Note]
    power: Power
    cache: Cache | None
    speculation: Speculation | None
    others: int | None
    raw: Sequence[Request]
    depth: int = 0


class ScenarioResult(Counted, frozen=True):
    """One request at a time. The values of the single runs; the result is their median. None: it is no rate here."""

    ttft: Sequence[float] = ()
    total: Sequence[float] = ()
    prefill: Sequence[float] | None = None
    decode: Sequence[float] | None = None


class LevelResult(Counted, frozen=True):
    """Several at once. `good`: requests within the objective; `met`: whether the percentiles are; None: none is set.

    `per_watt`: generated tokens a second for each watt; `energy`: kWh for a million of them.
    """

    concurrency: int = 1
    seconds: float = 0.0
    ttft: Percentiles | None = None
    itl: Percentiles | None = None
    per_token: Percentiles | None = None
    total: Percentiles | None = None
    good: int | None = None
    met: bool | None = None
    why: str = ""
    tokens_per_second: float = 0.0
    all_tokens_per_second: float = 0.0
    per_watt: float | None = None
    energy: float | None = None


class Context(Struct, frozen=True):
    """What the numbers are judged with. `ceiling`: decoded tokens a second that the memory allows, None: unknown."""

    slo: Slo | None = None
    ceiling: float | None = None
    prefix_cache: bool | None = None
    cached: bool = False
    power: Power = field(default_factory=lambda: Power(None, 0))


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Return the percentiles, with linear interpolation between two values; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    p50, p90, p95, p99 = (round(_at(ordered, each), 3) for each in PERCENTILES)
    return Percentiles(p50, p90, p95, p99, len(ordered))


def _at(ordered: Sequence[float], percentile: int) -> float:
    low, high, part = between(len(ordered), percentile)
    return ordered[low] + (ordered[high] - ordered[low]) * part


def between(count: int, percentile: int) -> tuple[int, int, float]:
    """Return between which two of `count` values in ascending order a percentile is, and at which part of the way."""
    place = (count - 1) * percentile / 100
    low = int(place)
    return low, min(low + 1, count - 1), place - low


def requests_of(raw: Raw, of: Round) -> tuple[list[Request], list[str]]:
    """Return the whole answers, and why the others are none. Nothing is counted twice, and no chunk for a token."""
    whole, broken = list[Request](), list[str]()
    for at, error in enumerate(raw.errors):
        tokens = raw.output_lens[at]
        if error or not tokens:
            broken.append(error or "no answer has arrived, or none with the `usage` that counts its tokens")
        elif not raw.ttfts[at] > 0:
            broken.append("by the server's `usage` it has tokens, but none arrived")
        elif tokens != of.tokens:
            broken.append(f"by the server's `usage` it has {tokens} tokens of the {of.tokens} that were asked for")
        else:
            gaps = raw.itls[at]
            total = raw.latencies[at] if raw.latencies else raw.ttfts[at] + sum(gaps)
            whole.append(
                Request(raw.input_lens[at], tokens, _ms(raw.ttfts[at]), _ms(total), [_ms(each) for each in gaps])
            )
    return whole, broken


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def scenario_result(raw: Raw, of: Round, context: Context) -> ScenarioResult:
    """Return the result of one request at a time."""
    whole, broken = requests_of(raw, of)
    cache, speculation = _cache(raw), _speculation(raw)
    decoded = [_rate(each) for each in whole]
    decode = [each for each in decoded if each is not None] if of.tokens >= LEAST_FOR_A_RATE else []
    notes = [*_notes(raw, of, whole, broken, context), *_on_decode(decode, speculation, context)]
    return ScenarioResult(
        **_common(raw, of, whole, broken, notes, context),
        cache=cache,
        speculation=speculation,
        ttft=[each.ttft for each in whole],
        total=[each.total for each in whole],
        prefill=_prefill(whole, of, cache),
        decode=decode or None,
    )


def _prefill(whole: Sequence[Request], of: Round, cache: Cache | None) -> list[float] | None:
    """Return the tokens a second of the prompts that were computed; None if that is unknown."""
    if (of.depth and cache is None) or _beyond(of, cache) > _CACHED:
        return None
    from_cache = cache.hits / of.requests if of.depth and cache else 0.0
    return [round((each.prompt_tokens - from_cache) / each.ttft * 1000, 2) for each in whole]


def _beyond(of: Round, cache: Cache | None) -> float:
    """Return the part of the prompts' tokens that came from the prefix cache, without those that were to."""
    return cache.hits / cache.queries - of.depth / of.prompt_tokens if cache and cache.queries else 0.0


def level_result(raw: Raw, of: Round, context: Context) -> LevelResult:
    """Return the result of several at once."""
    whole, broken = requests_of(raw, of)
    made, read = sum(each.tokens for each in whole), sum(each.prompt_tokens for each in whole)
    ttft = percentiles([each.ttft for each in whole])
    itl = percentiles([gap for each in whole for gap in each.gaps])
    speed = made / raw.duration if raw.duration else 0.0
    met, why = _judged(context.slo, ttft, itl, len(broken))
    watts = context.power.watts
    return LevelResult(
        **_common(raw, of, whole, broken, _notes(raw, of, whole, broken, context), context),
        cache=_cache(raw),
        speculation=_speculation(raw),
        concurrency=of.concurrency,
        seconds=round(raw.duration, 3),
        ttft=ttft,
        itl=itl,
        per_token=percentiles([each.per_token for each in whole if each.per_token is not None]),
        total=percentiles([each.total for each in whole]),
        good=sum(_is_good(each, context.slo) for each in whole) if context.slo else None,
        met=met,
        why=why,
        tokens_per_second=round(speed, 2),
        all_tokens_per_second=round((made + read) / raw.duration, 2) if raw.duration else 0.0,
        per_watt=round(speed / watts, 4) if watts else None,
        energy=round(watts * raw.duration / 3.6e6 / (made / 1e6), 4) if watts and made else None,
    )


def _common(
    raw: Raw, of: Round, whole: Sequence[Request], broken: Sequence[str], notes: Iterable[Note], context: Context
) -> dict[str, Any]:
    return {
        "name": of.name,
        "text": of.text,
        "prompt_tokens": of.prompt_tokens,
        "depth": of.depth,
        "tokens": of.tokens,
        "requests": of.requests,
        "completed": len(whole),
        "failed": len(broken),
        "errors": sorted(set(broken)),
        "notes": tuple(notes),
        "power": context.power,
        "others": _others(raw),
        "raw": whole,
    }


def _rate(of: Request) -> float | None:
    """Return the tokens a second after the first; None if all arrived at once."""
    each = of.per_token
    return round(1000 / each, 2) if each and each > 0 else None


def _is_good(of: Request, slo: Slo | None) -> bool:
    slow_first = slo is not None and slo.ttft is not None and of.ttft > slo.ttft
    slow_rest = slo is not None and slo.itl is not None and (of.per_token or 0) > slo.itl
    return not slow_first and not slow_rest


def _judged(slo: Slo | None, ttft: Percentiles | None, itl: Percentiles | None, broken: int) -> tuple[bool | None, str]:
    """Compare two percentiles with the objective; return whether it is met, and what was compared."""
    if slo is None:
        return None, ""
    if ttft is None:
        return False, "no request was answered"
    said, met = list[str](), not broken
    for name, found, limit in (("TTFT", ttft, slo.ttft), ("ITL", itl, slo.itl)):
        if limit is not None and found is not None:
            value = found.at(slo.percentile)
            met = met and value <= limit
            said.append(f"p{slo.percentile} {name} {value:.0f} ms {'≤' if value <= limit else '>'} {limit:g} ms")
    return met, ", ".join(said) + (f", {broken} failed" if broken else "")


# --- what the server counted


def _grown(raw: Raw, name: str) -> float | None:
    return raw.after[name] - raw.before.get(name, 0.0) if name in raw.after else None


def _others(raw: Raw) -> int | None:
    grown = _grown(raw, vllm.GENERATED_TOKENS)
    return None if grown is None else int(grown) - sum(raw.output_lens)


def _cache(raw: Raw) -> Cache | None:
    queries, hits = (_grown(raw, name) for name in (vllm.PREFIX_CACHE_QUERIES, vllm.PREFIX_CACHE_HITS))
    return None if queries is None or hits is None else Cache(int(queries), int(hits))


def _speculation(raw: Raw) -> Speculation | None:
    drafts, drafted, accepted = (_grown(raw, name) for name in vllm.SPECULATION)
    if drafts is None or drafted is None or accepted is None:
        return None
    part = round(accepted / drafted, 4) if drafted else None
    length = round(1 + accepted / drafts, 3) if drafts else None
    return Speculation(int(drafts), int(drafted), int(accepted), part, length)


# --- what a reader must know


def _notes(raw: Raw, of: Round, whole: Sequence[Request], broken: Sequence[str], context: Context) -> Iterator[Note]:
    if broken:
        yield Note("error", f"{len(broken)} of {of.requests} requests failed, and none was sent again: {broken[0]}")
    if (grown := _grown(raw, vllm.GENERATED_TOKENS)) is not None and grown < 0:
        yield Note("error", "the server was started again meanwhile: its counters have begun again")
    elif (others := _others(raw)) is not None and others > 0 and not broken:
        weight: Weight = "error" if others > max(_FEW, _SHARE * sum(raw.output_lens)) else "note"
        yield Note(weight, f"the server has generated {others} tokens more meanwhile than these requests got")
    yield from _on_prompts(raw, of, whole, context)
    times = [each.ttft for each in whole]
    if of.alone and len(times) > 1 and times[0] > _COLD * median(times[1:]):
        yield Note("warning", f"the first request took {times[0] / median(times[1:]):.1f} times as long as the others")
    yield from _on_chunks(whole)
    yield from _on_stalls(whole)


def _on_prompts(raw: Raw, of: Round, whole: Sequence[Request], context: Context) -> Iterator[Note]:
    wrong = {each.prompt_tokens for each in whole} - {of.prompt_tokens}
    if wrong:
        yield Note("error", f"prompts had {', '.join(map(str, sorted(wrong)))} tokens instead of {of.prompt_tokens}")
    cache = _cache(raw)
    part = cache.hits / cache.queries if cache and cache.queries else 0.0
    if context.cached and part <= _CACHED:
        yield Note("warning", f"the prompts were sent before, but the prefix cache had none of them: {_why(context)}")
    elif of.depth and (cache is None or cache.hits < _MOSTLY * of.depth * of.requests):
        had = (
            "the server does not tell what"
            if cache is None
            else f"{cache.hits // of.requests} tokens a request are all that"
        )
        yield Note("warning", f"{had} the prefix cache had of the {of.depth} before the prompt: {_why(context)}")
    elif not context.cached and _beyond(of, cache) > _CACHED:
        yield Note(
            "error", f"{part:.0%} of the prompts' tokens came from the prefix cache, though none was sent before"
        )


def _why(context: Context) -> str:
    return "it is off" if context.prefix_cache is False else "the prompts are shorter than a block, or it is full"


def _on_chunks(whole: Sequence[Request]) -> Iterator[Note]:
    tokens, chunks = sum(each.tokens for each in whole), sum(len(each.gaps) + 1 for each in whole)
    if tokens and chunks < tokens * (1 - _MERGED):
        yield Note(
            "note",
            f"{tokens} tokens arrived in {chunks} chunks: ITL is the time between chunks, TPOT that of a token",
        )


def _on_stalls(whole: Sequence[Request]) -> Iterator[Note]:
    gaps = [gap for each in whole for gap in each.gaps]
    together = sum(gap < _TOGETHER for gap in gaps)
    if gaps and together > _MANY * len(gaps):
        yield Note(
            "warning",
            f"{together} of {len(gaps)} chunks arrived together with the one before: what reads them, or the server, "
            "stood still at times, so that TTFT is too long and decode too fast",
        )


def _on_decode(decode: Sequence[float], speculation: Speculation | None, context: Context) -> Iterator[Note]:
    if not decode or context.ceiling is None or speculation is not None:
        return
    if median(decode) > context.ceiling:
        yield Note(
            "error",
            f"{median(decode):.1f} decoded tokens a second are more than the {context.ceiling:.1f} that the memory's "
            "bandwidth allows without speculative decoding: something else was measured",
        )
