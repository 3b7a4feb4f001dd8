"""`sparkinstall models`: pulled files are what the hub's list says, and lie as the hub's own client expects them."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparkinstall.cli.live_output import amount
from sparkinstall.core import model_cache, models
from sparkinstall.models import hub as client
from sparkinstall.models import listing as hub_listing
from sparkinstall.recipes import Recipe, serve_options
from sparkinstall.recipes.serve_options import Draft
from tests.support.hub_client import printed, versions
from tests.support.model_hub import COMMIT, ModelHub, digest, served
from tests.support.mounts import resize, small_disk
from tests.support.rehearsals import (
    CHECKOUT,
    command,
    envelope,
    environment,
    everything_with_times,
    in_this_process,
    output_of,
    sparkinstall,
    tree,
)
from tests.support.waiting import until

MODEL = "org/tiny-model"
FOLDER = "models--org--tiny-model"
BIG = bytes(range(256)) * 12_000
CONFIG = b'{"model_type": "x"}'
FILES = {
    "config.json": CONFIG, "model-00001-of-00002.safetensors": BIG, "model-00002-of-00002.safetensors": BIG[1:],
    "nested/folder/same.json": CONFIG, "empty.txt": b"",
    "model.safetensors.index.json": json.dumps({"weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}).encode(),
}  # fmt: skip
TOKEN = "hf_" + "Aa1" * 11
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE",
)  # fmt: skip
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The HF_HOME of a user without a login."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setattr("sparkinstall.core.models._PAUSES", (0.01, 0.01))
    return tmp_path / "hf"


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub with one model; HF_ENDPOINT names it."""
    del home
    with served(ModelHub(MODEL, dict(FILES))) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


@pytest.fixture
def folder(home: Path) -> Path:
    """Where the model will be."""
    return home / "hub" / FOLDER


def _pull(*words: str) -> dict[str, Any]:
    run = in_this_process("models", "pull", MODEL, *words, "--json")
    assert run.returncode == 0, output_of(run)
    return dict(envelope(run)["data"])


def _error(*words: str | Path, code: int = 1) -> dict[str, Any]:
    run = in_this_process("models", *words, "--json")
    assert run.returncode == code, output_of(run)
    (error,) = envelope(run)["errors"]
    return dict(error)


def _revisions() -> list[dict[str, Any]]:
    found = envelope(in_this_process("models", "list", "--json"))["data"]
    return [each for model in found["models"] for each in model["revisions"]]


def _is_nowhere_linked(folder: Path) -> bool:
    return not (folder / "refs").exists() and not list(folder.glob("snapshots/*"))


# --- pull


@pytest.mark.usefixtures("hub")
def test_pull_makes_the_layout_of_the_hubs_cache(folder: Path) -> None:
    done = _pull()
    snapshot = folder / "snapshots" / COMMIT
    assert done == {
        "model": MODEL, "revision": "main", "commit": COMMIT, "path": str(snapshot), "files": len(FILES),
        "size": sum(len(each) for each in set(FILES.values())),
        "fetched": done["size"], "fetched_files": len(FILES) - 1, "recipe": "", "draft": None,
    }  # fmt: skip
    assert {path.name for path in (folder / "blobs").iterdir()} == {digest(each) for each in FILES.values()}
    assert {path.name for path in folder.iterdir()} == {"blobs", "refs", "snapshots", "trees"}
    assert {path.name for path in snapshot.rglob("*") if not path.is_dir()} == {Path(path).name for path in FILES}
    for path, content in FILES.items():
        assert (snapshot / path).read_bytes() == content
        up = "../" * (2 + path.count("/"))
        assert os.readlink(snapshot / path) == f"{up}blobs/{digest(content)}"
    assert (folder / "refs/main").read_text() == COMMIT
    assert [path.name for path in (folder / "trees").iterdir()] == [f"{COMMIT}.json"]


def test_pull_again_downloads_nothing(hub: ModelHub, folder: Path) -> None:
    _pull()
    before, hub.requests = tree(folder, everything_with_times), []
    done = _pull()
    assert (done["fetched"], done["fetched_files"], len(hub.requests)) == (0, 0, 1)
    after = tree(folder, everything_with_times)
    assert {path: each for path, each in after.items() if path.startswith("blobs/")} == {
        path: each for path, each in before.items() if path.startswith("blobs/")
    }


@pytest.mark.parametrize(("revision", "ref"), [("refs/pr/1", "refs/pr/1"), ("v1.0", "v1.0"), (COMMIT, None)])
def test_pull_of_a_revision_pins_its_commit(revision: str, ref: str | None, hub: ModelHub, folder: Path) -> None:
    hub.revisions = ("refs/pr/1", "v1.0")
    assert _pull("--revision", revision)["commit"] == COMMIT
    refs = [str(path.relative_to(folder / "refs")) for path in (folder / "refs").rglob("*") if path.is_file()]
    assert refs == ([ref] if ref else [])
    # What was resolved once is not asked by its name again: all files are of one commit.
    assert all(f"/resolve/{COMMIT}/" in each.path for each in hub.downloads())


RECIPE = Recipe(
    id="mine", model=MODEL, revision=COMMIT, args=(("--speculative-config", '{"method": "x", "model": "org/draft"}'),)
)


@pytest.mark.parametrize(("words", "revision"), [((), COMMIT), (("--revision", "main"), "main")])
def test_pull_of_a_recipe_brings_its_model_at_its_revision_and_its_draft(
    words: Sequence[str], revision: str, hub: ModelHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.others = ("org/draft",)
    monkeypatch.setattr(models, "shipped", lambda: (RECIPE,))
    run = in_this_process("models", "pull", "mine", *words)
    assert run.returncode == 0, output_of(run)
    assert f"{MODEL} ({revision} is " in run.stdout and f"recipe mine: {MODEL} at {revision}" in run.stderr
    assert f"✓ org/draft (main is {COMMIT[:12]}): 6 files" in run.stdout
    draft = folder.with_name("models--org--draft")
    assert all((each / "snapshots" / COMMIT).is_dir() for each in (folder, draft))
    done = envelope(in_this_process("models", "pull", "mine", *words, "--json"))["data"]
    assert (done["recipe"], done["model"], done["fetched_files"]) == ("mine", MODEL, 0)
    assert (done["draft"]["model"], done["draft"]["commit"], done["draft"]["draft"]) == ("org/draft", COMMIT, None)


@pytest.mark.parametrize(
    ("args", "draft"),
    [
        ((("--speculative-config.model", "a/b"),), Draft("a/b")),
        ((("--speculative-config.revision", "v1"), ("--speculative-config.model", "a/b")), Draft("a/b", "v1")),
        ((("--speculative-config", '{"method": "x", "model": "a/b", "revision": "v1"}'),), Draft("a/b", "v1")),
        ((("--speculative-config", '{"model": "a/b"}'), ("--speculative-config", '{"method": "mtp"}')), None),
        ((("--speculative-config", '{"method": "mtp"}'),), None),
        ((("--speculative-config", "no JSON"),), None),
        ((("--max-num-seqs", "4"),), None),
    ],
)
def test_draft_of_a_recipe_is_another_model(args: tuple[tuple[str, ...], ...], draft: Draft | None) -> None:
    assert serve_options.draft_of(args) == draft
    words = [word for each in args for word in each]
    pinned = serve_options.options(serve_options.with_draft_at(words, COMMIT))[1]
    if draft:
        assert serve_options.draft_of(pinned) == Draft(draft.model, COMMIT)
    else:
        assert serve_options.draft_of(pinned) is None and len(pinned) == len(args)


def test_pull_of_another_commit_keeps_the_blobs_that_are_the_same(
    hub: ModelHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pull()
    hub.requests, hub.files["config.json"] = [], b'{"model_type": "y"}'
    monkeypatch.setattr("tests.support.model_hub.COMMIT", "d" * 40)
    assert _pull()["fetched_files"] == 1
    assert (folder / "refs/main").read_text() == "d" * 40
    assert [each["refs"] for each in _revisions()] == [[], ["main"]]
    assert all(each["complete"] for each in _revisions())


@pytest.mark.usefixtures("hub")
def test_pull_respects_the_variables_of_the_hubs_client(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    # The env file of a node sets it, but who pulls wants to download.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert _pull()["path"] == str(tmp_path / "elsewhere" / FOLDER / "snapshots" / COMMIT)
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _pull()["path"].startswith(str(tmp_path / "xdg/huggingface/hub/"))
    assert not home.exists()


@pytest.mark.usefixtures("hub")
def test_pull_completes_a_snapshot_that_another_program_began(folder: Path) -> None:
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "blobs" / digest(CONFIG)).write_bytes(CONFIG)
    (snapshot / "config.json").symlink_to(f"../../blobs/{digest(CONFIG)}")
    (snapshot / "mine.txt").write_text("mine")
    assert _pull()["fetched_files"] == len(FILES) - 2
    assert (snapshot / "mine.txt").read_text() == "mine"
    assert all((snapshot / path).read_bytes() == content for path, content in FILES.items())


@pytest.mark.usefixtures("hub")
def test_pull_replaces_a_blob_of_another_size(folder: Path) -> None:
    _pull()
    (folder / "blobs" / digest(BIG)).write_bytes(BIG[:1000])
    assert [each["missing"] for each in _revisions()] == [["model-00001-of-00002.safetensors"]]
    assert _pull()["fetched_files"] == 1
    assert (folder / "blobs" / digest(BIG)).read_bytes() == BIG


# --- interrupted


def test_pull_over_a_connection_that_is_cut_resumes_within_the_file(hub: ModelHub, folder: Path) -> None:
    hub.files = {"model.safetensors": BIG * 3}
    # More cuts than attempts: each one has brought something.
    hub.cut = 1_200_000
    _pull()
    starts = [int((each.range or "bytes=0-").strip("bytes=-")) for each in hub.downloads()]
    assert starts[0] == 0 and len(starts) > 5 and starts == sorted(set(starts))
    assert (folder / "blobs" / digest(BIG * 3)).read_bytes() == BIG * 3


def test_pull_over_a_connection_that_brings_nothing_fails_and_resumes(hub: ModelHub, folder: Path) -> None:
    hub.cut = 70_000
    error = _error("pull", MODEL)
    assert error["code"] == "command" and "resumes where it stopped" in error["hint"]
    assert _is_nowhere_linked(folder)
    (found,) = _revisions()
    assert found["complete"] is False and "model-00001-of-00002.safetensors" in found["missing"]
    hub.cut, hub.requests = 0, []
    _pull()
    assert all(each.range not in (None, "bytes=0-") for each in hub.downloads() if "model-0" in each.path)


def _start(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command("models", *words), cwd=CHECKOUT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _arrived(folder: Path) -> int:
    total = 0
    for path in folder.glob("blobs/*.incomplete"):
        # A file that is complete gets its name at this moment.
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_pull_that_is_stopped_resumes_within_the_file(number: int, hub: ModelHub, folder: Path) -> None:
    hub.stops_at = 1_000_000
    with _start("pull", MODEL, "--json") as run:
        until(lambda: _arrived(folder) > 500_000, during=run)
        run.send_signal(number)
        # So slowly that the signal is seen before all has come.
        hub.pause = 0.05
        hub.goes_on.set()
        out, err = run.communicate(timeout=300)
    assert run.returncode == (-number if number == signal.SIGKILL else 130), out + err
    assert "Traceback" not in err
    assert _is_nowhere_linked(folder)
    (found,) = _revisions()
    assert (found["complete"], found["refs"]) == (False, [])
    parts = {path.name.partition(".")[0]: path.stat().st_size for path in folder.glob("blobs/*.incomplete")}
    hub.pause, hub.stops_at, hub.requests = 0.0, 0, []
    done = _pull()
    assert 0 < done["fetched"] <= done["size"] - sum(parts.values())
    asked = {each.path.rpartition("/")[2]: each.range for each in hub.downloads()}
    for name, content in FILES.items():
        # One that has come whole, but had not got its name yet, is not asked for.
        if 0 < (size := parts.get(digest(content), 0)) < len(content):
            assert asked[Path(name).name] == f"bytes={size}-"
    assert not list(folder.glob("blobs/*.incomplete"))


def test_pull_that_is_interrupted_while_the_hub_sends_nothing_ends_at_once_and_keeps_the_part(
    hub: ModelHub, folder: Path
) -> None:
    hub.stops_at = 1_000_000
    with _start("pull", MODEL) as run:
        until(lambda: _arrived(folder) > 500_000, during=run)
        run.send_signal(signal.SIGINT)
        # Before a download gives the server up, which takes a minute.
        _, err = run.communicate(timeout=50)
    assert run.returncode == 130 and not hub.goes_on.is_set(), err
    assert "interrupted while downloading; what has come is kept" in err
    assert "run the same command again: it continues there, also in the middle of a file" in err
    assert _arrived(folder) > 500_000
    hub.stops_at, hub.requests = 0, []
    hub.goes_on.set()
    _pull()
    assert any(each.range and not each.range.startswith("bytes=0-") for each in hub.downloads())


def _line_with(words: str, run: "subprocess.Popen[str]") -> str:
    """What it writes on stderr, up to the line with these words."""
    assert run.stderr is not None
    told = ""
    while words not in told:
        line = run.stderr.readline()
        assert line, told
        told += line
    return told


def test_two_pulls_at_once_download_each_file_once(hub: ModelHub, folder: Path) -> None:
    hub.stops_at = 1_000_000
    with _start("pull", MODEL) as first:
        until(lambda: _arrived(folder) > 100_000, during=first)
        with _start("pull", MODEL) as second:
            waits = _line_with("waiting for it", second)
            hub.goes_on.set()
            waits += second.communicate(timeout=300)[1]
            done = first.communicate(timeout=300)[1]
    assert (first.returncode, second.returncode) == (0, 0), done + waits
    assert "another run uses org/tiny-model: waiting for it" in waits
    asked = [each.path for each in hub.downloads()]
    assert len(asked) == len(set(asked)) == len(FILES) - 1


def test_part_that_the_hubs_client_left_is_resumed(hub: ModelHub, folder: Path) -> None:
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / f"{digest(BIG)}.incomplete").write_bytes(BIG[:1_000_000])
    (folder / "blobs" / f"{digest(BIG[1:])}.incomplete").write_bytes(BIG[1:])
    _pull()
    ranges = {each.path.rpartition("/")[2]: each.range for each in hub.downloads() if "model-0" in each.path}
    assert ranges == {"model-00001-of-00002.safetensors": "bytes=1000000-"}, "what is complete is not asked for"


@pytest.mark.usefixtures("hub")
def test_part_that_is_too_long_is_discarded(folder: Path) -> None:
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / f"{digest(BIG)}.incomplete").write_bytes(BIG + b"more")
    _pull()
    assert (folder / "blobs" / digest(BIG)).read_bytes() == BIG


@pytest.mark.usefixtures("hub")
def test_part_that_is_damaged_is_not_accepted(folder: Path) -> None:
    (folder / "blobs").mkdir(parents=True)
    part = folder / "blobs" / f"{digest(BIG)}.incomplete"
    part.write_bytes(b"four" + BIG[4:1_000_000])
    error = _error("pull", MODEL)
    assert "expected sha256" in error["cause"] and _is_nowhere_linked(folder)
    assert not part.exists() and not (folder / "blobs" / digest(BIG)).exists()
    _pull()


def test_server_that_has_less_than_was_received_starts_again(hub: ModelHub, folder: Path) -> None:
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / f"{digest(BIG)}.incomplete").write_bytes(BIG[:-10])
    hub.sent["model-00001-of-00002.safetensors"] = BIG[:1000]
    assert "416" in _error("pull", MODEL)["cause"]
    hub.sent = {}
    _pull()


# --- what is not as the hub's list says


@pytest.mark.parametrize(
    ("name", "sent", "words"),
    [
        ("model-00001-of-00002.safetensors", BIG[:-1] + b"x", "expected sha256"),
        ("model-00001-of-00002.safetensors", BIG + b"x", f"it has {len(BIG) + 1} bytes instead of {len(BIG)}"),
        ("model-00001-of-00002.safetensors", BIG[:-1], f"it has {len(BIG) - 1} bytes instead of {len(BIG)}"),
        ("config.json", CONFIG.upper(), "expected sha1"),
        ("empty.txt", b"x", "it has 1 bytes instead of 0"),
    ],
)
def test_file_that_is_not_the_listed_one_is_refused(
    name: str, sent: bytes, words: str, hub: ModelHub, folder: Path
) -> None:
    hub.sent[name] = sent
    error = _error("pull", MODEL)
    assert words in error["cause"] and name in error["message"] and error["hint"]
    assert "geheim" not in str(error)
    assert not (folder / "blobs" / digest(FILES[name])).exists() and _is_nowhere_linked(folder)
    hub.sent = {}
    _pull()


LONG = "/".join(["x" * 200] * 6)


@pytest.mark.parametrize(
    "path",
    ["../up", "a/../../up", "/etc/passwd", "a//b", "a/./b", ".", "..", "", "a\nb", "a\x1b[2Jb", "a\u202eb", "x" * 256,
     LONG, "a\ud800", "a/"],
)  # fmt: skip
def test_path_from_the_hub_that_is_hostile_is_refused(path: str, hub: ModelHub, home: Path) -> None:
    listing = hub.listing()
    listing["siblings"][0]["rfilename"] = path
    hub.answer = json.dumps(listing).encode()
    error = _error("pull", MODEL)
    assert error["message"] == "the hub's list of files cannot be used" and error["hint"]
    assert not re.search(r"[\x00-\x1f\x7f\u202e]", error["cause"])
    assert not hub.downloads() and not home.exists()


def _changed(hub: ModelHub, **more: object) -> bytes:
    listing = hub.listing()
    listing["siblings"][0] |= more
    return json.dumps(listing).encode()


UNUSABLE: dict[str, Callable[[ModelHub], bytes]] = {
    "it is no JSON": lambda _: b"<html>",
    "it is a list": lambda _: b"[]",
    "it is too deep": lambda _: b"[" * 100_000,
    "no file": lambda hub: json.dumps({**hub.listing(), "siblings": []}).encode(),
    "no commit": lambda hub: json.dumps({**hub.listing(), "sha": "../../x"}).encode(),
    "no hash": lambda hub: _changed(hub, blobId=None),
    "a path as a hash": lambda hub: _changed(hub, blobId="../" * 13 + "x"),
    "a negative size": lambda hub: _changed(hub, size=-1),
    "an enormous size": lambda hub: _changed(hub, size=1 << 60),
    "a size that is a text": lambda hub: _changed(hub, size="12"),
    "a path twice": lambda hub: _changed(hub, rfilename="empty.txt"),
    "a file that is a folder": lambda hub: _changed(hub, rfilename="nested/folder"),
    "two sizes of one hash": lambda hub: _changed(hub, size=5),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_answer_of_the_hub_that_cannot_be_used_is_refused(what: str, hub: ModelHub, home: Path) -> None:
    hub.answer = UNUSABLE[what](hub)
    error = _error("pull", MODEL)
    assert error["message"] == "the hub's list of files cannot be used" and error["cause"]
    assert not hub.downloads() and not home.exists()


def test_answer_for_another_commit_is_refused(hub: ModelHub, home: Path) -> None:
    hub.revisions = ("d" * 40,)
    assert COMMIT in _error("pull", MODEL, "--revision", "d" * 40)["cause"]
    assert not home.exists()


@pytest.mark.usefixtures("hub")
def test_answer_that_is_too_large_is_not_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_listing, "LARGEST_ANSWER", 100)
    assert "more than 100 bytes" in _error("pull", MODEL)["cause"]
    assert not home.exists()


# --- refusals


@pytest.mark.parametrize(
    ("where", "status", "reason", "code", "words"),
    [
        ("api", 401, "", "hub", "does not give org/tiny-model to a user without a login"),
        ("api", 401, "GatedRepo", "hub", "org/tiny-model is gated"),
        ("file", 401, "GatedRepo", "hub", "org/tiny-model is gated"),
        ("file", 403, "GatedRepo", "hub", "org/tiny-model is gated"),
        ("api", 404, "RepoNotFound", "hub", "there is no model org/tiny-model"),
        ("api", 404, "", "hub", "there is no model org/tiny-model"),
        ("api", 404, "RevisionNotFound", "hub", "org/tiny-model has no revision main"),
        ("file", 404, "EntryNotFound", "command", "could not be downloaded"),
        ("api", 500, "", "command", "could not be downloaded"),
        ("file", 503, "", "command", "could not be downloaded"),
        ("file", 429, "", "command", "could not be downloaded"),
    ],
)
def test_refusal_of_the_hub_says_what_to_do(
    where: str, status: int, reason: str, code: str, words: str, hub: ModelHub, folder: Path
) -> None:
    hub.refuses = {where: (status, reason)}
    error = _error("pull", MODEL)
    assert error["code"] == code and words in error["message"] and error["hint"]
    if status in (401, 403):
        assert "hf auth login" in error["hint"] and f"{hub.url}/{MODEL}" in error["hint"]
    assert not folder.exists(), "nothing of it has come"
    hub.refuses = {}
    _pull()


@pytest.mark.parametrize(
    ("status", "reason", "words", "hint"),
    [
        (403, "GatedRepo", "your login may not download org/tiny-model", "ask for access"),
        (401, "", "does not accept your token", "hf auth login"),
    ],
)
def test_refusal_in_spite_of_a_token_does_not_ask_for_one(
    status: int, reason: str, words: str, hint: str, hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuses = {"file": (status, reason)}
    error = _error("pull", MODEL)
    assert words in error["message"] and hint in error["hint"]


def test_hub_that_is_not_reached_is_named(home: Path) -> None:
    error = _error("pull", MODEL)
    assert error["message"] == f"the hub {NOWHERE} cannot be reached"
    assert error["hint"] == "check the network and HF_ENDPOINT, and run the same command again"
    assert not home.exists()


@pytest.mark.parametrize("address", ["hub.example.org", "ftp://hub.example.org", "http://", "http://[x"])
def test_endpoint_that_is_no_address_is_refused(address: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert "HF_ENDPOINT" in _error("pull", MODEL, code=2)["message"] and not home.exists()


@pytest.mark.parametrize(
    "name", ["../x", "a/b/c", "org/../x", "org/x--y", "/etc", "org/", "org/a b", "org/\x1b[2J", "org/" + "x" * 97]
)
def test_name_that_is_no_models_is_refused(name: str, hub: ModelHub, home: Path) -> None:
    for verb in ("pull", "verify", "remove"):
        assert "is not the name of a model" in _error(verb, name, code=2)["message"]
    assert not hub.requests and not home.exists()


@pytest.mark.parametrize("name", ["../main", "a/../b", "/main", "a//b", "a\nb", "x" * 300, "-x", ".git"])
def test_name_that_is_no_revision_is_refused(name: str, hub: ModelHub, home: Path) -> None:
    assert "is not the name of a revision" in _error("pull", MODEL, f"--revision={name}", code=2)["message"]
    assert not hub.requests and not home.exists()


# --- the token


def test_token_is_sent_to_the_hub_only(hub: ModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    _pull()
    assert {each.authorization for each in hub.requests if each.host == "127.0.0.1"} == {f"Bearer {TOKEN}"}
    stored = [each for each in hub.requests if each.host == "localhost"]
    assert stored and {each.authorization for each in stored} == {None}


def _login(home: Path, text: str = f"{TOKEN}\n") -> Path:
    home.mkdir(exist_ok=True)
    (home / "token").write_text(text)
    return home / "token"


@pytest.mark.parametrize("how", ["variable", "file", "path"])
def test_token_is_that_of_the_users_login(
    how: str, hub: ModelHub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = TOKEN
    if how == "variable":
        _login(home, "hf_another_one")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    elif how == "file":
        _login(home)
    else:
        _login(tmp_path / "else")
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "else/token"))
    _pull()


def test_token_is_in_no_output_and_no_file(hub: ModelHub, home: Path, tmp_path: Path) -> None:
    secret = "plain-secret-without-a-prefix"
    hub.token = secret
    token = _login(home, secret)
    hub.sent["config.json"] = CONFIG.upper()
    failed = sparkinstall("models", "pull", MODEL, "-v")
    # What has arrived of the other files would shorten the second pull.
    shutil.rmtree(home / "hub" / FOLDER)
    hub.sent, hub.stops_at = {}, 1_000_000
    with _start("pull", MODEL, "-v") as run:
        until(lambda: _arrived(home / "hub" / FOLDER) > 100_000, during=run)
        line = Path(f"/proc/{run.pid}/cmdline").read_bytes()
        hub.goes_on.set()
        out, err = run.communicate(timeout=300)
    assert MODEL.encode() in line
    assert (failed.returncode, run.returncode) == (1, 0), output_of(failed) + out + err
    assert secret not in output_of(failed) + out + err + line.decode()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != token]
    assert files and not [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("text", ["two words", "a\r\nX-Other: b", "ü", "x" * 5000])
def test_token_that_cannot_be_one_is_refused_and_not_repeated(text: str, hub: ModelHub, home: Path) -> None:
    _login(home, text)
    error = _error("pull", MODEL, code=2)
    assert str(home / "token") in error["message"] and text not in str(error)
    assert not hub.requests


def test_login_of_netrc_is_not_sent(hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    _pull()
    assert {each.host for each in hub.requests} == {"127.0.0.1", "localhost"}
    assert {each.authorization for each in hub.requests} == {None}


def test_token_travels_only_encrypted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _login(home)
    sent = {}
    for address in ("http://hub.example.org", "https://hub.example.org", "http://localhost:1", ""):
        monkeypatch.setenv("HF_ENDPOINT", address)
        sent[address] = client.authorization()
    assert sent == {
        "http://hub.example.org": "",
        "https://hub.example.org": f"Bearer {TOKEN}",
        "http://localhost:1": f"Bearer {TOKEN}",
        "": f"Bearer {TOKEN}",
    }


# --- disks


def test_disk_that_is_too_small_is_named_before_anything_is_downloaded(hub: ModelHub, home: Path) -> None:
    listing = hub.listing()
    listing["siblings"][1]["lfs"]["size"] = 1 << 49
    hub.answer = json.dumps(listing).encode()
    error = _error("pull", MODEL)
    assert error["code"] == "storage" and "562950.0 GB needed" in error["message"] and "HF_HUB_CACHE" in error["hint"]
    assert not hub.downloads() and not (home / "hub" / FOLDER).exists()


def test_disk_that_gets_full_is_named_and_the_pull_resumes(
    hub: ModelHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(home, "2m"):
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
            error = _error("pull", MODEL)
        assert error["code"] == "storage" and "the disk is full" in error["message"] and "it resumes" in error["hint"]
        assert _is_nowhere_linked(home / "hub" / FOLDER)
        resize(home, "20m")
        hub.requests = []
        _pull()
        assert any(each.range not in (None, "bytes=0-") for each in hub.downloads())


@pytest.mark.usefixtures("hub")
def test_something_else_in_the_place_of_a_blob_is_named(folder: Path) -> None:
    (folder / "blobs" / digest(BIG)).mkdir(parents=True)
    error = _error("pull", MODEL)
    assert error["code"] == "storage" and digest(BIG) in error["message"] and _is_nowhere_linked(folder)


@pytest.mark.usefixtures("hub")
def test_folder_of_a_snapshot_that_is_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (folder / "snapshots" / COMMIT / "nested").symlink_to(tmp_path / "outside")
    assert "nested is a link" in _error("pull", MODEL)["message"]
    assert not list((tmp_path / "outside").iterdir()) and not (folder / "refs").exists()


# --- list


def test_list_of_no_cache_is_empty_and_creates_nothing(home: Path) -> None:
    for verb in ("list", "verify"):
        run = in_this_process("models", verb, "--json")
        assert run.returncode == 0, output_of(run)
    assert not home.exists()


@pytest.mark.usefixtures("hub")
def test_list_says_what_is_complete(folder: Path) -> None:
    done = _pull()
    found = envelope(in_this_process("models", "list", "--json"))["data"]
    (model,) = found["models"]
    assert (model["id"], model["arriving"], found["folder"]) == (MODEL, 0, str(folder.parent))
    assert model["size"] >= done["size"]
    assert model["revisions"] == [
        {"commit": COMMIT, "refs": ["main"], "size": done["size"], "files": len(FILES), "complete": True, "missing": []}
    ]
    text = in_this_process("models", "list").stdout
    assert f"{COMMIT[:12]} (main)" in text and "complete" in text


@pytest.mark.usefixtures("hub")
def test_list_goes_on_where_a_download_has_just_renamed_a_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pull()
    size = model_cache.ModelFolder(folder.parent, MODEL).bytes()
    walk = os.walk

    def stale(top: Any, **how: Any) -> Iterator[Any]:
        for place, names, files in walk(top, **how):
            yield place, names, [*files, "gone.incomplete"]

    monkeypatch.setattr(os, "walk", stale)
    assert model_cache.ModelFolder(folder.parent, MODEL).bytes() == size


@pytest.mark.usefixtures("hub")
def test_list_names_missing_files(folder: Path) -> None:
    _pull()
    (folder / "blobs" / digest(BIG)).unlink()
    (found,) = _revisions()
    assert (found["complete"], found["missing"]) == (False, ["model-00001-of-00002.safetensors"])
    assert "1 missing" in in_this_process("models", "list").stdout
    assert "model-00001-of-00002.safetensors is missing" in in_this_process("models", "list", "-v").stdout


@pytest.mark.parametrize(
    ("there", "complete", "missing"), [(1, False, ["model-00002-of-00002.safetensors"]), (2, None, [])]
)
def test_list_without_the_hubs_list_goes_by_the_index(
    there: int, complete: bool | None, missing: list[str], home: Path, folder: Path
) -> None:
    del home
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors.index.json").write_bytes(FILES["model.safetensors.index.json"])
    for number in range(1, there + 1):
        (snapshot / f"model-0000{number}-of-00002.safetensors").write_bytes(b"x")
    (found,) = _revisions()
    assert (found["complete"], found["missing"]) == (complete, missing)
    run = in_this_process("models", "verify", "--json")
    assert run.returncode == (3 if missing else 0)
    assert envelope(run)["data"]["unknown"] == ([] if missing else [f"{MODEL}@{COMMIT}"])


@pytest.mark.parametrize(
    "content", ["", "{", '{"format_version": 2, "files": {}}', '{"format_version": 1, "files": {"../x": 1}}']
)
@pytest.mark.usefixtures("hub")
def test_list_with_a_damaged_list_of_files_does_not_know(content: str, folder: Path) -> None:
    _pull()
    (folder / f"trees/{COMMIT}.json").write_text(content)
    (found,) = _revisions()
    assert (found["complete"], found["files"]) == (None, len(FILES))
    _pull()
    assert [each["complete"] for each in _revisions()] == [True]


# --- verify


def test_verify_reads_all_files_without_a_network(hub: ModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    _pull()
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    hub.requests = []
    for words in ([], [MODEL]):
        run = in_this_process("models", "verify", *words, "--json")
        found = envelope(run)["data"]
        assert run.returncode == 0 and found["checked"] == len(FILES) - 1, output_of(run)
        assert (found["damaged"], found["incomplete"], found["unknown"], found["unchecked"]) == ([], [], [], [])
    assert not hub.requests


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
@pytest.mark.usefixtures("hub")
def test_verify_removes_what_is_damaged_and_pull_brings_it_again(name: str, folder: Path) -> None:
    _pull()
    content = FILES[name]
    blob = folder / "blobs" / digest(content)
    found = blob.stat()
    blob.write_bytes(content[:10] + bytes([content[10] ^ 1]) + content[11:])
    os.utime(blob, ns=(found.st_atime_ns, found.st_mtime_ns))
    run = in_this_process("models", "verify", "--json")
    users = sorted(path for path, each in FILES.items() if each == content)
    assert run.returncode == 3 and not blob.exists(), output_of(run)
    assert envelope(run)["data"]["damaged"] == [{"model": MODEL, "blob": blob.name, "files": users}]
    run = in_this_process("models", "verify", MODEL)
    assert run.returncode == 3 and f"`sparkinstall models pull {MODEL}`" in run.stdout and name in run.stdout
    assert _pull()["fetched_files"] == 1
    assert in_this_process("models", "verify").returncode == 0


@pytest.mark.usefixtures("hub")
def test_verify_names_a_blob_without_a_hash_as_its_name(folder: Path) -> None:
    _pull()
    (folder / "blobs/0123").write_bytes(b"x")
    found = envelope(in_this_process("models", "verify", "--json"))["data"]
    assert found["unchecked"] == [f"{MODEL}: 0123"] and (folder / "blobs/0123").exists()


# --- remove


@pytest.mark.usefixtures("hub")
def test_remove_asks_first() -> None:
    _pull()
    assert "--yes" in _error("remove", MODEL, code=2)["hint"]
    assert [each["complete"] for each in _revisions()] == [True]


@pytest.mark.usefixtures("hub")
def test_remove_removes_the_model_and_nothing_else(folder: Path) -> None:
    _pull()
    other = folder.parent / "models--org--tiny-model-2"
    shutil.copytree(folder, other, symlinks=True)
    (folder.parent / "mine").mkdir()
    before = tree(other, everything_with_times)
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    run = in_this_process("models", "remove", MODEL, "--yes", "--json")
    assert envelope(run)["data"] == {"model": MODEL, "path": str(folder), "freed": size}
    assert not folder.exists() and (folder.parent / "mine").is_dir()
    assert tree(other, everything_with_times) == before
    assert _error("remove", MODEL, "--yes", code=2)["hint"] == "did you mean `org/tiny-model-2`?"


@pytest.mark.usefixtures("hub")
def test_remove_does_not_follow_links(folder: Path, tmp_path: Path) -> None:
    _pull()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"x")
    (folder / "snapshots" / COMMIT / "out").symlink_to(outside)
    (folder / "refs/out").symlink_to(outside)
    in_this_process("models", "remove", MODEL, "--yes")
    assert not folder.exists() and (outside / "kept").exists()
    folder.symlink_to(outside)
    for verb in (["remove", MODEL, "--yes"], ["pull", MODEL]):
        error = _error(*verb)
        assert error["code"] == "blocked" and "is a link" in error["message"]
    assert (outside / "kept").exists() and [path.name for path in outside.iterdir()] == ["kept"]


def test_remove_waits_for_a_pull(hub: ModelHub, folder: Path) -> None:
    hub.stops_at = 1_000_000
    with _start("pull", MODEL) as first:
        until(lambda: _arrived(folder) > 100_000, during=first)
        with _start("remove", MODEL, "--yes") as second:
            waits = _line_with("waiting for it", second)
            hub.goes_on.set()
            waits += second.communicate(timeout=300)[1]
        first.communicate(timeout=300)
    assert (first.returncode, second.returncode) == (0, 0) and "waiting for it" in waits
    assert not folder.exists()


# --- progress


def test_progress_has_bytes_speed_and_time_left(hub: ModelHub) -> None:
    assert amount(2_000_000_000, 10_000_000_000, 10, 1_000_000_000) == "2.0 GB of 10.0 GB, 100.0 MB/s, 1 m 20 s left"
    assert amount(0, 10, 0, 0) == "0 bytes of 10 bytes"
    hub.pause = 0.01
    run = sparkinstall("models", "pull", MODEL)
    assert run.returncode == 0, output_of(run)
    lines = run.stderr.splitlines()
    assert f"{MODEL} at {COMMIT[:12]}: {len(FILES)} files, 6.1 MB, of which 6.1 MB are not here yet" in lines[0]
    assert [line for line in lines if re.search(r" of 6\.1 MB, .*/s, .* left$", line)], run.stderr
    assert len(lines) <= 12
    assert run.stdout.startswith(f"✓ {MODEL} (main is {COMMIT[:12]}): {len(FILES)} files, 6.1 MB, complete")


# --- the hub's own client

READ = f"""
path = snapshot_download({MODEL!r}, local_files_only=False)
scan = scan_cache_dir()
(repo,) = scan.repos
(revision,) = repo.revisions
print(json.dumps([path, open(path + "/nested/folder/same.json").read(), [str(each) for each in scan.warnings],
  repo.repo_id, revision.commit_hash, sorted(revision.refs), len(revision.files), revision.size_on_disk,
  hf_hub_download({MODEL!r}, "config.json", revision="main")]))
"""


@pytest.mark.network
@pytest.mark.parametrize("version", versions())
def test_the_client_of_each_stack_reads_what_was_pulled(version: str, hub: ModelHub) -> None:
    done = _pull()
    hub.requests = []
    assert printed(version, READ, HF_HUB_OFFLINE="1") == [
        done["path"], CONFIG.decode(), [], MODEL, COMMIT, ["main"], len(FILES), done["size"],
        f"{done['path']}/config.json",
    ]  # fmt: skip
    assert not hub.requests


@pytest.mark.network
@pytest.mark.parametrize("version", versions())
@pytest.mark.usefixtures("hub")
def test_pull_leaves_what_the_client_of_each_stack_leaves(version: str, folder: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    printed(version, f"print(json.dumps(snapshot_download({MODEL!r})))", HF_HUB_CACHE=str(theirs))
    _pull()

    def entries(top: Path) -> dict[str, Any]:
        found = tree(top / FOLDER)
        return {path: (each[0], each[4:]) for path, each in found.items() if path.split("/")[0] != "trees"}

    assert entries(folder.parent) == entries(theirs)
    trees = [list((each / FOLDER).glob("trees/*.json")) for each in (folder.parent, theirs)]
    if trees[1]:
        ours, others = (json.loads(each.read_text())["files"] for (each,) in trees)
        assert {path: each["size"] for path, each in ours.items()} == {
            path: each["size"] for path, each in others.items()
        }
        assert all(ours[path] == {**ours[path], **each} for path, each in others.items())


@pytest.mark.network
@pytest.mark.parametrize("version", versions())
def test_what_the_client_of_each_stack_downloaded_is_not_downloaded_again(version: str, hub: ModelHub) -> None:
    printed(version, f"print(json.dumps(snapshot_download({MODEL!r})))")
    assert envelope(in_this_process("models", "verify", "--json"))["data"]["checked"] == len(FILES) - 1
    (found,) = _revisions()
    assert found["complete"] is not False
    hub.requests = []
    assert _pull()["fetched_files"] == 0 and not hub.downloads()
    assert [each["complete"] for each in _revisions()] == [True]
