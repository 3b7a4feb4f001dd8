"""Wheels and NCCL copied between the caches of two nodes: complete, verified by hash, and confined to the cache."""

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import asdict

from sparkinstall.cluster import artifacts
from sparkinstall.cluster.file_server import CopyFailed, serving
from sparkinstall.cluster.protocol import Offer
from sparkinstall.resources.nccl import NcclLibrary
from sparkinstall.resources.nccl_source import NcclSource
from tests.support.cuda_toolkit import toolkit
from tests.support.far_nodes import FarNodes, look, problem, step
from tests.support.rehearsals import Rehearsal, output_of
from tests.support.tiny_stack import small_stack, tiny_stack
from tests.support.two_caches import HEAD, OTHER, WORKER, Side, ended, fetched, offering

NOWHERE = "http://127.0.0.1:9/"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Side, Side]:
    """A head with the wheel of a stack, and a worker without."""
    stack = tiny_stack(tmp_path / "stack")
    settings = (f"stack={stack}",)
    head, worker = Side(tmp_path / "head", HEAD, settings), Side(tmp_path / "worker", WORKER, settings)
    (head.cache / "wheels").mkdir(parents=True)
    worker.home.mkdir()
    shutil.copy(next(stack.parent.glob("*.whl")), head.cache / "wheels")
    return head, worker


def _wheels(side: Side) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in side.cache.glob("wheels/*.whl")}


# --- wheels


@pytest.mark.network
def test_copied_wheels_install_without_a_network(pair: tuple[Side, Side], tmp_path: Path) -> None:
    stack = small_stack(tmp_path / "small")
    head, worker = (replace(side, settings=(f"stack={stack}",)) for side in pair)
    for wheel in stack.parent.glob("*.whl"):
        shutil.copy(wheel, head.cache / "wheels")
    with offering(head, "environment") as offered:
        code, data, error = fetched(worker, offered, "environment")
        assert (code, error) == (0, "")
        assert ended(offered)["sent"] > data["bytes"], "and the list"
    assert (data["changed"], data["files"]) == (True, 4)
    assert _wheels(worker) == _wheels(head)
    assert not list(worker.cache.glob("arriving/*"))
    node = Rehearsal(tmp_path / "node", ("--stack", str(stack), "--platform", "x86_64", "--only", "environment"))
    run = node.all("--json", "--set", "nccl.mode=wheel", **{**worker.environment, "UV_DEFAULT_INDEX": NOWHERE})
    assert run.returncode == 0, output_of(run)


def test_copy_skips_what_the_worker_has(pair: tuple[Side, Side]) -> None:
    head, worker = pair
    with offering(head, "environment") as offered:
        assert fetched(worker, offered, "environment")[1]["files"] == 1
    with offering(head, "environment") as offered:
        assert fetched(worker, offered, "environment")[1] == {"changed": False, "files": 0, "bytes": 0}


def test_copy_serves_several_workers_at_once(pair: tuple[Side, Side], tmp_path: Path) -> None:
    head, worker = pair
    other = Side(tmp_path / "other", OTHER, worker.settings)
    other.home.mkdir()
    with offering(head, "environment", workers=2) as offered:
        both = [side.start("fetch", "--only", "environment") for side in (worker, other)]
        for each in both:
            out, err = each.communicate(offered.as_given(), timeout=60)
            assert each.returncode == 0, out + err
        assert ended(offered)["sent"] > 2 * sum(map(len, _wheels(head).values()))
    assert _wheels(worker) == _wheels(other) == _wheels(head)


def test_copy_of_another_stack_is_not_taken(pair: tuple[Side, Side], tmp_path: Path) -> None:
    head, worker = pair
    other = small_stack(tmp_path / "other")
    with offering(head, "environment") as offered:
        code, data, _ = fetched(replace(worker, settings=(f"stack={other}",)), offered, "environment")
    assert (code, data["files"]) == (0, 0)
    assert not _wheels(worker)


def test_copy_that_stopped_in_a_file_resumes_there(pair: tuple[Side, Side]) -> None:
    head, worker = pair
    ((name, content),) = _wheels(head).items()
    arriving = worker.cache / "wheels/arriving" / hashlib.sha256(content).hexdigest()
    arriving.mkdir(parents=True)
    (arriving / f"{name}.part").write_bytes(content[:-100])
    with offering(head, "environment") as offered:
        assert fetched(worker, offered, "environment")[0] == 0
        assert ended(offered)["sent"] < len(content), "only the list and the rest"
    assert _wheels(worker) == _wheels(head)
    assert not list(worker.cache.glob("wheels/arriving/*"))


def test_copy_of_a_wheel_without_a_known_hash_is_taken_by_its_name(pair: tuple[Side, Side], tmp_path: Path) -> None:
    """The hash of a wheel that the stack names by URL alone is recorded at the first install."""
    head, worker = pair
    ((name, content),) = _wheels(head).items()
    stack = tmp_path / "stack/tiny.yaml"
    url = f"https://127.0.0.1:9/{name}"
    stack.write_text(stack.read_text().replace("{lock: tiny.lock}", f"{{wheels: [{{url: '{url}'}}]}}"))
    recorded = head.prefix / f"locks/tiny.{platform.machine()}.lock"
    recorded.parent.mkdir(parents=True)
    recorded.write_text(f"vllm @ {url} --hash=sha256:{hashlib.sha256(content).hexdigest()}\n")
    with offering(head, "environment") as offered:
        assert fetched(worker, offered, "environment")[1]["files"] == 1
    assert _wheels(worker) == _wheels(head)


# --- who gets a copy, and what is trusted


def test_copy_with_a_wrong_token_is_refused_and_blocks_nobody(pair: tuple[Side, Side]) -> None:
    head, worker = pair
    with offering(head, "environment") as offered:
        code, _, error = fetched(worker, offered, "environment", token="another")
        assert code == 1 and "403" in error
        assert not _wheels(worker)
        assert fetched(worker, offered, "environment")[0] == 0


def test_head_with_another_certificate_is_refused_before_the_token_is_sent(pair: tuple[Side, Side]) -> None:
    head, worker = pair
    with offering(head, "environment") as offered:
        code, _, error = fetched(worker, offered, "environment", fingerprint="0" * 64)
    assert code == 1 and "Fingerprints did not match" in error
    assert not _wheels(worker)


def test_copy_with_a_changed_byte_is_refused(pair: tuple[Side, Side]) -> None:
    head, worker = pair
    with offering(head, "environment") as offered:
        (wheel,) = head.cache.glob("wheels/*.whl")
        content = wheel.read_bytes()
        wheel.write_bytes(content[:-1] + b"x")
        code, _, error = fetched(worker, offered, "environment")
    assert code == 1 and "is not the locked wheel" in error
    assert not _wheels(worker)


def _listing(**wheel: Any) -> bytes:
    return json.dumps({"wheels": [{"name": "a.whl", "size": 1, "sha256": "0" * 64, **wheel}]}).encode()


@pytest.mark.parametrize(
    "name", ["../x.whl", "/etc/x.whl", "a/x.whl", "x\0.whl", "a\nb.whl", "", "..", ".bashrc", "x\n"]
)
def test_list_with_a_path_as_a_name_is_refused(name: str) -> None:
    assert artifacts.understood(_listing()).wheels
    with pytest.raises(CopyFailed, match="cannot be read"):
        artifacts.understood(_listing(name=name))


@pytest.mark.parametrize(
    "listing",
    [b"", b"[]", b"null", b"\xff", b'{"wheels": 3}', b'{"wheels": [{}]}',
     _listing(size=-1), _listing(sha256="../x"), _listing(sha256=1)],
)  # fmt: skip
def test_list_that_cannot_be_read_is_refused(listing: bytes) -> None:
    with pytest.raises(CopyFailed, match="cannot be read"):
        artifacts.understood(listing)


def test_head_without_a_client_ends_after_a_while() -> None:
    began = time.monotonic()
    with serving("127.0.0.1", "token", {}) as server:
        server.wait(1, patience=0.3)
    assert 0.3 <= time.monotonic() - began < 5


def test_address_of_another_machine_cannot_be_served() -> None:
    with pytest.raises(CopyFailed, match=r"nothing can be offered at 203\.0\.113\.1"), serving("203.0.113.1", "t", {}):
        pass


# --- NCCL


_KERNEL = "__global__ void k(float* x) { *x *= 2; }\n"
_VERSION = r"""
int ncclGetVersion(int* v) { *v = 22907; return 0; }
asm(".section .nv_fatbin,\"a\"\n.incbin \"k.fatbin\"\n.text\n");
"""


@pytest.fixture(scope="module")
def small_nccl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that reports NCCL 2.29.7 and has code for sm_121, as the checks expect."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "k.cu").write_text(_KERNEL)
    (folder / "v.c").write_text(_VERSION)
    compile_ = [str(toolkit() / "bin/nvcc"), "-fatbin", "-gencode", "arch=compute_121,code=sm_121", "k.cu"]
    subprocess.run([*compile_, "-o", "k.fatbin"], cwd=folder, check=True)
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,--build-id", "v.c", "-o", "libnccl.so"], cwd=folder, check=True)
    return folder / "libnccl.so"


@pytest.fixture
def built(tmp_path: Path, small_nccl: Path) -> tuple[Side, Side]:
    """A head that has built NCCL from a tarball that the worker does not have."""
    where = str(tmp_path / "nccl.tar.gz")
    settings = ("stack=0.29.0", f"nccl.source={where}", "nccl.version=2.29.7", f"nccl.cuda_home={toolkit()}")
    head, worker = (Side(tmp_path / name, at, settings) for name, at in (("head", HEAD), ("worker", WORKER)))
    (head.cache / "nccl").mkdir(parents=True)
    (head.cache / "nccl/tarballs.json").write_text(json.dumps({where: "5" * 64}))
    worker.home.mkdir()
    source = NcclSource("2.29.7", "", "", where, None, head.cache / "nccl")
    _as_built(NcclLibrary(f"{head.prefix}/nccl", source, "121", str(toolkit()), 0, None), small_nccl)
    return head, worker


def _as_built(library: NcclLibrary, so: Path) -> None:
    recipe = library.recipe()
    folder = Path(library.folder)
    (folder / f"build-{recipe.id}/lib").mkdir(parents=True)
    shutil.copy(so, folder / f"build-{recipe.id}/lib/libnccl.so.2")
    (folder / "lib").symlink_to(f"build-{recipe.id}/lib")
    found = Path(library.library).stat()
    digest = hashlib.sha256(so.read_bytes()).hexdigest()
    stamp = {"recipe": asdict(recipe), "library": [found.st_size, found.st_mtime_ns], "build_id": "", "sha256": digest}
    (folder / "build.json").write_text(json.dumps(stamp))


def _run_nccl(worker: Side, root: Path, *more: str) -> dict[str, Any]:
    words = [word for each in (*worker.settings, *more) if "stack" not in each for word in ("--set", each)]
    argv = ["run", "nccl", "--root", str(root), "--stack", "0.29.0", *words, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "sparkinstall", *argv],
        env=worker.environment, cwd=worker.home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


@pytest.mark.network
def test_nccl_copied_from_the_head_replaces_the_build(
    built: tuple[Side, Side], small_nccl: Path, tmp_path: Path
) -> None:
    head, worker = built
    with offering(head, "nccl") as offered:
        code, data, error = fetched(worker, offered, "nccl")
    assert (code, error, data["files"]) == (0, "", 1)
    assert not (worker.cache / "nccl/arriving").exists()
    reply = _run_nccl(worker, tmp_path / "node")
    assert reply["exit_code"] == 0, reply["errors"]
    made = tmp_path / "node/opt/sparkinstall/nccl/lib/libnccl.so.2"
    assert made.read_bytes() == small_nccl.read_bytes()
    assert _run_nccl(worker, tmp_path / "node")["data"]["changed"] is False


@pytest.mark.network
@pytest.mark.parametrize("what", ["a byte", "the recipe", "the version", "the file"])
def test_nccl_of_another_recipe_is_not_used(built: tuple[Side, Side], tmp_path: Path, what: str) -> None:
    head, worker = built
    with offering(head, "nccl") as offered:
        assert fetched(worker, offered, "nccl")[0] == 0
    (waiting,) = worker.cache.glob("nccl/built/*")
    more = ["nccl.only_functions=AllReduce"] if what == "the recipe" else []
    stamp = json.loads((waiting / "build.json").read_text())
    if what != "the recipe":
        marks = {"a byte": (b"ncclGetVersion", b"ncclGotVersion"), "the file": (b"\x7fELF", b"\x7fBLF")}
        _tamper(waiting, stamp, *marks.get(what, _version_bytes()), honest=what != "a byte")
    reply = _run_nccl(worker, tmp_path / "node", *more)
    assert reply["exit_code"] != 0
    assert "neither a file nor a folder" in reply["errors"][0]["message"]
    assert not list(tmp_path.glob("node/opt/sparkinstall/nccl/lib*"))


def _version_bytes() -> tuple[bytes, bytes]:
    return (22907).to_bytes(4, "little"), (22908).to_bytes(4, "little")


def _tamper(waiting: Path, stamp: dict[str, Any], before: bytes, after: bytes, *, honest: bool) -> None:
    """Change the library; `honest` also updates its hash in the stamp."""
    content = (waiting / "libnccl.so").read_bytes()
    assert before in content
    (waiting / "libnccl.so").write_bytes(content.replace(before, after))
    if honest:
        stamp["sha256"] = hashlib.sha256((waiting / "libnccl.so").read_bytes()).hexdigest()
        (waiting / "build.json").write_text(json.dumps(stamp))


@pytest.mark.network
def test_nccl_for_another_gpu_is_skipped_with_a_warning(built: tuple[Side, Side]) -> None:
    head, worker = built
    with offering(head, "nccl") as offered:
        code, data, _ = fetched(replace(worker, settings=(*worker.settings, "nccl.arch=120")), offered, "nccl")
    assert code == 0
    assert data["warning"] == "NCCL not copied: the nodes differ in arch"
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


def test_copy_that_fails_is_a_warning_and_the_worker_builds(far: FarNodes) -> None:
    broken = [1, {}, [problem("the other node was interrupted")]]
    far.answer("spark-2", fetch=broken)
    code, reply, log = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 0, reply["errors"]
    (copy,) = [each for each in reply["data"]["nodes"][1]["phases"] if each["phase"] == "copy"]
    assert (copy["outcome"], copy["data"]["warning"]) == ("unchanged", "the other node was interrupted")
    assert "spark-2 │ copy: warning: the other node was interrupted" in log
    assert _builds(far)[-1] == ("spark-2", "multi-node")


def test_head_that_offers_nothing_delays_no_worker(far: FarNodes) -> None:
    far.answer("spark-1", offer=[1, {}, [problem("nothing can be offered")]])
    code, _, log = far.cluster("spark-1", "spark-2", "--yes")
    assert code == 0
    assert not [call for call in far.calls if call["verb"] == "fetch"]
    assert "spark-1 │ copy: warning: nothing can be offered" in log
    assert "downloads and builds what is missing" in log


def test_copy_is_skipped_if_no_worker_can_use_it(far: FarNodes) -> None:
    far.answer("spark-2", look=look("unchanged"))
    assert far.cluster("spark-1", "spark-2", "--yes")[0] == 0
    steps = [step(name, "unchanged") for name in ("environment", "nccl")]
    far.answer("spark-2", look=look(steps=[*steps, step("fp8")]))
    assert far.cluster("spark-1", "spark-2", "--yes")[0] == 0
    assert not [call for call in far.calls if call["verb"] in ("offer", "fetch")]
