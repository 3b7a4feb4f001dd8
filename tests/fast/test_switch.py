"""From one stack to another on an installed node: built beside, proven, switched by one rename."""

import shutil
import signal
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.rehearsals import (
    SETTINGS,
    Rehearsal,
    envelope,
    files_with_times,
    output_of,
    sparkinstall,
    tree,
)
from tests.support.tiny_stack import no_index, small_stack

pytestmark = pytest.mark.network

DYING = "tests.support.dying_run"
OLD, NEW, BROKEN = "old", "new", "broken"
# Changes of the file system by the process itself, from the first to the last of a switch.
TOUCHES = (5, 15, 25, 35)


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three stacks with the same versions and other files; the last does not pass the wheel gate."""
    base = tmp_path_factory.mktemp("stacks")
    return {name: small_stack(base / name, name, works=name != BROKEN) for name in (OLD, NEW, BROKEN)}


@pytest.fixture
def use(stacks: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> "Use":
    return Use(stacks, monkeypatch)


class Use:
    """Options for one of the stacks; uv then finds its wheels only."""

    def __init__(self, stacks: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        self.stacks, self.monkeypatch = stacks, monkeypatch

    def __call__(self, name: str) -> tuple[str, ...]:
        for variable, value in no_index(self.stacks[name]).items():
            self.monkeypatch.setenv(variable, value)
        return ("--stack", str(self.stacks[name]))


@pytest.fixture
def node(tmp_path: Path, use: Use) -> Rehearsal:
    """A node with the old stack."""
    node = Rehearsal(
        tmp_path / "node", (*SETTINGS, "--platform", "x86_64", "--set", "fp8.fallback=on", "--ignore", "prefix")
    )
    run = node.all(*use(OLD))
    assert run.returncode == 0, output_of(run)
    return node


def environments(node: Rehearsal) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in (node.root / "opt/sparkinstall/venvs").iterdir())


def used(node: Rehearsal) -> str:
    """The stack whose files the environment in use has, by the marker in its vLLM."""
    (module,) = (node.root / "opt/sparkinstall/venv").glob("lib/python3*/site-packages/vllm/__init__.py")
    return module.read_text().partition("'")[2].partition("'")[0]


def is_restored(node: Rehearsal) -> None:
    run = node.uninstall()
    assert run.returncode == 0, output_of(run)
    assert "kept" not in run.stdout.replace("Downloads are kept", ""), output_of(run)
    assert not node.root.exists()


def test_switch_installs_beside_and_removes_the_former(node: Rehearsal, use: Use) -> None:
    first = (node.root / "opt/sparkinstall/venv").readlink()
    run = node.all(*use(NEW))
    assert run.returncode == 0, output_of(run)
    assert (used(node), environments(node)) == (NEW, [NEW])
    assert (node.root / "opt/sparkinstall/venv").readlink() != first
    again = envelope(node.all("--json"))
    assert again["data"]["changed"] is False
    is_restored(node)


def test_plan_of_a_switch_names_both_stacks(node: Rehearsal, use: Use) -> None:
    run = sparkinstall("plan", "--root", node.root, *use(NEW))
    said = " ".join(run.stdout.split())
    assert "of stack new beside stack old; once they are proven, switch to them" in said.replace(
        " and resolve the rest", ""
    ), output_of(run)
    assert "then remove the former environment" in said
    assert used(node) == OLD


def test_switch_with_keep_old_keeps_the_former_and_switches_back_at_once(node: Rehearsal, use: Use) -> None:
    assert node.all(*use(NEW), "--keep-old").returncode == 0
    assert (used(node), environments(node)) == (NEW, [NEW, OLD])
    # Without any wheel: what was proven is only switched to.
    options = use(OLD)
    for wheel in use.stacks[OLD].parent.glob("vllm-*.whl"):
        shutil.move(wheel, f"{wheel}.away")
    try:
        run = node.all(*options)
    finally:
        for wheel in use.stacks[OLD].parent.glob("*.away"):
            shutil.move(wheel, wheel.with_suffix(""))
    assert run.returncode == 0, output_of(run)
    assert (used(node), environments(node)) == (OLD, [NEW, OLD])
    assert node.all("--no-keep-old").returncode == 0
    assert (used(node), environments(node)) == (OLD, [OLD])
    is_restored(node)


def test_environment_installed_again_has_another_stamp(node: Rehearsal, use: Use) -> None:
    """Services depend on the stamp: those that run from the former files are restarted before these are removed."""
    stamp, options = node.root / "opt/sparkinstall/venv/sparkinstall.json", use(OLD)
    before = stamp.read_text()
    run = sparkinstall("run", "environment", "--force", "--root", node.root, *options, "--yes")
    assert run.returncode == 0, output_of(run)
    assert stamp.read_text() != before and (used(node), environments(node)) == (OLD, [OLD, OLD])
    assert node.all().returncode == 0
    assert environments(node) == [OLD]
    is_restored(node)


def test_failed_proof_leaves_the_former_in_use(node: Rehearsal, use: Use) -> None:
    env_files = tree(node.root / "opt/sparkinstall/env", files_with_times)
    run = node.all(*use(BROKEN))
    assert run.returncode == 1 and "does not pass the wheel gate" in run.stderr, output_of(run)
    assert used(node) == OLD
    assert tree(node.root / "opt/sparkinstall/env", files_with_times) == env_files
    run = node.all(*use(OLD))
    assert run.returncode == 0, output_of(run)
    assert (used(node), environments(node)) == (OLD, [OLD])
    is_restored(node)


def test_failed_proof_is_uninstalled(node: Rehearsal, use: Use) -> None:
    assert node.all(*use(BROKEN)).returncode == 1
    is_restored(node)


def test_folder_of_an_older_version_is_converted_by_a_switch(node: Rehearsal, use: Use) -> None:
    """Before, the environment was a folder in the place of the link."""
    link = node.root / "opt/sparkinstall/venv"
    folder = link.resolve()
    link.unlink()
    folder.rename(link)
    folder.parent.rmdir()
    assert envelope(node.all(*use(OLD), "--json"))["data"]["changed"] is False
    run = node.all(*use(NEW))
    assert run.returncode == 0, output_of(run)
    assert link.is_symlink() and (used(node), environments(node)) == (NEW, [NEW])
    is_restored(node)


def test_link_of_another_user_in_its_place_is_kept(node: Rehearsal, tmp_path: Path) -> None:
    link = node.root / "opt/sparkinstall/venv"
    link.unlink()
    link.symlink_to(tmp_path)
    run = node.all()
    assert run.returncode == 1 and "is a link to" in run.stderr, output_of(run)
    run = node.uninstall()
    assert link.readlink() == tmp_path and "a link" in run.stdout, output_of(run)


def test_switch_killed_anywhere_continues(node: Rehearsal, use: Use) -> None:
    """To and fro, at every line of the journal and at changes of the file system between them."""
    there, other, lines = OLD, NEW, lines_of_a_switch(node, use)
    for moment in [*(f"after:{n}" for n in range(1, lines + 1)), "torn:2", *(f"touch:{n}" for n in TOUCHES)]:
        killed = kill(node, use(other), moment)
        assert used(node) in (there, other), f"{moment}\n{output_of(killed)}"
        run = node.all(*use(other))
        assert run.returncode == 0, f"{moment}\n{output_of(run)}"
        assert (used(node), environments(node)) == (other, [other]), moment
        there, other = other, there
    is_restored(node)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_switch_killed_is_uninstalled(node: Rehearsal, use: Use, share: float) -> None:
    lines = lines_of_a_switch(node, use)
    kill(node, use(NEW), f"after:{1 + round(share * (lines - 1))}")
    is_restored(node)


def lines_of_a_switch(node: Rehearsal, use: Use) -> int:
    """How many lines the journal gets by a switch to the new stack and as many by one back."""
    first = len(node.records())
    assert node.all(*use(NEW)).returncode == 0
    lines = len(node.records()) - first
    assert node.all(*use(OLD)).returncode == 0
    assert lines > 1 and len(node.records()) == first + 2 * lines
    return lines


def kill(node: Rehearsal, options: tuple[str, ...], moment: str) -> CompletedProcess[str]:
    """Run `all` and kill it; a line's number counts from the first of this run."""
    when, _, number = moment.partition(":")
    absolute = int(number) + (0 if when == "touch" else len(node.records()))
    killed = node.all(*options, through=DYING, DYING_AT=f"{when}:{absolute}")
    assert killed.returncode == -signal.SIGKILL, f"{moment}\n{output_of(killed)}"
    return killed
