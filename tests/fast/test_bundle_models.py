"""Models in bundles: pinned by their commit, every byte compared, and installed into the cache of the hub."""

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkinstall.bundle.supply import supply
from sparkinstall.core.model_cache import ModelFolder
from sparkinstall.core.model_snapshots import whole
from sparkinstall.core.session import Target, described
from sparkinstall.errors import BadBundle, Blocked, Storage
from sparkinstall.events import silent
from sparkinstall.payloads import bundle_archive
from sparkinstall.payloads.bundle_archive import Refused, header, manifest_of
from sparkinstall.system.local import LocalReader
from tests.support.bundles import OTHER, Maker, manifest, packed, written
from tests.support.model_hub import COMMIT, ModelHub, digest, served
from tests.support.mounts import small_disk
from tests.support.rehearsals import envelope, everything_with_times, in_this_process, output_of, tree
from tests.support.stored_models import FILES, FOLDER, MODEL
from tests.support.tiny_stack import tiny_stack

NOWHERE = "http://127.0.0.1:9"
PINNED = f"{MODEL}@{COMMIT}"
IN_BUNDLE = f"models/{MODEL.replace('/', '--')}"


@pytest.fixture
def hub() -> Iterator[ModelHub]:
    with served(ModelHub(MODEL, dict(FILES))) as found:
        yield found


@pytest.fixture
def maker(tmp_path: Path, hub: ModelHub) -> Maker:
    """A machine that makes bundles, whose hub has one model."""
    made = Maker(tmp_path, tiny_stack(tmp_path / "stack"))
    made.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    return made


@pytest.fixture
def bundle(maker: Maker, tmp_path: Path) -> Path:
    maker.created(tmp_path / "b.tar", "--model", MODEL)
    return tmp_path / "b.tar"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model's folder on a node without a network, whose caches are empty."""
    for name, value in {"HF_HOME": "node/hf", "XDG_CACHE_HOME": "node/cache", "HOME": "node"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    return tmp_path / "node/hf/hub" / FOLDER


def _checks(bundle: Path, stack: Path, *, install: bool = True) -> list[str]:
    """Install the caches' part of a bundle; what is said of what it lacks."""
    target = Target(stack=str(stack), platform=OTHER, settings=("nccl.mode=wheel",), bundle=bundle)
    found = supply(described(target), LocalReader(), silent)
    (finding,) = [each.look(LocalReader()) for each in found.checks]
    if install:
        found.bring_in(silent)
    return [finding.found, finding.hint]


def test_bundle_has_a_model_pinned_by_its_commit_and_the_same_bytes_without_the_hub(
    maker: Maker, bundle: Path, tmp_path: Path
) -> None:
    found = manifest_of(bundle)
    assert found.models == (PINNED,)
    named = {each.path for each in found.folder("models")}
    assert named == {f"{IN_BUNDLE}/{COMMIT}.json", *(f"{IN_BUNDLE}/blobs/{digest(each)}" for each in FILES.values())}
    verified = in_this_process("bundle", "verify", bundle)
    assert f"With the model {MODEL} at {COMMIT[:12]}" in verified.stdout, output_of(verified)
    maker.env["HF_ENDPOINT"] = NOWHERE
    (tmp_path / "hf/hub" / FOLDER / "refs/main").unlink()
    again = maker.created(tmp_path / "again.tar", "--model", PINNED)
    assert again["models"] == [PINNED]
    assert _members(tmp_path / "again.tar", "blobs/") == _members(bundle, "blobs/")


def _members(bundle: Path, part: str) -> dict[str, str]:
    return {each.path: each.sha256 for each in manifest_of(bundle).folder("models") if part in each.path}


def test_bundle_brings_the_model_into_the_hubs_cache(maker: Maker, bundle: Path, there: Path) -> None:
    _checks(bundle, maker.stack)
    (snapshot,) = whole(ModelFolder(there.parent, MODEL))
    assert (snapshot.refs, {each.path for each in snapshot.files}) == (("main",), set(FILES))
    for path, content in FILES.items():
        assert (there / "snapshots" / COMMIT / path).read_bytes() == content
        assert os.readlink(there / "snapshots" / COMMIT / path).endswith(f"../blobs/{digest(content)}")
    found = envelope(in_this_process("models", "verify", "--json"))["data"]
    assert (found["damaged"], found["unchecked"], found["incomplete"]) == ([], [], [])
    before = tree(there, everything_with_times)
    _checks(bundle, maker.stack)
    assert tree(there, everything_with_times) == before, "it was there"


def test_next_run_removes_the_parts_of_a_killed_one_and_no_others(maker: Maker, bundle: Path, there: Path) -> None:
    blobs = there / "blobs"
    blobs.mkdir(parents=True)
    kept = {
        f"{'a' * 64}.incomplete": "a pull",
        f"{'b' * 64}.77.incomplete": "a run that goes on",
        "note.1.incomplete": "",
    }
    for name, content in {f"{'c' * 64}.4711.incomplete": "killed", f"{'d' * 40}.12.incomplete": "", **kept}.items():
        (blobs / name).write_text(content)
    with open(blobs / f"{'b' * 64}.77.incomplete") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        _checks(bundle, maker.stack)
    assert {each.name for each in blobs.iterdir() if "incomplete" in each.name} == set(kept)


def test_update_leaves_out_the_files_of_the_older_bundle(
    maker: Maker, hub: ModelHub, bundle: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["config.json"] = b'{"new": 1}'
    monkeypatch.setattr("tests.support.model_hub.COMMIT", "d" * 40)
    update = tmp_path / "u.tar"
    maker.created(update, "--model", MODEL, "--since", bundle)
    assert {each.rpartition("/")[2] for each in _members(update, "blobs/")} == {digest(b'{"new": 1}')}
    lacking, hint = _checks(update, maker.stack, install=False)
    assert f"files of the models {MODEL}" in lacking and "install the bundle that it updates" in hint
    _checks(bundle, maker.stack)
    assert "files of the models" not in _checks(update, maker.stack)[0]
    assert (there / "snapshots" / ("d" * 40) / "config.json").read_bytes() == b'{"new": 1}'
    assert (there / "refs/main").read_text() == "d" * 40
    shown = in_this_process("bundle", "diff", bundle, update).stdout
    (row,) = [line for line in shown.splitlines() if MODEL in line]
    assert COMMIT[:12] in row and "d" * 12 in row


def _packed(**changes: Any) -> dict[str, bytes]:
    """The files of a bundle with the model; `changes`: of its list."""
    listed = {path: {"path": path, "size": len(each), **_hash(each)} for path, each in FILES.items()}
    snapshot = {"model": MODEL, "commit": COMMIT, "refs": ["main"], "files": list(listed.values()), **changes}
    blobs = {f"{IN_BUNDLE}/blobs/{digest(each)}": each for each in FILES.values()}
    return {f"{IN_BUNDLE}/{COMMIT}.json": json.dumps([snapshot]).encode(), **blobs}


def _hash(content: bytes) -> dict[str, str]:
    name = digest(content)
    return {"blob_id": "", "sha256": name} if len(name) == 64 else {"blob_id": name}


SMALL = f"{IN_BUNDLE}/blobs/{digest(FILES['config.json'])}"


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (_packed(model="org/other"), "it lists the files of another model, org/other@"),
        (_packed(commit="d" * 40), "it lists the files of another model"),
        (_packed(refs=["../../x"]), "is refused"),
        (_packed(files=[{"path": "../x", "size": 0, "blob_id": "0" * 40}]), "is refused"),
        (_packed(files=[{"path": "x", "size": 0, "blob_id": "0" * 40}]), "it does not have x of"),
        ({**_packed(), f"{IN_BUNDLE}/{COMMIT}.json": b"{"}, "is refused"),
        ({**_packed(), SMALL: b"[]"}, "does not have the hash that is its name"),
    ],
)
def test_list_of_a_models_files_that_is_hostile_links_nothing(
    files: dict[str, bytes], what: str, there: Path, tmp_path: Path
) -> None:
    stack = tiny_stack(tmp_path / "stack")
    bundle = written(tmp_path, packed(files, platform=OTHER, models=(PINNED,)))
    with pytest.raises(BadBundle, match=what):
        _checks(bundle, stack)
    assert not list(there.glob("snapshots/*")) and not (there / "refs").exists()
    assert not list(there.glob("blobs/*.incomplete"))
    _checks(written(tmp_path, packed(_packed(), platform=OTHER, models=(PINNED,)), "good.tar"), stack)
    assert (there / "refs/main").read_text() == COMMIT


@pytest.mark.parametrize(
    ("path", "models"),
    [
        (f"{IN_BUNDLE}/x", (PINNED,)),
        (f"{IN_BUNDLE}/blobs/x", (PINNED,)),
        (f"{IN_BUNDLE}/blobs/{'0' * 64}", (PINNED,)),
        (f"{IN_BUNDLE}/more/blobs/{'0' * 40}", (PINNED,)),
        (f"models/org--other/blobs/{'0' * 40}", (PINNED,)),
        (f"{IN_BUNDLE}/{'d' * 40}.json", (PINNED,)),
        (f"{IN_BUNDLE}/blobs/{'0' * 40}", ()),
        ("nccl/x", (PINNED, f"org/other@{COMMIT}")),
    ],
)
def test_file_that_no_model_has_is_refused(path: str, models: tuple[str, ...]) -> None:
    files = {**(_packed() if models else {}), path: b"x"}
    with pytest.raises(Refused, match="its manifest lists"):
        bundle_archive.decoded(manifest(files, models=models).encoded())
    bundle_archive.decoded(manifest(_packed(), models=(PINNED,)).encoded())


def test_node_that_cannot_take_a_model_is_told_before_anything_is_unpacked(there: Path, tmp_path: Path) -> None:
    stack = tiny_stack(tmp_path / "stack")
    bundle = written(tmp_path, packed(_packed(), platform=OTHER, models=(PINNED,)))
    with small_disk(there.parents[1], "1m"), pytest.raises(Storage, match="has no room for the bundle") as error:
        _checks(bundle, stack)
    assert "HF_HUB_CACHE" in error.value.hint and not there.exists()
    there.parent.mkdir(exist_ok=True)
    there.symlink_to(tmp_path)
    with pytest.raises(Blocked, match="is a link"):
        _checks(bundle, stack)


def test_file_of_many_gigabytes_is_read_by_tar(tmp_path: Path) -> None:
    path, size = f"{IN_BUNDLE}/blobs/{'0' * 64}", (9 << 30) + 1
    with open(tmp_path / "large.tar", "wb") as file:
        file.write(header(path, size))
        file.truncate(file.tell() + (size + 511) // 512 * 512 + 1024)
    listed = subprocess.run(["tar", "-tvf", tmp_path / "large.tar"], capture_output=True, text=True, check=True)
    assert str(size) in listed.stdout and path in listed.stdout


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (("org/none",), 1, "there is no model org/none"),
        ((f"{MODEL}@nowhere",), 1, "has no revision nowhere"),
        (("../x",), 2, "is not the name of a model"),
        ((f"{MODEL}@../x",), 2, "is not the name of a revision"),
        ((MODEL, PINNED), 2, "is named twice"),
    ],
)
def test_model_that_cannot_be_packed_is_one_error(
    words: tuple[str, ...], code: int, what: str, maker: Maker, tmp_path: Path
) -> None:
    run = maker.create(tmp_path / "b.tar", *(each for word in words for each in ("--model", word)))
    (error,) = envelope(run)["errors"]
    assert run.returncode == code and what in error["message"] and error["hint"]
    assert not list(tmp_path.glob("b.tar*"))
