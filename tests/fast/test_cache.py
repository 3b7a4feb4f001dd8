"""`sparkinstall cache`: what is there and who needs it, what is damaged, and what may go."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict

from sparkinstall.core.converge import Dialog, InstallOptions, Supply, converge
from sparkinstall.core.session import Target, open_session
from sparkinstall.downloads import sha256_of
from sparkinstall.errors import Busy
from sparkinstall.events import silent
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.resources.nccl import Recipe
from sparkinstall.system.local import LocalSystem
from sparkinstall.system.locks import cache_in_use, cache_unused
from sparkinstall.wheelhouse import Wheelhouse
from tests.support.rehearsals import empty_rehearsal, envelope, in_this_process, output_of
from tests.support.tiny_stack import tiny_stack


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a wheel of a stack of one's own, one that nothing needs, and what else may be there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache/sparkinstall"
    tiny_stack(tmp_path / "stack")
    tiny_stack(tmp_path / "other", more=b"other")
    wheels = cache / "wheels"
    wheels.mkdir(parents=True)
    name = "vllm-0.18.1-py3-none-any.whl"
    shutil.copy(tmp_path / "stack" / name, wheels)
    shutil.copy(tmp_path / "other" / name, wheels / "vllm-0.18.0-py3-none-any.whl")
    Wheelhouse(wheels).refresh()
    for path in ("wheels/arriving/0/x.whl.part", "nccl/0.tar.part", "nccl/nccl-v2.29.7-1.git/HEAD", "uv/archive-v0/x",
                 "nccl/nccl-v1.0.0-1.git/HEAD", "index/page", "hashes/x", "mine"):  # fmt: skip
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / path).write_text("12345")
    _build(cache / "nccl/built/0123456789ab", "2.29.7")
    _build(cache / "nccl/built/ba9876543210", "1.0.0")
    return cache


def _build(folder: Path, version: str) -> None:
    folder.mkdir(parents=True)
    (folder / "libnccl.so").write_bytes(b"a library")
    recipe = asdict(Recipe(**dict.fromkeys(Recipe.__struct_fields__, ""))) | {"version": version}
    stamp = {"recipe": recipe, "library": [9, 0], "build_id": "", "sha256": sha256_of(folder / "libnccl.so")}
    (folder / "build.json").write_text(json.dumps(stamp))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A rehearsal with the stack."""
    root = empty_rehearsal(tmp_path / "node")
    options = {"settings": {"stack": str(tiny_stack(tmp_path / "stack"))}}
    StateFolder(LocalSystem(str(root))).remember_options(options)
    return root


def _run(root: Path, *words: str) -> dict[str, Any]:
    return dict(envelope(in_this_process("cache", *words, "--root", root, "--json"))["data"])


NEEDLESS = {
    "wheels/vllm-0.18.0-py3-none-any.whl", "wheels/arriving/0", "nccl/0.tar.part", "nccl/nccl-v1.0.0-1.git",
    "nccl/built/ba9876543210", "uv", "hashes",
}  # fmt: skip
NEEDED = {"wheels/vllm-0.18.1-py3-none-any.whl": ["tiny"], "nccl/nccl-v2.29.7-1.git": ["0.29.0"]}


def test_list_names_who_needs_what(cache: Path, root: Path) -> None:
    found = _run(root, "list")
    entries = {each["path"]: each for each in found["entries"]}
    assert {path for path, each in entries.items() if not each["needed_by"]} == NEEDLESS | {"index", "mine"}
    assert {path: entries[path]["needed_by"] for path in NEEDED} == NEEDED
    assert entries["uv"] == {"path": "uv", "kind": "former", "size": 5, "needed_by": []}
    assert (found["folder"], found["size"]) == (str(cache), sum(each["size"] for each in entries.values()))


def test_list_as_text_names_what_nothing_needs(cache: Path, root: Path) -> None:
    run = in_this_process("cache", "list", "--root", root)
    assert run.returncode == 0 and str(cache) in run.stdout, output_of(run)
    assert f"Nothing needs {len(NEEDLESS)} of these" in run.stdout and "NCCL builds" in run.stdout
    assert "ba9876543210" not in run.stdout
    assert "ba9876543210" in in_this_process("cache", "list", "--root", root, "-v").stdout


def test_wheel_of_an_installed_environment_is_needed(cache: Path, root: Path) -> None:
    wheel = cache / "wheels/vllm-0.18.0-py3-none-any.whl"
    lock = root / "opt/sparkinstall/venvs/mine-0/sparkinstall.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(f"vllm==0.18.0 --hash=sha256:{sha256_of(wheel)}\n")
    (entry,) = [each for each in _run(root, "list")["entries"] if each["path"].endswith(wheel.name)]
    assert entry["needed_by"] == [f"installed below {root}/opt/sparkinstall"]


def test_verify_removes_what_is_damaged(cache: Path, root: Path) -> None:
    assert _run(root, "verify") == {"checked": 4, "damaged": []}
    wheel = cache / "wheels/vllm-0.18.1-py3-none-any.whl"
    found, content = wheel.stat(), bytearray(wheel.read_bytes())
    content[40] ^= 1
    wheel.write_bytes(content)
    os.utime(wheel, ns=(found.st_atime_ns, found.st_mtime_ns))
    (cache / "nccl/built/0123456789ab/libnccl.so").write_bytes(b"b library")
    (cache / "nccl/built/ba9876543210/build.json").write_text("{")
    run = in_this_process("cache", "verify", "--root", root)
    assert run.returncode == 3, output_of(run)
    assert f"wheels/{wheel.name} was damaged" in run.stdout
    assert not wheel.exists() and not list(cache.glob("nccl/built/*"))
    assert (cache / "wheels/vllm-0.18.0-py3-none-any.whl").exists()
    assert _run(root, "verify") == {"checked": 1, "damaged": []}


def test_what_is_incomplete_is_needed_while_its_process_lives(cache: Path, root: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in ("arriving/0a-{}", "own-packages/0a-3.12-x86_64.{}.new"):
        for number in (os.getpid(), ended.pid):
            (cache / name.format(number)).mkdir(parents=True)
    (cache / "own-packages/0a-3.11-x86_64").mkdir()
    going = {f"arriving/0a-{ended.pid}", f"own-packages/0a-3.12-x86_64.{ended.pid}.new"}
    assert set(_run(root, "prune", "--yes")["removed"]) == NEEDLESS | going
    kept = {each["path"]: each["kind"] for each in _run(root, "list")["entries"]}
    assert kept[f"arriving/0a-{os.getpid()}"] == "incomplete" and kept["own-packages/0a-3.11-x86_64"] == "tool"
    assert not [path for path in going if (cache / path).exists()]


def test_folder_for_arriving_files_that_is_empty_is_nothing_to_remove(cache: Path, root: Path) -> None:
    _run(root, "prune", "--yes")
    (cache / "arriving").mkdir()
    assert _run(root, "prune", "--yes") == {"removed": [], "freed": 0}


def test_prune_removes_what_nothing_needs(cache: Path, root: Path) -> None:
    run = in_this_process("cache", "prune", "--root", root)
    assert run.returncode == 2 and "--yes" in output_of(run), "it asks"
    before = {path for path in cache.rglob("*") if path.is_file()}
    assert {path for path in cache.rglob("*") if path.is_file()} == before
    assert set(_run(root, "prune", "--yes")["removed"]) == NEEDLESS
    assert not [path for path in NEEDLESS if (cache / path).exists()]
    assert all((cache / path).exists() for path in (*NEEDED, "index/page", "mine"))
    assert _run(root, "prune", "--yes") == {"removed": [], "freed": 0}
    assert _run(root, "verify") == {"checked": 2, "damaged": []}


def test_prune_all_leaves_nothing_but_the_index_of_the_wheels(cache: Path, root: Path) -> None:
    _run(root, "prune", "--all", "--yes")
    left = {path.name for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert left == {"index.json"}
    assert json.loads((cache / "wheels/index.json").read_text()) == {}


def test_prune_during_a_run_is_refused(cache: Path, root: Path) -> None:
    with StateFolder(LocalSystem(str(root))).hold("all", silent):
        run = in_this_process("cache", "prune", "--yes", "--root", root)
    assert run.returncode == 1 and "`all`" in output_of(run)
    assert all((cache / path).exists() for path in NEEDLESS)


def _is_refused(root: Path) -> bool:
    run = in_this_process("cache", "prune", "--yes", "--root", root, "--json")
    return run.returncode == 1 and [each["code"] for each in envelope(run)["errors"]] == ["busy"]


def test_prune_while_another_nodes_run_uses_the_cache_is_refused(cache: Path, root: Path) -> None:
    with cache_in_use(cache), cache_in_use(cache):
        assert _is_refused(root)
        assert all((cache / path).exists() for path in NEEDLESS)
    assert set(_run(root, "prune", "--yes")["removed"]) == NEEDLESS


def test_run_uses_the_cache_while_it_takes_from_a_bundle(cache: Path, root: Path, tmp_path: Path) -> None:
    refused = []
    another = empty_rehearsal(tmp_path / "another")
    supply = Supply(bring_in=lambda _: refused.append(_is_refused(another)))
    dialog = Dialog(lambda _: None, lambda _: None, lambda: nullcontext(silent))
    converge(open_session(Target(root=root)), InstallOptions(only=("packages",), force=True), dialog, supply)
    assert refused == [True] and all((cache / path).exists() for path in NEEDLESS)
    assert not _is_refused(another)


def test_run_that_brings_nothing_to_the_cache_leaves_no_folder(tmp_path: Path) -> None:
    with cache_in_use(tmp_path / "cache"):
        assert (tmp_path / "cache").is_dir()
    assert not (tmp_path / "cache").exists()


def test_cache_of_a_run_stays_when_another_that_brought_nothing_ends(tmp_path: Path) -> None:
    cache = tmp_path / "cache/sparkinstall"
    with cache_in_use(cache):
        with cache_in_use(cache):
            pass
        (cache / "mine").write_text("")
        with pytest.raises(Busy), cache_unused(cache):
            pass


def test_cache_that_others_leave_and_remove_is_locked_each_time(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def use(_: int) -> bool:
        with cache_in_use(cache):
            return cache.is_dir()

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(1000)))
    assert not cache.exists()


@pytest.mark.parametrize("verb", ["list", "verify", "prune"])
def test_cache_that_does_not_exist_is_empty_and_not_created(
    verb: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    run = in_this_process("cache", verb, "--root", root)
    assert run.returncode == 0, output_of(run)
    assert not (tmp_path / "none").exists()
