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
_SCENARIO = re.compile(r"([0-9]{1,7})/([0-9]{1,7})(?:@([0-9]{1,7}(?:,[0-9]{1,7})*))?")
_SLO = re.compile(r"(ttft|itl)=([0-9]{1,7}(?:\.[0-9]{1,3})?)(ms|s)")


class Scenario(Struct, frozen=True):
    """One request at a time: tokens of its prompt, and tokens that are generated.

    `depth`: tokens of a context before the prompt, which the prefix cache has: all requests of a round share it.
    """

    prompt: int
    tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        return f"{self.prompt}/{self.tokens}" + (f"@{self.depth}" if self.depth else "")

    @property
    def length(self) -> int:
        """Tokens of context that it takes."""
        return self.depth + self.prompt + self.tokens


FIELD = (Scenario(58, 2), Scenario(1834, 32), Scenario(7234, 32), Scenario(1834, 108), Scenario(7234, 124))
"""The five scenarios with which others have measured Sparks."""
LOAD = Scenario(1834, 108)
"""What each request is in the rounds with several at once."""


def scenarios_of(word: str) -> list[Scenario]:
    """Parse a scenario, such as 1834/32, or one at several depths: 2048/32@0,8192.

    Raises:
        BadUsage: it is none.
    """
    found = _SCENARIO.fullmatch(word)
    depths = (found[3] or "0").split(",") if found else []
    scenarios = [Scenario(int(found[1]), int(found[2]), int(depth)) for depth in depths] if found else []
    if not scenarios or not all(each.prompt and each.tokens and each.length <= _MOST_TOKENS for each in scenarios):
        raise BadUsage(
            f"{show(word)} is no scenario",
            hint="write tokens of the prompt and generated tokens, such as 1834/32; "
            "`sparkinstall bench --help` lists what else there is",
        )
    return scenarios


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
    `depth`: how many of the prompt's tokens are the first ones of the prompt with the number `shared`.
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
    depth: int = 0
    shared: int = 0


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
            shared = numbers.one() if each.depth else 0
            warm, number = numbers.take(1, RUNS)
            sizes = (1 if not options.cached else RUNS, RUNS)
            rounds += _pair(each.name, each, text, sizes, 1, (warm, number, shared))
        for level in levels:
            count, each = options.requests or max(_LEAST_REQUESTS, _REQUESTS_EACH * level), load or LOAD
            shared = numbers.one() if each.depth else 0
            warm, number = numbers.take(level, count)
            sizes = (count if options.cached else level, count)
            rounds += _pair(f"{level} at once", each, text, sizes, level, (warm, number, shared), alone=False)
    return rounds, left


def _too_long(scenario: Scenario, context: int | None) -> str:
    return f"it takes {scenario.length} tokens, and {context} are served: `--max-model-len` of the server"


class _Numbers:
    """Numbers for prompts: each is used once, but for a warm-up that shall fill the cache."""

    def __init__(self, options: BenchOptions) -> None:
        self._cached, self._next = options.cached, 0

    def one(self) -> int:
        """Return the number of a prompt whose beginning others share."""
        self._next += 1
        return self._next - 1

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
    numbers: tuple[int, int, int],
    alone: bool = True,
) -> Iterator[Round]:
    """Yield the warm-up and the measured round."""
    *firsts, shared = numbers
    for size, first, measured in zip(sizes, firsts, (False, True), strict=True):
        whole, length = f"{name} {text}" if measured else f"{name} {text}, warm-up", scenario.depth + scenario.prompt
        yield Round(
            whole, length, scenario.tokens, text, size, level, first, measured, alone, scenario.depth, shared
        )  # fmt: skip
