"""Whose program has the port of vLLM: tables of the kernel in, users out; a stranger gets no key."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sparkinstall.facts import listening
from sparkinstall.facts.listening import owner_of_port, stranger_at_the_api
from sparkinstall.probes import vllm_client
from sparkinstall.probes.vllm_client import Api
from sparkinstall.system.local import LocalReader
from tests.support.chat_server import ChatServer, chatting
from tests.support.machine import OnASpark
from tests.support.nodes import NODE
from tests.support.rehearsals import envelope, in_this_process

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
PORT = NODE.config.serving.port
KEY = "sesame-sesame-sesame"


def row(address: str, uid: int, state: str = "0A", port: int = PORT) -> str:
    return f"   0: {address}:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000  {uid}    0 77 1\n"


def machine(root: Path, *rows: str, six: str = "") -> OnASpark:
    (root / "proc/net").mkdir(parents=True)
    (root / "proc/net/tcp").write_text(HEAD + "".join(rows))
    (root / "proc/net/tcp6").write_text(HEAD + six)
    return OnASpark(root, {})


@pytest.mark.parametrize(
    ("rows", "six", "owner"),
    [
        ((), "", None),
        ((row("0100007F", 1001),), "", 1001),
        ((row("00000000", 1001),), "", 1001),
        ((row("00000000", 1001), row("0100007F", 1002)), "", 1002),
        ((row("0100007F", 1001, state="06"), row("0100007F", 1001, port=PORT + 1), row("0A01A8C0", 7)), "", None),
        ((), row("0" * 32, 1003), 1003),
        (("cut",), "", None),
    ],
)
def test_owner_is_that_of_the_socket_that_takes_the_connection(
    rows: tuple[str, ...], six: str, owner: int | None, tmp_path: Path
) -> None:
    assert owner_of_port(machine(tmp_path, *rows, six=six), PORT) == owner


def test_owner_of_a_port_of_this_machine_is_this_user() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert owner_of_port(LocalReader(), port) == os.geteuid()
    assert owner_of_port(LocalReader(), port) is None


def test_stranger_is_neither_root_nor_this_user_nor_who_has_set_up_the_node(tmp_path: Path) -> None:
    for uid in {0, os.geteuid()}:
        assert stranger_at_the_api(NODE, machine(tmp_path / str(uid), row("0100007F", uid))) == ""
    assert stranger_at_the_api(NODE, machine(tmp_path / "x", row("0100007F", 4_000_000))) == "user 4000000"
    # Who has set it up, in the eyes of root.
    on = machine(tmp_path / "y", row("0100007F", 4_000_000))
    venv = Path(on.real(NODE.venv))
    venv.mkdir(parents=True)
    assert stranger_at_the_api(NODE, on) == "user 4000000"
    if os.geteuid() == 0:
        os.chown(venv, 4_000_000, -1)
        assert stranger_at_the_api(NODE, on) == ""


def test_stranger_gets_no_key_from_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setattr(listening, "owner_of_port", lambda *_: 4_000_000)
    with chatting(ChatServer(key=KEY)) as server:
        settings = {"model": "/srv/tiny", "port": int(server.url.rpartition(":")[2])}
        (tmp_path / "config.yaml").write_text(json.dumps({"serving": settings}))
        words = ("--config", tmp_path / "config.yaml", "--json")
        for verb in (("ask", "x"), ("watch", "--once"), ("bench", "58/2", "--output", tmp_path / "x.json")):
            run = in_this_process(*verb, *words)
            (error,) = envelope(run)["errors"]
            assert run.returncode == 1 and "a program of user 4000000 listens at" in error["message"], verb
            assert KEY not in run.stdout
        assert server.asked == []
        # A server that is named is the user's own choice.
        assert in_this_process("ask", "x", "--url", server.url).returncode == 0


def test_stranger_gets_no_key_from_the_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    on: Any = machine(tmp_path, row("0100007F", 4_000_000))
    reply = Api(NODE, on).completion
    assert reply.stranger and reply.error.endswith("and gets no key")
    assert str(PORT) in vllm_client.whose(PORT)
    monkeypatch.delenv("VLLM_API_KEY")
    # Without a key there is none to lose.
    assert not Api(replace(NODE), on).completion.stranger
