"""Wheels and NCCL copied between the caches of two nodes: complete, verified by hash, and confined to the cache."""

import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import asdict

from sparkinstall.cluster import artifacts
from sparkinstall.cluster.file_server import CopyFailed, serving
from sparkinstall.cluster.protocol import Fetched, Offer
from sparkinstall.errors import CommandFailed
from sparkinstall.resources.nccl import NcclLibrary
from sparkinstall.resources.nccl_source import NcclSource
from tests.support.cuda_toolkit import toolkit
from tests.support.far_nodes import FarNodes, look, problem, step
from tests.support.nccl_library import library
from tests.support.rehearsals import Rehearsal, envelope, output_of, sparkinstall
from tests.support.tiny_stack import small_stack, tiny_stack
from tests.support.two_caches import HEAD, OTHER, WORKER, Side, offering

NOWHERE = "http://127.0.0.1:9/"
NOTHING = Fetched()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Side, Side]:
    """A head with the wheel of a stack, and a worker without."""
    stack = tiny_stack(tmp_path / "stack")
    head, worker = (
        Side(tmp_path / role, at, {"stack": str(stack)}) for role, at in (("head", HEAD), ("worker", WORKER))
    )
    (head.cache / "wheels").mkdir(parents=True)
    shutil.copy(next(stack.parent.glob("*.whl")), head.cache / "wheels")
    return head, worker


def _wheels(side: Side) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in side.cache.glob("wheels/*.whl")}


# --- wheels


@pytest.mark.network
def test_copied_wheels_install_without_a_network(pair: tuple[Side, Side], tmp_path: Path) -> None:
    stack = small_stack(tmp_path / "small")
    head, worker = (replace(side, settings={"stack": str(stack)}) for side in pair)
    for wheel in stack.parent.glob("*.whl"):
        shutil.copy(wheel, head.cache / "wheels")
    with offering(head, "environment") as offered:
        came = worker.fetch(offered, "environment")
        assert offered.sent > came.bytes, "and the list"
    assert (came.changed, came.files) == (True, 4)
    assert _wheels(worker) == _wheels(head)
    assert not list(worker.cache.glob("arriving/*"))
    node = Rehearsal(tmp_path / "node", ("--stack", str(stack), "--platform", "x86_64", "--only", "environment"))
    variables = {"HOME": str(worker.home), "XDG_CACHE_HOME": str(worker.cache.parent), "UV_DEFAULT_INDEX": NOWHERE}
    run = node.all("--json", "--set", "nccl.mode=wheel", **variables)
    assert run.returncode == 0, output_of(run)


def test_copy_takes_only_what_the_worker_needs_and_lacks(pair: tuple[Side, Side], tmp_path: Path) -> None:
    head, worker = pair
    other = Side(tmp_path / "other", OTHER, {"stack": str(small_stack(tmp_path / "small"))})
    with offering(head, "environment", workers=3) as offered:
        assert worker.fetch(offered, "environment").files == 1
        assert worker.fetch(offered, "environment") == NOTHING, "it has it"
        assert other.fetch(offered, "environment") == NOTHING, "its stack has another one"
    assert not _wheels(other)


def test_copy_serves_several_workers_at_once(pair: tuple[Side, Side], tmp_path: Path) -> None:
    head, worker = pair
    other = Side(tmp_path / "other", OTHER, worker.settings)
    with offering(head, "environment", workers=2) as offered, ThreadPoolExecutor(2) as pool:
        both = [pool.submit(side.fetch, offered, "environment") for side in (worker, other)]
        assert [each.result().files for each in both] == [1, 1]
        assert offered.sent > 2 * sum(map(len, _wheels(head).values()))
    assert _wheels(worker) == _wheels(other) == _wheels(head)


def test_copy_that_stopped_in_a_file_resumes_there(pair: tuple[Side, Side]) -> None:
    head, worker = pair
    ((name, content),) = _wheels(head).items()
    arriving = worker.cache / "wheels/arriving" / hashlib.sha256(content).hexdigest()
    arriving.mkdir(parents=True)
    (arriving / f"{name}.part").write_bytes(content[:-100])
    with offering(head, "environment") as offered:
        worker.fetch(offered, "environment")
        assert offered.sent < len(content), "only the list and the rest"
    assert _wheels(worker) == _wheels(head)
    assert not list(worker.cache.glob("wheels/arriving/*"))


def test_copy_of_a_wheel_without_a_known_hash_is_taken_by_its_name(pair: tuple[Side, Side], tmp_path: Path) -> None:
    """The hash of a wheel that the stack names by URL alone is recorded at the first install."""
    head, worker = pair
    ((name, content),) = _wheels(head).items()
    stack = tmp_path / "stack/tiny.yaml"
    url = f"https://127.0.0.1:9/{name}"
    stack.write_text(stack.read_text().replace("{lock: tiny.lock}", f"{{wheels: [{{url: '{url}'}}]}}"))
    recorded = head.home / f"opt/locks/tiny.{head.node.platform}.lock"
    recorded.parent.mkdir(parents=True)
    recorded.write_text(f"vllm @ {url} --hash=sha256:{hashlib.sha256(content).hexdigest()}\n")
    with offering(head, "environment") as offered:
        assert worker.fetch(offered, "environment").files == 1
    assert _wheels(worker) == _wheels(head)


# --- who gets a copy, and what is trusted


@pytest.mark.parametrize(
    ("other", "why"), [({"token": "another"}, "403"), ({"fingerprint": "0" * 64}, "Fingerprints did not match")]
)
def test_copy_without_the_token_or_the_certificate_is_refused_and_blocks_nobody(
    other: dict[str, str], why: str, pair: tuple[Side, Side]
) -> None:
    head, worker = pair
    with offering(head, "environment") as offered:
        with pytest.raises(CopyFailed, match=why):
            worker.fetch(offered, "environment", **other)
        assert not _wheels(worker)
        assert worker.fetch(offered, "environment").files == 1


def test_copy_with_a_changed_byte_is_refused(pair: tuple[Side, Side]) -> None:
    head, worker = pair
    with offering(head, "environment") as offered:
        (wheel,) = head.cache.glob("wheels/*.whl")
        content = wheel.read_bytes()
        wheel.write_bytes(content[:-1] + b"x")
        with pytest.raises(CommandFailed, match="is not the locked wheel"):
            worker.fetch(offered, "environment")
    assert not _wheels(worker)


def _listing(**wheel: Any) -> bytes:
    return json.dumps({"wheels": [{"name": "a.whl", "size": 1, "sha256": "0" * 64, **wheel}]}).encode()


NO_NAMES = ("../x.whl", "/etc/x.whl", "a/x.whl", "x\0.whl", "a\nb.whl", "", "..", ".bashrc", "x\n")


@pytest.mark.parametrize(
    "listing",
    [b"", b"[]", b"null", b"\xff", b'{"wheels": 3}', b'{"wheels": [{}]}', _listing(size=-1),
     _listing(sha256="../x"), _listing(sha256=1), *(_listing(name=each) for each in NO_NAMES)],
)  # fmt: skip
def test_list_that_cannot_be_read_or_names_a_path_is_refused(listing: bytes) -> None:
    assert artifacts.understood(_listing()).wheels
    with pytest.raises(CopyFailed, match="cannot be read"):
        artifacts.understood(listing)


def test_head_without_a_client_ends_after_a_while() -> None:
    # The server counts from its own start.
    began = time.monotonic()
    with serving("127.0.0.1", "token", {}) as server:
        server.wait(1, patience=0.3)
        assert time.monotonic() - began >= 0.3 and server.done == 0


def test_address_of_another_machine_cannot_be_served() -> None:
    with pytest.raises(CopyFailed, match=r"nothing can be offered at 203\.0\.113\.1"), serving("203.0.113.1", "t", {}):
        pass


# --- NCCL


@pytest.fixture
def built(tmp_path: Path) -> tuple[Side, Side]:
    """A head that has built NCCL from a tarball that the worker does not have."""
    where = str(tmp_path / "nccl.tar.gz")
    nccl = {"nccl.source": where, "nccl.version": "2.29.7", "nccl.cuda_home": str(toolkit())}
    settings = {"stack": "0.29.0", **nccl}
    head, worker = (Side(tmp_path / name, at, settings) for name, at in (("head", HEAD), ("worker", WORKER)))
    (head.cache / "nccl").mkdir(parents=True)
    (head.cache / "nccl/tarballs.json").write_text(json.dumps({where: "5" * 64}))
    source = NcclSource("2.29.7", "", "", where, None, head.cache / "nccl")
    _as_built(NcclLibrary(f"{head.home}/opt/nccl", source, "121", str(toolkit()), 0, None))
    return head, worker


def _as_built(nccl: NcclLibrary) -> None:
    recipe, folder = nccl.recipe(), Path(nccl.folder)
    made = library(folder / f"build-{recipe.id}/lib/libnccl.so.2")
    (folder / "lib").symlink_to(f"build-{recipe.id}/lib")
    found, digest = made.stat(), hashlib.sha256(made.read_bytes()).hexdigest()
    stamp = {"recipe": asdict(recipe), "library": [found.st_size, found.st_mtime_ns], "build_id": "", "sha256": digest}
    (folder / "build.json").write_text(json.dumps(stamp))


def _run_nccl(worker: Side, root: Path, **more: str) -> dict[str, Any]:
    words = [word for name, value in {**worker.settings, **more}.items() for word in ("--set", f"{name}={value}")]
    variables = {"HOME": str(worker.home), "XDG_CACHE_HOME": str(worker.cache.parent)}
    return envelope(sparkinstall("run", "nccl", "--root", root, *words, "--json", **variables))


@pytest.mark.network
def test_nccl_copied_from_the_head_replaces_the_build(built: tuple[Side, Side], tmp_path: Path) -> None:
    head, worker = built
    with offering(head, "nccl") as offered:
        assert worker.fetch(offered, "nccl").files == 1
    assert not (worker.cache / "nccl/arriving").exists()
    reply = _run_nccl(worker, tmp_path / "node")
    assert reply["exit_code"] == 0, reply["errors"]
    made = tmp_path / "node/opt/sparkinstall/nccl/lib/libnccl.so.2"
    assert made.read_bytes() == (head.home / "opt/nccl/lib/libnccl.so.2").read_bytes()
    assert _run_nccl(worker, tmp_path / "node")["data"]["changed"] is False


@pytest.mark.network
@pytest.mark.parametrize("what", ["its hash", "the recipe", "the version", "the file"])
def test_nccl_of_another_recipe_is_not_used(built: tuple[Side, Side], tmp_path: Path, what: str) -> None:
    """But for the hash, the library and its stamp agree."""
    head, worker = built
    with offering(head, "nccl") as offered:
        worker.fetch(offered, "nccl")
    (kept,) = worker.cache.glob("nccl/built/*/libnccl.so")
    if what == "the version":
        library(kept, version=22908)
    elif what != "the recipe":
        kept.write_bytes(b"no library" if what == "the file" else kept.read_bytes() + b"x")
    if what in ("the version", "the file"):
        stamp = json.loads(kept.with_name("build.json").read_text())
        stamp["sha256"] = hashlib.sha256(kept.read_bytes()).hexdigest()
        kept.with_name("build.json").write_text(json.dumps(stamp))
    more = {"nccl.only_functions": "AllReduce"} if what == "the recipe" else {}
    reply = _run_nccl(worker, tmp_path / "node", **more)
    assert reply["exit_code"] != 0
    assert "neither a file nor a folder" in reply["errors"][0]["message"]
    assert not list(tmp_path.glob("node/opt/sparkinstall/nccl/lib*"))


@pytest.mark.network
def test_nccl_for_another_gpu_is_skipped_with_a_warning(built: tuple[Side, Side]) -> None:
    head, worker = built
    with offering(head, "nccl") as offered:
        found = replace(worker, settings={**worker.settings, "nccl.arch": "120"}).fetch(offered, "nccl")
    assert found.warning == "NCCL not copied: the nodes differ in arch"
    assert not list(worker.cache.glob("nccl/built/*"))


# --- copies within `cluster`


@pytest.fixture
def far(tmp_path: Path, checkout: tuple[Path, str]) -> FarNodes:
    nodes = FarNodes(tmp_path, *checkout)
    for host in ("spark-1", "spark-2"):
        nodes.add(host, says={"offer": msgspec.json.encode(Offer(4711, "f1ngerprint")).decode()})
    return nodes


def _builds(far: FarNodes, *verbs: str) -> list[tuple[str, str]]:
    calls = [call for call in far.calls if call["verb"] in verbs or "fp8" in call["only"]]
    return [(call["host"], call["verb"]) for call in sorted(calls, key=lambda call: call["began"])]


def test_builds_run_on_the_head_then_copy_then_on_the_workers(far: FarNodes) -> None:
    code, reply, log = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 0, reply["errors"]
    assert _builds(far, "offer", "fetch") == [
        ("spark-1", "multi-node"),
        ("spark-1", "offer"),
        ("spark-2", "fetch"),
        ("spark-2", "multi-node"),
    ]
    (offer,) = [call for call in far.calls if call["verb"] == "offer"]
    (fetch,) = [call for call in far.calls if call["verb"] == "fetch"]
    given = json.loads(fetch["stdin"])
    assert given == {"token": offer["stdin"], "port": 4711, "fingerprint": "f1ngerprint"}
    assert offer["argv"][2] == "1", "the number of workers"
    assert offer["only"] == fetch["only"] == ["environment", "nccl"]
    assert len(offer["stdin"]) == 64
    assert offer["stdin"] not in log + str(offer["argv"]) + str(fetch["argv"])
    assert "f1ngerprint" not in log


def test_debian_packages_of_a_bundle_go_to_the_nodes_that_lack_some(far: FarNodes) -> None:
    (here := far.lab / ".cache/sparkinstall/debs").mkdir(parents=True)
    (here / "git_1_all.deb").write_bytes(b"git")
    far.answer("spark-1", look=look(steps=[step("packages", "unchanged"), step("ray")]))
    code, reply, log = far.cluster("spark-1", "spark-2", "--yes", XDG_CACHE_HOME="")
    assert code == 0, reply["errors"]
    assert not (far.lab / "spark-1/.cache").exists()
    assert (far.lab / "spark-2/.cache/sparkinstall/debs/git_1_all.deb").read_bytes() == b"git"
    assert "spark-2 │   copying Debian packages to the node" in log


@pytest.mark.parametrize(("host", "verb", "asked"), [("spark-2", "fetch", 1), ("spark-1", "offer", 0)])
def test_copy_that_fails_is_a_warning_and_the_worker_builds(host: str, verb: str, asked: int, far: FarNodes) -> None:
    """`asked`: where the head offers nothing, no worker waits for it."""
    far.answer(host, **{verb: [1, {}, [problem("the other node was interrupted")]]})
    code, reply, log = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 0, reply["errors"]
    why = "the other node was interrupted (a cause)"
    phases = {node["host"]: node["phases"] for node in reply["data"]["nodes"]}
    (copy,) = [each for each in phases[host] if each["phase"] == "copy"]
    assert (copy["outcome"], copy["data"]["warning"]) == ("unchanged", why)
    assert f"{host} │ copy: warning: {why}" in log
    assert ("downloads and builds what is missing" in log) is (asked == 0)
    assert len([call for call in far.calls if call["verb"] == "fetch"]) == asked
    assert _builds(far)[-1] == ("spark-2", "multi-node")


def test_copy_is_skipped_if_no_worker_can_use_it(far: FarNodes) -> None:
    far.answer("spark-2", look=look("unchanged"))
    assert far.cluster("spark-1", "spark-2", "--yes")[0] == 0
    steps = [step(name, "unchanged") for name in ("environment", "nccl")]
    far.answer("spark-2", look=look(steps=[*steps, step("fp8")]))
    assert far.cluster("spark-1", "spark-2", "--yes")[0] == 0
    assert not [call for call in far.calls if call["verb"] in ("offer", "fetch")]
