"""The proof of life runs as root: what it does where a server, a file or a person is not as it expects."""

import json
import os
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sparkinstall.payloads import vllm_life
from sparkinstall.payloads.vllm_life import Evidence, Limits, Memory, Names, Places, Probed, Server, Unit, Watch
from tests.support.local_server import listening


class Hostile(BaseHTTPRequestHandler):
    """Asks for a key, and sends without end."""

    keys: list[str]
    body = b""

    def do_GET(self) -> None:
        self.keys.append(self.headers.get("Authorization", ""))
        self.send_response(200 if self.body or self.keys[-1] else 401)
        self.end_headers()
        try:
            while self.body:
                self.wfile.write(self.body)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Hostile.keys, Hostile.body = [], b""
    with listening(Hostile) as url:
        yield urlsplit(url).port or 0


def test_answer_without_an_end_is_not_kept(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_life, "MOST_BYTES", 1 << 20)
    Hostile.body = b"x" * 65536
    began = time.monotonic()
    assert Server(port, lambda: "").metrics() == ("", "/metrics does not answer: more than 1 MiB come")
    assert Server(port, lambda: "").probe(9) == Probed(why="more than 1 MiB come")
    assert time.monotonic() - began < vllm_life.SCRAPE_SECONDS


def test_json_that_is_too_deep_is_no_token(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    del port
    monkeypatch.setattr(Server, "request", lambda *_: (200, "[" * 200_000))
    assert Server(0, lambda: "").probe(9).why.startswith("its answer cannot be read")


def test_key_goes_to_the_user_of_the_unit_only(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("sesame\n")
    monkeypatch.setattr(vllm_life, "unit_now", lambda _: Unit("active", "a", 0.0, os.getpid()))
    assert vllm_life.users_at(port) == {os.geteuid()}
    server = Server(port, lambda: vllm_life.key_for("vllm.service", str(tmp_path / "key"), port))
    assert server.metrics() == ("", "")
    assert Hostile.keys == ["", "Bearer sesame"]
    # Another user's program has the port now, and asks for the key.
    monkeypatch.setattr(vllm_life, "users_at", lambda _: {os.geteuid() + 1})
    assert server.metrics() == ("", "/metrics answers HTTP 401")
    assert Hostile.keys[2:] == [""]
    monkeypatch.setattr(vllm_life, "users_at", lambda _: {os.geteuid(), os.geteuid() + 1})
    assert server.metrics() == ("", "/metrics answers HTTP 401")
    assert Hostile.keys[3:] == [""]


@pytest.mark.parametrize("content", [b"two\nlines", b"\xff\xfe", b"", b"k" * 5000, "schl\u00fcssel".encode()])
def test_file_without_a_key_gives_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    assert vllm_life.key_of("no-such.service", str(tmp_path / "key")) == ""


def test_pipe_in_the_place_of_the_key_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key")
    assert vllm_life.key_of("no-such.service", str(tmp_path / "key")) == ""


class Wedged(Server):
    """Answers always the same, and generates nothing."""

    def __init__(self) -> None:
        super().__init__(0, lambda: "")

    def metrics(self) -> tuple[str, str]:
        return "run 1\ngen 7\n", ""

    def probe(self, seconds: float) -> Probed:
        return Probed(why=f"no answer within {seconds:g} s")


def watch_at(folder: Path, unit: Callable[[], Unit], monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(vllm_life, "unit_now", lambda _: unit())
    places = Places(folder / "state", folder / "live")
    for each in (places.state, places.live):
        each.mkdir()
    limits, names = Limits(still=0, probe_every=0), Names(["run"], [], ["gen"], [])
    evidence = Evidence(places.state / "evidence", (), (8000,))
    return Watch("vllm.service", 1, limits, names, Wedged(), evidence, places, memory=Memory("a", up=True))


@pytest.mark.parametrize("then", [Unit("inactive", "a"), Unit("active", "b"), Unit("activating", "a")])
def test_unit_that_someone_stopped_or_started_during_the_evidence_is_left_alone(
    then: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, commands = [Unit("active", "a")], list[str]()

    def run(*argv: str, seconds: float = 0) -> tuple[int, str]:
        del seconds
        commands.append(" ".join(argv))
        now[0] = then
        return 0, ""

    monkeypatch.setattr(vllm_life, "output_of", run)
    watch = watch_at(tmp_path, lambda: now[0], monkeypatch)
    assert watch.once().state == "wedged"
    assert not [each for each in commands if each.startswith("systemctl")]
    assert [each["action"] for each in watch.wedges] == ["left alone: it was stopped or started meanwhile"]
    assert watch.restarts == []


@pytest.mark.parametrize("lost", ["state", "live"])
def test_budget_is_noted_before_a_restart_in_which_the_service_is_killed(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def run(*argv: str, seconds: float = 0) -> tuple[int, str]:
        del seconds
        if "restart" in argv:
            raise Killed
        return 0, ""

    monkeypatch.setattr(vllm_life, "output_of", run)
    watch = watch_at(tmp_path, lambda: Unit("active", "a"), monkeypatch)
    with pytest.raises(Killed):
        watch.once()
    (tmp_path / lost / "state.json").unlink()
    again = Watch("vllm.service", 1, watch.limits, watch.names, watch.server, watch.evidence, watch.places)
    again.recall()
    assert vllm_life.left(again.limits, again.restarts, time.time()) == 2


def test_state_that_is_damaged_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watch_at(tmp_path, Unit, monkeypatch)
    (watch.places.live / "state.json").write_text(json.dumps({"wedges": [{"why": "no time"}], "restarts": []}))
    watch.recall()
    assert watch.wedges == []
