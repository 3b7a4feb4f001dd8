"""What `bench` measures: scenarios, rounds of requests, and the job of the payload that sends them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from msgspec import Struct, field

from sparkinstall.errors import BadUsage
from sparkinstall.facts import vllm
from sparkinstall.schema import show

Text = Literal["prose", "code"]
Percentile = Literal[50, 90, 95, 99]
PERCENTILES: tuple[Percentile, ...] = (50, 90, 95, 99)
RUNS = 3
"""Measured requests of a scenario: their median is the result."""
CONCURRENCY = (1, 2, 4, 8)
_LEAST_REQUESTS, _REQUESTS_EACH = 16, 8
_MOST_TOKENS = 1 << 20
_SCENARIO = re.compile(r"([0-9]{1,7})/([0-9]{1,7})")
_SLO = re.compile(r"(ttft|itl)=([0-9]{1,7}(?:\.[0-9]{1,3})?)(ms|s)")


class Scenario(Struct, frozen=True):
    """One request at a time: tokens of its prompt, and tokens that are generated."""

    prompt: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.prompt}/{self.tokens}"

    @property
    def length(self) -> int:
        """Tokens of context that it takes."""
        return self.prompt + self.tokens


FIELD = (Scenario(58, 2), Scenario(1834, 32), Scenario(7234, 32), Scenario(1834, 108), Scenario(7234, 124))
"""The five scenarios with which others have measured Sparks."""
LOAD = Scenario(1834, 108)
"""What each request is in the rounds with several at once."""


def scenario_of(word: str) -> Scenario:
    """Parse a scenario, such as 1834/32.

    Raises:
        BadUsage: it is none.
    """
    found = _SCENARIO.fullmatch(word)
    scenario = Scenario(int(found[1]), int(found[2])) if found else None
    if not scenario or not scenario.prompt or not scenario.tokens or scenario.length > _MOST_TOKENS:
        raise BadUsage(
            f"{show(word)} is no scenario", hint="write tokens of the prompt and generated tokens, such as 1834/32"
        )
    return scenario


class Slo(Struct, frozen=True):
    """A service level objective: milliseconds that a percentile of TTFT and of the inter-token latency must not exceed.

    None: not limited.
    """

    ttft: float | None = None
    itl: float | None = None
    percentile: Percentile = 95


def slo_of(text: str, percentile: int) -> Slo:
    """Parse an objective, such as `ttft=500ms,itl=250ms`.

    Raises:
        BadUsage: it is none.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        found = _SLO.fullmatch(part.strip())
        if not found or found[1] in limits or not float(found[2]):
            raise BadUsage(f"--slo {show(text)} is no objective", hint="use one such as ttft=500ms,itl=250ms")
        limits[found[1]] = float(found[2]) * (1000 if found[3] == "s" else 1)
    for each in PERCENTILES:
        if each == percentile:
            return Slo(limits.get("ttft"), limits.get("itl"), each)
    known = ", ".join(map(str, PERCENTILES))
    raise BadUsage(f"--slo-percentile {percentile} is not measured", hint=f"use one of {known}")


class Round(Struct, frozen=True):
    """Requests that are sent with so many at once. `measured`: False for a warm-up.

    `first_prompt`: the number of the first of its prompts, which no other round has, unless they shall be cached.
    """

    name: str
    prompt_tokens: int
    tokens: int
    text: Text
    requests: int
    concurrency: int
    first_prompt: int
    measured: bool = True
    alone: bool = True


class BenchOptions(Struct, frozen=True):
    """What is measured. `concurrency`: requests at once; () for none. `requests`: of each such level, None: enough.

    `cached`: each prompt was sent before it is measured, so that its prefix is cached. `seed`: of the prompts.
    `limit`: seconds of a round. `python`: whose vLLM sends the requests, "" for that of the node.
    """

    scenarios: tuple[Scenario, ...] = FIELD
    texts: tuple[Text, ...] = ("prose",)
    concurrency: tuple[int, ...] = CONCURRENCY
    requests: int | None = None
    slo: Slo | None = None
    cached: bool = False
    seed: int = 0
    limit: int = 1800
    python: str = ""


class LeftOut(Struct, frozen=True):
    """What is not measured, and why."""

    name: str
    why: str


class Job(Struct, frozen=True):
    """What the payload gets. `direct`: no proxy; `metrics`: those that it reads before and after each round."""

    url: str
    model: str
    direct: bool
    seed: int
    limit: int
    rounds: Sequence[Round]
    goodput: Mapping[str, float]
    metrics: Sequence[str] = field(default_factory=lambda: list(vllm.BENCH_METRICS))
    generated: str = vllm.GENERATED_TOKENS


def planned(options: BenchOptions, context: int | None) -> tuple[list[Round], list[LeftOut]]:
    """Return the rounds in order, each after a warm-up of its own, and what does not fit into the served context."""
    fits = [each for each in options.scenarios if context is None or each.length <= context]
    left = [LeftOut(each.name, _too_long(each, context)) for each in options.scenarios if each not in fits]
    # Several at once: what is usual, else the longest.
    load = LOAD if LOAD in fits else max(fits, key=lambda each: each.length, default=None)
    if load is None and options.concurrency:
        left += [LeftOut("several at once", f"no scenario fits into the served context of {context} tokens")]
    levels = options.concurrency if load else ()
    numbers, rounds = _Numbers(options), list[Round]()
    for text in options.texts:
        for each in fits:
            warm, number = numbers.take(1, RUNS)
            rounds += _pair(each.name, each, text, (1 if not options.cached else RUNS, RUNS), 1, (warm, number))
        for level in levels:
            count = options.requests or max(_LEAST_REQUESTS, _REQUESTS_EACH * level)
            warm, number = numbers.take(level, count)
            sizes = (count if options.cached else level, count)
            rounds += _pair(f"{level} at once", load or LOAD, text, sizes, level, (warm, number), alone=False)
    return rounds, left


def _too_long(scenario: Scenario, context: int | None) -> str:
    return f"it takes {scenario.length} tokens, and {context} are served: `--max-model-len` of the server"


class _Numbers:
    """Numbers for prompts: each is used once, but for a warm-up that shall fill the cache."""

    def __init__(self, options: BenchOptions) -> None:
        self._cached, self._next = options.cached, 0

    def take(self, warm: int, measured: int) -> tuple[int, int]:
        first = self._next
        begin = first if self._cached else first + warm
        self._next = begin + measured
        return first, begin


def _pair(
    name: str,
    scenario: Scenario,
    text: Text,
    sizes: tuple[int, int],
    level: int,
    numbers: tuple[int, int],
    alone: bool = True,
) -> Iterator[Round]:
    """Yield the warm-up and the measured round."""
    for size, first, measured in zip(sizes, numbers, (False, True), strict=True):
        whole = f"{name} {text}" if measured else f"{name} {text}, warm-up"
        yield Round(whole, scenario.prompt, scenario.tokens, text, size, level, first, measured, alone)
