"""Measure the served model with `vllm bench serve`, and keep everything that made the numbers."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from sparkinstall import __version__, given, payloads
from sparkinstall.core.ask import LOOPBACK, Conversation, NoAnswer, Question, Server
from sparkinstall.core.session import Session
from sparkinstall.errors import BadUsage, Problem
from sparkinstall.facts import vllm
from sparkinstall.facts.env_file import started_with
from sparkinstall.measure import circumstances
from sparkinstall.measure.circumstances import Busy, Host, Interfaces, Served, State
from sparkinstall.measure.power import Readings, reading
from sparkinstall.measure.results import Context, LevelResult, Raw, ScenarioResult, level_result, scenario_result
from sparkinstall.measure.rounds import PERCENTILES, BenchOptions, Job, LeftOut, Round, planned
from sparkinstall.node import site_packages
from sparkinstall.payloads.bench_marks import MARK, MORE
from sparkinstall.payloads.bench_prompts import VERSION as PROMPTS
from sparkinstall.system import Reader, failure_of
from sparkinstall.system.local import LocalReader

FORMAT = 1
"""Of the record. A reader of another one refuses it."""
TOOL = "vllm bench serve"
_PAYLOAD = "vllm_bench"
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
_LARGEST_RECORD = 64 << 20
# Milliseconds of a request (a month), and tokens a second.
_HIGHEST = 2.7e9


class BenchFailed(Problem):
    """The measurement has ended before it was complete."""

    code = "bench"


class Benchmark(Struct, frozen=True, kw_only=True):
    """The record of one run.

    `complete`: every round was measured; else `why` says what has ended it, and the results before that are kept.
    `finished`: when, in UTC. `client`: the machine and vLLM that sent the requests. `host`, `before` and `after` are of
    the server's machine, null if that is another one.
    """

    format: int = FORMAT
    sparkinstall: str = __version__
    tool: str = TOOL
    prompts: int = PROMPTS
    complete: bool = False
    why: str = ""
    began: str
    finished: str = ""
    options: BenchOptions
    served: Served
    client: str = ""
    host: Host | None = None
    before: State | None = None
    after: State | None = None
    busy: Sequence[Busy] = ()
    left_out: Sequence[LeftOut] = ()
    scenarios: Sequence[ScenarioResult] = ()
    levels: Sequence[LevelResult] = ()

    @property
    def wrong(self) -> list[str]:
        """Which results are not to be used, and why."""
        results = (*self.scenarios, *self.levels)
        return [f"{each.name}: {note.text}" for each in results for note in each.notes if note.weight == "error"]


def read_record(path: Path) -> Benchmark:
    """Read a record.

    Raises:
        BadUsage: it is none, or one of another format.
    """
    try:
        content = given.read(path, _LARGEST_RECORD)
    except OSError as error:
        why = error.strerror or str(error)
        raise BadUsage(f"{path} cannot be read: {why}", hint=_NAME_A_RECORD) from error
    try:
        found = msgspec.json.decode(content, type=_Format)
        if found.format == FORMAT:
            return _sound(msgspec.json.decode(content, type=Benchmark), path)
    except msgspec.DecodeError as error:
        raise BadUsage(f"{path} is no record of `bench`", cause=str(error), hint=_NAME_A_RECORD) from error
    raise BadUsage(
        f"{path} has format {found.format}, and this sparkinstall knows {FORMAT}",
        hint="measure again, or use the sparkinstall that wrote it",
    )


def _sound(found: Benchmark, path: Path) -> Benchmark:
    """Return a record whose times can be divided and drawn.

    Raises:
        BadUsage: it has others.
    """
    for result in (*found.scenarios, *found.levels):
        times, rates = [time for each in result.raw for time in (each.ttft, each.total)], list[float]()
        if isinstance(result, ScenarioResult):
            times += (*result.ttft, *result.total)
            rates += (*(result.prefill or ()), *(result.decode or ()))
        elif isinstance(result, LevelResult):
            found_at = [each for each in (result.ttft, result.itl, result.per_token, result.total) if each]
            rates += (result.tokens_per_second, *(each.at(of) for each in found_at for of in PERCENTILES))
        if not all(0 < each < _HIGHEST for each in times) or not all(0 <= each < _HIGHEST for each in rates):
            raise BadUsage(f"{path} is damaged: {result.name} has a time or a rate that cannot be", hint=_NAME_A_RECORD)
    return found


class _Format(Struct):
    format: int


class Progress(Struct, frozen=True):
    """A round has begun: its name, its place, and how many there are."""

    name: str
    place: int
    count: int


class _Event(Struct, frozen=True):
    """A line of the payload."""

    event: str
    round: str = ""
    result: Raw | None = None
    error: str = ""
    kind: str = ""
    late: bool = False


class Bench:
    """One run; after an error `found` has what was measured before."""

    def __init__(self, session: Session, server: Server, options: BenchOptions, model: str = "") -> None:
        self._session, self._server, self._options = session, server, options
        self._asking = Conversation(session, server, Question("", model=model))
        parts = urlsplit(server.url)
        self._here = parts.hostname in LOOPBACK
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        # A rehearsal is a folder, but what answers on the loopback is this machine.
        self._on: Reader | None = LocalReader() if self._here else None
        self._scenarios, self._levels = list[ScenarioResult](), list[LevelResult]()
        self._failed: _Event | None = None
        self._base: Benchmark | None = None

    @property
    def found(self) -> Benchmark | None:
        """What was measured so far; None before the first request."""
        if self._base is None:
            return None
        with suppress(Problem, OSError):
            self._finish()
        return msgspec.structs.replace(self._base, scenarios=tuple(self._scenarios), levels=tuple(self._levels))

    def run(self, tell: Callable[[Progress], None]) -> Benchmark:
        """Measure everything.

        Raises:
            NoAnswer: nothing answers, or the server refuses.
            BadUsage: there is no `vllm bench serve` here, or no scenario fits.
            BenchFailed: it has ended in the middle.
        """
        try:
            said = self._interfaces()
        except NoAnswer as problem:
            problem.hint = _again(problem.hint)
            raise
        rounds, left = planned(self._options, said.context)
        if not rounds:
            raise BadUsage(f"nothing fits into the served context of {said.context} tokens", hint=_SHORTER)
        command = self._command()
        on, served = self._on, circumstances.served(self._session, self._on, self._server.url, self._port, said)
        self._base = Benchmark(
            began=_now(),
            options=self._options,
            served=served,
            client=self._client(),
            host=circumstances.host(on) if on else None,
            before=circumstances.state(on) if on else None,
            left_out=tuple(left),
        )
        self._ticks = circumstances.ticks(on, time.monotonic()) if on else None
        with reading(on) as readings:
            self._send(command, rounds, readings, tell)
        self._require_whole()
        self._base = msgspec.structs.replace(self._base, complete=True)
        found = self.found
        assert found is not None, "it was set above"
        return found

    # --- before

    def _interfaces(self) -> Interfaces:
        model, asking = self._asking.served(), self._asking
        listed = _decoded(asking.content("/v1/models"), _Models)
        own = next((each for each in listed.data if each.id == model), None)
        if own is None:
            raise NoAnswer(f"the server has no model {model!r}", hint="omit --model, or use a name that it serves")
        version = metrics = ""
        with suppress(NoAnswer):
            version = _decoded(asking.content("/version"), _Version).version
        with suppress(NoAnswer):
            metrics = asking.content("/metrics").decode(errors="replace")
        _decoded(asking.content("/tokenize", {"model": model, "prompt": "One"}), _Tokens)
        return Interfaces(model, own.root or "", own.max_model_len, version, metrics)

    def _command(self) -> tuple[str, ...]:
        """Return the words that start the Python whose vLLM sends the requests."""
        node, on = self._session.node, self._session.system
        if self._options.python:
            return (self._options.python,)
        site = site_packages(node, on)
        if not site or not on.entry(f"{site}/{vllm.BENCH_FILE}") or not on.entry(node.python):
            raise BadUsage(
                f"there is no `{TOOL}` in {on.real(node.venv)}",
                hint="`sparkinstall all` installs vLLM; or name a Python that has it: --python FILE",
            )
        python = on.real(node.python)
        return started_with(node, on, python) if on.entry(node.env_file) else (python,)

    def _client(self) -> str:
        return self._options.python or self._session.system.real(self._session.node.python)

    # --- the requests

    def _send(
        self, command: Sequence[str], rounds: Sequence[Round], readings: Readings, tell: Callable[[Progress], None]
    ) -> None:
        by_name = {each.name: each for each in rounds}
        job = msgspec.json.encode(self._job(rounds)).decode()

        held = list[str]()

        def take(line: str) -> None:
            if line.startswith((MARK, MORE)):
                held.append(line[len(MARK) :])
            if not line.startswith(MARK):
                return
            event = msgspec.json.decode("".join(held), type=_Event)
            held.clear()
            if event.event == "began":
                tell(Progress(event.round, list(by_name).index(event.round) + 1, len(rounds)))
            elif event.result is not None:
                self._take(event.result, by_name[event.round], readings)
            elif event.event == "failed":
                self._failed = event

        argv = (*command, "-P", "-c", payloads.source(_PAYLOAD), job)
        self._result = self._session.system.try_run(*argv, env=self._environment(), watch=take)

    def _job(self, rounds: Sequence[Round]) -> Job:
        options, slo = self._options, self._options.slo
        limits = {"ttft": slo.ttft, "tpot": slo.itl} if slo else {}
        return Job(
            url=self._server.url,
            model=self._asking.served(),
            direct=self._here,
            seed=options.seed,
            limit=options.limit,
            rounds=rounds,
            goodput={name: limit for name, limit in limits.items() if limit is not None},
        )

    def _environment(self) -> Mapping[str, str]:
        key = {"OPENAI_API_KEY": self._server.key} if self._server.key else {}
        # vLLM's client obeys the variables of a proxy, which has no way to this machine's own address.
        direct = {"no_proxy": "*", "NO_PROXY": "*"} if self._here else {}
        return {**_QUIET, **key, **direct}

    def _take(self, raw: Raw, of: Round, readings: Readings) -> None:
        if not raw.completed:
            self._failed = _Event("failed", of.name, error=next(iter(raw.errors), ""))
        if not of.measured:
            return
        assert self._base is not None, "it was set before the first request"
        served = self._base.served
        power = readings.between(raw.began, raw.ended)
        context = Context(self._options.slo, served.ceiling, served.prefix_cache, self._options.cached, power)
        if of.alone:
            self._scenarios.append(scenario_result(raw, of, context))
        else:
            self._levels.append(level_result(raw, of, context))

    # --- after

    def _finish(self) -> None:
        assert self._base is not None, "there is something to finish"
        if self._base.finished:
            return
        on, busy = self._on, list[Busy]()
        if on and self._ticks:
            ours = circumstances.family(on, self._base.served.process)
            busy = circumstances.busy(self._ticks, circumstances.ticks(on, time.monotonic()), ours)
        after = circumstances.state(on) if on else None
        self._base = msgspec.structs.replace(self._base, finished=_now(), after=after, busy=tuple(busy))

    def stopped(self, why: str) -> None:
        """Note what has ended the run."""
        if self._base is not None:
            self._base = msgspec.structs.replace(self._base, complete=False, why=why)

    def _require_whole(self) -> None:
        if self._failed:
            self._require_server()
            where = f"the round `{self._failed.round}`"
            if self._failed.late:
                raise BenchFailed(f"{where}: {self._failed.error}", hint=f"--limit SECONDS waits longer; {_LOOK}")
            raise BenchFailed(
                f"no request of {where} was answered; none was sent again", cause=self._failed.error, hint=_LOOK
            )
        if not self._result.ok:
            if missing := _MISSING.search(self._result.out):
                raise BadUsage(
                    f"{self._client()} cannot load `{TOOL}`: it has no module {missing[1]}",
                    hint="name the Python of an environment with vLLM: --python FILE",
                )
            raise failure_of(self._result, f"`{TOOL}` has ended with code {self._result.code}", hint=_LOOK)

    def _require_server(self) -> None:
        """Say it if the server is gone, which explains all the errors of requests."""
        try:
            self._asking.content("/v1/models")
        except NoAnswer as problem:
            failed = self._failed.round if self._failed else ""
            raise BenchFailed(
                f"the server has ended in the round `{failed}`: {problem.message}",
                cause=problem.cause,
                hint=_again(problem.hint),
            ) from problem


def _again(hint: str) -> str:
    """Return the hint of a question that got no answer for a benchmark."""
    return hint.replace("sparkinstall ask", "sparkinstall bench")


_MISSING = re.compile(r"^ModuleNotFoundError: No module named '([^']+)'", re.MULTILINE)
_NAME_A_RECORD = "name a file that `sparkinstall bench` has written"
_LOOK = "`sparkinstall diagnose --unit vllm` explains the log of the server"
_SHORTER = "name a shorter scenario, such as 58/2, or serve with a larger `--max-model-len`"


class _Model(Struct):
    id: str
    root: str | None = None
    max_model_len: int | None = None


class _Models(Struct):
    data: list[_Model]


class _Tokens(Struct):
    tokens: list[int]


class _Version(Struct):
    version: str = ""


_Said = TypeVar("_Said", _Models, _Version, _Tokens)


def _decoded(data: bytes, kind: type[_Said]) -> _Said:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise NoAnswer("the server does not answer like vLLM", cause=str(error)) from error


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
