"""Watch whether vLLM generates tokens; if it does not, save evidence and restart it. A service of its own, as root.

A server is wedged when it runs and generates nothing: requests run while every counter stands still and a probe
request of one token gets none, or it is idle and a probe request gets none. /health proves nothing: it answers 200 as
long as there is a process. A server that starts is not wedged; its start has a limit of its own.
"""

import argparse
import datetime
import functools
import http.client
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

HOUR, DAY = 3600.0, 86400.0
# Seconds for /metrics, which a working server sends within a few milliseconds.
SCRAPE_SECONDS = 10.0
# Seconds for one program that collects evidence; one that hangs in the kernel cannot even be killed.
COLLECT_SECONDS = 15.0
# Seconds for all stacks of Python: a process that is stopped lets each of them wait.
SPY_SECONDS = 60.0
# Above the unit's TimeoutStopSec, after which systemd kills what SIGTERM has not ended.
RESTART_SECONDS = 240.0
# Bounds of the evidence: folders, bytes a file, processes, threads a process, lines a log.
FOLDERS, FILE_BYTES, PROCESSES, THREADS, LINES = 10, 512 * 1024, 32, 256, 400
ASLEEP = 'sleep_state="awake"'
# FlashInfer and Triton compile kernels when a shape is needed for the first time: for minutes, in which no token comes.
COMPILERS = frozenset(("nvcc", "cicc", "cudafe++", "ptxas", "fatbinary", "nvlink", "ninja", "cc1plus"))
# Bytes of an answer, of which vLLM's have some thousand: whoever has the port must not fill the memory of root.
MOST_BYTES = 8 << 20
MOST_KEY = 4096
KEY = re.compile(rf"[!-~]{{1,{MOST_KEY}}}")
# The state of a socket in /proc/net/tcp.
LISTENS = "0A"


# --- the decision


@dataclass(frozen=True)
class Limits:
    """Seconds, and restarts an hour. `still`: how long a busy server may show no sign; `start`: to its first token."""

    still: float = 300.0
    probe_every: float = 300.0
    probe: float = 120.0
    start: float = 5400.0
    restarts: int = 3


@dataclass(frozen=True)
class Probed:
    """A probe request: `token` came, or `cannot` be asked at all (no key, no such API), or none came; and why."""

    token: bool = False
    cannot: bool = False
    why: str = ""


@dataclass(frozen=True)
class Look:
    """What was seen at `now`, in seconds of the monotonic clock.

    `unit`: systemd's ActiveState; `invocation` differs after each start, which was at `started`. `trouble`: why
    /metrics was not read, in words. `signs`: the values that only a working engine changes; empty: there are none.
    `generated`: tokens so far. `requests`: running and waiting; None: unknown. `compiling`: a compiler runs for it.
    """

    now: float
    unit: str = "active"
    invocation: str = ""
    started: float = 0.0
    trouble: str = ""
    signs: tuple[float, ...] = ()
    generated: float = 0.0
    requests: float | None = None
    asleep: bool = False
    compiling: bool = False
    probed: Probed | None = None


@dataclass(frozen=True)
class Memory:
    """What is known of this start of the unit. `up`: it has generated a token, or answers that it cannot be probed."""

    invocation: str = ""
    up: bool = False
    signs: tuple[float, ...] = ()
    sign_at: float = 0.0
    probed_at: float = float("-inf")


@dataclass(frozen=True)
class Verdict:
    """`state`: stopped, starting, alive, idle, asleep, quiet (busy, but nothing moves), wedged; or probe: ask first."""

    state: str
    why: str = ""


def decide(limits: Limits, memory: Memory, look: Look) -> tuple[Memory, Verdict]:
    """Judge one look; the second one, with `probed`, follows the verdict `probe`."""
    if look.unit in ("activating", "reloading"):
        return Memory(), Verdict("starting", "systemd starts it")
    if look.unit != "active":
        return Memory(), Verdict("stopped", f"the unit is {look.unit or 'unknown'}")
    if look.invocation != memory.invocation:
        memory = Memory(look.invocation, sign_at=look.now)
    memory, moved = _remembered(memory, look)
    if not memory.up:
        return memory, _at_start(limits, look)
    if look.asleep:
        return replace(memory, sign_at=look.now), Verdict("asleep", "it sleeps until it is woken")
    if moved:
        return memory, Verdict("alive", "it compiles kernels" if look.compiling else "it generates")
    return memory, _standing(limits, memory, look)


def _remembered(memory: Memory, look: Look) -> tuple[Memory, bool]:
    """Return the memory with what this look adds, and whether it shows a sign of life."""
    probed = look.probed or Probed()
    moved = probed.token or look.compiling or bool(look.signs and memory.signs and look.signs != memory.signs)
    return replace(
        memory,
        up=memory.up or look.generated > 0 or probed.token or probed.cannot,
        signs=look.signs or memory.signs,
        sign_at=look.now if moved else memory.sign_at,
        probed_at=look.now if look.probed else memory.probed_at,
    ), moved


def _at_start(limits: Limits, look: Look) -> Verdict:
    since = look.now - look.started
    if since >= limits.start:
        return Verdict("wedged", f"it has generated no token in the {_span(since)} since its start")
    if look.trouble or look.probed:
        return Verdict("starting", f"no token yet, {_span(since)} after its start")
    return Verdict("probe", "it serves, and has generated no token yet")


def _standing(limits: Limits, memory: Memory, look: Look) -> Verdict:
    still, doing = look.now - memory.sign_at, _doing(look)
    busy, long = look.requests != 0, still >= limits.still
    if look.probed is None:
        due = look.now - max(memory.probed_at, memory.sign_at) >= limits.probe_every
        if (long and look.now - memory.probed_at >= min(limits.still, limits.probe_every)) if busy else due:
            return Verdict("probe", f"{doing}, and nothing has moved for {_span(still)}")
        return Verdict("quiet" if busy else "idle", f"{doing}; the last sign of life was {_span(still)} ago")
    if look.probed.cannot:
        # Only counters can tell, if there are any.
        if busy and long and look.requests is not None:
            return Verdict("wedged", f"{doing}, and no token has come for {_span(still)}")
        return Verdict("quiet" if busy else "idle", f"{doing}; it cannot be probed: {look.probed.why}")
    if busy and not long:
        return Verdict("quiet", f"{doing}; a probe request got no token: {look.probed.why}")
    return Verdict(
        "wedged", f"{doing}, no token has come for {_span(still)}, nor for a probe request: {look.probed.why}"
    )


def _doing(look: Look) -> str:
    if look.requests is None:
        return look.trouble or "/metrics does not tell what runs"
    return f"{look.requests:.0f} requests run or wait" if look.requests else "no request runs"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def left(limits: Limits, restarts: Sequence[float], now: float) -> int:
    """Return how many restarts the hour before `now` leaves of the budget; times in seconds."""
    return max(0, limits.restarts - sum(now - HOUR < each <= now for each in restarts))


# --- what a server says


@dataclass(frozen=True)
class Names:
    """Names of the metrics, the newest first: of one meaning, the first that is there counts."""

    running: Sequence[str]
    waiting: Sequence[str]
    generated: Sequence[str]
    moving: Sequence[str]
    asleep: str = ""


def read_metrics(text: str, names: Names) -> dict[str, float]:
    """Return the sum over the labels of each metric that `names` has, in Prometheus' text format."""
    wanted = {*names.running, *names.waiting, *names.generated, *names.moving, names.asleep}
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition(" ")[0].partition("{")[0]
        if name in wanted and (name != names.asleep or ASLEEP in line):
            with suppress(ValueError):
                value = float(line.rpartition(" ")[2])
                # Not a number differs from itself: it would look like a sign of life.
                found[name] = found.get(name, 0.0) + (0.0 if math.isnan(value) else value)
    return found


def seen(text: str, names: Names) -> dict[str, Any]:
    """Return the fields of a `Look` that a text of /metrics tells."""
    found = read_metrics(text, names)
    running, generated = _first(found, names.running), _first(found, names.generated)
    if running is None or generated is None:
        missing = names.running[0] if running is None else names.generated[0]
        return {"trouble": f"/metrics has no {missing}"}
    moving = tuple(found[each] for each in names.moving if each in found)
    waiting = _first(found, names.waiting) or 0.0
    return {
        "signs": (generated, running, waiting, *moving),
        "generated": generated,
        "requests": running + waiting,
        "asleep": found.get(names.asleep, 1.0) == 0,
    }


def _first(found: Mapping[str, float], names: Sequence[str]) -> float | None:
    return next((found[each] for each in names if each in found), None)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`: a socket's timeout limits a single read only."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Server:
    """The API of the vLLM on this node."""

    def __init__(self, port: int, key: Callable[[], str]) -> None:
        self._port, self._ask_key, self._key = port, key, ""
        self._users: set[int] = set()

    def request(self, path: str, seconds: float, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """Return the status and the text of an answer; read the key again if it is refused.

        Raises:
            OSError, HTTPException: there is none.
        """
        users = users_at(self._port)
        if users != self._users:
            # While vLLM is down, another user's program can have its port.
            self._key, self._users = "", users
        status, text = self._request(path, seconds, body)
        if status not in (401, 403) or (key := self._ask_key()) == self._key:
            return status, text
        self._key = key
        return self._request(path, seconds, body)

    def _request(self, path: str, seconds: float, body: Mapping[str, Any] | None) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"} if body else {}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        link = http.client.HTTPConnection("127.0.0.1", self._port, timeout=seconds)
        try:
            with time_limit(seconds):
                link.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
                answer = link.getresponse()
                data = answer.read(MOST_BYTES + 1)
                if len(data) > MOST_BYTES:
                    raise http.client.HTTPException(f"more than {MOST_BYTES >> 20} MiB come")
                return answer.status, data.decode(errors="replace")
        finally:
            link.close()

    def metrics(self) -> tuple[str, str]:
        """Return the text of /metrics, and why there is none."""
        try:
            status, text = self.request("/metrics", SCRAPE_SECONDS)
        except (OSError, http.client.HTTPException) as error:
            return "", f"/metrics does not answer: {_words(error, SCRAPE_SECONDS)}"
        return (text, "") if status == 200 else ("", f"/metrics answers HTTP {status}")

    def probe(self, seconds: float) -> Probed:
        """Ask for one token."""
        try:
            return self._probe(time.monotonic() + seconds)
        except (OSError, http.client.HTTPException) as error:
            return Probed(why=_words(error, seconds))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            return Probed(why=f"its answer cannot be read ({type(error).__name__})")

    def _probe(self, until: float) -> Probed:
        status, text = self._ask("/v1/models", until)
        if status != 200:
            return _refused(status)
        asked = {"model": json.loads(text)["data"][0]["id"], "max_tokens": 1, "temperature": 0}
        status, text = self._ask("/v1/completions", until, {**asked, "prompt": "One, two,"})
        if status in (400, 404, 405):
            said = {"messages": [{"role": "user", "content": "Count."}]}
            status, text = self._ask("/v1/chat/completions", until, {**asked, **said})
        if status != 200:
            return _refused(status)
        return Probed(token=json.loads(text)["usage"]["completion_tokens"] > 0, why="the answer has no token")

    def _ask(self, path: str, until: float, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        return self.request(path, max(0.1, until - time.monotonic()), body)


def _refused(status: int) -> Probed:
    if status in (401, 403):
        return Probed(cannot=True, why=f"it refuses the key (HTTP {status})")
    return Probed(cannot=status < 500, why=f"it answers HTTP {status}")


def _words(error: Exception, seconds: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {seconds:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens"
    return str(error) or type(error).__name__


# --- the unit


def output_of(*argv: str, seconds: float = COLLECT_SECONDS) -> tuple[int, str]:
    """Run a program; return its exit code and what it wrote, or 124 or 127 and why it has no result."""
    env = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"}
    try:
        run = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        return 127, f"{argv[0]}: {error.strerror}"
    try:
        out, _ = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # Do not wait for it long: a program that waits in the kernel for a GPU does not even end when it is killed.
        run.kill()
        with suppress(subprocess.TimeoutExpired):
            run.communicate(timeout=1)
        return 124, f"{argv[0]} did not end within {seconds:g} s"
    return run.returncode, out.decode(errors="replace")


@dataclass(frozen=True)
class Unit:
    """A unit as systemd sees it. `started`: seconds of the monotonic clock."""

    state: str = ""
    invocation: str = ""
    started: float = 0.0
    pid: int = 0


def unit_now(name: str) -> Unit:
    properties = "ActiveState,InvocationID,ExecMainStartTimestampMonotonic,MainPID"
    _, text = output_of("systemctl", "show", name, f"--property={properties}")
    has = dict(line.partition("=")[::2] for line in text.splitlines())
    started = int(has.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
    return Unit(has.get("ActiveState", ""), has.get("InvocationID", ""), started, int(has.get("MainPID") or 0))


def processes_of(unit: str) -> list[int]:
    """Return the processes in the control group of a unit, oldest first."""
    found = []
    for each in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            groups = Path("/proc", each, "cgroup").read_text().splitlines()
            if any(f"/{unit}/" in f"{group}/" for group in groups):
                found.append(int(each))
    return sorted(found)


def compiles(unit: str) -> bool:
    """Return whether a compiler runs in the control group of a unit."""
    return any(_read(pid, "comm") in COMPILERS for pid in processes_of(unit))


# --- evidence


def state_of(pid: int) -> str:
    """Return what the kernel knows of a process: its state, where it waits, and the stacks of its threads."""
    parts = [f"== {pid} {_read(pid, 'comm')}", _read(pid, "status"), f"wchan: {_read(pid, 'wchan')}"]
    with suppress(OSError):
        for task in sorted(os.listdir(f"/proc/{pid}/task"), key=int)[:THREADS]:
            at = f"task/{task}"
            stat = _read(pid, f"{at}/stat").rpartition(")")[2].split()[:1]
            parts.append(f"-- thread {task} {_read(pid, f'{at}/comm')} {''.join(stat)} {_read(pid, f'{at}/wchan')}")
            parts.append(_read(pid, f"{at}/stack"))
    return "\n".join(filter(None, parts)) + "\n"


def _read(pid: int, name: str) -> str:
    try:
        return Path("/proc", str(pid), name).read_text(errors="replace").strip()
    except OSError as error:
        return f"({name.rpartition('/')[2]}: {error.strerror})"


@dataclass
class Evidence:
    """Where evidence goes, and what belongs to it. `ports`: those of the API and between the nodes."""

    folder: Path
    units: Sequence[str]
    ports: Sequence[int]

    def save(self, why: str, texts: Mapping[str, str]) -> Path:
        """Write one folder of evidence and remove the oldest beyond `FOLDERS`.

        Raises:
            OSError: it cannot be written; nothing of it stays.
        """
        place = self._new_folder()
        try:
            for name, text in self._files(why, texts):
                (place / name).write_bytes(text.encode(errors="replace")[-FILE_BYTES:])
        except OSError:
            shutil.rmtree(place, ignore_errors=True)
            raise
        return place

    def _new_folder(self) -> Path:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        for old in sorted(self.folder.iterdir())[: -(FOLDERS - 1)]:
            shutil.rmtree(old, ignore_errors=True)
        place = self.folder / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        place.mkdir(mode=0o700)
        return place

    def _files(self, why: str, texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        yield "why.txt", why + "\n"
        yield from texts.items()
        pids = {unit: processes_of(unit)[:PROCESSES] for unit in self.units}
        yield "processes.txt", "".join(state_of(pid) for each in pids.values() for pid in each)
        for unit in self.units:
            yield f"{unit}.log", output_of("journalctl", "-u", unit, "-n", str(LINES), "--no-pager", "-q")[1]
        yield "kernel.log", output_of("journalctl", "-k", "-n", str(LINES), "--no-pager", "-q")[1]
        yield "sockets.txt", self._sockets()
        if shutil.which("nvidia-smi"):
            yield "nvidia-smi.txt", output_of("nvidia-smi")[1]
        if spy := shutil.which("py-spy"):
            until = time.monotonic() + SPY_SECONDS
            chosen = (pid for each in pids.values() for pid in each if time.monotonic() < until)
            yield "py-spy.txt", "\n".join(output_of(spy, "dump", "--pid", str(pid))[1] for pid in chosen)

    def _sockets(self) -> str:
        ports = " or ".join(f"sport = :{port} or dport = :{port}" for port in self.ports)
        return output_of("ss", "-tanop", "exclude", "time-wait", f"( {ports} )")[1]


# --- the service


@dataclass(frozen=True)
class Places:
    """`state`: the folder that stays; `live`: the folder in memory, where every look is noted."""

    state: Path
    live: Path


@dataclass
class Watch:
    """The service: what it watches, what it has seen, and what it has done."""

    unit: str
    every: float
    limits: Limits
    names: Names
    server: Server
    evidence: Evidence
    places: Places
    wedges: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    memory: Memory = Memory()
    now: Unit = Unit()
    said: str = ""
    metrics: str = ""
    last_sign: str = ""
    wedge: dict[str, Any] | None = None

    def run(self) -> None:
        """Look every `every` seconds, for ever."""
        self.recall()
        say(f"watching {self.unit}: {self.limits.restarts} restarts an hour at most")
        while True:
            began = time.monotonic()
            self.once()
            time.sleep(max(0.0, self.every - (time.monotonic() - began)))

    def once(self) -> Verdict:
        """Look once, and do what follows from it."""
        self.memory, verdict = decide(self.limits, self.memory, self._look())
        if verdict.state == "probe":
            self._note(Verdict("probe", verdict.why))
            probed = self.server.probe(self.limits.probe)
            self.memory, verdict = decide(self.limits, self.memory, self._look(probed))
        if verdict.state == "wedged":
            self._on_wedge(verdict.why)
        else:
            self._over(verdict)
        self._note(verdict)
        return verdict

    def _look(self, probed: Probed | None = None) -> Look:
        text, trouble = self.server.metrics()
        found: dict[str, Any] = seen(text, self.names) if text else {"trouble": trouble}
        signs: tuple[float, ...] = found.get("signs", ())
        # Counters that grow are those of the process that was there: systemd need not be asked each time.
        if not (self.memory.up and signs and len(signs) == len(self.memory.signs) and signs[0] >= self.memory.signs[0]):
            self.now = unit_now(self.unit)
        if text:
            self.last_sign = text if signs != self.memory.signs or not self.last_sign else self.last_sign
            self.metrics = text
        self._say_once(str(found.get("trouble", "")) if text else "")
        now = self.now
        compiling = probed is not None and not probed.token and compiles(self.unit)
        return Look(
            time.monotonic(), now.state, now.invocation, now.started, compiling=compiling, probed=probed, **found
        )

    def _say_once(self, trouble: str) -> None:
        """Tell a lasting trouble of the server's text once."""
        if trouble and trouble != self.said:
            say(f"{trouble}: only probe requests can tell whether it generates")
        self.said = trouble

    # --- a wedge

    def _on_wedge(self, why: str) -> None:
        now = time.time()
        if self.wedge is None or self.wedge["invocation"] != self.memory.invocation:
            self.wedge = self._new_wedge(why, now)
        if left(self.limits, self.restarts, now):
            self._restart(now)
        elif self.wedge["action"] != "none":
            self.wedge["action"] = "none"
            say(
                f"{self.unit} is not restarted: the budget of {self.limits.restarts} restarts an hour is used up", "<3>"
            )
            self._keep()

    def _new_wedge(self, why: str, now: float) -> dict[str, Any]:
        say(f"{self.unit} is wedged: {why}", "<3>")
        wedge: dict[str, Any] = {"at": utc(now), "why": why, "invocation": self.memory.invocation, "action": ""}
        texts = {"metrics-at-last-sign.txt": self.last_sign, "metrics-last.txt": self.metrics}
        try:
            wedge["evidence"] = str(self.evidence.save(why, texts))
            say(f"evidence of the wedge is in {wedge['evidence']}")
        except OSError as error:
            wedge["trouble"] = f"the evidence could not be saved: {error.strerror or error}"
            say(f"{wedge['trouble']} ({self.evidence.folder})", "<3>")
        self.wedges.append(wedge)
        return wedge

    def _restart(self, now: float) -> None:
        assert self.wedge is not None, "only a wedge leads to a restart"
        found = unit_now(self.unit)
        if (found.state, found.invocation) != ("active", self.memory.invocation):
            # The evidence takes a while, in which a user may have stopped it or started it again.
            self.wedge["action"] = "left alone: it was stopped or started meanwhile"
            say(f"{self.unit} is {self.wedge['action']}")
            self._keep()
            return
        self.restarts.append(now)
        # Before: a restart takes minutes, and who is killed in them must not forget the budget.
        self._keep()
        # Else systemd counts it with the starts that failed, and after some of them refuses to start the unit.
        output_of("systemctl", "reset-failed", self.unit)
        code, text = output_of("systemctl", "restart", self.unit, seconds=RESTART_SECONDS)
        self.wedge["action"] = "restarted" if code == 0 else f"the restart failed: {' '.join(text.split())[:300]}"
        rest = left(self.limits, self.restarts, now)
        done = f"{self.unit} was restarted" if code == 0 else f"{self.unit} could not be restarted: {text.strip()}"
        say(f"{done}; {rest} of {self.limits.restarts} restarts of this hour are left", "<4>")
        self._keep()

    def _over(self, verdict: Verdict) -> None:
        """Tell that the server generates again after a wedge."""
        if self.wedge and verdict.state == "alive":
            say(f"{self.unit} generates again")
            self.wedge = None

    # --- what is kept

    def _note(self, verdict: Verdict) -> None:
        self._write(self.places.live, verdict)

    def _keep(self) -> None:
        for folder in (self.places.live, self.places.state):
            self._write(folder, Verdict("wedged"))

    def _write(self, folder: Path, verdict: Verdict) -> None:
        now = time.time()
        self.wedges = [each for each in self.wedges if epoch(each["at"]) > now - DAY]
        self.restarts = [each for each in self.restarts if each > now - DAY]
        content = {
            "checked": utc(now),
            "state": verdict.state,
            "why": verdict.why,
            "wedges": self.wedges,
            "restarts": [utc(each) for each in self.restarts],
            "budget": self.limits.restarts,
            "left": left(self.limits, self.restarts, now),
        }
        waiting = folder / ".state.json.new"
        try:
            waiting.write_text(json.dumps(content) + "\n")
            waiting.replace(folder / "state.json")
        except OSError as error:
            if verdict.state == "wedged":
                say(f"{folder}/state.json cannot be written: {error.strerror}", "<4>")

    def recall(self) -> None:
        """Read what an earlier process of this service has noted, the newest first: the budget outlives a restart."""
        for folder in (self.places.live, self.places.state):
            with suppress(OSError, ValueError, LookupError, TypeError):
                found = json.loads((folder / "state.json").read_text())
                restarts = [epoch(each) for each in found["restarts"]]
                self.wedges, self.restarts = [each for each in found["wedges"] if epoch(each["at"])], restarts
                return


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def epoch(text: str) -> float:
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def say(text: str, level: str = "<5>") -> None:
    """Print one line for systemd's journal, which reads the level before it."""
    print(f"{level}sparkinstall: {text}", flush=True)


def users_at(port: int) -> set[int]:
    """Return the users whose programs listen at a port of this machine."""
    found = set()
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTENS and int(words[1].rpartition(":")[2], 16) == port:
                    found.add(int(words[7]))
    return found


def key_for(unit: str, file: str, port: int) -> str:
    """Return the API's key if the unit's own user listens at the port, else "": nobody else gets to know it."""
    user = re.search(r"^Uid:\s+(\d+)", _read(unit_now(unit).pid, "status"), re.MULTILINE)
    return key_of(unit, file) if user and users_at(port) == {int(user[1])} else ""


def key_of(unit: str, file: str) -> str:
    """Return the API's key: from the credential, or from the environment that vLLM was started with; "" if none."""
    with suppress(OSError):
        if file:
            return _sound(_begin_of(file))
    with suppress(OSError):
        for each in Path("/proc", str(unit_now(unit).pid), "environ").read_bytes().split(b"\0"):
            if each.startswith(b"VLLM_API_KEY="):
                return _sound(each.partition(b"=")[2])
    return ""


def _begin_of(file: str) -> bytes:
    """Return what a file begins with; of a pipe, which could let us wait for ever, nothing."""
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as opened:
        return opened.read(MOST_KEY + 2) or b""


def _sound(key: bytes) -> str:
    """Return a key that a header can have, else ""."""
    text = key.decode(errors="replace").strip()
    return text if KEY.fullmatch(text) else ""


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("unit")
    parser.add_argument("state", type=Path)
    parser.add_argument("live", type=Path)
    for name, kind in (("port", int), ("every", float), ("restarts", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name in ("still", "probe-every", "probe", "start"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--also-port", type=int, action="append", default=[])
    parser.add_argument("--also-unit", action="append", default=[])
    parser.add_argument("--key-file", default="")
    for name in ("running", "waiting", "generated", "moving", "asleep"):
        parser.add_argument(f"--{name}", action="append", default=[])
    asked = parser.parse_args(words)
    limits = Limits(asked.still, asked.probe_every, asked.probe, asked.start, asked.restarts)
    names = Names(asked.running, asked.waiting, asked.generated, asked.moving, *asked.asleep[:1])
    server = Server(asked.port, functools.partial(key_for, asked.unit, asked.key_file, asked.port))
    evidence = Evidence(asked.state / "evidence", (asked.unit, *asked.also_unit), (asked.port, *asked.also_port))
    Watch(asked.unit, asked.every, limits, names, server, evidence, Places(asked.state, asked.live)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
