"""The proof of life: when vLLM is wedged, what /metrics tells, the budget, the evidence, and what it reports."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from sparkinstall.core import catalogue
from sparkinstall.facts import vllm
from sparkinstall.facts.life import LifeState, Wedge, life_state, summary
from sparkinstall.layout import API_KEY, LIFE_FOLDER, LIFE_LIVE, LIFE_PROGRAM, LIFE_UNIT, unit_path
from sparkinstall.payloads import as_file, vllm_life
from sparkinstall.payloads.vllm_life import (
    Evidence,
    Limits,
    Look,
    Memory,
    Names,
    Places,
    Probed,
    Server,
    Unit,
    Verdict,
    Watch,
    decide,
)
from sparkinstall.probes import life
from sparkinstall.resources import NodeOnly, state_of
from sparkinstall.resources.systemd import complaints_of_systemd
from sparkinstall.steps.life import Life
from sparkinstall.system.local import LocalReader
from tests.support.local_server import free_port
from tests.support.nodes import node_of, system_of
from tests.support.recording import RecordingSystem
from tests.support.rehearsals import envelope, in_this_process

LIMITS = Limits(still=300, probe_every=300, probe=120, start=5400, restarts=3)
LATE = Probed(why="no answer within 120 s")
TOKEN = Probed(token=True)
NAMES = Names(
    vllm.RUNNING_REQUESTS,
    vllm.WAITING_REQUESTS,
    (vllm.GENERATED_TOKENS,),
    vllm.MOVES_WITH_THE_ENGINE,
    vllm.SLEEP_STATE,
)


def at(now: float, **more: Any) -> Look:
    """A look `now` seconds after the start, at a server that has generated ten tokens and is idle."""
    has: dict[str, Any] = {"invocation": "a", "signs": (10.0, 0.0), "generated": 10.0, "requests": 0.0}
    return Look(now, **{**has, **more})


def busy(now: float, **more: Any) -> Look:
    return at(now, **{"signs": (10.0, 2.0), "requests": 2.0, **more})


def silent(now: float, **more: Any) -> Look:
    """A look at a server whose /metrics do not answer."""
    return Look(now, **{"invocation": "a", "trouble": "/metrics does not answer: nothing listens", **more})


def states(looks: Sequence[Look], limits: Limits = LIMITS) -> list[str]:
    """The verdicts of looks that follow each other."""
    memory, found = Memory(), []
    for look in looks:
        memory, verdict = decide(limits, memory, look)
        found.append(verdict.state)
    return found


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        # While it starts: nothing listens for an hour, then the API answers, then the first token comes.
        ([silent(10), silent(3600), at(3610, generated=0.0)], ["starting", "starting", "probe"]),
        ([at(3610, generated=0.0), at(3650, generated=0.0, probed=LATE)], ["probe", "starting"]),
        ([at(3610, generated=0.0), at(3650, probed=TOKEN)], ["probe", "alive"]),
        # Its start has a limit of its own.
        ([silent(5399), silent(5400)], ["starting", "wedged"]),
        ([at(5400, generated=0.0)], ["wedged"]),
        # systemd's states that are not a running vLLM.
        ([Look(1, unit="activating"), Look(2, unit="failed"), Look(3, unit="")], ["starting", "stopped", "stopped"]),
        ([at(1), Look(2, unit="inactive"), at(9000, invocation="b", started=8999.0)], ["idle", "stopped", "idle"]),
        # Busy: any counter that moves is a sign of life, also a cache that fills while a long prompt is read.
        ([busy(0), busy(290), busy(299)], ["quiet"] * 3),
        ([busy(0), busy(600, signs=(11.0, 2.0)), busy(890, signs=(11.0, 2.0))], ["quiet", "alive", "quiet"]),
        ([busy(t, signs=(10.0, 2.0, t / 1e5)) for t in range(0, 4000, 250)], ["quiet", *["alive"] * 15]),
        # A slow answer: a token every 295 s, looked for every 59 s; and a long prompt for which only the cache grows,
        # so slowly that a probe request in between is late.
        (
            [busy(59.0 * n, signs=(10.0 + n // 5, 2.0)) for n in range(61)],
            ["quiet", *(["quiet"] * 4 + ["alive"]) * 12],
        ),
        (
            [busy(0), busy(300), busy(301, signs=(10.0, 2.0, 0.1), probed=LATE), busy(590, signs=(10.0, 2.0, 0.1))],
            ["quiet", "probe", "alive", "quiet"],
        ),
        # Busy, and nothing moves: one token decides.
        ([busy(0), busy(300), busy(420, probed=LATE)], ["quiet", "probe", "wedged"]),
        ([busy(0), busy(300), busy(310, probed=TOKEN), busy(320)], ["quiet", "probe", "alive", "quiet"]),
        ([busy(0), busy(300), busy(420, signs=(11.0, 2.0), probed=LATE)], ["quiet", "probe", "alive"]),
        # Idle: asked for a token once in a while, and never while one has come meanwhile.
        ([at(0), at(299), at(300), at(301, probed=TOKEN), at(600)], ["idle", "idle", "probe", "alive", "idle"]),
        ([at(0), at(300), at(420, probed=LATE)], ["idle", "probe", "wedged"]),
        # A long prompt arrived with the probe request: it is busy now, and has just shown a sign of life.
        ([at(0), at(300), busy(420, probed=LATE)], ["idle", "probe", "alive"]),
        # Idle for long, then busy: the time counts from there.
        ([at(0), at(200), busy(299), busy(590)], ["idle", "idle", "alive", "quiet"]),
        # /metrics hangs, or nothing listens any more.
        ([at(0), silent(10), silent(299)], ["idle", "quiet", "quiet"]),
        ([at(0), silent(300), silent(430, probed=LATE)], ["idle", "probe", "wedged"]),
        ([at(0), silent(300), silent(301, probed=TOKEN)], ["idle", "probe", "alive"]),
        # It cannot be probed: counters alone decide, and an idle server is not judged.
        ([at(0), at(300), at(301, probed=Probed(cannot=True, why="HTTP 401"))], ["idle", "probe", "idle"]),
        ([busy(0), busy(300), busy(301, probed=Probed(cannot=True))], ["quiet", "probe", "wedged"]),
        ([at(9, generated=0.0), at(10, generated=0.0, probed=Probed(cannot=True))], ["probe", "idle"]),
        ([at(0), silent(300), silent(301, probed=Probed(cannot=True))], ["idle", "probe", "quiet"]),
        # It compiles kernels, which takes minutes in which nothing moves.
        ([at(0), at(300), at(420, probed=LATE, compiling=True), at(430)], ["idle", "probe", "alive", "idle"]),
        # Asleep by request.
        ([at(0), at(900, asleep=True), at(1100), at(1200)], ["idle", "asleep", "idle", "probe"]),
        # Another start of the unit: all is counted again.
        ([busy(0), silent(290, invocation="b", started=280.0), at(300)], ["quiet", "starting", "idle"]),
    ],
)  # fmt: skip
def test_life_judges_looks_that_follow_each_other(looks: list[Look], expected: list[str]) -> None:
    assert states(looks) == expected


def test_life_without_counters_needs_a_late_probe_and_time() -> None:
    def blind(now: float, **more: Any) -> Look:
        return Look(now, invocation="a", trouble="/metrics has no vllm:num_requests_running", **more)

    looks = [blind(0, probed=TOKEN), blind(100), blind(300), blind(310, probed=LATE)]
    assert states(looks) == ["alive", "quiet", "probe", "wedged"]


def test_life_after_a_wedge_without_a_restart_asks_again_only_after_a_while() -> None:
    looks = [busy(0), busy(300), busy(420, probed=LATE), busy(430), busy(719), busy(720)]
    assert states(looks) == ["quiet", "probe", "wedged", "quiet", "quiet", "probe"]


def test_life_says_what_it_has_seen() -> None:
    memory, _ = decide(LIMITS, Memory(), busy(0))
    assert decide(LIMITS, memory, busy(300, probed=LATE))[1] == Verdict(
        "wedged",
        "2 requests run or wait, no token has come for 300 s, nor for a probe request: no answer within 120 s",
    )


@pytest.mark.parametrize(
    ("restarts", "expected"),
    [([], 3), ([0.0], 3), ([3601.0], 2), ([100.0, 3602.0, 3700.0], 1), ([3601.0, 3602.0, 3603.0, 3604.0], 0)],
)
def test_life_budget_counts_the_last_hour(restarts: list[float], expected: int) -> None:
    assert vllm_life.left(LIMITS, restarts, now=7200.0) == expected


# --- what a server says

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 1.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:generation_tokens_total{engine="0",model_name="m"} 70.0
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:prompt_tokens_total{engine="0",model_name="m"} 5.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="discard_all"} 0.0
"""


def test_metrics_are_summed_over_engines() -> None:
    found = vllm_life.seen(METRICS, NAMES)
    expected = {"signs": (70.0, 3.0, 4.0, 5.0, 0.25), "generated": 70.0, "requests": 7.0, "asleep": False}
    assert found == expected


def test_metric_that_is_not_a_number_is_no_sign_of_life() -> None:
    text = METRICS.replace('model_name="m"} 0.25', 'model_name="m"} NaN')
    assert vllm_life.seen(text, NAMES)["signs"] == vllm_life.seen(text, NAMES)["signs"]


def test_metrics_of_a_sleeping_engine() -> None:
    assert vllm_life.seen(METRICS.replace('"awake"} 1.0', '"awake"} 0.0'), NAMES)["asleep"]


@pytest.mark.parametrize("missing", [*vllm.RUNNING_REQUESTS, vllm.GENERATED_TOKENS])
def test_metrics_without_a_counter_name_it(missing: str) -> None:
    text = "".join(line for line in METRICS.splitlines(keepends=True) if not line.startswith(missing + "{"))
    assert vllm_life.seen(text, NAMES) == {"trouble": f"/metrics has no {missing}"}


class Api(BaseHTTPRequestHandler):
    """Answers as `answers` says: a status and a text by path, or None for no answer within the test."""

    answers: ClassVar[dict[str, tuple[int, str] | None]] = {}
    keys: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.keys.append(self.headers.get("Authorization", ""))
        if "Content-Length" in self.headers:
            self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.answers.get(self.path, (404, "{}"))
        if answer is None:
            time.sleep(0.6)
            return
        if answer == (401, "") and self.keys[-1] == "Bearer right":
            answer = (200, METRICS)
        self.send_response(answer[0])
        self.end_headers()
        self.wfile.write(answer[1].encode())

    do_POST = do_GET  # noqa: N815 - the name that http.server calls

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    Api.keys.clear()
    yield server.server_port
    server.shutdown()
    server.server_close()


def asked(port: int, **answers: tuple[int, str] | None) -> Probed:
    paths = {"models": "/v1/models", "completions": "/v1/completions", "chat": "/v1/chat/completions"}
    Api.answers = {
        "/v1/models": (200, '{"data": [{"id": "m"}]}'),
        **{paths[name]: answer for name, answer in answers.items()},
    }
    # One that answers may take its time.
    return Server(port, lambda: "").probe(0.3 if None in answers.values() else 300)


ONE = (200, '{"usage": {"completion_tokens": 1}}')


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"completions": ONE}, (True, False, "the answer has no token")),
        ({"completions": (404, ""), "chat": ONE}, (True, False, "the answer has no token")),
        ({"completions": (200, '{"usage": {"completion_tokens": 0}}')}, (False, False, "the answer has no token")),
        ({"completions": None}, (False, False, "no answer within 0.3 s")),
        ({"models": None}, (False, False, "no answer within 0.3 s")),
        ({"completions": (500, "")}, (False, False, "it answers HTTP 500")),
        ({"completions": (400, ""), "chat": (400, "")}, (False, True, "it answers HTTP 400")),
        ({"completions": (401, "")}, (False, True, "it refuses the key (HTTP 401)")),
        ({"completions": (200, "oops")}, (False, False, "its answer cannot be read (JSONDecodeError)")),
    ],
)
def test_probe_request_has_a_token_or_a_reason(
    port: int, answers: dict[str, tuple[int, str] | None], expected: tuple[bool, bool, str]
) -> None:
    found = asked(port, **answers)
    assert (found.token, found.cannot) == expected[:2]
    assert found.token or found.why.startswith(expected[2])


def test_probe_request_where_nothing_listens() -> None:
    free = free_port()
    assert Server(free, lambda: "").probe(300) == Probed(why="nothing listens")
    assert Server(free, lambda: "").metrics() == ("", "/metrics does not answer: nothing listens")


def test_key_is_read_when_it_is_asked_for_and_again_when_it_is_refused(port: int) -> None:
    Api.answers = {"/metrics": (401, "")}
    keys = iter(["wrong", "right"])
    server = Server(port, lambda: next(keys))
    assert server.metrics() == ("", "/metrics answers HTTP 401")
    assert server.metrics() == (METRICS, "")
    assert server.metrics() == (METRICS, "")
    assert Api.keys == ["", "Bearer wrong", "Bearer wrong", "Bearer right", "Bearer right"]


def test_key_comes_from_the_credential(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    assert vllm_life.key_of("no-such.service", str(tmp_path / "key")) == "sesame"


# --- evidence


def test_evidence_is_bounded_in_number_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_life, "FOLDERS", 3)
    monkeypatch.setattr(vllm_life, "FILE_BYTES", 100)
    evidence = Evidence(tmp_path / "evidence", ("no-such.service",), (1,))
    for number in range(5):
        monkeypatch.setattr(time, "strftime", lambda _format, _when, number=number: f"2026112{number}T000000Z")
        place = evidence.save("it is wedged", {"metrics-last.txt": "x" * 1000 + "end"})
    names = sorted(each.name for each in (tmp_path / "evidence").iterdir())
    assert names == ["20261122T000000Z", "20261123T000000Z", "20261124T000000Z"]
    assert (place / "why.txt").read_text() == "it is wedged\n"
    assert (place / "metrics-last.txt").read_text() == "x" * 97 + "end"
    assert place.stat().st_mode & 0o777 == 0o700


def test_evidence_has_the_kernels_view_of_a_process() -> None:
    text = vllm_life.state_of(1)
    assert text.startswith("== 1 ")
    assert "\nState:\t" in text
    assert "\n-- thread 1 " in text


def test_compiler_of_a_unit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ptxas").symlink_to("/bin/sleep")
    monkeypatch.setattr(vllm_life, "processes_of", lambda _unit: [os.getpid()])
    assert not vllm_life.compiles("vllm.service")
    with subprocess.Popen([tmp_path / "ptxas", "600"]) as compiler:
        monkeypatch.setattr(vllm_life, "processes_of", lambda _unit: [os.getpid(), compiler.pid])
        while not Path(f"/proc/{compiler.pid}/cmdline").read_bytes().startswith(bytes(tmp_path)):
            time.sleep(0.01)
        assert vllm_life.compiles("vllm.service")
        compiler.kill()


def test_program_that_hangs_is_left_behind() -> None:
    assert vllm_life.output_of("sleep", "600", seconds=0.2) == (124, "sleep did not end within 0.2 s")
    assert vllm_life.output_of("no-such-program") == (127, "no-such-program: No such file or directory")


# --- a wedge


class Wedged(Server):
    """A server whose engine stands still: /metrics answers always the same, and no token comes."""

    def __init__(self) -> None:
        super().__init__(0, lambda: "")

    def metrics(self) -> tuple[str, str]:
        return METRICS, ""

    def probe(self, seconds: float) -> Probed:
        return Probed(why=f"no answer within {seconds:g} s")


class Revived(Wedged):
    """The same, which generates again."""

    def probe(self, seconds: float) -> Probed:
        del seconds
        return TOKEN


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A watch of a wedged server that has just started; what it runs is noted in `commands`."""
    commands: list[str] = []

    def run(*argv: str, seconds: float = 0) -> tuple[int, str]:
        del seconds
        commands.append(" ".join(argv))
        return 0, ""

    monkeypatch.setattr(vllm_life, "output_of", run)
    monkeypatch.setattr(vllm_life, "unit_now", lambda _: Unit("active", str(len(restarts_in(commands))), 0.0, 0))
    folders = [tmp_path / name for name in ("state", "live")]
    for each in folders:
        each.mkdir()
    evidence = Evidence(folders[0] / "evidence", (), (8000,))
    limits = Limits(still=0, probe_every=0, restarts=2)
    found = Watch("vllm.service", 1, limits, NAMES, Wedged(), evidence, Places(*folders))
    monkeypatch.setattr(found, "commands", commands, raising=False)
    return found


def restarts_in(commands: list[str]) -> list[str]:
    return [each for each in commands if each.startswith("systemctl restart")]


def looks(watch: Watch, number: int) -> list[str]:
    """The verdicts of some looks, each of a process of its own: after a restart the unit is another one."""
    found = []
    for _ in range(number):
        watch.memory = Memory(watch.memory.invocation, up=True)
        found.append(watch.once().state)
    return found


def test_wedge_is_restarted_until_the_budget_is_used_up(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(looks(watch, 6)) == {"wedged"}
    commands: list[str] = vars(watch)["commands"]
    assert restarts_in(commands) == ["systemctl restart vllm.service"] * 2
    first = commands.index("systemctl reset-failed vllm.service")
    assert commands[first + 1] == "systemctl restart vllm.service"
    told = capsys.readouterr().out.splitlines()
    refusal = "<3>sparkinstall: vllm.service is not restarted: the budget of 2 restarts an hour is used up"
    assert told.count(refusal) == 1
    assert [each["action"] for each in watch.wedges] == ["restarted", "restarted", "none"]
    state = life_state(RecordingSystem({f"{LIFE_LIVE}/state.json": (watch.places.live / "state.json").read_bytes()}))
    assert state is not None
    assert (state.left, state.budget, len(state.wedges), len(state.restarts)) == (0, 2, 3, 2)


def test_budget_outlives_the_process_of_the_service(watch: Watch) -> None:
    looks(watch, 2)
    again = Watch("vllm.service", 1, watch.limits, NAMES, watch.server, watch.evidence, watch.places)
    (watch.places.live / "state.json").unlink()
    again.recall()
    assert [each["action"] for each in again.wedges] == ["restarted", "restarted"]
    assert vllm_life.left(again.limits, again.restarts, time.time()) == 0


def test_wedge_without_room_for_evidence_is_restarted(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_path: Path, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert looks(watch, 1) == ["wedged"]
    assert restarts_in(vars(watch)["commands"]) == ["systemctl restart vllm.service"]
    assert list(watch.evidence.folder.iterdir()) == []
    trouble = "the evidence could not be saved: No space left on device"
    assert watch.wedges[0]["trouble"] == trouble
    assert f"<3>sparkinstall: {trouble} ({watch.evidence.folder})" in capsys.readouterr().out.splitlines()


def test_server_that_generates_after_a_wedge_is_told_once(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    looks(watch, 1)
    watch.server = Revived()
    assert looks(watch, 2) == ["alive", "alive"]
    assert capsys.readouterr().out.splitlines().count("<5>sparkinstall: vllm.service generates again") == 1


# --- the step


@pytest.mark.parametrize(
    ("role", "settings", "there"),
    [
        ("single", {}, False),
        ("single", {"serving__model": "m"}, True),
        ("head", {"serving__model": "m"}, True),
        ("worker", {"serving__model": "m"}, False),
        ("single", {"serving__model": "m", "serving__life__enabled": False}, False),
    ],
)
def test_life_is_a_step_where_the_api_is(role: str, settings: dict[str, Any], there: bool, tmp_path: Path) -> None:
    assert ("life" in [step.name for step in catalogue.of(node_of(tmp_path, role, **settings))]) is there


def rehearsed(root: Path, role: str = "single", **settings: Any) -> str:
    on = system_of(root)
    for each in Life().resources(node_of(root, role, serving__model="m", **settings)):
        if not isinstance(state_of(each, on), NodeOnly):
            each.apply(on)
    return (root / unit_path(LIFE_UNIT)[1:]).read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize(("role", "executor"), [("single", "ray"), ("head", "ray"), ("head", "mp")])
def test_life_unit_is_accepted_by_systemd(role: str, executor: str, tmp_path: Path) -> None:
    text = rehearsed(tmp_path, role, cluster__executor=executor)
    assert complaints_of_systemd(LocalReader(str(tmp_path)), LIFE_UNIT, text.encode()) == []


def test_life_unit_passes_settings_and_names_of_metrics(tmp_path: Path) -> None:
    text = rehearsed(tmp_path, "head", cluster__executor="mp", serving__life__restarts_per_hour=0)
    for option in ("port 8000", "every 10", "still 300", "restarts 0", "also-port 29501", f"asleep {vllm.SLEEP_STATE}"):
        assert f"    --{option}" in text
    assert (tmp_path / LIFE_PROGRAM[1:]).read_bytes() == as_file("vllm_life")
    assert (tmp_path / LIFE_FOLDER[1:]).is_dir()


def test_life_unit_of_an_open_api_names_the_file_of_the_key(tmp_path: Path) -> None:
    text = rehearsed(tmp_path, serving__allow="192.168.1.0/24", serving__port=8001)
    assert text.count(f"    --key-file {API_KEY}") == 1
    assert "    --port 8001 " in text
    assert "key-file" not in rehearsed(tmp_path)


# --- what it reports


def noted(**more: Any) -> bytes:
    now = vllm_life.utc(time.time())
    has = {"checked": now, "state": "idle", "why": "", "budget": 3, "left": 2, "wedges": [], "restarts": [now]}
    return json.dumps({**has, **more}).encode()


WEDGE = {"at": "2026-11-29T10:00:00Z", "why": "stopped", "invocation": "a", "action": "restarted", "evidence": "/e"}


def test_state_is_read_from_memory_then_from_the_disk() -> None:
    on = RecordingSystem({f"{LIFE_LIVE}/state.json": b"{", f"{LIFE_FOLDER}/state.json": noted(wedges=[WEDGE])})
    state = life_state(on)
    assert state is not None
    assert state.wedges == [Wedge("2026-11-29T10:00:00Z", "stopped", "restarted", "/e")]
    assert summary(state) == "idle; 1 wedge and 1 restarts in 24 h, 2 of 3 restarts left this hour"
    assert life_state(RecordingSystem()) is None


def test_status_shows_wedges_restarts_and_evidence(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    words = ("status", "--root", str(tmp_path), "--config", str(config))
    config.write_text("serving: {model: /m}\n")
    live = tmp_path / LIFE_LIVE[1:]
    live.mkdir(parents=True)
    (live / "state.json").write_bytes(noted(wedges=[WEDGE]))
    found = envelope(in_this_process(*words, "--json"))["data"]["life"]
    assert (found["state"], found["budget"], found["left"], len(found["restarts"])) == ("idle", 3, 2, 1)
    assert found["wedges"] == [{each: WEDGE.get(each, "") for each in ("at", "why", "action", "evidence", "trouble")}]
    config.write_text("serving: {model: /m, life: {enabled: false}}\n")
    assert envelope(in_this_process(*words, "--json"))["data"]["life"] is None


def test_folder_of_the_evidence_is_taken_for_no_second_installation(tmp_path: Path) -> None:
    chosen = ("--stack", "0.22.1", "--platform", "x86_64", "--set", "nccl.mode=wheel")
    served = ("--set", "serving.model=/m", "--set", "serving.allow=192.0.2.0/24")
    words = ("run", "serving", "life", "--root", str(tmp_path), *chosen, *served, "--yes", "--json")
    first, second = (envelope(in_this_process(*words)) for _ in range(2))
    assert (first["status"], second["status"]) == ("good", "good"), second["errors"]
    assert (tmp_path / LIFE_FOLDER[1:]).is_dir()
    (error,) = envelope(in_this_process(*words, "--set", "prefix=/opt/other"))["errors"]
    assert error["message"] == (
        f"this node was set up in {tmp_path}/opt/sparkinstall/services, and `prefix` is /opt/other now"
    )


@pytest.mark.parametrize(
    ("state", "verdict"),
    [
        (LifeState("2026-11-29T10:00:00Z", "idle", "", 3, 3), "pass"),
        (LifeState("2026-11-29T10:00:00Z", "idle", "", 3, 0, [Wedge("2026-11-29T09:59:00Z", "")]), "warn"),
        (LifeState("2026-11-29T10:00:00Z", "wedged", "", 3, 0), "warn"),
        (LifeState("2026-11-29T09:00:00Z", "idle", "", 3, 3), "fail"),
        (None, "warn"),
    ],
)  # fmt: skip
def test_probe_judges_what_was_noted(state: LifeState | None, verdict: str, tmp_path: Path) -> None:
    now = vllm_life.epoch("2026-11-29T10:00:20Z")
    assert life.judged(node_of(tmp_path, serving__model="m"), state, now).verdict == verdict
