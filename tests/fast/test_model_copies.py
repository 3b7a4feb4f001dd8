"""`sparkinstall models sync`: real programs and sockets; the other nodes are folders of this machine."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.filesize import decimal

from sparkinstall.cluster import bootstrap
from sparkinstall.cluster.file_server import CopyFailed, FileServer
from sparkinstall.cluster.model_copies import Own
from sparkinstall.core.model_snapshots import Unusable, understood
from tests.support.far_nodes import FarNodes
from tests.support.model_hub import COMMIT, digest
from tests.support.mounts import small_disk
from tests.support.rehearsals import (
    CHECKOUT,
    ORDINARY_USER,
    envelope,
    everything_with_times,
    in_this_process,
    output_of,
    tree,
)
from tests.support.stored_models import BIG, FILES, FOLDER, MODEL, OTHER, store

SIZE = sum(map(len, set(FILES.values())))
CACHE = ".cache/huggingface/hub"


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FarNodes:
    """The nodes spark-2 and spark-3, and this machine with one model in its cache."""
    made = FarNodes(tmp_path, CHECKOUT, bootstrap.digest())
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**made.environment(), "HF_HOME": str(tmp_path / "here")}.items():
        monkeypatch.setenv(name, value)
    store(tmp_path / "here/hub" / FOLDER)
    made.add_real("spark-2", "127.0.0.2")
    made.add_real("spark-3", "127.0.0.3")
    return made


@pytest.fixture
def here(nodes: FarNodes) -> Path:
    """The model's folder in the cache of this machine."""
    return nodes.lab / "here/hub" / FOLDER


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[FileServer]:
    """The servers of files that this machine starts."""
    started: list[FileServer] = []

    class Recorded(FileServer):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            started.append(self)

    monkeypatch.setattr("sparkinstall.cluster.file_server.FileServer", Recorded)
    return started


def _sync(*words: str, code: int = 0) -> dict[str, Any]:
    run = in_this_process("models", "sync", *words, "--json")
    assert run.returncode == code, output_of(run)
    return envelope(run)


def _came(reply: dict[str, Any]) -> dict[str, tuple[str, int, int]]:
    return {each["host"]: (each["outcome"], each["files"], each["bytes"]) for each in reply["data"]["nodes"]}


def _complete(*hosts: str) -> dict[str, list[str]]:
    return dict(envelope(in_this_process("models", "list", *hosts, "--json"))["data"]["nodes"])


def _layout(folder: Path) -> dict[str, Any]:
    """Everything in a model's folder; a list of files by what it says."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    links = {path: os.readlink(folder / path) for path in found if (folder / path).is_symlink()}
    return {
        **{path: json.loads(found[path]) if path.endswith(f"{COMMIT}.json") else found[path] for path in found},
        **links,
    }


def test_sync_brings_the_same_files_links_and_refs_to_every_node(nodes: FarNodes, here: Path) -> None:
    reply = _sync(MODEL, "spark-2", "spark-3")
    assert _came(reply) == dict.fromkeys(("spark-2", "spark-3"), ("changed", len(FILES) - 1, SIZE))
    assert reply["data"]["models"] == [f"{MODEL}@{COMMIT}"]
    for host in ("spark-2", "spark-3"):
        assert _layout(nodes.lab / host / CACHE / FOLDER) == _layout(here)
    assert _complete("spark-2", "spark-3") == {host: [f"{MODEL}@{COMMIT}"] for host in ("spark-2", "spark-3")}


def test_sync_tells_the_progress_of_each_node(nodes: FarNodes) -> None:
    run = in_this_process("models", "sync", MODEL, "spark-2", "spark-3")
    assert run.returncode == 0, output_of(run)
    for host in ("spark-2", "spark-3"):
        told = [line for line in run.stderr.splitlines() if line.startswith(f"{host} │   {MODEL}: ")]
        assert any(line.endswith(f" of {decimal(SIZE)}") or " left" in line for line in told), run.stderr
        assert f"✓ {host}: {len(FILES) - 1} files, {decimal(SIZE)}" in run.stdout
        assert not (nodes.lab / host / CACHE / FOLDER / "blobs" / f"{digest(BIG)}.incomplete").exists()


def test_sync_again_copies_nothing(nodes: FarNodes) -> None:
    _sync("spark-2")
    before = tree(nodes.lab / "spark-2" / CACHE / FOLDER / "blobs", everything_with_times)
    assert "nothing was copied" in in_this_process("models", "sync", MODEL, "spark-2").stdout
    assert tree(nodes.lab / "spark-2" / CACHE / FOLDER / "blobs", everything_with_times) == before


def test_sync_of_a_cache_without_a_list_of_files_goes_by_the_links(nodes: FarNodes, here: Path) -> None:
    shutil.rmtree(here / "trees")
    _sync("spark-2")
    there = nodes.lab / "spark-2" / CACHE / FOLDER
    shutil.rmtree(there / "trees")
    assert _layout(there) == _layout(here)


def test_sync_that_was_killed_resumes_within_the_file_and_never_looks_complete(
    nodes: FarNodes, servers: list[FileServer]
) -> None:
    there = nodes.lab / "spark-2" / CACHE / FOLDER
    (nodes.lab / "spark-2/dies-after").write_text(str(2 * len(OTHER)))
    (error,) = _sync(MODEL, "spark-2", code=5)["errors"]
    assert "spark-2" in error["message"]
    (part,) = there.glob(f"blobs/{digest(BIG)}.incomplete")
    arrived = part.stat().st_size
    assert 2 * len(OTHER) <= arrived < len(BIG)
    assert not list(there.glob("snapshots/*")) and not (there / "refs").exists()
    assert _complete("spark-2") == {"spark-2": []}
    (nodes.lab / "spark-2/dies-after").unlink()
    (_, _, missing) = _came(_sync(MODEL, "spark-2"))["spark-2"]
    assert missing <= SIZE - arrived
    assert servers[-1].sent < missing + 4096, "the rest, and the list"
    assert _complete("spark-2") == {"spark-2": [f"{MODEL}@{COMMIT}"]}


def test_sync_of_a_damaged_file_brings_the_others_and_no_snapshot(nodes: FarNodes, here: Path) -> None:
    (here / "blobs" / digest(BIG)).write_bytes(BIG[:-1] + b"x")
    (error,) = _sync(MODEL, "spark-2", code=5)["errors"]
    assert "spark-2" in error["message"] and "is damaged" in error["message"]
    assert f"models verify {MODEL}" in error["hint"]
    there = nodes.lab / "spark-2" / CACHE / FOLDER
    assert not (there / "blobs" / digest(BIG)).exists()
    assert not list(there.glob("snapshots/*")) and not (there / "refs").exists()
    (here / "blobs" / digest(BIG)).write_bytes(BIG)
    assert _came(_sync(MODEL, "spark-2"))["spark-2"][0] == "changed"


@pytest.fixture
def unable(nodes: FarNodes) -> Iterator[dict[str, str]]:
    """Three nodes that cannot take the model, and what is said of each."""
    nodes.add_real("full", "127.0.0.4")
    nodes.add_real("foreign", "127.0.0.5", through=" ".join(ORDINARY_USER[:2]))
    nodes.add_real("elsewhere", "203.0.113.9")
    (nodes.lab / "silent").mkdir()
    (nodes.lab / "silent/ssh-says").write_text("ssh: connect to host silent port 22: Connection refused\n")
    (nodes.lab / "foreign" / CACHE).mkdir(parents=True)
    os.chown(nodes.lab / "foreign" / CACHE, 12345, 12345)
    with small_disk(nodes.lab / "full/.cache", "1m"):
        yield {
            "full": "not enough space in", "foreign": "belongs to another user (12345)",
            "silent": "refuses ssh connections", "elsewhere": "are in no common network",
        }  # fmt: skip


def test_nodes_that_cannot_take_a_model_are_named_and_the_others_get_it(
    unable: dict[str, str], nodes: FarNodes
) -> None:
    reply = _sync(MODEL, "full", "foreign", "silent", "elsewhere", "spark-2", code=5)
    errors = {each["message"] for each in reply["errors"]}
    assert len(errors) == len(unable)
    for host, what in unable.items():
        assert any(host in each and what in each for each in errors), (host, errors)
    assert _came(reply)["spark-2"] == ("changed", len(FILES) - 1, SIZE)
    assert not list((nodes.lab / "full/.cache").rglob("blobs")) and not list((nodes.lab / "foreign" / CACHE).iterdir())


def test_sync_without_nodes_goes_to_the_workers_of_a_head(nodes: FarNodes) -> None:
    nodes.add_real("192.168.100.11", "127.0.0.6")
    (nodes.lab / ".config").mkdir()
    (nodes.lab / ".config/sparkinstall.yaml").write_text("cluster: {role: head}\n")
    assert _came(_sync(MODEL))["192.168.100.11"][0] == "changed"
    assert "complete on" in (text := in_this_process("models", "list").stdout) and "192.168.100.11" in text
    shutil.rmtree(nodes.lab / "192.168.100.11/.local")
    run = in_this_process("models", "list")
    assert run.returncode == 0 and "192.168.100.11 was not asked" in run.stdout


def test_this_machine_among_the_nodes_is_left_alone(nodes: FarNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparkinstall.facts.machine.identity", lambda _: "127.0.0.2")
    assert _came(_sync(MODEL, "spark-2")) == {"spark-2": ("unchanged", 0, 0)}
    assert not (nodes.lab / "spark-2" / CACHE).exists()


def _cut(here: Path) -> None:
    (here / "blobs" / digest(BIG)).write_bytes(b"x")


def _unhashed(here: Path) -> None:
    shutil.rmtree(here / "trees")
    (here / "snapshots" / COMMIT / "own.txt").write_text("not a link")


@pytest.mark.parametrize(
    ("words", "change", "what"),
    [
        (("org/tiny-modle", "spark-2"), None, "there is no model 'org/tiny-modle'"),
        ((MODEL,), None, "names no nodes"),
        ((MODEL, "spark-2", "spark-2"), None, "is named twice"),
        ((MODEL, "spark-2"), _cut, "is not complete here"),
        ((MODEL, "spark-2"), _unhashed, "is not complete here"),
        (("spark-2",), _cut, "no model in"),
    ],
)
def test_sync_that_cannot_be_meant_is_refused_before_any_node_is_asked(
    words: tuple[str, ...], change: Callable[[Path], None] | None, what: str, nodes: FarNodes, here: Path
) -> None:
    if change:
        change(here)
    (error,) = _sync(*words, code=2)["errors"]
    assert what in error["message"] and error["hint"]
    assert change is not _cut or words[0] == "spark-2" or "a.safetensors missing" in error["cause"]
    assert not (nodes.lab / "trips").exists()


def _listing(**changes: Any) -> bytes:
    file = {
        "path": "a",
        "size": 1,
        "blob_id": "0" * 40,
        **{name: changes.pop(name) for name in list(changes) if name in _OF_FILE},
    }
    return msgspec.json.encode([{"model": MODEL, "commit": COMMIT, "refs": ["main"], "files": [file], **changes}])


_OF_FILE = ("path", "size", "blob_id", "sha256")


@pytest.mark.parametrize(
    "listing",
    [
        b"", b"{}", b"[1]", b"\xff", _listing(path="../a"), _listing(path="/etc/x"), _listing(path="a\nb"),
        _listing(blob_id="../../x"), _listing(blob_id=""), _listing(sha256="0" * 63), _listing(size=-1),
        _listing(size=True), _listing(refs=["../../x"]), _listing(refs=["/x"]), _listing(model="../x"),
        _listing(model="a/b/c"), _listing(commit="main"), _listing(files=[]),
    ],
)  # fmt: skip
def test_list_of_models_that_is_hostile_is_refused(listing: bytes) -> None:
    assert understood(_listing())
    with pytest.raises(Unusable):
        understood(listing)


def test_node_that_names_no_addresses_is_in_no_common_network() -> None:
    own = Own("m", [(IPv4Interface("10.0.0.1/24"), 1000)])
    with pytest.raises(CopyFailed, match="in no common network"):
        own.shared_with("spark-2", ["::1", "10.0.0.300", "\x1b[2J"])
    assert own.shared_with("spark-2", ["?", "10.0.0.2"]) == "10.0.0.1"


def test_machine_with_a_hostile_list_is_refused(nodes: FarNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparkinstall.core.model_snapshots.encoded", lambda _: _listing(path="../a"))
    (error,) = _sync(MODEL, "spark-2", code=5)["errors"]
    assert "spark-2" in error["message"] and "list of models is refused" in error["message"]
    assert not (nodes.lab / "spark-2" / CACHE / FOLDER).exists()
