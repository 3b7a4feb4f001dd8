"""Follow vLLM from its start to the first streamed answer, phase by phase."""

import re
import time
from collections.abc import Sequence

from msgspec import Struct

from sparkinstall.errors import Problem
from sparkinstall.events import Emit, LineRead, Progressed, StepEnded, StepStarted
from sparkinstall.facts.units import journal, show
from sparkinstall.layout import VLLM_UNIT
from sparkinstall.node import Node
from sparkinstall.probes.vllm_client import Api, Reply, whose
from sparkinstall.system import Reader

LIMIT, LIMIT_OF_SEVERAL = 1800, 3600
"""Seconds from the start to the first answer; the first start on several nodes has taken 40 minutes."""

# Seconds for the first answer, in which kernels may be compiled, and for one to a long prompt.
_FIRST_ANSWER = 900
_TOKENS = 16
_SEQUENCE, _LONG_PROMPT, _TOKENS_OF_A_WORD = 32768, 4096, 8
_PAUSE = 1.0
# Looks in which a server whose engine has died ends too: until then it answers with an error of its own.
_LOOKS_AT_AN_END = 10
# Every so many looks /health is asked too: a user may have turned the log off.
_LOOKS = 15
# Seconds since 1970, the host, the program, and what it said.
_LINE = re.compile(r"(\d+\.\d+) \S+ [^:]*: ?(.*)")
_SHARDS = re.compile(r"(\d{1,9})/(\d{1,9}) \[")
_SINCE = "ExecMainStartTimestampMonotonic"
_PROPERTIES = ("ActiveState", "SubState", "InvocationID", "NRestarts", "Result", "ExecMainStatus", _SINCE)
_LOOK = "`sparkinstall diagnose --unit vllm` explains its log"
_RUNNING = ("active", "activating", "reloading")

# What begins each phase, in vLLM's log from 0.18.1 to 0.33.0.
_BEGINS = (
    ("weights", "Starting to load model"),
    ("profiling", "Loading weights took"),
    ("compilation", "torch.compile is|Dynamo bytecode transform|Compiling a graph|Start compiling"),
    ("profiling", "torch.compile (?:takes|took)|Available KV cache memory"),
    ("CUDA graphs", "Capturing CUDA graph"),
    ("server", "init engine .*took"),
)
_MARKS = tuple((name, re.compile(pattern)) for name, pattern in _BEGINS)
_UP = "Application startup complete"


class Phase(Struct, frozen=True):
    """A part of a start, and its seconds."""

    name: str
    seconds: float


class Ready(Struct, frozen=True):
    """The first answer that arrived. `seconds`: from the beginning of the wait until then."""

    model: str
    seconds: float
    first_token: float
    tokens: int
    chat: bool
    phases: Sequence[Phase]


class NotReady(Problem):
    """vLLM has ended before it answered, or has not answered in time."""

    code = "not-ready"


class Following:
    """The log and the state of one start of the unit."""

    def __init__(self, node: Node, on: Reader, emit: Emit, limit: float) -> None:
        self._node, self._on, self._emit, self._limit = node, on, emit, limit
        self._began = time.monotonic()
        self._lines = 0
        self._phases: list[Phase] = []
        self._current, self._at = "", 0.0
        self._first = self._state()

    def until_ready(self, answered: str = "") -> Ready:
        """Wait until a streamed answer has arrived.

        Args:
            answered: the start that has answered before, if any: if it is still that one, nothing is followed.

        Raises:
            NotReady: vLLM has ended, or has not answered in time.
        """
        try:
            if answered != self._first["InvocationID"] or not answered:
                self._begin("start", self._started())
                self._until_up()
            self._begin("first answer", time.time())
            reply, chat = self._answered()
            self._begin("warm-up", time.time())
            ready = sum(phase.seconds for phase in self._phases)
            self._warm(reply.model, chat)
        except BaseException:
            self._end("failed", time.time())
            raise
        self._end("changed", time.time())
        return Ready(reply.model, round(ready, 1), round(reply.first, 2), reply.tokens, chat, tuple(self._phases))

    # --- the start

    def _started(self) -> float:
        """Return when systemd started the process, in seconds since 1970; 0: unknown."""
        since = int(self._first[_SINCE] or 0) / 1e6
        return time.time() - time.clock_gettime(time.CLOCK_MONOTONIC) + since if since else 0.0

    def _until_up(self) -> None:
        looks = 0
        while not self._read():
            self._require_alive()
            self._require_time("it is still loading")
            looks += 1
            if looks % _LOOKS == 0 and Api(self._node, self._on).healthy:
                return
            time.sleep(_PAUSE)

    def _read(self) -> bool:
        """Take the new lines of the log; return whether the API listens."""
        said = journal(self._on, f"_SYSTEMD_INVOCATION_ID={self._first['InvocationID']}", "-o", "short-unix")
        lines = said.split("\n")[:-1]
        up = False
        for line in lines[self._lines :]:
            if found := _LINE.match(line):
                self._take(float(found[1]), found[2])
            up = up or _UP in line
        self._lines = len(lines)
        return up

    def _take(self, at: float, line: str) -> None:
        self._at = self._at or at
        for name, mark in _MARKS:
            if mark.search(line) and self._current != name:
                self._begin(name, at)
        # A bar of progress is one line with all its states.
        if shards := _SHARDS.findall(line):
            done, total = map(int, shards[-1])
            self._emit(Progressed(self._current, done, total, "shards" if "shards" in line else "steps"))
        elif line.strip():
            self._emit(LineRead(self._current, line))

    def _begin(self, name: str, at: float) -> None:
        self._end("changed", at)
        self._current, self._at = name, at
        self._emit(StepStarted(name))

    def _end(self, outcome: str, at: float) -> None:
        if self._current:
            # A start that was begun earlier has its times in the log.
            seconds = round(max(0.0, at - (self._at or at)), 1)
            self._phases.append(Phase(self._current, seconds))
            self._emit(StepEnded(self._current, outcome, seconds))
        self._current = ""

    # --- its end

    def _state(self) -> dict[str, str]:
        return show(self._on, VLLM_UNIT, *_PROPERTIES)

    def _require_alive(self) -> None:
        now = self._state()
        same = all(now[each] == self._first[each] for each in ("InvocationID", "NRestarts"))
        if same and now["ActiveState"] in _RUNNING and now["SubState"] != "auto-restart":
            return
        how = f"{now['Result']}, status {now['ExecMainStatus']}" if now["Result"] != "success" else now["ActiveState"]
        raise NotReady(
            f"vLLM has ended before it answered, in the phase `{self._current}`",
            cause=f"systemd says of {VLLM_UNIT}: {how}",
            hint=_LOOK,
        )

    def _require_lasting(self, reply: Reply) -> None:
        """Check that vLLM lives, and lives on if this reply can be the end of its engine."""
        can_be_the_end = not reply.late and (reply.status == 0 or reply.status >= 500)
        for _ in range(_LOOKS_AT_AN_END if can_be_the_end else 1):
            self._require_alive()
            time.sleep(_PAUSE)

    def _require_time(self, what: str) -> None:
        if time.monotonic() - self._began > self._limit:
            raise NotReady(
                f"vLLM has not answered within {self._limit:g} s, in the phase `{self._current}`",
                cause=what,
                hint="`--limit SECONDS` waits longer; `sparkinstall diagnose --unit vllm` explains its log",
            )

    # --- answers

    def _answered(self) -> tuple[Reply, bool]:
        """Return the end of a real stream, and whether it was a chat."""
        api = Api(self._node, self._on)
        patience = int(max(1, min(_FIRST_ANSWER, self._limit - (time.monotonic() - self._began))))
        reply = api.ask("first", _TOKENS, patience=patience)
        if reply.done and reply.tokens:
            return reply, "text" not in reply.said
        self._require_lasting(reply)
        if reply.late:
            raise NotReady(
                f"vLLM listens, but has not answered within {patience} s",
                cause="a request got no answer, although the server may report healthy",
                hint=_LOOK,
            )
        why = reply.error or ("the stream had no token" if reply.done else "the stream was cut before its end")
        raise NotReady("vLLM listens, but no whole answer has arrived", cause=why, hint=_hint(reply, self._node))

    def _warm(self, model: str, chat: bool) -> None:
        """Send one request of the size that users send, which compiles what is compiled late."""
        how = {"words": _words_of(self._node), "chat": chat, "tools": _has_tools(self._node)}
        reply = Api(self._node, self._on).ask("warm", 8, model, _FIRST_ANSWER, **how)
        if reply.error:
            self._require_lasting(reply)
            raise NotReady("vLLM answers, but not to a long prompt", cause=reply.error, hint=_hint(reply, self._node))


def _hint(reply: Reply, node: Node) -> str:
    if reply.status in (401, 403):
        return "it asks for a key: put it into VLLM_API_KEY, without showing it"
    return whose(node.config.serving.port) if reply.stranger else _LOOK


def _words_of(node: Node) -> int:
    """Return how long a prompt is that a user may send; a word may be several tokens."""
    return min((node.config.serving.max_model_len or _SEQUENCE) // _TOKENS_OF_A_WORD, _LONG_PROMPT)


def _has_tools(node: Node) -> bool:
    return "--enable-auto-tool-choice" in node.config.serving.arguments
