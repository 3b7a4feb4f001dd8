"""Killed anywhere, it goes on: SIGKILL at every line of the journal, in every touch, and at random moments."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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

pytestmark = pytest.mark.network

DYING = "tests.support.dying_run"
# Two trees at work at once, each with first and last states of its own: paths are written into scripts.
SIDE_BY_SIDE = 2
RANDOM_MOMENTS = 8


@dataclass(frozen=True, eq=False)
class Ground:
    """A root, how it was before, and how an undisturbed run leaves it."""

    node: Rehearsal
    furnished: bool
    first: Tree
    last: Tree
    lines: int
    seconds: float

    @property
    def around(self) -> Path:
        return self.node.root.parent

    def state(self) -> Tree:
        return tree(self.around, files_with_times)


def prepare(around: Path, furnished: bool) -> Ground:
    around.mkdir(parents=True)
    node = Rehearsal(around / "node", (*SETTINGS, "--ignore", "prefix"))
    if furnished:
        add_files_of_others(node.root)
    first = tree(around, files_with_times)
    began = time.monotonic()
    run = node.all()
    seconds = time.monotonic() - began
    assert run.returncode == 0, output_of(run)
    last, lines = node.installed(), len(node.records())
    ground = Ground(node, furnished, first, last, lines, seconds)
    take_back(ground)
    return ground


def take_back(ground: Ground) -> None:
    run = ground.node.uninstall()
    assert run.returncode == 0, output_of(run)
    assert ground.state() == ground.first, difference(ground.first, ground.state())


def go_on(ground: Ground, how: str) -> None:
    """The same command again comes to the same end; then everything is taken back."""
    run = ground.node.all()
    assert run.returncode == 0, f"{how}\n{output_of(run)}"
    last = ground.node.installed()
    assert last == ground.last, f"{how}\n{difference(ground.last, last)}"
    take_back(ground)


def both(moments: "dict[Ground, list[str]]", job: Callable[[Ground, str], None]) -> None:
    """Each ground its moments, the grounds side by side."""

    def work(ground: Ground) -> None:
        for moment in moments[ground]:
            job(ground, moment)

    with ThreadPoolExecutor(len(moments)) as pool:
        for done in [pool.submit(work, ground) for ground in moments]:
            done.result()


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> list[Ground]:
    """One root that is not there before, and one in which others have left things."""
    base = tmp_path_factory.mktemp("killed")
    return [prepare(base / f"{number}", furnished=number % 2 == 1) for number in range(SIDE_BY_SIDE)]


def test_killed_at_every_line_of_the_journal_it_goes_on(grounds: list[Ground]) -> None:
    def job(ground: Ground, moment: str) -> None:
        killed = ground.node.all(through=DYING, DYING_AT=moment)
        assert killed.returncode == -signal.SIGKILL, f"{moment}\n{output_of(killed)}"
        go_on(ground, moment)

    bare, furnished = grounds
    assert bare.lines > 6
    before = [f"before:{n}" for n in range(1, bare.lines + 1)]
    after = [f"after:{n}" for n in range(1, furnished.lines + 1)]
    both({bare: before, furnished: [*after, f"torn:{furnished.lines // 2}"]}, job)


def test_killed_and_taken_back_at_once(grounds: list[Ground]) -> None:
    def job(ground: Ground, moment: str) -> None:
        killed = ground.node.all(through=DYING, DYING_AT=moment)
        assert killed.returncode == -signal.SIGKILL, f"{moment}\n{output_of(killed)}"
        take_back(ground)

    both({ground: ["after:1", "after:3", f"after:{ground.lines - 1}"] for ground in grounds}, job)


def test_killed_at_random_moments_it_goes_on_and_no_program_of_it_is_left(grounds: list[Ground]) -> None:
    seed = int(os.environ.get("RANDOM_MOMENTS_SEED", time.time_ns() % 10**6))
    chance = random.Random(seed)

    def job(ground: Ground, moment: str) -> None:
        run = ground.node.start()
        time.sleep(float(moment) * ground.seconds)
        run.kill()
        run.communicate()
        go_on(ground, f"RANDOM_MOMENTS_SEED={seed}, {moment}")
        assert not programs_of(ground)

    moments = [f"{chance.uniform(0.1, 0.95):.3f}" for _ in range(RANDOM_MOMENTS)]
    both({ground: moments[number::SIDE_BY_SIDE] for number, ground in enumerate(grounds)}, job)


def programs_of(ground: Ground) -> list[str]:
    """Command lines of what still runs with the root in its arguments."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes()
        except OSError:
            continue
        if f"{ground.node.root}/".encode() in words:
            found.append(words.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_an_uninstall_that_is_killed_is_gone_on_with(grounds: list[Ground], tmp_path: Path) -> None:
    def job(ground: Ground, moment: str) -> None:
        assert ground.node.all().returncode == 0
        killed = ground.node.uninstall(through=DYING, DYING_AT=f"touch:{moment}")
        assert killed.returncode == -signal.SIGKILL, f"{moment}\n{output_of(killed)}"
        take_back(ground)

    counting = tmp_path / "touches"
    assert grounds[0].node.all().returncode == 0
    assert grounds[0].node.uninstall(through=DYING, DYING_COUNT=str(counting)).returncode == 0
    changes = int(counting.read_text())
    assert changes > 20
    # Among the files, in the middle of the environment, and in the last moments of the state itself.
    moments = [str(n) for n in (8, changes // 2, changes - 6, changes - 1)]
    both({ground: moments[number::SIDE_BY_SIDE] for number, ground in enumerate(grounds)}, job)


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


def test_what_a_killed_run_left_running_is_ended_by_the_next(tmp_path: Path) -> None:
    root, said_pid = tmp_path / "node", tmp_path / "pid"
    run = subprocess.Popen([sys.executable, "-c", LINGERING, str(root), str(said_pid)], cwd=CHECKOUT, env=environment())
    while not said_pid.exists() or not said_pid.read_text():
        assert run.poll() is None
        time.sleep(0.05)
    shell = int(said_pid.read_text())
    left = processes_of_group(shell)
    run.kill()
    run.wait()
    assert len(left) == 3 and left == processes_of_group(shell), "they outlive the run: that is what is tested"
    done = Rehearsal(root).uninstall()
    assert done.returncode == 0, output_of(done)
    assert not processes_of_group(shell)
    assert not root.exists()


def processes_of_group(leader: int) -> set[int]:
    """Living processes of a process group, zombies left out."""
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


def test_only_marked_programs_are_ended() -> None:
    other = subprocess.Popen(["sleep", "1000"], env=environment(**{processes.RUN_MARK: "another"}))
    mine = subprocess.Popen(["sleep", "1000"], env=environment(**{processes.RUN_MARK: "this"}))
    try:
        assert processes.end_leftovers("this") == 1
        assert mine.wait(60) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_journal_of_a_killed_run_says_what_was_done(grounds: list[Ground]) -> None:
    node = grounds[0].node
    killed = node.all(through=DYING, DYING_AT=f"torn:{grounds[0].lines}")
    assert killed.returncode == -signal.SIGKILL
    whole, _, rest = node.journal.read_bytes().rpartition(b"\n")
    assert rest and len(whole.splitlines()) == grounds[0].lines - 1
    assert [json.loads(line)["n"] for line in whole.splitlines()] == list(range(1, grounds[0].lines))
    take_back(grounds[0])
