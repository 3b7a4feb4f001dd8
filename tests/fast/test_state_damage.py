"""The state folder after damage by others: an error that names the file and what to do, or the right answer; never a
silent default. And once the file is repaired, `uninstall` restores everything."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkinstall.events import silent
from sparkinstall.journal.journal import Journal
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.system import Undo
from sparkinstall.system.local import LocalSystem
from tests.support.rehearsals import (
    Rehearsal,
    add_files_of_others,
    difference,
    envelope,
    files_with_times,
    in_this_process,
    output_of,
    tree,
)

EXAMPLES = int(os.environ.get("SPARKINSTALL_FUZZ", "25"))
bounded = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

OPTIONS = {"settings": {"stack": "0.22.1", "cluster.role": "head"}, "platform": "aarch64"}
DOCUMENTED = {0, 1, 2, 3, 4, 5, 130}
FILES = ("journal.jsonl", "journal.last", "options.json", "unproven", "lock", "ORIGINAL")
FOLDERS = ("logs", "originals")


class SmallRehearsal:
    """A rehearsal with changes of each kind that it can have, over files of others; `reset` restores it."""

    def __init__(self, top: Path) -> None:
        self.top, self.node = top / "around", Rehearsal(top / "around/node", ())
        self.root, self.home = self.node.root, self.node.home
        add_files_of_others(self.root)
        (self.top / "outside").write_text("of another program\n")
        self.before = tree(self.top, files_with_times)
        state = StateFolder(LocalSystem(str(self.root)))
        with state.hold("all", silent) as run:
            on = JournaledSystem(state.system, state.journal(run), "test", state.logs(run) / "test.log", silent)
            on.write("/opt/theirs.txt", b"ours\n")
            on.write("/opt/sparkinstall/env/single-node.env", b"ours\n", 0o600)
            on.link("/opt/sparkinstall/env/multi-node-head.env", "/nowhere")
            on.write("/etc/new/file", b"ours\n")
            on.claim("/opt/sparkinstall/venv")
            on.write("/opt/sparkinstall/venv/bin/python", b"ours\n")
            on.remove("/opt/sparkinstall/elsewhere.env")
            state.remember_options(OPTIONS)
            state.remember_unproven(["clock"])
            on.try_run("true")
        self.copy = top / "copy"
        self._copied(self.top, self.copy)

    def reset(self) -> None:
        shutil.rmtree(self.top)
        self._copied(self.copy, self.top)

    def _copied(self, one: Path, other: Path) -> None:
        shutil.copytree(one, other, symlinks=True)

    def place(self, name: str) -> Path:
        return next((self.home / "originals").iterdir()) if name == "ORIGINAL" else self.home / name

    def repair(self, path: Path) -> None:
        """Restore a file or folder of the state, as from a backup."""
        _gone(path)
        kept = self.copy / path.relative_to(self.top)
        if kept.is_dir():
            shutil.copytree(kept, path)
        else:
            shutil.copy2(kept, path)

    def restored(self) -> str:
        """The differences from what was there before; "" if everything is back."""
        return difference(self.before, tree(self.top, files_with_times))


def _gone(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SmallRehearsal:
    return SmallRehearsal(tmp_path_factory.mktemp("state"))


@pytest.fixture
def small(made: SmallRehearsal) -> SmallRehearsal:
    made.reset()
    return made


def _folder(path: Path) -> None:
    _gone(path)
    path.mkdir()


def _pipe(path: Path) -> None:
    _gone(path)
    os.mkfifo(path)


def _links_to(target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        _gone(path)
        path.symlink_to(target)

    return link


def _file(path: Path) -> None:
    _gone(path)
    path.write_text("a file\n")


KINDS: Mapping[str, Callable[[Path], None]] = {
    "folder": _folder,
    "pipe": _pipe,
    "dangling-link": _links_to("/nowhere/at/all"),
    "link-to-itself": _links_to("lock-of-itself"),
    "link-out": _links_to("../../../../outside"),
}
CONTENTS: Mapping[str, bytes] = {
    "half-of-a-character": b'{"\\ud800": "\\ud800"}\n',
    "empty": b"",
    "blank": b"\n",
    "not-utf8": b"\xff\xfe\n",
    "nul": b"\0" * 64,
    "deep": b"[" * 100_000 + b"\n",
    "deep-ends": b"[" * 50_000 + b"]" * 50_000 + b"\n",
    "list": b"[]\n",
    "number": b"5\n",
    "null": b"null\n",
    "huge-number": b"9" * 5000 + b"\n",
    "text": b'"text"\n',
    "other-keys": b'{"stack": "0.18.1", "role": "head"}\n',
    "other-settings": b'{"settings": {"cluster.rolle": "head"}}\n',
    "settings-list": b'{"settings": ["cluster.role"]}\n',
    "cut": b'{"platform": "aarch64", "settings": {"stack": "0.2',
}


def _damaged(path: Path, damage: str) -> None:
    if damage in KINDS:
        KINDS[damage](path)
    else:
        path.write_bytes(CONTENTS[damage])


# --- each kind of damage to each file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_state_file_of_another_kind_is_named_by_every_verb_that_needs_it(
    small: SmallRehearsal, name: str, kind: str
) -> None:
    path = small.place(name)
    KINDS[kind](path)
    _judge(small, path, "uninstall")


@pytest.mark.parametrize("kind", ["file", *(each for each in KINDS if each != "folder")])
@pytest.mark.parametrize("name", FOLDERS)
def test_state_folder_of_another_kind_is_named(small: SmallRehearsal, name: str, kind: str) -> None:
    path = small.place(name)
    {**KINDS, "file": _file}[kind](path)
    _judge(small, path, "uninstall")


@pytest.mark.parametrize(
    ("damage", "verb"),
    [
        *((damage, "settings") for damage in (*CONTENTS, *KINDS)),
        *((damage, verb) for verb in ("plan", "status", "all") for damage in ("empty", "pipe")),
    ],
)
def test_options_that_cannot_be_read_stop_every_verb_that_continues_with_them(
    small: SmallRehearsal, damage: str, verb: str
) -> None:
    path = small.home / "options.json"
    _damaged(path, damage)
    before = tree(small.root / "opt")
    run = _run(small, verb)
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (1, "state"), error
    assert str(path) in error["message"] and f"mv {path}" in error["hint"] and len(error["message"]) < 400
    assert tree(small.root / "opt") == before, "nothing was changed"


@pytest.mark.parametrize("damage", ["empty", "blank", "not-utf8", "nul", *KINDS])
def test_unproven_that_cannot_be_read_is_named(small: SmallRehearsal, damage: str) -> None:
    path = small.home / "unproven"
    _damaged(path, damage)
    state = StateFolder(LocalSystem(str(small.root)))
    with pytest.raises(Exception, match=f"{path} (cannot be read|is not a list of probes)") as found:
        state.unproven()
    assert f"rm -r {path}" in getattr(found.value, "hint", "")


@pytest.mark.parametrize("damage", ["empty", "not-utf8", "nul"])
def test_unproven_that_is_damaged_is_replaced_at_the_end_of_a_run(small: SmallRehearsal, damage: str) -> None:
    _damaged(small.home / "unproven", damage)
    state = StateFolder(LocalSystem(str(small.root)))
    state.remember_unproven(["disk"])
    assert state.unproven() == ["disk"]
    state.remember_unproven([])
    assert state.unproven() == [] and not (small.home / "unproven").exists()


# Each damage for one verb, and each verb for two.
JOURNALS = [
    (name, damage, verb)
    for name in ("journal.jsonl", "journal.last")
    for damage in (*CONTENTS, *KINDS)
    for verb in (("plan", "status", "all", "uninstall") if damage in ("cut", "pipe") else ("uninstall",))
    # A smaller number than that of the last line is that of a killed run.
    if (name, damage) != ("journal.last", "number")
]


@pytest.mark.parametrize(("name", "damage", "verb"), JOURNALS)
def test_journal_that_cannot_be_read_stops_every_verb_that_needs_it(
    small: SmallRehearsal, name: str, damage: str, verb: str
) -> None:
    path = small.home / name
    _damaged(path, damage)
    run = _run(small, verb)
    (error,) = envelope(run)["errors"]
    assert run.returncode == 1 and error["code"] in ("journal", "state"), error
    assert str(path) in error["message"] and error["hint"] and len(error["message"]) < 400
    small.repair(path)
    assert _run(small, "uninstall").returncode == 0
    assert not small.restored()


@pytest.mark.parametrize("verb", ["all", "status", "uninstall"])
def test_journal_that_is_gone_is_not_taken_for_never_set_up(small: SmallRehearsal, verb: str) -> None:
    (small.home / "journal.jsonl").unlink()
    run = _run(small, verb)
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (1, "journal"), error
    assert f"{small.home}/journal.jsonl is missing" in error["message"] and "backup" in error["hint"]


def test_journal_cut_at_any_line_is_recognised(small: SmallRehearsal) -> None:
    lines = (small.home / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for kept in range(len(lines)):
        (small.home / "journal.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:7])
        run = _run(small, "uninstall")
        (error,) = envelope(run)["errors"]
        assert (run.returncode, error["code"]) == (1, "journal"), kept
        assert str(small.home / "journal.jsonl") in error["message"] and error["hint"]


def test_journal_of_an_older_version_is_read(tmp_path: Path) -> None:
    undo = {"kind": "path", "subject": "/x", "before": {"kind": "absent"}, "after": {"kind": "absent"}}
    line = {"v": 1, "n": 1, "at": "", "run": "", "step": "", "undo": undo}
    (tmp_path / "journal.jsonl").write_text(json.dumps(line) + "\n")
    journal = Journal(tmp_path)
    assert [each.n for each in journal.records()] == [1]
    journal.add("step", Undo("path", "/y", {}, {}))
    assert [each.n for each in Journal(tmp_path).records()] == [1, 2]


# --- random damage


damages = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 0.999), st.just(b"")),
    st.tuples(st.just("flip"), st.floats(0, 0.999), st.binary(min_size=1, max_size=1)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("drop"), st.floats(0, 0.9), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("replace"), st.just(0.0), st.binary(max_size=200)),
    st.tuples(st.sampled_from(sorted(KINDS)), st.just(0.0), st.just(b"")),
)


def _damage(path: Path, how: str, where: float, what: bytes) -> None:
    if how in KINDS:
        KINDS[how](path)
        return
    content = path.read_bytes()
    at = int(where * len(content))
    after = {
        "cut": content[:at],
        "flip": content[:at] + what + content[at + 1 :],
        "insert": content[:at] + what + content[at:],
        "drop": content[:at] + content[at + len(what) :],
        "replace": what,
    }[how]
    path.write_bytes(after)


@bounded
@given(name=st.sampled_from(FILES), damage=damages)
def test_uninstall_after_random_damage_restores_everything_or_names_the_file(
    made: SmallRehearsal, name: str, damage: tuple[str, float, bytes]
) -> None:
    made.reset()
    path = made.place(name)
    _damage(path, *damage)
    _judge(made, path, "uninstall")


@bounded
@given(name=st.sampled_from(FILES), damage=damages, verb=st.sampled_from(["settings", "plan", "status", "all"]))
def test_verb_after_random_damage_ends_with_a_documented_code_and_names_the_file(
    made: SmallRehearsal, name: str, damage: tuple[str, float, bytes], verb: str
) -> None:
    made.reset()
    path = made.place(name)
    _damage(path, *damage)
    run = _run(made, verb)
    assert run.returncode in DOCUMENTED and "internal error" not in output_of(run), output_of(run)
    for error in envelope(run)["errors"]:
        assert len(error["message"]) < 600 and error["message"].isprintable(), error
        if error["code"] in ("journal", "state"):
            assert str(path) in error["message"] and error["hint"], error
    made.repair(path)
    assert made.node.root.exists() and _run(made, "uninstall").returncode == 0
    assert not made.restored()


@pytest.mark.parametrize("place", ["opt/theirs.txt", "opt/sparkinstall/env/single-node.env", "etc/new/file"])
def test_file_of_the_node_that_has_become_too_large_is_named_and_not_read(small: SmallRehearsal, place: str) -> None:
    path = small.root / place
    was = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(200 << 30)
    for verb in ("plan", "all", "verify", "status"):
        run = _run(small, verb)
        assert run.returncode in DOCUMENTED and "internal error" not in output_of(run), output_of(run)
    (error,) = envelope(_run(small, "uninstall"))["errors"]
    assert str(path) in error["message"] and "larger than" in error["message"] and error["hint"], error
    path.write_bytes(was)
    assert _run(small, "uninstall").returncode == 0
    assert not small.restored()


def _judge(small: SmallRehearsal, path: Path, verb: str) -> None:
    """`uninstall` restores everything, or names the file and does so once that is repaired."""
    run = _run(small, verb)
    assert "internal error" not in output_of(run), output_of(run)
    errors = envelope(run)["errors"]
    if run.returncode:
        assert run.returncode == 1 and len(errors) == 1, output_of(run)
        assert str(path) in errors[0]["message"] and errors[0]["hint"], errors
        small.repair(path)
        run = _run(small, verb)
    assert run.returncode == 0, output_of(run)
    assert not small.restored()


def _run(small: SmallRehearsal, verb: str) -> Any:
    words = {"settings": ("settings", "show"), "all": ("all", "--only", "env-files"), "plan": ("plan",)}
    return in_this_process(*words.get(verb, (verb,)), "--root", small.root, "--json")
