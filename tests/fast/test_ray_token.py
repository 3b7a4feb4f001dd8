"""Ray's token: created once, never shown, readable by its owner only."""

import io
import os
import stat
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from sparkinstall.errors import BadUsage, Problem
from sparkinstall.events import silent
from sparkinstall.journal.journal import Journal
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.journal.undo import undo_all
from sparkinstall.node import Node
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok
from sparkinstall.resources.ray_token import RayToken, by_hand, given
from sparkinstall.system.local import LocalSystem
from tests.support.nodes import node_of, system_of

TOKEN = "0123456789abcdef-of-a-test"


def with_file(node: Node, file: str) -> Node:
    return replace(node, token_file=file)


def token_at(root: Path) -> Path:
    return root / "opt/sparkinstall/ray-token"


@pytest.fixture(autouse=True)
def _without_a_cached_token() -> None:
    given.cache_clear()


def test_ray_token_of_the_head_is_created_once(tmp_path: Path) -> None:
    token, on = RayToken(node_of(tmp_path, "head")), system_of(tmp_path)
    assert isinstance(token.check(on), Drift)
    token.apply(on)
    assert isinstance(token.check(on), Ok)
    made = token_at(tmp_path).read_text()
    assert len(made) == 64
    assert stat.S_IMODE(token_at(tmp_path).stat().st_mode) == 0o600
    token.apply(on)
    assert token_at(tmp_path).read_text() == made


def test_ray_token_is_in_no_state_journal_or_log(tmp_path: Path) -> None:
    token, on = RayToken(node_of(tmp_path, "head")), system_of(tmp_path)
    state = token.check(on)
    assert isinstance(state, Drift) and (state.before, state.after) == ("", "")
    token.apply(on)
    token_at(tmp_path).chmod(0o644)
    shown = repr(token.check(on))
    token.apply(on)
    made = token_at(tmp_path).read_text()
    assert made not in shown
    for path in (tmp_path / "var").rglob("*"):
        if path.is_file() and "originals" not in path.parts:
            assert made not in path.read_text(), path


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o400])
def test_ray_token_with_a_loose_mode_is_restricted_and_kept(mode: int, tmp_path: Path) -> None:
    token, on = RayToken(node_of(tmp_path, "head")), system_of(tmp_path)
    token.apply(on)
    made = token_at(tmp_path).read_text()
    token_at(tmp_path).chmod(mode)
    assert isinstance(token.check(on), Drift)
    token.apply(on)
    assert isinstance(token.check(on), Ok)
    assert token_at(tmp_path).read_text() == made


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the owner needs root")
def test_ray_token_of_another_user_gets_the_owner(tmp_path: Path) -> None:
    token, on = RayToken(node_of(tmp_path, "head")), system_of(tmp_path)
    token.apply(on)
    os.chown(token_at(tmp_path), 12345, 12345)
    assert isinstance(token.check(on), Drift)
    token.apply(on)
    assert isinstance(token.check(on), Ok)


@pytest.mark.parametrize("content", [b"", b"short", b"two words that are long enough", b"\x00" * 40])
def test_ray_token_with_invalid_content_is_drift_and_refused(content: bytes, tmp_path: Path) -> None:
    token, on = RayToken(node_of(tmp_path, "head")), system_of(tmp_path)
    token_at(tmp_path).parent.mkdir(parents=True)
    token_at(tmp_path).write_bytes(content)
    token_at(tmp_path).chmod(0o600)
    assert isinstance(token.check(on), Drift)
    file = tmp_path / "given"
    file.write_bytes(content)
    with pytest.raises(BadUsage):
        given(str(file))


def test_ray_token_with_a_folder_in_its_place_conflicts(tmp_path: Path) -> None:
    token_at(tmp_path).mkdir(parents=True)
    assert isinstance(RayToken(node_of(tmp_path, "head")).check(system_of(tmp_path)), Conflict)


def test_ray_token_of_a_worker_follows_the_token_file(tmp_path: Path) -> None:
    file, on = tmp_path / "given", system_of(tmp_path)
    for text in (TOKEN, TOKEN + "-two"):
        file.write_text(text + "\n")
        given.cache_clear()
        token = RayToken(with_file(node_of(tmp_path, "worker"), str(file)))
        assert isinstance(token.check(on), Drift)
        token.apply(on)
        assert isinstance(token.check(on), Ok)
        assert token_at(tmp_path).read_text() == text
    assert isinstance(RayToken(node_of(tmp_path, "worker")).check(on), Ok), "the token is kept without a file"


def test_ray_token_from_standard_input_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TOKEN.encode() + b"\n")))
    token, on = RayToken(with_file(node_of(tmp_path, "worker"), "-")), system_of(tmp_path)
    assert isinstance(token.check(on), Drift)
    token.apply(on)
    assert isinstance(token.check(on), Ok)


def test_ray_token_from_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadUsage, match="cannot be read: No such file"):
        given(str(tmp_path / "none"))


def test_ray_token_of_a_worker_in_a_rehearsal_is_node_only(tmp_path: Path) -> None:
    assert isinstance(RayToken(node_of(tmp_path, "worker")).check(system_of(tmp_path)), NodeOnly)


def test_ray_token_that_cannot_be_fetched_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text("#!/bin/sh\necho 'ssh: connect to host 192.168.100.10 port 22: No route to host' >&2\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    node = node_of(tmp_path, "worker")
    with pytest.raises(Problem) as caught:
        RayToken(node).apply(system_of(tmp_path))
    assert "192.168.100.10 could not be fetched" in caught.value.message
    assert caught.value.cause and "No route to host" in caught.value.cause
    assert "ssh 192.168.100.10 cat /opt/sparkinstall/ray-token | sparkinstall multi-node --role worker" in by_hand(node)
    assert caught.value.hint == by_hand(node)


def test_undo_removes_the_ray_token(tmp_path: Path) -> None:
    system = LocalSystem(str(tmp_path))
    state = StateFolder(system)
    state.home.mkdir(parents=True)
    on = JournaledSystem(system, Journal(state.home, "run"), "ray", tmp_path / "log", silent)
    RayToken(node_of(tmp_path, "head")).apply(on)
    undo_all(state)
    assert not token_at(tmp_path).exists()
    assert not (tmp_path / "opt").exists()
