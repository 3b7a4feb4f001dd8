"""The journal: its records are complete and in order, or the error names the line and nothing is changed."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparkinstall.errors import Busy, JournalDamaged, Problem, Storage
from sparkinstall.events import Event, silent
from sparkinstall.journal import journal as journal_module
from sparkinstall.journal.journal import Journal
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.undo import undo_all
from sparkinstall.system import Undo
from sparkinstall.system.local import LocalSystem
from tests.support.mounts import need_root
from tests.support.rehearsals import (
    CHECKOUT,
    Rehearsal,
    as_ordinary_user,
    empty_rehearsal,
    envelope,
    environment,
    everything_with_times,
    sparkinstall,
    tree,
)

UNDO = Undo("path", "/x", {"kind": "absent"}, {"kind": "file", "sha256": "0", "mode": 420})


def state_of(root: Path) -> StateFolder:
    return StateFolder(LocalSystem(str(root)))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path, "run")
    for _ in range(3):
        made.add("step", UNDO)
    return made


def lines(journal: Journal) -> list[bytes]:
    return journal.path.read_bytes().splitlines(keepends=True)


def test_record_is_read_as_written(journal: Journal) -> None:
    records = Journal(journal.home).records()
    assert [record.n for record in records] == [1, 2, 3]
    assert records[0].undo == UNDO and records[0].run == "run" and records[0].step == "step"


def test_unfinished_last_line_is_ignored_and_replaced(journal: Journal) -> None:
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b'{"at": "2026-')
    again = Journal(journal.home, "second")
    assert len(again.records()) == 3
    again.add("step", UNDO)
    assert journal.path.read_bytes().startswith(whole)
    assert [record.n for record in Journal(journal.home).records()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\x00\xff",
        b'{"v": 1}',
        b'{"v": 2, "n": 1}',
        b'{"v": 1, "n": "1", "at": "", "run": "", "step": "", "undo": UNDO}',
        b'{"v": 1, "n": 1, "at": "", "run": 7, "step": "", "undo": UNDO}',
        b'{"v": 1, "n": 1, "at": "", "run": "", "step": "", "undo": {"kind": "path"}}',
        b'{"v": 1, "n": 1, "at": "", "run": "", "step": "", "undo": UNDO, "undo": 5}',
        b"[" * 100_000,
    ],
    ids=range(12),
)
def test_damaged_line_is_named_and_nothing_is_changed(journal: Journal, damage: bytes) -> None:
    undo = json.dumps({"kind": "path", "subject": "/x", "before": {}, "after": {}}).encode()
    first, _, third = lines(journal)
    journal.path.write_bytes(first + damage.replace(b"UNDO", undo) + b"\n" + third)
    content = journal.path.read_bytes()
    damaged = Journal(journal.home, "second")
    with pytest.raises(JournalDamaged, match="line 2 "):
        damaged.records()
    with pytest.raises(JournalDamaged, match="line 2 "):
        damaged.add("step", UNDO)
    assert journal.path.read_bytes() == content


@pytest.mark.parametrize("verb", ["all", "uninstall", "status"])
def test_damaged_line_stops_every_verb(tmp_path: Path, verb: str) -> None:
    root = tmp_path / "node"
    with state_of(root).hold("all", silent) as run:
        state_of(root).journal(run).add("step", UNDO)
    with open(root / "var/lib/sparkinstall/journal.jsonl", "a") as out:
        out.write("rubbish\n")
    first = tree(tmp_path, everything_with_times)
    node = Rehearsal(root)
    run_ = {
        "all": lambda: node.all("--json", "--only", "env-files"),
        "uninstall": lambda: node.uninstall("--json"),
        "status": lambda: _status(root),
    }[verb]()
    answer = envelope(run_)
    (error,) = answer["errors"]
    assert (answer["exit_code"], error["code"]) == (1, "journal")
    assert "line 6 " in error["message"] and error["hint"]
    assert tree(tmp_path, everything_with_times) == first


def _status(root: Path) -> "subprocess.CompletedProcess[str]":
    return sparkinstall("status", "--root", root, "--json")


def test_number_of_a_record_continues_after_a_rewrite(journal: Journal) -> None:
    journal.rewrite([record for record in journal.records() if record.n == 3])
    journal.add("step", UNDO)
    assert [record.n for record in Journal(journal.home).records()] == [3, 4]


def test_records_of_several_threads_are_complete_and_numbered(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")

    def add_twenty() -> None:
        for _ in range(20):
            journal.add("step", UNDO)

    threads = [threading.Thread(target=add_twenty) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.n for record in Journal(tmp_path).records()] == list(range(1, 161))


def test_step_that_reads_first_while_another_adds_loses_no_record(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Journal(journal.home, "run")
    adding = threading.Thread(target=shared.add, args=("step", UNDO))
    read = journal_module.read_state

    def read_slowly(path: Path, kind: type[Problem], hint: str) -> bytes | None:
        content = read(path, kind, hint)
        if path.name == "journal.jsonl" and adding.ident is None:
            adding.start()
            adding.join(0.5)
        return content

    monkeypatch.setattr(journal_module, "read_state", read_slowly)
    assert [record.n for record in shared.records()] == [1, 2, 3]
    adding.join()
    shared.add("step", UNDO)
    assert [record.n for record in Journal(journal.home).records()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("change", ["add", "rewrite"])
@pytest.mark.parametrize("after", ["journal.last", "journal.jsonl"])
def test_journal_that_another_process_changes_while_it_is_read_is_not_called_cut(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, change: str, after: str
) -> None:
    other, reader = Journal(journal.home), Journal(journal.home)
    known, read = other.records(), journal_module.read_state
    changed: list[Path] = []

    def read_then_change(path: Path, kind: type[Problem], hint: str) -> bytes | None:
        content = read(path, kind, hint)
        if path.name == after and not changed:
            changed.append(path)
            other.add("step", UNDO) if change == "add" else other.rewrite(known[:1])
        return content

    monkeypatch.setattr(journal_module, "read_state", read_then_change)
    reader.records()
    assert changed


def test_original_is_kept_once_readable_by_its_owner_and_checked_when_read(journal: Journal) -> None:
    name = journal.keep(b"precious")
    assert journal.keep(b"precious") == name
    kept = journal.home / "originals" / name
    assert kept.stat().st_mode & 0o777 == 0o600
    assert journal.original(name) == b"precious"
    kept.write_bytes(b"precious?")
    assert journal.keep(b"precious") == name and journal.original(name) == b"precious"
    kept.write_bytes(b"preciouz")
    with pytest.raises(JournalDamaged, match="missing or damaged"):
        journal.original(name)


def test_clock_set_back_does_not_change_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "run")
    for year in (2026, 1971, 2030):
        monkeypatch.setattr("time.gmtime", lambda year=year: (year, 1, 1, 0, 0, 0, 0, 1, 0))
        journal.add("step", UNDO)
    records = Journal(tmp_path).records()
    assert [record.at[:4] for record in records] == ["2026", "1971", "2030"]
    assert [record.n for record in records] == [1, 2, 3]


# --- a state folder that this user cannot read


@pytest.mark.parametrize("verb", ["all", "run", "plan", "status", "verify", "uninstall"])
@pytest.mark.parametrize("mode", [0o700, 0o755], ids=["folder", "journal"])
def test_state_of_another_user_is_refused_with_a_hint(tmp_path: Path, verb: str, mode: int) -> None:
    need_root()
    home = empty_rehearsal(tmp_path / "node") / "var/lib/sparkinstall"
    home.chmod(mode)
    for path in (home, *home.iterdir()):
        os.chown(path, 65534, 65534)
    run = as_ordinary_user(verb, *(["nccl"] if verb == "run" else []), "--root", tmp_path / "node", "--json")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (1, "blocked"), error
    assert f"{home} belongs to the user with id 65534" in error["message"] and "as that user" in error["hint"]


@pytest.mark.parametrize("name", ["journal.jsonl", "options.json", "."])
def test_state_with_a_wrong_mode_is_refused_with_the_command_that_repairs_it(tmp_path: Path, name: str) -> None:
    need_root()
    home = empty_rehearsal(tmp_path / "node") / "var/lib/sparkinstall"
    (home / "options.json").write_text("{}")
    (home / name).chmod(0)
    (error,) = envelope(as_ordinary_user("status", "--root", tmp_path / "node", "--json"))["errors"]
    assert error["message"] == f"{home / name} cannot be read (mode 000)"
    subprocess.run(error["hint"].split(), check=True)
    assert as_ordinary_user("status", "--root", tmp_path / "node").returncode == 0


# --- the state folder and its lock


def test_undo_all_removes_the_folders_around_the_state(tmp_path: Path) -> None:
    with state_of(tmp_path / "node").hold("all", silent):
        pass
    undo_all(state_of(tmp_path / "node"))
    assert list(tmp_path.iterdir()) == []


def test_lock_held_by_another_run_names_it(tmp_path: Path) -> None:
    state = state_of(tmp_path / "node")
    with (
        state.hold("all", silent),
        pytest.raises(Busy, match=r"`all`, pid \d+, since \d\d:\d\d:\d\d"),
        state_of(tmp_path / "node").hold("uninstall", silent),
    ):
        pass
    with state.hold("uninstall", silent):
        pass


HOLD_ONCE = """
import sys
from sparkinstall.errors import Busy
from sparkinstall.events import silent
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.undo import undo_all
from sparkinstall.system.local import LocalSystem

state = StateFolder(LocalSystem(sys.argv[1]))
for _ in range(60):
    try:
        with state.hold("all", silent) as run:
            state.journal(run).records()
        undo_all(state)
    except Busy:
        pass
"""


def test_lock_separates_runs_that_start_while_an_uninstall_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD_ONCE, str(tmp_path / "node")]
    runs = [
        subprocess.Popen(command, cwd=CHECKOUT, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    errors = [run.communicate(timeout=600)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], "\n".join(errors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "null", "[]", '{"run": 5}', '{"run": "none", "pid": "x"}', "\x00"])
def test_lock_file_with_invalid_content_stops_no_run(tmp_path: Path, content: str) -> None:
    state = state_of(tmp_path / "node")
    with state.hold("all", silent):
        pass
    (state.home / "lock").write_text(content)
    events: list[Event] = []
    with state.hold("all", events.append):
        pass
    assert events == []


def test_state_that_cannot_be_written_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparkinstall.journal.journal.replace_file", full)
    with pytest.raises(Storage, match="the disk is full"), state_of(tmp_path / "node").hold("all", silent):
        pass
    assert list(tmp_path.iterdir()) == []
