"""A run killed anywhere can continue: SIGKILL at every line of the journal, in changes, and at random moments."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparkinstall.system import processes
from tests.support.rehearsals import (
    CHECKOUT,
    SETTINGS,
    Rehearsal,
    Tree,
    add_files_of_others,
    difference,
    environment,
    files_with_times,
    output_of,
    tree,
)
from tests.support.tiny_stack import no_index, small_stack

pytestmark = pytest.mark.network

DYING = "tests.support.dying_run"
# Two roots in parallel, each with its own first and last state: paths are written into scripts.
ROOTS = 2
RANDOM_MOMENTS = 8


@dataclass(frozen=True, eq=False)
class Root:
    """A root: its state before, and after an undisturbed run."""

    node: Rehearsal
    not_empty: bool
    first: Tree
    last: Tree
    begun: int
    """Lines of the journal that appear at once, with the folders of the state."""
    lines: int
    seconds: float

    @property
    def around(self) -> Path:
        return self.node.root.parent

    def state(self) -> Tree:
        return tree(self.around, files_with_times)


def prepare(around: Path, stack: Path, not_empty: bool) -> Root:
    around.mkdir(parents=True)
    chosen = ("--stack", str(stack), "--platform", "x86_64", "--set", "fp8.fallback=on")
    node = Rehearsal(around / "node", (*SETTINGS, *chosen, "--ignore", "prefix"))
    if not_empty:
        add_files_of_others(node.root)
    first = tree(around, files_with_times)
    began = time.monotonic()
    run = node.all()
    seconds = time.monotonic() - began
    assert run.returncode == 0, output_of(run)
    records = node.records()
    begun = sum(record["step"] == "state" for record in records)
    root = Root(node, not_empty, first, node.installed(), begun, len(records), seconds)
    uninstall(root)
    return root


def uninstall(root: Root) -> None:
    run = root.node.uninstall()
    assert run.returncode == 0, output_of(run)
    assert root.state() == root.first, difference(root.first, root.state())


def run_again(root: Root, how: str) -> None:
    """The same command again leads to the same state; then everything is uninstalled."""
    run = root.node.all()
    assert run.returncode == 0, f"{how}\n{output_of(run)}"
    last = root.node.installed()
    assert last == root.last, f"{how}\n{difference(root.last, last)}"
    uninstall(root)


def in_parallel(moments: "dict[Root, list[str]]", job: Callable[[Root, str], None]) -> None:
    """Run the moments of each root, the roots in parallel."""

    def work(root: Root) -> None:
        for moment in moments[root]:
            job(root, moment)

    with ThreadPoolExecutor(len(moments)) as pool:
        for done in [pool.submit(work, root) for root in moments]:
            done.result()


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Root]]:
    """One root that does not exist before, and one that contains files of others."""
    base = tmp_path_factory.mktemp("killed")
    stack = small_stack(base / "stack")
    with pytest.MonkeyPatch.context() as patched:
        for name, value in no_index(stack).items():
            patched.setenv(name, value)
        yield [prepare(base / f"{number}", stack, not_empty=number % 2 == 1) for number in range(ROOTS)]


def test_all_killed_at_every_line_of_the_journal_continues(roots: list[Root]) -> None:
    def job(root: Root, moment: str) -> None:
        killed = root.node.all(through=DYING, DYING_AT=moment)
        assert killed.returncode == -signal.SIGKILL, f"{moment}\n{output_of(killed)}"
        run_again(root, moment)

    empty, not_empty = roots
    assert empty.lines > 6
    before = [f"before:{n}" for n in range(empty.begun + 1, empty.lines + 1)]
    after = [f"after:{n}" for n in range(not_empty.begun + 1, not_empty.lines + 1)]
    in_parallel({empty: before, not_empty: [*after, f"torn:{not_empty.begun + 2}"]}, job)


def test_all_killed_is_uninstalled(roots: list[Root]) -> None:
    def job(root: Root, moment: str) -> None:
        killed = root.node.all(through=DYING, DYING_AT=moment)
        assert killed.returncode == -signal.SIGKILL, f"{moment}\n{output_of(killed)}"
        uninstall(root)

    in_parallel({root: [f"after:{n}" for n in (root.begun + 1, root.begun + 3, root.lines - 1)] for root in roots}, job)


def test_all_killed_at_random_moments_continues_and_leaves_no_program(roots: list[Root]) -> None:
    seed = int(os.environ.get("RANDOM_MOMENTS_SEED", time.time_ns() % 10**6))
    chance = random.Random(seed)

    def job(root: Root, moment: str) -> None:
        run = root.node.start()
        time.sleep(float(moment) * root.seconds)
        run.kill()
        run.communicate()
        run_again(root, f"RANDOM_MOMENTS_SEED={seed}, {moment}")
        assert not programs_of(root)

    moments = [f"{chance.uniform(0.1, 0.95):.3f}" for _ in range(RANDOM_MOMENTS)]
    in_parallel({root: moments[number::ROOTS] for number, root in enumerate(roots)}, job)


def programs_of(root: Root) -> list[str]:
    """The command lines of running programs with the root in their arguments."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes()
        except OSError:
            continue
        if f"{root.node.root}/".encode() in words:
            found.append(words.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_uninstall_killed_continues(roots: list[Root], tmp_path: Path) -> None:
    def job(root: Root, moment: str) -> None:
        assert root.node.all().returncode == 0
        killed = root.node.uninstall(through=DYING, DYING_AT=f"touch:{moment}")
        assert killed.returncode == -signal.SIGKILL, f"{moment}\n{output_of(killed)}"
        uninstall(root)

    counter = tmp_path / "changes"
    assert roots[0].node.all().returncode == 0
    assert roots[0].node.uninstall(through=DYING, DYING_COUNT=str(counter)).returncode == 0
    changes = int(counter.read_text())
    assert changes > 20
    # Among the files, in the middle of the environment, and at the removal of the state folder.
    moments = [str(n) for n in (8, changes // 2, changes - 6, changes - 1)]
    in_parallel({root: moments[number::ROOTS] for number, root in enumerate(roots)}, job)


LINGERING = """
import os, signal, sys
from pathlib import Path
from sparkinstall.events import silent
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.system.local import LocalSystem

system = LocalSystem(sys.argv[1])
state = StateFolder(system)
with state.hold("all", silent) as run:
    on = JournaledSystem(system, state.journal(run), "long", state.logs(run) / "long.log", silent)
    on.run("sh", "-c", "sleep 1000 & sleep 1000 & echo $$ > $0; wait", sys.argv[2])
"""


def test_uninstall_ends_the_programs_of_a_killed_run(tmp_path: Path) -> None:
    node_root, pid_file = tmp_path / "node", tmp_path / "pid"
    run = subprocess.Popen(
        [sys.executable, "-c", LINGERING, str(node_root), str(pid_file)], cwd=CHECKOUT, env=environment()
    )
    while not pid_file.exists() or not pid_file.read_text():
        assert run.poll() is None
        time.sleep(0.05)
    shell = int(pid_file.read_text())
    left = processes_of_group(shell)
    run.kill()
    run.wait()
    assert len(left) == 3 and left == processes_of_group(shell), "the programs must outlive the run"
    done = Rehearsal(node_root).uninstall()
    assert done.returncode == 0, output_of(done)
    assert not processes_of_group(shell)
    assert not node_root.exists()


def processes_of_group(leader: int) -> set[int]:
    """The processes of a process group, without zombies."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # proc_pid_stat(5): after the name in parentheses come state, parent and group.
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == leader and state != "Z":
            found.add(int(stat.parent.name))
    return found


def test_end_leftovers_ends_only_marked_programs() -> None:
    # All processes of this machine are looked at, also those of other tests.
    run = f"of-{os.getpid()}"
    other = subprocess.Popen(["sleep", "1000"], env=environment(**{processes.RUN_MARK: f"{run}-another"}))
    mine = subprocess.Popen(["sleep", "1000"], env=environment(**{processes.RUN_MARK: run}))
    try:
        assert processes.end_leftovers(run) == 1
        assert mine.wait(300) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_journal_of_a_killed_run_has_every_complete_record(roots: list[Root]) -> None:
    node = roots[0].node
    killed = node.all(through=DYING, DYING_AT=f"torn:{roots[0].lines}")
    assert killed.returncode == -signal.SIGKILL
    whole, _, rest = node.journal.read_bytes().rpartition(b"\n")
    assert rest and len(whole.splitlines()) == roots[0].lines - 1
    assert [json.loads(line)["n"] for line in whole.splitlines()] == list(range(1, roots[0].lines))
    uninstall(roots[0])
