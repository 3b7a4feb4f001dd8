"""Full and read-only disks, cut downloads, wrong hashes, Ctrl-C, two runs at once, a wrong clock: each ends with a
clear error and loses nothing."""

import errno
import hashlib
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparkinstall.core import catalogue
from sparkinstall.downloads import fetch
from sparkinstall.errors import BadUsage, Blocked, CommandFailed, Interrupted, Storage, storage_problem
from sparkinstall.events import seldom, silent
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.probes import Probe, failed
from sparkinstall.resources.nccl_source import NcclSource
from sparkinstall.system import local, processes
from sparkinstall.system.local import LocalSystem
from tests.support.cut_downloads import CutServer, served
from tests.support.fake_sudo import AsAnotherUser, among_files_of_root, fake_sudo
from tests.support.mounts import fill, need_root, read_only, resize, small_disk
from tests.support.rehearsals import (
    SETTINGS,
    Rehearsal,
    add_files_of_others,
    as_ordinary_user,
    empty_rehearsal,
    envelope,
    everything_with_times,
    files_with_times,
    in_this_process,
    output_of,
    sparkinstall,
    tree,
)
from tests.support.tiny_stack import no_index, tiny_stack

DYING = "tests.support.dying_run"


# --- disks


@pytest.mark.network
def test_all_on_a_full_disk_fails_and_resumes_with_more_space(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64m") as disk:
        node = Rehearsal(disk / "node")
        first = envelope(node.all("--json"))
        assert first["status"] == "preflight" and "disk" in first["errors"][0]["message"]
        assert list(disk.iterdir()) == [], "nothing was changed"

        node = Rehearsal(disk / "node", (*SETTINGS, "--ignore", "disk"))
        run = node.all("--json")
        full = envelope(run)
        assert full["exit_code"] == 1 and full["errors"][0]["cause"].startswith("the disk is full"), output_of(run)
        assert "run the same command again" in full["errors"][0]["hint"]
        assert "Traceback" not in output_of(run)
        resize(disk, "1500m")
        run = node.all("--json")
        assert envelope(run)["data"]["changed"] is True, output_of(run)
        assert node.uninstall().returncode == 0
        assert list(disk.iterdir()) == []


def test_change_with_a_full_disk_below_the_journal_is_not_made(tmp_path: Path) -> None:
    with small_disk(tmp_path / "node/var/lib/sparkinstall", "64k"):
        state = StateFolder(LocalSystem(str(tmp_path / "node")))
        with state.hold("all", silent) as run:
            on = JournaledSystem(state.system, state.journal(run), "s", state.home / "log", silent)
            on.write("/before", b"")
            fill(state.home / "filler")
            number = 0
            with pytest.raises(Storage, match=r"journal .* the disk is full"):
                for number in range(1000):
                    on.write(f"/many/{number}", b"x")
            assert not (tmp_path / f"node/many/{number}").exists(), "no change without its record"
            records = StateFolder(state.system).journal().records()
            assert records[-1].undo.subject == f"/many/{number - 1}"
            os.unlink(state.home / "filler")
            on.write(f"/many/{number}", b"x")


def test_all_with_a_full_state_disk_fails_at_once(tmp_path: Path) -> None:
    with small_disk(tmp_path / "node/var/lib/sparkinstall", "16k") as home:
        fill(home / "filler")
        run = Rehearsal(tmp_path / "node", (*SETTINGS, "--ignore", "disk")).all("--json")
        answer = envelope(run)
        assert (answer["exit_code"], answer["errors"][0]["code"]) == (1, "storage"), output_of(run)
        assert "full" in answer["errors"][0]["message"] and "Traceback" not in output_of(run)


@pytest.mark.parametrize("place", ["opt", "var/lib", ""])
def test_all_with_a_read_only_folder_fails_and_loses_nothing(tmp_path: Path, place: str) -> None:
    root = tmp_path / "node"
    add_files_of_others(root)
    (root / "var/lib").mkdir(parents=True)
    node, first = Rehearsal(root, (*SETTINGS, "--ignore", "prefix")), tree(tmp_path, files_with_times)
    with read_only(root / place):
        run = node.all("--json")
        answer = envelope(run)
        assert answer["exit_code"] == 1 and answer["errors"][0]["code"] == "storage", output_of(run)
        assert "read-only" in answer["errors"][0]["message"] and answer["errors"][0]["hint"]
        assert "Traceback" not in output_of(run)
    assert node.uninstall().returncode == 0
    assert tree(tmp_path, files_with_times) == first


@pytest.mark.parametrize("name", ["", "node"], ids=["the root", "the folder around it"])
def test_all_without_write_permission_names_the_folder(tmp_path: Path, name: str) -> None:
    need_root()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    run = as_ordinary_user(
        "all", "--root", closed / name, "--only", "env-files", "--only", "fp8", "--only", "environment", "--json"
    )
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (1, "storage"), error
    assert error["message"] == f"{closed / name}/var/lib/sparkinstall cannot be created: permission denied"
    assert error["cause"] == f"you may not write to the folder {closed}"
    assert "--root" in error["hint"] and f"chmod u+wx {closed}" in error["hint"]
    assert list(closed.iterdir()) == []


CHANGES: dict[str, Callable[[LocalSystem, str], object]] = {
    "writing": lambda on, folder: on.write(f"{folder}/new.yaml", b"x" * 20_000),
    "linking": lambda on, folder: on.link(f"{folder}/new", "elsewhere"),
    "creating the folder": lambda on, folder: on.make_dir(f"{folder}/new"),
    "removing": lambda on, folder: on.remove(f"{folder}/kept"),
    "restoring mode, owner and time of": lambda on, folder: on.restore_meta(f"{folder}/kept", 0o600, 1, 1, 0),
}


@pytest.mark.parametrize(
    ("doing", "size", "why"),
    [
        ("writing", "12k", "the disk is full"),
        *((doing, "1m,nr_inodes=2", "no inode is left on the disk") for doing in list(CHANGES)[:3]),
    ],
)
def test_change_by_sudo_on_a_full_disk_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doing: str, size: str, why: str
) -> None:
    with small_disk(tmp_path / "netplan", size) as disk:
        fill(disk / "filler")
        fake_sudo(tmp_path / "bin", monkeypatch)
        with pytest.raises(Storage) as full:
            among_files_of_root(CHANGES[doing], str(disk))
        assert re.fullmatch(rf"{doing} {disk}/new(.yaml)? failed: {why}", full.value.message)
        assert ("free some space" if "full" in why else "delete files") in full.value.hint
        assert os.listdir(disk) == ["filler"]


@pytest.mark.parametrize("doing", list(CHANGES)[:3])
def test_change_without_sudo_on_a_full_disk_says_so(tmp_path: Path, doing: str) -> None:
    with small_disk(tmp_path / "netplan", "1m,nr_inodes=2") as disk:
        (disk / "one").touch()
        with pytest.raises(Storage, match="no inode is left on the disk"):
            CHANGES[doing](LocalSystem(), str(disk))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("root", [True, False])
def test_refusal_of_the_kernel_is_not_a_matter_of_sudo_for_root(
    monkeypatch: pytest.MonkeyPatch, number: int, root: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    hint = storage_problem(OSError(number, "no"), "writing /x").hint
    assert ("sudo" in hint, "lsattr" in hint) == (not root, root)


@pytest.mark.parametrize("doing", CHANGES)
def test_change_by_sudo_on_a_read_only_disk_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    (tmp_path / "netplan").mkdir()
    (tmp_path / "netplan/kept").touch()
    with read_only(tmp_path / "netplan") as folder:
        fake_sudo(tmp_path / "bin", monkeypatch)
        with pytest.raises(Storage, match="the file system is read-only") as found:
            among_files_of_root(CHANGES[doing], str(folder))
        assert found.value.message.startswith(doing) and "mount it writable" in found.value.hint


@pytest.mark.parametrize("doing", CHANGES)
@pytest.mark.parametrize(
    ("refusal", "hint"),
    [
        ("Sorry, user spark is not allowed to execute '/usr/bin/x' as root on node.", "let this user run"),
        ("sudo: a password is required", "sudo -v"),
    ],
)
def test_change_that_sudo_refuses_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doing: str, refusal: str, hint: str
) -> None:
    (tmp_path / "kept").touch()
    fake_sudo(tmp_path / "bin", monkeypatch, refusal)
    with pytest.raises(CommandFailed) as found:
        among_files_of_root(CHANGES[doing], str(tmp_path))
    assert found.value.message.startswith(doing) and str(tmp_path) in found.value.message
    assert refusal in found.value.cause and hint in found.value.hint


def test_write_by_sudo_with_a_full_temporary_folder_names_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "tmp", "12k") as disk:
        fill(disk / "filler")
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        fake_sudo(tmp_path / "bin", monkeypatch)
        with pytest.raises(Storage, match=rf"temporary file in {disk} failed: the disk is full"):
            among_files_of_root(CHANGES["writing"], str(tmp_path))


# --- downloads

CONTENT = bytes(range(256)) * 4096


def same(got: Path) -> bool:
    """Whether a file has the whole content. A plain assert would let pytest compare a megabyte byte by byte."""
    return got.read_bytes() == CONTENT


def test_progress_is_told_at_once_and_then_once_in_a_while() -> None:
    told: list[tuple[int, int]] = []
    tell = seldom(lambda *amount: told.append(amount), 0.3)
    for done in range(1000):
        tell(done, 1000)
    assert told[0] == (0, 1000) and len(told) < 100
    time.sleep(0.3)
    tell(1000, 1000)
    assert told[-1] == (1000, 1000)


def test_fetch_after_a_cut_resumes(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    with served(CutServer(CONTENT, cut=400_000)) as server:
        for _ in range(2):
            with pytest.raises(CommandFailed) as cut:
                fetch(server.url, tmp_path / "file", lambda *amount: progress.append(amount))
            assert "the download resumes where it stopped" in cut.value.hint
            assert not (tmp_path / "file").exists()
        got = fetch(server.url, tmp_path / "file", lambda *amount: progress.append(amount))
        assert same(got)
        starts = [int(each.strip("bytes=-")) if each else 0 for each in server.asked]
        assert starts[0] == 0 < starts[1] < starts[2], "what has arrived is not requested again"
        assert progress[-1] == (len(CONTENT), len(CONTENT))
        assert fetch(server.url, tmp_path / "file", lambda *_: None) == got and len(server.asked) == 3


def test_fetch_from_a_server_without_ranges_starts_again(tmp_path: Path) -> None:
    with served(CutServer(CONTENT, cut=400_000, ranges=False)) as server:
        with pytest.raises(CommandFailed):
            fetch(server.url, tmp_path / "file", lambda *_: None)
        server.cut = 0
        assert same(fetch(server.url, tmp_path / "file", lambda *_: None))


def test_fetch_of_a_complete_part_succeeds(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    with served(CutServer(CONTENT)) as server:
        assert same(fetch(server.url, tmp_path / "file", lambda *_: None))


def test_fetch_with_a_part_longer_than_the_file_discards_it(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    with served(CutServer(CONTENT)) as server:
        with pytest.raises(CommandFailed):
            fetch(server.url, tmp_path / "file", lambda *_: None)
        assert same(fetch(server.url, tmp_path / "file", lambda *_: None))


def test_fetch_with_a_wrong_range_in_the_answer_fails(tmp_path: Path) -> None:
    with served(CutServer(CONTENT, cut=400_000)) as server:
        with pytest.raises(CommandFailed):
            fetch(server.url, tmp_path / "file", lambda *_: None)
        server.shifted = 10
        with pytest.raises(CommandFailed, match="could not be downloaded"):
            fetch(server.url, tmp_path / "file", lambda *_: None)
        assert CONTENT.startswith((tmp_path / "file.part").read_bytes())


@pytest.mark.parametrize("name", ["file", "file.part", ".file.lock"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/nowhere", path)])
def test_fetch_with_something_else_in_the_place_of_a_file_names_it(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / name)
    with pytest.raises(Storage, match=f"{tmp_path / name} is not a file") as problem:
        fetch("http://127.0.0.1:9/x", tmp_path / "file", lambda *_: None)
    assert f"rm -r {tmp_path / name}" in problem.value.hint


def test_fetch_to_a_full_disk_fails(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "128k") as disk, served(CutServer(CONTENT)) as server:
        with pytest.raises(Storage, match="the disk is full"):
            fetch(server.url, disk / "file", lambda *_: None)
        resize(disk, "4m")
        assert same(fetch(server.url, disk / "file", lambda *_: None))


@pytest.mark.parametrize("status", [403, 404, 500])
def test_fetch_that_the_server_refuses_does_not_blame_the_network(tmp_path: Path, status: int) -> None:
    with served(CutServer(CONTENT, status=status)) as server, pytest.raises(CommandFailed) as found:
        fetch(server.url, tmp_path / "file", lambda *_: None)
    assert str(status) in found.value.cause and "the network works" in found.value.hint


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("http://127.0.0.1:9/x", "check the network"),
        ("http://name.invalid/x", "check the network"),
        ("https:///x", "correct the address"),
        ("nonsense://x", "correct the address"),
    ],
)
def test_fetch_from_where_nobody_answers_says_what_to_check(tmp_path: Path, url: str, hint: str) -> None:
    with pytest.raises(CommandFailed) as found:
        fetch(url, tmp_path / "file", lambda *_: None)
    assert hint in found.value.hint and found.value.cause


# --- hashes


def test_all_with_a_wrong_wheel_hash_installs_nothing(tmp_path: Path) -> None:
    stack = tiny_stack(tmp_path / "stack", hash_is_right=False)
    node = Rehearsal(tmp_path / "around/node", (*SETTINGS, "--stack", str(stack)))
    node.root.parent.mkdir()
    run = node.all("--json", **no_index(stack))
    error = envelope(run)["errors"][0]
    assert "hash" in error["cause"] and error["hint"] and error["log"], output_of(run)
    assert not list(node.root.rglob("vllm"))
    assert node.uninstall().returncode == 0
    assert list(node.root.parent.iterdir()) == []


def test_nccl_source_with_a_wrong_hash_is_not_kept(tmp_path: Path) -> None:
    state = StateFolder(LocalSystem(str(tmp_path / "node")))
    with served(CutServer(CONTENT)) as server, state.hold("all", silent) as run:
        on = JournaledSystem(state.system, state.journal(run), "nccl", state.logs(run) / "nccl.log", silent)
        source = NcclSource("2.28.9", "v2.28.9-1", "0" * 40, server.url, "0" * 64, tmp_path / "cache")
        on.claim("/nccl")
        with pytest.raises(Blocked, match="does not have the expected hash") as wrong:
            source.bring(on, "/nccl/source")
        assert hashlib.sha256(CONTENT).hexdigest() in wrong.value.cause
        assert not (tmp_path / "node/nccl/source").exists()
        assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"]


# --- interrupts


def test_nccl_source_that_stalls_ends_at_an_interrupt_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()

    def refuse() -> None:
        if any(part.stat().st_size for part in tmp_path.glob("cache/*.part")):
            raise Interrupted("interrupted")

    monkeypatch.setattr(processes, "refuse_if_stopped", refuse)
    with served(CutServer(CONTENT, cut=len(CONTENT) // 2, held=held)) as server:
        source = NcclSource("2.28.9", "v2.28.9-1", "0" * 40, server.url, None, tmp_path / "cache")
        with pytest.raises(Interrupted, match="what has come is kept"):
            source.bring(LocalSystem(str(tmp_path / "node")), "/nccl/source")
        # Nobody has asked again, and the server still holds the connection.
        assert server.asked == [None] and not held.is_set()
        assert [part.stat().st_size > 0 for part in tmp_path.glob("cache/*.part")] == [True]
        held.set()


SLEEPY = "tests.support.sleepy_run"


@pytest.mark.parametrize(("sig", "stubborn"), [("INT", ""), ("TERM", ""), ("INT", "stubborn")])
def test_all_interrupted_ends_with_130_and_all_its_programs(tmp_path: Path, sig: str, stubborn: str) -> None:
    node, pids = Rehearsal(tmp_path / "node", ()), tmp_path / "pids"
    run = node.start("all", through=SLEEPY, SLEEPY_PIDS=str(pids), SLEEPY_HOW=stubborn)
    while not pids.exists() or pids.read_text().count("\n") < 2:
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    os.killpg(run.pid, getattr(signal, f"SIG{sig}"))
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 130, text
    assert "Traceback" not in text and "run the same command again" in text, text
    for pid in pids.read_text().split():
        assert not is_alive(int(pid)), text
    assert pids.read_text().count("\n") == 2, "no program is started after the interrupt"
    assert "/later" not in (node.journal.read_text()), "nothing is changed after the interrupt"
    assert node.uninstall().returncode == 0
    assert not node.root.exists()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_options_after_an_interrupt_are_used_by_a_plain_command(tmp_path: Path) -> None:
    node, pids = Rehearsal(tmp_path / "node", ("--stack", "0.22.1", "--platform", "aarch64")), tmp_path / "pids"
    run = node.start(through=SLEEPY, SLEEPY_PIDS=str(pids))
    while not pids.exists() or pids.read_text().count("\n") < 2:
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 130, text
    status = envelope(sparkinstall("status", "--json", "--root", node.root))["data"]
    assert (status["stack"], status["platform"]) == ("0.22.1", "aarch64")
    assert "stack 0.22.1, aarch64" in sparkinstall("plan", "--root", node.root).stdout
    assert node.uninstall().returncode == 0
    assert not node.root.exists()


def test_options_after_a_killed_run_are_stored(tmp_path: Path) -> None:
    node, stack = Rehearsal(tmp_path / "node", ()), tiny_stack(tmp_path / "stack")
    killed = node.all("--stack", str(stack), through=DYING, DYING_AT="before:5", **no_index(stack))
    assert killed.returncode == -signal.SIGKILL, output_of(killed)
    assert StateFolder(LocalSystem(str(node.root))).options() == {"settings": {"stack": str(stack)}}
    assert node.uninstall().returncode == 0
    assert not node.root.exists()


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (("plan", "--stack", "0.22.1"), 0),
        (("all", "--stack", "0.22.1", "--only", "env-files"), 2),
        (("all", "--stack", "0.22.1", "--ignore", "nonsense"), 2),
    ],
)
def test_options_of_a_run_that_does_not_start_are_not_stored(tmp_path: Path, asked: tuple[str, ...], code: int) -> None:
    root = empty_rehearsal(tmp_path / "node")
    run = in_this_process(*asked, "--root", root)
    assert run.returncode == code, output_of(run)
    assert StateFolder(LocalSystem(str(root))).options() == {}


def test_options_of_a_run_that_preflight_stops_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Probe("clock", "x", lambda _: failed("it is 1970", "set it"), "static")
    monkeypatch.setattr("sparkinstall.probes.preflight.preflight", lambda _: [bad])
    root = empty_rehearsal(tmp_path / "node")
    assert in_this_process("all", "--stack", "0.22.1", "--root", root).returncode == 4
    assert StateFolder(LocalSystem(str(root))).options() == {}


def test_options_of_an_unconfirmed_run_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BadUsage("there is no terminal to ask on")

    monkeypatch.setattr("sparkinstall.cli.install.confirm", refuse)
    root = empty_rehearsal(tmp_path / "node")
    assert in_this_process("all", "--stack", "0.22.1", "--root", root).returncode == 2
    assert StateFolder(LocalSystem(str(root))).options() == {}


def test_options_of_a_run_without_changes_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options are stored although the node is already up to date."""
    monkeypatch.setattr(catalogue, "STEPS", ())
    root = empty_rehearsal(tmp_path / "node")
    state = StateFolder(LocalSystem(str(root)))
    state.remember_options({"settings": {"stack": "0.22.1"}})
    run = in_this_process("all", "--stack", "0.18.1", "--root", root)
    assert run.returncode == 0 and "nothing was changed" in run.stdout, output_of(run)
    assert state.options() == {"settings": {"stack": "0.18.1"}}
    before = tree(root, everything_with_times)
    assert in_this_process("all", "--root", root).returncode == 0
    assert tree(root, everything_with_times) == before


@pytest.mark.network
def test_all_repeated_after_an_interrupt_completes(tmp_path: Path) -> None:
    node = Rehearsal(tmp_path / "node")
    run = node.start()
    while not (node.root / "opt/sparkinstall/venv/pyvenv.cfg").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 130, text
    assert "Traceback" not in text
    again = node.all()
    assert again.returncode == 0, output_of(again)
    assert node.uninstall().returncode == 0
    assert list(tmp_path.iterdir()) == []


# --- two runs at once, and the clock


@pytest.mark.network
def test_second_run_during_the_first_is_refused_with_its_pid(tmp_path: Path, small: tuple[str, ...]) -> None:
    node = Rehearsal(tmp_path / "node", small)
    run = node.start(through=DYING, DYING_AT="stop:5")
    while not node.journal.exists() or node.journal.read_bytes().count(b"\n") < 5:
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    for second in (node.all("--json"), node.uninstall("--json")):
        answer = envelope(second)
        assert (answer["exit_code"], answer["errors"][0]["code"]) == (1, "busy")
        assert re.search(rf"`all`, pid {run.pid}, since", answer["errors"][0]["message"])
    os.kill(run.pid, signal.SIGCONT)
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0, text
    assert envelope(node.all("--json"))["data"]["changed"] is False
    shutil.rmtree(node.root)


def test_uninstall_during_a_run_is_refused_at_once(tmp_path: Path) -> None:
    root = tmp_path / "node"
    state = StateFolder(LocalSystem(str(root)))
    with state.hold("all", silent):
        before = tree(root, everything_with_times)
        run = in_this_process("uninstall", "--root", root)
        assert run.returncode == 1 and f"`all`, pid {os.getpid()}" in output_of(run), output_of(run)
        assert "To undo" not in run.stdout
        assert tree(root, everything_with_times) == before
    run = in_this_process("uninstall", "--root", root)
    assert run.returncode == 0 and "To undo" in run.stdout, output_of(run)


def test_uninstall_with_the_lock_of_a_killed_run_succeeds(tmp_path: Path) -> None:
    root = empty_rehearsal(tmp_path / "node")
    (root / "var/lib/sparkinstall/lock").write_text('{"pid": 1, "verb": "all", "run": "killed-1"}')
    assert in_this_process("uninstall", "--root", root).returncode == 0


def test_all_with_a_wrong_clock_fails_in_preflight(tmp_path: Path) -> None:
    node = Rehearsal(tmp_path / "node")
    run = node.all("--json", through="tests.support.wrong_clock", CLOCK_SECONDS="86400")
    answer = envelope(run)
    assert answer["status"] == "preflight" and "clock" in answer["errors"][0]["message"], output_of(run)
    assert not node.root.exists()


@pytest.mark.network
def test_uninstall_after_a_clock_jump_removes_everything(tmp_path: Path, small: tuple[str, ...]) -> None:
    node = Rehearsal(tmp_path / "node", (*small, "--ignore", "clock"))
    killed = node.all(through=DYING, DYING_AT="after:8")
    assert killed.returncode == -signal.SIGKILL
    run = node.all(through="tests.support.wrong_clock", CLOCK_SECONDS="86400")
    assert run.returncode == 0, output_of(run)
    years = [record["at"][:4] for record in node.records()]
    assert years[0] > years[-1] == "1970"
    assert node.uninstall().returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_file_that_only_root_can_read_is_read_up_to_the_same_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    fake_sudo(tmp_path / "bin", monkeypatch)
    monkeypatch.setattr(local, "read_regular", denied)
    monkeypatch.setattr(local, "_LARGEST", 10)
    (path := tmp_path / "file").write_bytes(b"0123456789")
    assert AsAnotherUser().read(str(path)) == b"0123456789"
    path.write_bytes(b"0123456789a")
    with pytest.raises(OSError, match="larger than 10 bytes"):
        AsAnotherUser().read(str(path))
