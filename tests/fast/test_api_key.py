"""The API's key: who is let in, where the key is from, and that it is nowhere to be seen.

tests/nodes/test_serving.py tries every route of a real vLLM.
"""

import asyncio
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from sparkinstall import payloads
from sparkinstall.cli.serve import curl
from sparkinstall.core.ask import server_of
from sparkinstall.core.serve_record import Serving as ServingRecord
from sparkinstall.core.session import Target, open_session
from sparkinstall.events import silent
from sparkinstall.facts.vllm_releases import shipped
from sparkinstall.journal.journal import Journal
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.journal.undo import undo_all
from sparkinstall.layout import API_KEY
from sparkinstall.node import Node
from sparkinstall.probes import vllm_client
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok
from sparkinstall.resources.secret_files import ApiKey, NamedSecret
from sparkinstall.resources.systemd import Service, UnitFile, complaints_of_systemd
from sparkinstall.resources.template import render
from sparkinstall.steps import Step
from sparkinstall.steps.life import Life
from sparkinstall.steps.ray import Ray
from sparkinstall.steps.serving import Serving, arguments
from sparkinstall.system.local import LocalReader, LocalSystem
from tests.support.chat_server import ChatServer, chatting
from tests.support.machine import Machine, OnASpark
from tests.support.nodes import node_of, system_of

KEY = "a-key-of-this-test-0123"
OPEN = {"serving__model": "/srv/model", "serving__allow": "192.168.1.0/24"}
MIDDLEWARE = ["--middleware", "sparkinstall_api_key.RequireKey"]
Message = Mapping[str, Any]


# --- the middleware


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The middleware, imported from the file that a node has."""
    path = tmp_path_factory.mktemp("python") / "sparkinstall_api_key.py"
    path.write_bytes(payloads.as_file("api_key"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    file = tmp_path / "api-key"
    file.write_text(f"{KEY}\n")
    return file


def sent_to(module: ModuleType, scope: dict[str, Any]) -> list[Message]:
    """What a client gets; the app behind the middleware answers with its own name."""
    sent: list[Message] = []

    async def app(_scope: Message, _receive: Any, send: Any) -> None:
        await send({"type": "app"})

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("the body of a rejected request is not waited for")

    asyncio.run(module.RequireKey(app)(scope, receive, send))
    return sent


def is_let_in(module: ModuleType, *headers: tuple[bytes, bytes]) -> bool:
    sent = sent_to(module, {"type": "http", "path": "/", "headers": headers})
    assert sent[0]["type"] == "app" or sent[0]["status"] == 401
    return bool(sent[0]["type"] == "app")


GIVEN = KEY.encode()


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer " + GIVEN)],
        [(b"Authorization", b"bearer " + GIVEN)],
        [(b"AUTHORIZATION", b"BEARER   " + GIVEN + b" ")],
        [(b"host", b"x"), (b"authorization", b"Bearer " + GIVEN)],
    ],
)
def test_key_is_let_in(headers: Sequence[tuple[bytes, bytes]], module: ModuleType, credential: Path) -> None:
    del credential
    assert is_let_in(module, *headers)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer" + GIVEN)],
        [(b"authorization", b"Bearer\t" + GIVEN)],
        [(b"authorization", GIVEN)],
        [(b"authorization", b"Basic " + GIVEN)],
        [(b"authorization", b"Bearer " + GIVEN[:-1])],
        [(b"authorization", b"Bearer " + GIVEN + b"x")],
        [(b"authorization", b"Bearer " + GIVEN + b"\n")],
        [(b"authorization", b"Bearer " + GIVEN.upper())],
        [(b"authorization", b"Bearer " + GIVEN + b", Bearer x")],
        [(b"authorization", b"Bearer \xff\xfe")],
        # Of two, another program could take the other one.
        [(b"authorization", b"Bearer " + GIVEN), (b"authorization", b"Bearer x")],
        [(b"authorization", b"Bearer " + GIVEN)] * 2,
        [(b"x-authorization", b"Bearer " + GIVEN)],
        [(b"authorization ", b"Bearer " + GIVEN)],
        [(b"x-api-key", GIVEN)],
        [(b"cookie", b"authorization=Bearer " + GIVEN)],
    ],
)
def test_anything_else_is_not(headers: Sequence[tuple[bytes, bytes]], module: ModuleType, credential: Path) -> None:
    del credential
    assert not is_let_in(module, *headers)


def test_every_path_method_and_client_needs_the_key(module: ModuleType, credential: Path) -> None:
    del credential
    for path in ("/", "/health", "/metrics", "//v1/models", "/v1/models/..", "", "*", "http://x/v1"):
        for method in ("GET", "OPTIONS", "HEAD", "TRACE"):
            scope: dict[str, Any] = {
                "type": "http",
                "method": method,
                "path": path,
                "headers": [],
                "client": ("127.0.0.1", 9),
            }
            assert sent_to(module, scope)[0]["status"] == 401, (method, path)
    assert sent_to(module, {"type": "http"})[0]["status"] == 401


def test_rejection_says_how_to_ask(module: ModuleType, credential: Path) -> None:
    del credential
    start, body = sent_to(module, {"type": "http", "headers": []})
    headers = dict(start["headers"])
    assert headers[b"www-authenticate"] == b"Bearer"
    assert int(headers[b"content-length"]) == len(body["body"])
    assert b"this API asks for a key" in body["body"] and GIVEN not in body["body"]


def test_rejected_request_leaves_no_query_for_the_log(module: ModuleType, credential: Path) -> None:
    del credential
    scope: dict[str, Any] = {"type": "http", "headers": [], "query_string": b"api_key=" + GIVEN}
    sent_to(module, scope)
    assert GIVEN not in str(scope).encode()
    known = [(b"authorization", b"Bearer " + GIVEN)]
    scope = {"type": "http", "headers": known, "query_string": b"stream=1"}
    sent_to(module, scope)
    assert scope["query_string"] == b"stream=1"


def test_websocket_without_the_key_is_closed_before_it_is_accepted(module: ModuleType, credential: Path) -> None:
    del credential
    assert [each["type"] for each in sent_to(module, {"type": "websocket", "headers": []})] == ["websocket.close"]
    headers = [(b"authorization", b"Bearer " + GIVEN)]
    assert sent_to(module, {"type": "websocket", "headers": headers}) == [{"type": "app"}]


def test_start_of_the_server_passes_and_an_unknown_kind_does_not(module: ModuleType, credential: Path) -> None:
    del credential
    assert sent_to(module, {"type": "lifespan"}) == [{"type": "app"}]
    with pytest.raises(module.Refused, match="of the kind webtransport"):
        sent_to(module, {"type": "webtransport", "headers": []})


BAD = [
    b"",
    b"\n",
    b"short",
    b"two words of a key\n",
    b"first-line-of-it\nsecond-line-of-it\n",
    b"k\xc3\xa9y" * 9,
    b"x" * 9999,
]


@pytest.mark.parametrize("content", BAD)
def test_middleware_without_a_usable_key_does_not_start(content: bytes, module: ModuleType, credential: Path) -> None:
    credential.write_bytes(content)
    with pytest.raises(module.Refused) as refused:
        module.RequireKey(None)
    assert not content.strip() or content.decode(errors="replace").strip() not in str(refused.value)
    credential.unlink()
    with pytest.raises(module.Refused, match="No such file"):
        module.RequireKey(None)


def checked(folder: Path | None, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**env, **({"CREDENTIALS_DIRECTORY": str(folder)} if folder else {})}
    argv = [sys.executable, "-c", payloads.as_file("api_key").decode(), *words]
    return subprocess.run(argv, env=given, capture_output=True, text=True, timeout=300)


def test_check_before_the_start_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "api-key").write_text(f"{KEY}\r\n")
    assert (checked(tmp_path).returncode, checked(tmp_path, VLLM_API_KEY=KEY).returncode) == (0, 0)
    other = checked(tmp_path, VLLM_API_KEY="another-key-of-vllm")
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr == "sparkinstall: VLLM_API_KEY is another key than the API's, so that nobody could use /v1\n"
    assert "sparkinstall: systemd gives no credential" in checked(None).stderr
    (tmp_path / "api-key").write_text("short")
    assert checked(tmp_path).stderr.startswith("sparkinstall: the API's key is not one line of 16 to 4096")


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (("--grpc",), {}, "with --grpc"),
        (("--grp",), {}, "with --grpc"),
        (("--grpc-port", "8001"), {}, "with --grpc"),
        ((), {"VLLM_USE_RUST_FRONTEND": "1"}, "with VLLM_USE_RUST_FRONTEND"),
    ],
)
def test_check_before_the_start_refuses_a_server_without_middleware(
    words: tuple[str, ...], env: dict[str, str], message: str, credential: Path
) -> None:
    refused = checked(credential.parent, *words, **env)
    assert refused.returncode == 1
    assert refused.stderr == f"sparkinstall: {message} the API's key would not be asked for\n"
    assert checked(credential.parent, "--gpu-memory-utilization", VLLM_USE_RUST_FRONTEND="0").returncode == 0


def test_unit_checks_what_would_not_ask_for_the_key(tmp_path: Path) -> None:
    node = node_of(tmp_path, **OPEN, serving__arguments=["--enforce-eager", "--grpc"])
    assert re.search(
        r"^ExecStartPre=\S+/python \S+/sparkinstall_api_key.py --grpc$", unit_of(node, LocalReader(str(tmp_path))), re.M
    )


def test_every_stack_takes_a_middleware() -> None:
    assert all("--middleware" in release.options for release in shipped())


# --- the file


def key_at(root: Path) -> Path:
    return root / API_KEY.removeprefix("/")


def test_api_key_is_made_once(tmp_path: Path) -> None:
    key, on = ApiKey(API_KEY), system_of(tmp_path)
    state = key.check(on)
    assert isinstance(state, Drift) and (state.before, state.after) == ("", "")
    key.apply(on)
    assert isinstance(key.check(on), Ok)
    made = key_at(tmp_path).read_text()
    assert re.fullmatch(r"[0-9a-f]{64}\n", made)
    assert stat.S_IMODE(key_at(tmp_path).stat().st_mode) == 0o600
    ApiKey("/etc/other").apply(on)
    assert (tmp_path / "etc/other").read_text() != made


def test_api_key_is_in_no_record_and_removed_by_uninstall(tmp_path: Path) -> None:
    system = LocalSystem(str(tmp_path))
    state = StateFolder(system)
    with state.hold("all", silent):
        on = JournaledSystem(system, Journal(state.home, "run"), "serving", state.home / "log", silent)
        ApiKey(API_KEY).apply(on)
        made = key_at(tmp_path).read_text().strip()
        # Rotated, as the documents have it.
        key_at(tmp_path).unlink()
        ApiKey(API_KEY).apply(on)
    again = key_at(tmp_path).read_text().strip()
    assert again != made
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != key_at(tmp_path)]
    assert files
    for path in files:
        text = path.read_text()
        assert made not in text and again not in text, path
    assert {each.outcome for each in undo_all(state)} <= {"removed", "nothing"}
    assert not key_at(tmp_path).exists()


def test_api_key_that_is_empty_is_made_again(tmp_path: Path) -> None:
    key_at(tmp_path).parent.mkdir()
    key_at(tmp_path).touch(0o600)
    key, on = ApiKey(API_KEY), system_of(tmp_path)
    assert isinstance(key.check(on), Drift)
    key.apply(on)
    assert len(key_at(tmp_path).read_text()) == 65


def test_api_key_of_the_user_is_kept_and_never_copied(tmp_path: Path) -> None:
    file = key_at(tmp_path)
    file.parent.mkdir()
    file.write_text(KEY)
    on = system_of(tmp_path)
    file.chmod(0o644)
    state = ApiKey(API_KEY).check(on)
    assert isinstance(state, Conflict) and state.hint == f"`sudo chmod 600 {API_KEY}`"
    file.chmod(0o600)
    assert isinstance(ApiKey(API_KEY).check(on), Ok)
    file.unlink()
    file.symlink_to("/etc/passwd")
    assert isinstance(ApiKey(API_KEY).check(on), Conflict)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.exists, "does not exist"),
        (lambda path: path.touch(0o600), "is empty"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.symlink_to("/dev/null"), "is a link"),
        (lambda path: (path.write_text(KEY), path.chmod(0o640)), "others than its owner may read"),
    ],
)
def test_named_secret_that_cannot_be_used_is_a_conflict(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "key")
    state = NamedSecret("/key", "serving.key_file").check(Machine(str(tmp_path)))
    assert isinstance(state, Conflict) and message in state.message and state.hint


def test_named_secret_is_used_as_it_is(tmp_path: Path) -> None:
    secret = NamedSecret("/key", "serving.key_file")
    assert isinstance(secret.check(LocalReader(str(tmp_path))), NodeOnly), "a rehearsal does not need it"
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o400)
    assert isinstance(secret.check(Machine(str(tmp_path))), Ok)


def test_service_is_restarted_for_another_key_of_which_time_and_size_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    os.utime(tmp_path / "key", ns=(0, 7))
    (tmp_path / "noted.json").write_text(f'{{"/key": "7 {len(KEY)}"}}')
    runs = "LoadState=loaded\nActiveState=active\nUnitFileState=enabled\nNeedDaemonReload=no\n"
    on = OnASpark(tmp_path, {"systemctl": runs})
    service = Service("some.service", lambda _: (), "/noted.json", secrets=("/key",))
    assert isinstance(service.check(on), Ok)
    (tmp_path / "key").write_text(KEY.upper())
    state = service.check(on)
    assert isinstance(state, Drift) and state.summary == "start some.service: changed since its last start: /key"


# --- the step


def unit_of(node: Node, on: LocalReader, step: Step | None = None) -> str:
    (unit,) = [each for each in (step or Serving()).resources(node) if isinstance(each, UnitFile)]
    values = unit.values(on)
    assert isinstance(values, Mapping)
    return render(unit.template, {**values, "path": unit.path}).decode()


@pytest.mark.parametrize(
    ("settings", "file"),
    [
        ({}, None),
        ({"serving__arguments": ["--host", "127.0.0.1"]}, None),
        ({"serving__arguments": ["--host=localhost"]}, None),
        ({"serving__allow": "192.168.1.0/24"}, API_KEY),
        ({"serving__arguments": ["--host", "0.0.0.0"]}, API_KEY),
        ({"serving__arguments": ["--host=192.168.1.5"]}, API_KEY),
        ({"serving__arguments": ["--ho", "::"]}, API_KEY),
        ({"serving__arguments": ["--host", "127.0.0.1", "--host", "0.0.0.0"]}, API_KEY),
        ({"serving__key_file": "/etc/mine"}, "/etc/mine"),
        ({"serving__allow": "192.168.1.0/24", "serving__key_file": "/etc/mine"}, "/etc/mine"),
        ({"serving__allow": "192.168.1.0/24", "cluster__role": "head"}, API_KEY),
        ({"serving__allow": "192.168.1.0/24", "cluster__role": "worker", "cluster__executor": "mp"}, None),
    ],
)
def test_step_asks_for_the_key_where_a_network_may_reach_the_api(
    settings: dict[str, Any], file: str | None, tmp_path: Path
) -> None:
    role = settings.pop("cluster__role", "single")
    node, on = node_of(tmp_path, role, serving__model="/srv/model", **settings), LocalReader(str(tmp_path))
    text, words, keys = unit_of(node, on), arguments(node), [each.key for each in Serving().resources(node)]
    assert node.api_key == file
    if file is None:
        assert "LoadCredential" not in text and "PYTHONPATH" not in text and "--middleware" not in words
        assert not any(each.startswith("secret:") for each in keys)
        return
    assert f"LoadCredential=api-key:{file}\n" in text
    at = words.index("--middleware")
    assert words[at : at + 2] == MIDDLEWARE
    assert f"secret:{file}" in keys and f"file:{node.api_key_module}" in keys
    assert text.index("ExecStartPre=") < text.index("ExecStart=")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_accepts_the_units_with_credentials(tmp_path: Path) -> None:
    hub = {"hub__offline": False, "hub__token_file": "/etc/hub-token"}
    for name in ("ray", "vllm", "python"):
        program = tmp_path / "opt/sparkinstall/venv/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.symlink_to("/bin/true")
    on = LocalReader(str(tmp_path))
    for step, role in ((Serving(), "single"), (Serving(), "head"), (Ray(), "head"), (Ray(), "worker")):
        text = unit_of(node_of(tmp_path, role, **OPEN, **hub), on, step)
        assert "LoadCredential=hf-token:/etc/hub-token\nEnvironment=HF_TOKEN_PATH=%d/hf-token\n" in text
        assert complaints_of_systemd(on, "vllm.service", text.encode()) == []


def test_proof_of_life_reads_the_key_from_its_file(tmp_path: Path) -> None:
    on = LocalReader(str(tmp_path))
    assert f"--key-file {API_KEY}" in unit_of(node_of(tmp_path, **OPEN), on, Life())
    assert "--key-file" not in unit_of(node_of(tmp_path, serving__model="/srv/model"), on, Life())


def test_token_of_the_hub_is_only_for_units_that_download(tmp_path: Path) -> None:
    named = {"hub__token_file": "/etc/hub-token"}
    assert node_of(tmp_path, **OPEN, **named).hub_token is None
    assert node_of(tmp_path, **OPEN, **named, hub__offline=False).hub_token == "/etc/hub-token"


def test_rehearsal_of_the_step_makes_the_key_and_leaves_nothing(tmp_path: Path) -> None:
    node, system = node_of(tmp_path, **OPEN), LocalSystem(str(tmp_path))
    state = StateFolder(system)
    with state.hold("all", silent):
        on = JournaledSystem(system, Journal(state.home, "run"), "serving", state.home / "log", silent)
        for resource in Serving().resources(node):
            if not isinstance(resource, Service):
                resource.apply(on)
                assert isinstance(resource.check(on), Ok), resource.key
    made = key_at(tmp_path).read_text().strip()
    unit = (tmp_path / "etc/systemd/system/vllm.service").read_text()
    assert len(made) == 64 and made not in unit
    module = tmp_path / node.api_key_module.removeprefix("/")
    assert module.read_bytes() == payloads.as_file("api_key")
    # As vLLM does when it imports it.
    (module.parent / "__pycache__").mkdir()
    (module.parent / "__pycache__/sparkinstall_api_key.cpython-312.pyc").write_bytes(b"")
    assert {each.outcome for each in undo_all(state)} <= {"removed", "nothing"}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- who asks


def test_probes_and_ask_have_the_key_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    key_at(tmp_path).parent.mkdir()
    key_at(tmp_path).write_text(f"{KEY}\n")
    node, on = node_of(tmp_path, **OPEN), LocalReader(str(tmp_path))
    assert vllm_client.key_of(node, on) == (KEY, API_KEY)
    assert vllm_client.key_of(node_of(tmp_path), on) == ("", "")
    monkeypatch.setenv("VLLM_API_KEY", "from-the-shell")
    assert vllm_client.key_of(node, on) == ("from-the-shell", "VLLM_API_KEY")


def test_key_of_this_node_goes_to_no_other_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    key_at(tmp_path).parent.mkdir()
    key_at(tmp_path).write_text(f"{KEY}\n")
    session = open_session(Target(root=tmp_path, settings=("serving.model=/m", "serving.allow=192.168.1.0/24")))
    assert session.node.api_key == API_KEY
    assert server_of(session, "http://192.168.1.9:8000", None).key == ""


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_line_that_serve_prints_gives_the_key_to_curl_through_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "a key").write_text(f"{KEY}\n")
    with chatting(ChatServer(names=("tiny",), key=KEY)) as server:
        fields = dict.fromkeys(("served", "recipe", "revision", "invocation", "started", "kernel", "driver"), "")
        none: dict[str, Any] = {
            "phases": [],
            "versions": {},
            "clocks": {},
            "server": None,
            "engine": None,
            "seconds": 1,
            "first_token": 1,
        }
        memory = {"total": 1, "available": 1, "free_blocks": {}}
        given = {
            "seconds": 1,
            "first_token": 1,
            "url": f"{server.url}/v1",
            "model": "tiny",
            "key_file": f"{tmp_path}/a key",
            "memory": memory,
        }
        line = curl(msgspec.convert({**fields, **none, **given}, ServingRecord))
        assert "$(" not in line and KEY not in line and "\n" not in line
        done = subprocess.run(line.replace("sudo ", ""), shell=True, capture_output=True, text=True, timeout=300)
    assert "42" in "".join(re.findall(r'"content": "(.*?)"', done.stdout)), done
