"""The wheelhouse: filled by downloads that resume, shared by all installs, with nothing in it but the locked wheels."""

import base64
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sparkinstall.downloads import NotDownloaded, reason_of, sha256_of
from sparkinstall.errors import CommandFailed, Storage
from sparkinstall.stacks import Pin, load
from sparkinstall.system.local import LocalSystem
from sparkinstall.wheel_index import for_platform, rank
from sparkinstall.wheelhouse import Wheelhouse
from tests.support.mounts import resize, small_disk
from tests.support.rehearsals import SETTINGS, Rehearsal, envelope, output_of
from tests.support.tiny_stack import no_index, small_stack, tiny_stack
from tests.support.waiting import until

TARGET = for_platform("x86_64", "3.12")
NOWHERE = "http://127.0.0.1:9/"


class Index(SimpleHTTPRequestHandler):
    """A folder as a package index. `asked`: the paths of the wheels that were downloaded.

    `held`: of those it sends only a half until that is set.
    """

    asked: list[str]
    login = ""
    held: threading.Event | None = None

    def do_GET(self) -> None:
        """Answer with a file or a listing."""
        if self.login and self.headers.get("Authorization") != self.login:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="index"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path.endswith(".whl") and "uv/" not in self.headers["User-Agent"]:
            self.asked.append(self.path)
            if self.held and not self.held.is_set():
                self._stall(self.held)
                return
        super().do_GET()

    def _stall(self, held: threading.Event) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        held.wait(600)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Print no requests."""


@contextmanager
def index(folder: Path, login: str = "", held: threading.Event | None = None) -> Iterator[tuple[str, list[str]]]:
    """The wheels in `folder` at an address; also the list of downloads."""
    for wheel in folder.glob("*.whl"):
        (place := folder / "index" / wheel.name.partition("-")[0]).mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, place)
    asked: list[str] = []
    kept = f"Basic {base64.b64encode(login.encode()).decode()}" if login else ""
    handler = type("Handler", (Index,), {"asked": asked, "login": kept, "held": held})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder / "index"))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{f'{login}@' if login else ''}127.0.0.1:{server.server_port}/", asked
        server.shutdown()


@pytest.fixture
def house(tmp_path: Path) -> Wheelhouse:
    return Wheelhouse(tmp_path / "cache/wheels")


def pins_of(stack: Path) -> tuple[Pin, ...]:
    return load(str(stack)).platforms["x86_64"].locked()


def copied(wheel: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(wheel, folder))


def set_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", url)


# --- downloads


@pytest.mark.network
def test_wheels_are_downloaded_once(tmp_path: Path, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = pins_of(small_stack(tmp_path))
    with index(tmp_path) as (url, asked):
        set_index(monkeypatch, url)
        house.fill(LocalSystem(), pins, TARGET)
        assert len(asked) == len(pins) == 4
    set_index(monkeypatch, NOWHERE)
    house.fill(LocalSystem(), pins, TARGET)
    assert {path.name for path in house.found(pins).values()} == {path.name for path in tmp_path.glob("*.whl")}
    assert all(sha256_of(path) in pin.hashes[0] for pin, path in house.found(pins).items())
    assert not list(house.arriving.iterdir())


def test_wheel_of_the_index_that_is_not_the_locked_one_is_refused(
    tmp_path: Path, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = tiny_stack(tmp_path, hash_is_right=False)
    with index(tmp_path) as (url, asked):
        set_index(monkeypatch, url)
        with pytest.raises(CommandFailed, match=r"no wheel of vllm==0\.18\.1 with a hash of the lock") as found:
            house.fill(LocalSystem(), pins_of(stack), TARGET)
    assert "does not have the hash in the lock" in found.value.cause and not asked
    assert not house.listed()


def test_download_with_another_content_is_deleted(
    tmp_path: Path, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = tiny_stack(tmp_path)
    with index(tmp_path) as (url, _):
        (wheel,) = (tmp_path / "index").rglob("*.whl")
        page = f'<a href="{wheel.name}#sha256={sha256_of(wheel)}">{wheel.name}</a>'
        wheel.with_name("index.html").write_text(page)
        wheel.write_bytes(b"changed")
        set_index(monkeypatch, url)
        with pytest.raises(CommandFailed, match="is not the locked wheel"):
            house.fill(LocalSystem(), pins_of(stack), TARGET)
    assert not list(house.folder.rglob("*.whl*"))


def test_index_with_a_login_is_used_with_it(tmp_path: Path, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = pins_of(tiny_stack(tmp_path))
    with index(tmp_path, login="user:pass") as (url, asked):
        set_index(monkeypatch, url)
        house.fill(LocalSystem(), pins, TARGET)
    assert len(asked) == 1 and house.found(pins)


def test_unreachable_index_is_an_error_of_the_network(
    tmp_path: Path, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_index(monkeypatch, NOWHERE)
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(CommandFailed) as found:
        house.fill(LocalSystem(), pins_of(tiny_stack(tmp_path)), TARGET)
    assert found.value.kind == "network"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "HTTPSConnectionPool(host='a', port=443): Max retries exceeded with url: / (Caused by NameResolutionError("
            "\"HTTPSConnection(host='a', port=443): Failed to resolve 'a' ([Errno -2] Name or service not known)\"))",
            "Failed to resolve 'a' (Name or service not known)",
        ),
        (
            "HTTPSConnectionPool(host='a', port=443): Max retries exceeded with url: / (Caused by SSLError("
            "SSLCertVerificationError(1, '[SSL: X] certificate verify failed: self-signed (_ssl.c:1006)')))",
            "[SSL: X] certificate verify failed: self-signed (_ssl.c:1006)",
        ),
        ("('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer'))", "Connection reset by peer"),
        (
            "HTTPConnectionPool(host='a', port=80): Read timed out. (read timeout=60)",
            "Read timed out. (read timeout=60)",
        ),
        ("404 Client Error: Not Found for url: http://a/b", "404 Client Error: Not Found for url: http://a/b"),
    ],
)
def test_reason_of_an_error_of_the_network_is_its_words(error: str, reason: str) -> None:
    assert reason_of(OSError(error)) == reason


def test_wheel_that_the_index_lost_is_an_error_of_the_server(
    tmp_path: Path, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = pins_of(tiny_stack(tmp_path))
    with index(tmp_path) as (url, _):
        (wheel,) = (tmp_path / "index").rglob("*.whl")
        wheel.with_name("index.html").write_text(f'<a href="{wheel.name}#sha256={sha256_of(wheel)}">{wheel.name}</a>')
        wheel.unlink()
        set_index(monkeypatch, url)
        with pytest.raises(NotDownloaded) as found:
            house.fill(LocalSystem(), pins, TARGET)
    assert (found.value.kind, found.value.again) == ("server", False) and "404" in found.value.cause


def test_full_disk_is_named_and_the_next_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = tiny_stack(tmp_path, more=os.urandom(600_000))
    with small_disk(tmp_path / "disk", "256k") as disk:
        house = Wheelhouse(disk / "wheels")
        with index(tmp_path) as (url, _):
            set_index(monkeypatch, url)
            monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
            with pytest.raises((Storage, CommandFailed)) as found:
                house.fill(LocalSystem(), pins_of(stack), TARGET)
            assert "full" in f"{found.value.message} {found.value.cause}"
            resize(disk, "8m")
            house.fill(LocalSystem(), pins_of(stack), TARGET)
    assert not house.listed(), "it was on the disk"


def test_two_runs_at_once_download_each_wheel_once(
    tmp_path: Path, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = pins_of(tiny_stack(tmp_path))
    with index(tmp_path) as (url, asked):
        set_index(monkeypatch, url)
        both = [threading.Thread(target=house.fill, args=(LocalSystem(), pins, TARGET)) for _ in range(2)]
        for each in both:
            each.start()
        for each in both:
            each.join()
    assert len(asked) == 1 and house.found(pins)


def test_install_that_is_interrupted_while_the_index_sends_nothing_ends_at_once_and_keeps_the_part(
    tmp_path: Path,
) -> None:
    stack = tiny_stack(tmp_path, more=os.urandom(600_000))
    options = (*SETTINGS, "--stack", str(stack), "--platform", "x86_64", "--only", "environment")
    parts, held = partial(tmp_path.glob, "cache/sparkinstall/wheels/arriving/*/*.part"), threading.Event()
    with index(tmp_path, held=held) as (url, asked):
        env = {"UV_DEFAULT_INDEX": url, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        with Rehearsal(tmp_path / "node", options).start(**env) as run:
            until(lambda: any(each.stat().st_size > 100_000 for each in parts()), during=run)
            run.send_signal(signal.SIGINT)
            # Before a download gives the server up, which takes a minute.
            said, _ = run.communicate(timeout=50)
        assert run.returncode == 130 and len(asked) == 1 and not held.is_set(), said
    assert "interrupted while downloading; what has come is kept" in said
    assert [each.stat().st_size > 100_000 for each in parts()] == [True]


# --- the folder


def test_wheels_that_a_user_put_there_are_used(
    tmp_path: Path, house: Wheelhouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = pins_of(tiny_stack(tmp_path))
    house.folder.mkdir(parents=True)
    for wheel in tmp_path.glob("*.whl"):
        shutil.copy(wheel, house.folder)
    assert house.missing(pins) == list(pins)
    set_index(monkeypatch, NOWHERE)
    house.fill(LocalSystem(), pins, TARGET)
    assert house.missing(pins) == []


def test_wheel_under_a_name_of_no_wheel_is_left_alone(tmp_path: Path, house: Wheelhouse) -> None:
    """uv would not find it."""
    pins = pins_of(tiny_stack(tmp_path))
    house.folder.mkdir(parents=True)
    shutil.copy(next(tmp_path.glob("*.whl")), house.folder / "vllm.whl")
    assert house.refresh() == [] and house.missing(pins) == list(pins)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"../x.whl": {"sha256": "", "size": 0, "mtime_ns": 0}}', "\0"])
def test_index_that_cannot_be_read_is_written_again(tmp_path: Path, house: Wheelhouse, content: str) -> None:
    pins = pins_of(tiny_stack(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    house.adopt(copied(wheel, tmp_path / "new"), sha256_of(wheel))
    assert house.found(pins)
    (house.folder / "index.json").write_text(content)
    assert not house.found(pins)
    assert house.refresh() == [wheel.name]
    assert house.found(pins) and list(json.loads((house.folder / "index.json").read_text())) == [wheel.name]


def test_wheel_that_changed_is_hashed_again(tmp_path: Path, house: Wheelhouse) -> None:
    pins = pins_of(tiny_stack(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    place = house.adopt(copied(wheel, tmp_path / "new"), sha256_of(wheel))
    place.write_bytes(b"another file")
    assert house.missing(pins) == list(pins)
    house.refresh()
    assert house.missing(pins) == list(pins)
    house.adopt(copied(wheel, tmp_path / "new"), sha256_of(wheel))
    assert house.missing(pins) == [], "the locked wheel replaces another of its name"


def test_damaged_wheel_is_found_by_its_hash(tmp_path: Path, house: Wheelhouse) -> None:
    tiny_stack(tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    place = house.adopt(copied(wheel, tmp_path / "new"), sha256_of(wheel))
    assert house.damaged() == []
    damage(place)
    assert house.damaged() == [wheel.name]
    house.drop([wheel.name])
    assert not place.exists() and not house.listed()


def damage(wheel: Path) -> None:
    """Change a byte in the middle, without a trace in size and time."""
    found = wheel.stat()
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)
    os.utime(wheel, ns=(found.st_atime_ns, found.st_mtime_ns))


# --- installs


@pytest.mark.network
def test_installs_share_the_wheelhouse_and_need_no_network(tmp_path: Path) -> None:
    stack = small_stack(tmp_path / "stack")
    env = no_index(stack)
    with_stack = (*SETTINGS, "--stack", str(stack), "--platform", "x86_64", "--set", "fp8.fallback=on")
    first = Rehearsal(tmp_path / "one", with_stack).all(**env)
    assert first.returncode == 0, output_of(first)
    shutil.copytree(stack.parent / "cache/sparkinstall/wheels", tmp_path / "cache/sparkinstall/wheels")
    for pin in pins_of(stack)[:1]:
        assert pin.name == "vllm", "only its wheel was installed"
    alone = {"UV_DEFAULT_INDEX": NOWHERE, "XDG_CACHE_HOME": str(tmp_path / "cache"), "UV_HTTP_RETRIES": "0"}
    for wheel in stack.parent.glob("*.whl"):
        shutil.copy(wheel, tmp_path / "cache/sparkinstall/wheels")
    second = Rehearsal(tmp_path / "two", with_stack).all("--json", **alone)
    assert second.returncode == 0, output_of(second)
    assert not list(tmp_path.glob("two/opt/sparkinstall/venvs/*/unpacked"))
    assert not (tmp_path / "cache/sparkinstall/uv").exists()


@pytest.mark.network
def test_install_from_a_damaged_wheel_removes_it_and_the_next_run_succeeds(tmp_path: Path) -> None:
    stack = small_stack(tmp_path / "stack")
    env = no_index(stack)
    node = Rehearsal(
        tmp_path / "node",
        (*SETTINGS, "--stack", str(stack), "--platform", "x86_64", "--only", "environment"),
    )
    house = Wheelhouse(stack.parent / "cache/sparkinstall/wheels")
    house.folder.mkdir(parents=True)
    (wheel,) = stack.parent.glob("vllm-*.whl")
    shutil.copy(wheel, house.folder)
    house.refresh()
    damage(house.folder / wheel.name)
    run = node.all("--json", **env)
    assert run.returncode == 1, output_of(run)
    error = envelope(run)["errors"][0]
    assert error["cause"] == f"damaged since it was downloaded: {wheel.name}", output_of(run)
    assert "run the same command again" in error["hint"]
    run = node.all("--json", **env)
    assert run.returncode == 0, output_of(run)


@pytest.mark.network
def test_wheel_named_by_its_url_is_taken_from_the_wheelhouse_and_its_hash_recorded(tmp_path: Path) -> None:
    stack = small_stack(tmp_path / "stack")
    (wheel,) = stack.parent.glob("vllm-*.whl")
    url, lock = f"https://127.0.0.1:9/{wheel.name}", stack.with_name("tiny.lock")
    digest = f"--hash=sha256:{sha256_of(wheel)}"
    lock.write_text(lock.read_text().replace(f"vllm==0.18.1 \\\n    {digest}", f"vllm @ {url}"))
    stack.write_text(stack.read_text().replace("{lock: tiny.lock}", f"{{lock: tiny.lock, wheels: [{{url: '{url}'}}]}}"))
    (wheels := stack.parent / "cache/sparkinstall/wheels").mkdir(parents=True)
    for each in stack.parent.glob("*.whl"):
        shutil.copy(each, wheels)
    options = (*SETTINGS, "--stack", str(stack), "--platform", "x86_64", "--only", "environment")
    run = Rehearsal(tmp_path / "node", options).all("--json", **no_index(stack))
    assert run.returncode == 0, output_of(run)
    recorded = (tmp_path / "node/opt/sparkinstall/locks/tiny.x86_64.lock").read_text()
    assert f"vllm @ {url} \\\n    {digest}\n" in recorded and "file:" not in recorded


# --- the choice among compatible wheels


@pytest.mark.parametrize(
    ("chosen", "other"),
    [
        ("a-1-cp312-cp312-manylinux2014_aarch64.manylinux_2_28_aarch64.whl", "a-1-py3-none-any.whl"),
        ("a-1-cp311-abi3-manylinux_2_34_aarch64.whl", "a-1-cp38-abi3-manylinux_2_34_aarch64.whl"),
        ("a-1-cp311-abi3-manylinux_2_34_aarch64.whl", "a-1-cp311-abi3-manylinux_2_28_aarch64.whl"),
        ("a-1-cp312-cp312-manylinux_2_28_aarch64.whl", "a-1-cp312-cp312-manylinux2014_aarch64.whl"),
        ("a-1-cp310-abi3-manylinux2014_aarch64.whl", "a-1-cp39-abi3-manylinux2014_aarch64.whl"),
        ("a-1-cp312-cp312-manylinux2014_aarch64.whl", "a-1-cp39-abi3-manylinux_2_28_aarch64.whl"),
    ],
)
def test_choice_is_the_wheel_that_fits_closest(chosen: str, other: str) -> None:
    assert max((other, chosen), key=rank) == chosen
