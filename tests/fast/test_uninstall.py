"""`uninstall` restores every byte; what another program has changed since is kept and named."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sparkinstall.core import catalogue  # noqa: F401 - undo functions are registered beside their resources
from sparkinstall.errors import Blocked
from sparkinstall.events import silent
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.journal.undo import undo_all
from sparkinstall.system import UNDO_FUNCTIONS, System, Undo, Undone
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
    in_this_process,
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
def test_all_repeated_changes_nothing_and_uninstall_keeps_changed_files(tmp_path: Path, small: tuple[str, ...]) -> None:
    node = Rehearsal(tmp_path / "node", small)
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


# --- an undo counts when its effect is there


class Broken(LocalSystem):
    """One method does nothing, or fails, at the paths below `place`."""

    def __init__(self, root: Path, method: str, place: str, error: OSError | None = None) -> None:
        super().__init__(str(root))
        works = getattr(self, method)

        def broken(path: str, *rest: Any) -> Any:
            if not path.startswith(place):
                return works(path, *rest)
            if error:
                raise error
            return True

        setattr(self, method, broken)


CHANGES = (
    ("write", "/opt/theirs.txt", b"ours"),
    ("write", "/new/file", b"ours"),
    ("link", f"{ENV}/multi-node-head.env", "/nowhere"),
    ("remove", f"{ENV}/single-node.env"),
    ("claim", "/opt/sparkinstall/venv"),
    ("claim", "/opt/tree"),
    ("write", "/opt/tree/x", b"ours"),
)


@pytest.mark.parametrize("error", [None, PermissionError(1, "Operation not permitted")], ids=["silent", "refused"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("write", "/opt/theirs.txt"),
        ("remove", "/new/file"),
        ("link", f"{ENV}/multi-node-head.env"),
        ("write", f"{ENV}/single-node.env"),
        ("clear", "/opt/tree"),
        ("remove_dir", "/new"),
    ],
)
def test_undo_without_effect_fails_and_can_be_repeated(
    root: Path, method: str, path: str, error: OSError | None
) -> None:
    first = before(root)
    change(root, *CHANGES)
    for _ in range(2):
        results = {each.subject: each for each in undo_all(StateFolder(Broken(root, method, path, error)))}
        assert results[path].outcome == "failed" and results[path].note, results
        assert [each.undo.subject for each in state_of(root).journal().records()].count(path) == 1
    assert undone(root)[path].outcome in ("restored", "removed")
    assert before(root) == first, difference(first, before(root))
    assert not state_of(root).exists


def recorded(kind: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the undo function of `kind`, which restores nothing in a rehearsal."""
    calls: list[str] = []

    def undo(records: Sequence[Undo], _: System) -> Undone:
        calls.append(kind)
        return Undone(records[0].subject, "restored")

    monkeypatch.setitem(UNDO_FUNCTIONS, kind, undo)
    return calls


DEPENDENT = [
    ("netplan", "the QSFP link", "/etc/netplan/40-cx7.yaml"),
    ("netplan", "the QSFP link", "/etc/netplan/01-other.yaml"),
    ("units", "vllm.service", "/etc/systemd/system/vllm.service"),
]


@pytest.mark.parametrize(("kind", "subject", "path"), DEPENDENT)
def test_undo_that_depends_on_a_file_waits_until_the_file_is_restored(
    root: Path, kind: str, subject: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, calls = before(root), recorded(kind, monkeypatch)
    change(root, ("promise", Undo(kind, subject, {}, {})), ("write", path, b"ours"))
    for _ in range(2):
        broken = Broken(root, "remove", path, PermissionError(1, "Operation not permitted"))
        results = {each.subject: each for each in undo_all(StateFolder(broken))}
        assert results[path].outcome == results[subject].outcome == "failed"
        assert path in results[subject].note and calls == [], "it is not undone over a file that stays"
    assert undone(root)[subject].outcome == "restored" and calls == [kind]
    assert before(root) == first, difference(first, before(root))


@pytest.mark.parametrize(("kind", "subject", "path"), DEPENDENT)
def test_undo_that_depends_on_a_kept_file_stays_in_the_journal(
    root: Path, kind: str, subject: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded(kind, monkeypatch)
    change(root, ("promise", Undo(kind, subject, {}, {})), ("write", path, b"ours"))
    Path(f"{root}{path}").write_bytes(b"changed by another user")
    results = undone(root)
    assert (results[path].outcome, results[subject].outcome) == ("kept", "kept") and path in results[subject].note
    Path(f"{root}{path}").unlink()
    assert undone(root)[subject].outcome == "restored" and calls == [kind, kind]
    assert not state_of(root).exists


def test_uninstall_that_keeps_something_says_how_to_finish(root: Path) -> None:
    change(root, ("write", "/opt/theirs.txt", b"ours"))
    (root / "opt/theirs.txt").write_bytes(b"changed by another user")
    said = in_this_process("uninstall", "--root", root).stdout
    assert "kept /opt/theirs.txt: changed since" in said and "`sparkinstall uninstall` again" in said
    (root / "opt/theirs.txt").write_bytes(b"ours")
    said = in_this_process("uninstall", "--root", root).stdout
    assert "Restored 1" in said and "again" not in said and not state_of(root).exists


def test_uninstall_with_a_cache_that_stays_does_not_claim_that_it_is_removed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(root, ("write", "/new", b"ours"))
    (root.parent / "disk").mkdir()
    (root.parent / "sparkinstall").symlink_to("disk")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent))
    run = in_this_process("uninstall", "--root", root, "--purge-cache")
    assert "not all of them could be removed" in run.stdout and (root.parent / "disk").is_dir()


# --- links and files in the place of our folders


@pytest.mark.parametrize("what", ["file", "link", "dangling", "pipe"])
@pytest.mark.parametrize("path", ["/opt/sparkinstall/venv", "/opt/tree", "/made/folder"])
def test_undo_with_something_else_in_the_place_of_our_folder_keeps_and_names_it(
    root: Path, path: str, what: str
) -> None:
    change(root, *CHANGES, ("make_dir", "/made/folder"))
    place, elsewhere = Path(f"{root}{path}"), root.parent / "elsewhere"
    place.rename(elsewhere)
    if what == "file":
        place.write_text("theirs")
    elif what == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(elsewhere if what == "link" else "/nowhere")
    result = undone(root)[path]
    assert result.outcome == "kept" and "in the place of the folder" in result.note, result
    assert elsewhere.is_dir() and os.path.lexists(place)


@pytest.mark.parametrize("what", ["file", "link", "pipe"])
def test_claim_of_a_folder_that_was_replaced_is_refused_with_a_hint(root: Path, what: str) -> None:
    change(root, ("claim", "/opt/tree"))
    (root / "opt/tree").rmdir()
    make: Mapping[str, Callable[[Path], None]] = {
        "file": Path.touch,
        "link": lambda path: path.symlink_to("/nowhere"),
        "pipe": os.mkfifo,
    }
    make[what](root / "opt/tree")
    with pytest.raises(Blocked, match="sparkinstall made a folder there") as refused:
        change(root, ("claim", "/opt/tree"))
    assert "move it away" in refused.value.hint


@pytest.mark.parametrize("link", ["var", "var/lib", "var/lib/sparkinstall"])
@pytest.mark.parametrize("there", [True, False], ids=["empty", "dangling"])
def test_state_behind_a_link_in_the_rehearsal_is_removed_and_the_link_stays(
    tmp_path: Path, link: str, there: bool
) -> None:
    root = tmp_path / "around/node"
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(os.path.relpath(root / "elsewhere", (root / link).parent))
    if there:
        (root / "elsewhere").mkdir()
    first = before(root)
    for _ in range(2):
        change(root, ("write", "/opt/x", b"ours"))
        assert list((root / "elsewhere").rglob("journal.jsonl"))
        undone(root)
        assert before(root) == first, difference(first, before(root))


@pytest.mark.parametrize("link", ["var", "var/lib", "var/lib/sparkinstall", "opt", "opt/sparkinstall"])
@pytest.mark.parametrize("verb", [("all", "--only", "environment"), ("run", "environment"), ("uninstall",), ("plan",)])
def test_nothing_is_written_through_a_link_out_of_the_rehearsal(
    tmp_path: Path, link: str, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "node", tmp_path / "outside"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outside.mkdir()
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(outside)
    run = in_this_process(*verb, "--root", root, "--json")
    assert list(outside.iterdir()) == []
    if link.startswith("var"):
        (error,) = envelope(run)["errors"]
        assert (run.returncode, error["code"]) == (1, "blocked") and "leads out of the rehearsal" in error["message"]


def test_folder_of_the_state_that_was_there_before_stays(tmp_path: Path) -> None:
    root = tmp_path / "node"
    (root / "var/lib/sparkinstall").mkdir(parents=True)
    first = before(root)
    change(root, ("write", "/opt/x", b"ours"))
    undone(root)
    assert before(root) == first, difference(first, before(root))


@pytest.mark.parametrize("when", ["before", "after"])
def test_files_of_others_in_the_folder_of_the_state_stay_and_are_named(tmp_path: Path, when: str) -> None:
    root = tmp_path / "node"
    theirs = root / "var/lib/sparkinstall/theirs/notes.txt"
    if when == "after":
        change(root, ("write", "/opt/x", b"ours"))
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    if when == "before":
        change(root, ("write", "/opt/x", b"ours"))
    result = undone(root)[str(theirs.parents[1])]
    assert result.outcome == "kept" and "theirs" in result.note
    assert [name for name, what in tree(root).items() if what[0] == "file"] == [str(theirs.relative_to(root))]


@pytest.mark.parametrize("kind", ["file", "pipe"])
@pytest.mark.parametrize("verb", ["all", "plan", "uninstall"])
def test_something_else_in_the_place_of_the_state_is_refused(tmp_path: Path, verb: str, kind: str) -> None:
    home = tmp_path / "node/var/lib/sparkinstall"
    home.parent.mkdir(parents=True)
    os.mkfifo(home) if kind == "pipe" else home.write_text("theirs")
    run = in_this_process(verb, "--root", tmp_path / "node", "--json")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (1, "blocked") and str(home) in error["message"], error
    assert f"mv {home}" in error["hint"]


@pytest.mark.parametrize("verb", ["plan", "all", "status", "uninstall", "verify"])
def test_root_that_is_a_dangling_link_is_a_usage_error(tmp_path: Path, verb: str) -> None:
    (tmp_path / "d").symlink_to(tmp_path / "nowhere")
    run = in_this_process(verb, "--root", tmp_path / "d", "--json")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (2, "usage") and str(tmp_path / "nowhere") in error["message"]
    assert error["hint"] == f"create it: mkdir -p {tmp_path}/nowhere"
    (tmp_path / "nowhere").mkdir()
    assert in_this_process("plan", "--root", tmp_path / "d", "--only", "packages").returncode == 0


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
