"""`uninstall` restores every byte; what another program has changed since is kept and named."""

import os
from pathlib import Path
from typing import Any

import pytest

from sparkinstall.errors import Blocked
from sparkinstall.events import silent
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.journal.undo import undo_all
from sparkinstall.system import Undo, Undone
from sparkinstall.system.local import LocalSystem, staged
from tests.support.rehearsals import (
    OLD,
    SETTINGS,
    Rehearsal,
    Tree,
    add_files_of_others,
    difference,
    envelope,
    everything_with_times,
    files_with_times,
    output_of,
    sparkinstall,
    tree,
)
from tests.support.tiny_stack import no_index, tiny_stack


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root that already exists, with files of others."""
    add_files_of_others(tmp_path / "node")
    return tmp_path / "node"


def state_of(root: Path) -> StateFolder:
    return StateFolder(LocalSystem(str(root)))


def change(root: Path, *changes: tuple[Any, ...]) -> None:
    """Make changes in one run; each is a method of `System` and its arguments."""
    state = state_of(root)
    with state.hold("all", silent) as run:
        on = JournaledSystem(state.system, state.journal(run), "test", state.logs(run) / "test.log", silent)
        for name, *arguments in changes:
            getattr(on, name)(*arguments)


def undone(root: Path) -> dict[str, Undone]:
    return {each.subject: each for each in undo_all(state_of(root))}


def before(root: Path) -> Tree:
    return tree(root.parent, files_with_times)


ENV = "/opt/sparkinstall/env"


@pytest.mark.network
def test_uninstall_of_a_rehearsal_among_other_files_leaves_no_trace(root: Path) -> None:
    node, first = Rehearsal(root, (*SETTINGS, "--ignore", "prefix")), before(root)
    run = node.all()
    assert run.returncode == 0, output_of(run)
    assert b"VLLM" in (root / "opt/sparkinstall/env/multi-node-head.env").read_bytes()
    assert (root / "opt/sparkinstall/elsewhere.env").read_bytes() == b"reached through a link\n"
    run = node.uninstall()
    assert run.returncode == 0, output_of(run)
    assert before(root) == first, difference(first, before(root))


@pytest.mark.network
def test_all_repeated_changes_nothing_and_uninstall_keeps_changed_files(tmp_path: Path) -> None:
    node = Rehearsal(tmp_path / "node")
    assert node.all().returncode == 0
    once = tree(tmp_path, everything_with_times)
    again = node.all("--json")
    assert envelope(again)["data"]["changed"] is False
    assert tree(tmp_path, everything_with_times) == once
    for verb in ("plan", "verify", "status"):
        shown = sparkinstall(verb, "--root", node.root)
        assert shown.returncode == 0, output_of(shown)
    assert tree(tmp_path, everything_with_times) == once, "a reading verb changes nothing"
    kept = node.root / "opt/sparkinstall/env/single-node.env"
    kept.write_bytes(kept.read_bytes() + b"export MINE=1\n")
    first = envelope(node.uninstall("--json"))
    assert first["exit_code"] == 0
    assert next(t["subject"] for t in first["data"]["changes"] if t["outcome"] == "kept") == f"{ENV}/single-node.env"
    assert kept.read_bytes().endswith(b"export MINE=1\n")
    kept.unlink()
    assert node.uninstall().returncode == 0
    assert list(tmp_path.iterdir()) == [], "a second uninstall removes what the first kept"


def test_undo_restores_content_mode_owner_and_time(root: Path) -> None:
    os.chown(root / "opt/theirs.txt", 1234, 4321) if os.geteuid() == 0 else None
    first = before(root)
    change(
        root,
        ("write", "/opt/theirs.txt", b"ours", 0o600),
        ("write", "/opt/theirs.txt", b"ours again", 0o644),
        ("write", f"{ENV}/single-node.env", b"another user's file\r\n"),
        ("link", f"{ENV}/multi-node-head.env", "/nowhere"),
        ("write", "/a/b/c/d", b"deep"),
        ("claim", "/opt/sparkinstall/venv"),
        ("write", "/opt/sparkinstall/venv/lib/x", b"x"),
    )
    assert (root / "opt/theirs.txt").read_bytes() == b"ours again"
    results = undone(root)
    assert results["/opt/theirs.txt"].outcome == "restored"
    assert before(root) == first, difference(first, before(root))


def test_undo_after_many_runs_restores_the_first_original(root: Path) -> None:
    first = before(root)
    for number in range(3):
        change(root, ("write", "/opt/theirs.txt", b"run %d" % number), ("write", f"/new/{number}", b""))
    undone(root)
    assert before(root) == first, difference(first, before(root))


def test_undo_of_a_file_changed_since_keeps_it_and_its_original(root: Path) -> None:
    first = before(root)
    change(root, ("write", "/opt/theirs.txt", b"ours"), ("write", "/new/ours", b"ours"))
    (root / "opt/theirs.txt").write_bytes(b"hands off")
    (root / "new/ours").write_bytes(b"mine now")
    results = undone(root)
    kept = results["/opt/theirs.txt"]
    assert kept.outcome == "kept" and results["/new/ours"].outcome == "kept"
    original = Path(kept.note.rpartition(" ")[2])
    assert original.read_bytes() == b"theirs\n"
    assert (root / "opt/theirs.txt").read_bytes() == b"hands off"

    assert undone(root)["/opt/theirs.txt"].outcome == "kept", "the same result again"
    (root / "opt/theirs.txt").write_bytes(b"ours")
    (root / "opt/theirs.txt").chmod(0o644)
    (root / "new/ours").unlink()
    assert undone(root)["/opt/theirs.txt"].outcome == "restored"
    assert before(root) == first, difference(first, before(root))


def test_undo_of_a_run_after_an_incomplete_uninstall_restores_everything(root: Path) -> None:
    first = before(root)
    change(root, *(("write", f"/new/{number}", b"ours") for number in range(5)), ("write", "/opt/theirs.txt", b"o"))
    (root / "opt/theirs.txt").write_bytes(b"hands off")
    undone(root)
    change(root, ("make_dir", "/later"), ("write", "/later/x/y", b"ours"))
    numbers = [record.n for record in state_of(root).journal().records()]
    assert numbers == sorted(set(numbers))
    (root / "opt/theirs.txt").write_bytes(b"o")
    undone(root)
    assert before(root) == first, difference(first, before(root))


def test_undo_keeps_files_of_others_in_our_folders(tmp_path: Path) -> None:
    root = tmp_path / "node"
    change(root, ("write", "/ours/deep/file", b"ours"))
    (root / "ours/theirs").write_bytes(b"theirs")
    results = undone(root)
    assert results["/ours"].outcome == "kept" and "theirs" in results["/ours"].note
    assert sorted(tree(root)) == ["ours", "ours/theirs"], "only empty folders around the state are removed"
    assert not state_of(root).exists


def test_undo_interrupted_before_mode_and_time_completes(root: Path) -> None:
    first = before(root)
    change(root, ("write", "/opt/theirs.txt", b"ours", 0o600))
    (root / "opt/theirs.txt").write_bytes(b"theirs\n")
    (root / "opt/theirs.txt").chmod(0o644)
    undone(root)
    assert (root / "opt/theirs.txt").stat().st_mtime_ns == OLD
    assert before(root) == first, difference(first, before(root))


def test_undo_removes_the_temporary_files_of_a_killed_write(root: Path) -> None:
    first = before(root)
    change(root, ("write", "/opt/theirs.txt", b"ours"), ("write", "/opt/new", b"ours"))
    for path in ("/opt/theirs.txt", "/opt/new"):
        Path(str(root) + staged(path)).write_bytes(b"hal")
    undone(root)
    assert before(root) == first, difference(first, before(root))


def test_undo_of_a_claimed_empty_folder_empties_it(root: Path) -> None:
    change(root, ("claim", "/opt/sparkinstall/venv"), ("write", "/opt/sparkinstall/venv/x", b""))
    undone(root)
    assert list((root / "opt/sparkinstall/venv").iterdir()) == []
    assert (root / "opt/sparkinstall/venv").stat().st_mode & 0o7777 == 0o700


@pytest.mark.parametrize("what", ["a full folder", "a file", "a link to an empty folder"])
def test_claim_of_a_foreign_path_is_refused(root: Path, what: str) -> None:
    place = root / "place"
    if what == "a full folder":
        (place / "theirs").mkdir(parents=True)
    elif what == "a file":
        place.write_bytes(b"theirs")
    else:
        place.symlink_to(root / "opt/sparkinstall/venv")
    first = before(root)
    with pytest.raises(Blocked, match="not sparkinstall's"):
        change(root, ("claim", "/place"))
    undone(root)
    assert before(root) == first, difference(first, before(root))


def test_change_through_a_link_out_of_the_rehearsal_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "node", tmp_path / "machine"
    outside.mkdir()
    root.mkdir()
    (root / "opt").symlink_to(outside)
    for step in (("write", "/opt/x", b""), ("link", "/opt/x", "y"), ("make_dir", "/opt/x"), ("claim", "/opt/x/y")):
        with pytest.raises(Blocked, match="leads out of the rehearsal"):
            change(root, step)
    assert list(outside.iterdir()) == []


def test_clear_of_an_unclaimed_folder_is_refused(root: Path) -> None:
    with pytest.raises(Blocked, match="not sparkinstall's"):
        change(root, ("clear", "/opt"))
    assert (root / "opt/theirs.txt").exists()


def test_undo_of_an_unknown_record_fails_and_keeps_it(root: Path) -> None:
    change(root, ("promise", Undo("moon", "/x", {}, {})), ("promise", Undo("path", "/y", {}, {})))
    results = undone(root)
    assert results["/x"].outcome == "failed" and results["/y"].outcome == "kept"
    assert [record.undo.kind for record in state_of(root).journal().records()][-2:] == ["moon", "path"]


def test_uninstall_without_an_installation_creates_nothing(tmp_path: Path) -> None:
    run = Rehearsal(tmp_path / "node").uninstall("--json")
    assert envelope(run)["data"] == {"changes": []}
    assert list(tmp_path.iterdir()) == []


def test_uninstall_removes_a_recorded_lock(tmp_path: Path) -> None:
    stack = tiny_stack(tmp_path / "stack", locked=False)
    node = Rehearsal(tmp_path / "around/node", (*SETTINGS, "--stack", str(stack)))
    node.root.parent.mkdir()
    run = node.all("--json", **no_index(stack))
    resources = envelope(run)["data"]["steps"][1]["resources"]
    assert resources[0]["key"].startswith("lock:") and resources[0]["changed"], output_of(run)
    run = node.uninstall()
    assert run.returncode == 0 and "kept /" not in output_of(run), output_of(run)
    assert list(node.root.parent.iterdir()) == []
