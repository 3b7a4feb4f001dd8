"""Our records outside the state folder: decisions, stamps, caches, the recorded lock. What cannot be read is named; it
is determined again with a note, or an error says what to do."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkinstall.core import engine
from sparkinstall.core.engine import StepReport
from sparkinstall.errors import Blocked, StateDamaged
from sparkinstall.events import Emit, Event, ResourceApplied, silent
from sparkinstall.facts import wheel_files
from sparkinstall.facts.decisions import Fp8Fallback, RecordDamaged, as_text, recorded
from sparkinstall.node import Node
from sparkinstall.own_files import read_regular
from sparkinstall.resources import Drift, Ok, Resource, State, state_of
from sparkinstall.resources.nccl_source import NcclSource
from sparkinstall.resources.venv import RecordedLock, lock_of
from sparkinstall.steps import Step
from sparkinstall.system import Reader, System
from sparkinstall.system.local import LocalReader, LocalSystem
from tests.support.nodes import NODE, node_of, system_of
from tests.support.tiny_stack import tiny_stack

PATH = "/opt/sparkinstall/fp8.json"
GOOD = Fp8Fallback(True, "so", "code")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _bytes(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def _link(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


DAMAGES: Mapping[str, Callable[[Path], None]] = {
    "empty": _bytes(b""),
    "null": _bytes(b"null"),
    "not-utf8": _bytes(b"\xff\xfe{}"),
    "other-shape": _bytes(b'{"fallback": 3}'),
    "list": _bytes(b"[]"),
    "deep": _bytes(b"[" * 100_000),
    "huge-number": _bytes(b'{"fallback": ' + b"9" * 5000 + b"}"),
    "cut": _bytes(as_text(GOOD).encode()[:-9]),
    "pipe": _pipe,
    "link": _link,
    "folder": Path.mkdir,
}


class Decides:
    """A resource that records a decision."""

    key = "decision"

    def check(self, on: Reader) -> State:
        return Ok() if recorded(on, PATH, Fp8Fallback) == GOOD else Drift("decide")

    def apply(self, on: System) -> None:
        assert recorded(on, PATH, Fp8Fallback) is None
        on.write(PATH, as_text(GOOD).encode())


class TheStep(Step):
    name = "decision"

    def resources(self, node: Node) -> Iterable[Resource]:
        del node
        return (Decides(),)


def applied(root: Path, emit: Emit = silent) -> StepReport:
    (report,) = engine.converge([TheStep()], NODE, lambda _: system_of(root), emit)
    return report


def damaged(root: Path, damage: str) -> Path:
    place = Path(f"{root}{PATH}")
    place.parent.mkdir(parents=True, exist_ok=True)
    DAMAGES[damage](place)
    return place


@pytest.mark.parametrize("damage", DAMAGES)
def test_record_that_is_damaged_is_drift_that_names_it(tmp_path: Path, damage: str) -> None:
    damaged(tmp_path, damage)
    on = LocalReader(str(tmp_path))
    with pytest.raises(RecordDamaged, match=f"^{PATH} is damaged: ."):
        recorded(on, PATH, Fp8Fallback)
    state = state_of(Decides(), on)
    assert isinstance(state, Drift) and f"{PATH} is damaged: " in state.summary and len(state.summary) < 400


@pytest.mark.parametrize("damage", [each for each in DAMAGES if each not in ("folder", "pipe")])
def test_record_that_is_damaged_is_determined_again_with_a_note(tmp_path: Path, damage: str) -> None:
    damaged(tmp_path, damage)
    events: list[Event] = []
    report = applied(tmp_path, events.append)
    assert report.problem is None and report.checked[0].changed
    (done,) = [each for each in events if isinstance(each, ResourceApplied)]
    assert f"{PATH} is damaged: " in done.summary


@pytest.mark.parametrize("damage", ["folder", "pipe"])
def test_record_with_something_else_in_its_place_is_an_error_with_what_to_do(tmp_path: Path, damage: str) -> None:
    place = damaged(tmp_path, damage)
    problem = applied(tmp_path).problem
    assert problem and PATH in problem.message and "move it away" in problem.hint
    assert place.exists()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200))
def test_record_of_any_bytes_is_read_or_damaged(tmp_path: Path, content: bytes) -> None:
    place = Path(f"{tmp_path}{PATH}")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    try:
        recorded(LocalReader(str(tmp_path)), PATH, Fp8Fallback)
    except RecordDamaged as problem:
        assert PATH in problem.message and problem.hint and len(problem.message) < 400


# --- records that are not determined again without a word


@pytest.mark.parametrize("damage", ["empty", "not-utf8", "list", "deep", "pipe", "link", "folder"])
def test_recorded_lock_that_is_damaged_is_an_error(tmp_path: Path, damage: str) -> None:
    node = node_of(tmp_path, stack=str(tiny_stack(tmp_path / "stack", locked=False)))
    place = Path(f"{tmp_path}{node.lock_record}")
    place.parent.mkdir(parents=True)
    DAMAGES[damage](place)
    on = LocalReader(str(tmp_path))
    for look in (lambda: lock_of(node, on), lambda: RecordedLock(node).check(on)):
        with pytest.raises(StateDamaged, match="is damaged: ") as problem:
            look()
        assert str(place) in problem.value.message and f"rm -r {place}" in problem.value.hint
        assert len(problem.value.message) < 600
    assert isinstance(state_of(RecordedLock(node), LocalReader(str(tmp_path / "elsewhere"))), Drift)


@pytest.mark.parametrize("damage", [each for each in DAMAGES if each != "link"])
def test_recorded_hashes_of_tarballs_that_are_damaged_are_an_error(tmp_path: Path, damage: str) -> None:
    source = NcclSource("2.28.9", "v2.28.9-1", "0" * 40, "https://somewhere/nccl.tar.gz", None, tmp_path)
    assert source.identity() == "tarball not yet seen: https://somewhere/nccl.tar.gz"
    DAMAGES[damage](tmp_path / "tarballs.json")
    with pytest.raises(StateDamaged, match=f"^{tmp_path}/tarballs.json cannot be read: .") as problem:
        source.identity()
    assert f"rm -r {tmp_path}/tarballs.json" in problem.value.hint


@pytest.mark.parametrize("damage", ["not-utf8", "pipe", "folder"])
def test_rows_of_wheels_that_cannot_be_read_are_named(tmp_path: Path, damage: str) -> None:
    node = node_of(tmp_path)
    venv = Path(f"{tmp_path}{node.venv}")
    (venv / "lib/python3.12/site-packages").mkdir(parents=True)
    (venv / "sparkinstall.json").write_text("{}")
    place = Path(f"{tmp_path}{node.wheel_exceptions}")
    DAMAGES[damage](place)
    with pytest.raises(StateDamaged, match=f"^{place} cannot be read: .") as problem:
        wheel_files.compare(node, LocalReader(str(tmp_path)))
    assert "--force" in problem.value.hint


# --- the reader of whole files


def test_read_regular_tells_what_is_there_from_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    assert read_regular(tmp_path / "file") == read_regular(tmp_path / "link", 100) == b"x" * 100
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none")
    for name, limit, follow, why in (
        ("link", 100, False, "it is a link"),
        ("loop", 100, True, "Too many levels"),
        ("pipe", 100, True, "it is not a regular file"),
        (".", 100, True, "it is a folder"),
        ("file", 99, True, "larger than"),
    ):
        with pytest.raises(OSError, match=why):
            read_regular(tmp_path / name, limit, follow=follow)
    for name in ("pipe", "."):
        assert LocalSystem(str(tmp_path)).entry(f"/{name}") is not None


def test_file_too_large_for_an_original_is_named_and_not_copied(tmp_path: Path) -> None:
    on = system_of(tmp_path)
    place = tmp_path / "opt" / ".rendered.json"
    place.parent.mkdir()
    with place.open("wb") as file:
        file.truncate(200 << 30)
    changes: tuple[Callable[[], object], ...] = (
        lambda: on.remove("/opt/.rendered.json"),
        lambda: on.write("/opt/.rendered.json", b"x"),
    )
    for change in changes:
        with pytest.raises(Blocked, match="has 214748364800 bytes") as refused:
            change()
        assert str(place) in refused.value.message and "move it away" in refused.value.hint
    assert place.stat().st_size == 200 << 30
