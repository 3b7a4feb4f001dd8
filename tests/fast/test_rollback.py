"""The way back: its program as sh runs it, with a systemd that takes its timer, or does not."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparkinstall.errors import Problem
from sparkinstall.resources import rollback
from sparkinstall.resources.template import render
from sparkinstall.system.local import LocalReader, LocalSystem

FORMER, NEW = "the former state\n", "what nobody has confirmed\n"
# Every program that the script starts.
STARTED = ("cat", "cp", "chmod", "find", "flock", "grep", "ln", "mkdir", "mv", "rm", "rmdir", "sync", "systemd-run")
COUNTING = """\
#!/bin/sh
read -r count < {here}/count
count=$((count + 1))
echo $count > {here}/count
read -r last < {here}/last
[ $count != $last ] || kill -9 0
exec {real} "$@"
"""


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder that stands for a node: systemd takes every timer, and none runs yet."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "kept.yaml").write_text(FORMER)
    _program_that(tmp_path, "systemd-run", "exit 0")
    _program_that(tmp_path, "systemctl", "exit 3")
    return tmp_path


def _program_that(node: Path, name: str, does: str) -> None:
    (node / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
    (node / "bin" / name).chmod(0o755)


def _program(node: Path) -> str:
    return render(rollback._TEMPLATE, {name: str(node / name) for name in rollback._PLACES}).decode()


def _arm(node: Path, name: str = "network") -> int:
    kept, script = node / "kept.yaml", f"echo {name} >> {node}/told"
    return _do(node, "arm", _program(node), name, "30", script, f"{kept}|{kept}.new").returncode


def _do(node: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return _sh(node, "-c", _program(node), "rollback.sh", *words)


def _sh(node: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{node}/counting:{node}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", *words], env=env, check=False, timeout=60, capture_output=True, text=True, start_new_session=True
    )


def _boot(node: Path) -> int:
    """What the unit does after a reboot; where there is none, nothing."""
    units = [*(node / "units/multi-user.target.wants").glob("*")]
    for unit in units:
        (command,) = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=/bin/sh ")]
        return _sh(node, *command.split()[1:]).returncode
    return 0


def _left(node: Path) -> list[str]:
    """The files that stand of the timers."""
    return [each.name for each in (*(node / "units").rglob("*.service"), *(node / "home").rglob("*"))]


def _told(node: Path) -> str:
    return (node / "told").read_text() if (node / "told").exists() else ""


def _killed_at_every_program(node: Path, *words: str) -> Iterator[int]:
    """Run a verb once for every program that it starts, and kill all of it as that one starts."""
    (node / "counting").mkdir()
    for name in STARTED:
        real = node / "bin" / name if (node / "bin" / name).exists() else shutil.which(name)
        (node / "counting" / name).write_text(COUNTING.format(here=node, real=real))
        (node / "counting" / name).chmod(0o755)
    code, last = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        last += 1
        (node / "count").write_text("0\n")
        (node / "last").write_text(f"{last}\n")
        code = _do(node, *words).returncode
        (node / "last").write_text("0\n")
        yield code
    assert code == 0 and last > 3


def test_a_timer_is_armed_by_its_folder_alone(tmp_path: Path) -> None:
    on = LocalReader(str(tmp_path))
    assert not rollback.armed(on)
    (tmp_path / "var/lib/sparkinstall-rollback/network.gone").mkdir(parents=True)
    assert not rollback.armed(on)
    (tmp_path / "var/lib/sparkinstall-rollback/network").mkdir()
    assert rollback.armed(on) and rollback.armed(on, "network") and not rollback.armed(on, "firewall")


def test_its_program_is_sound(node: Path) -> None:
    (node / "rollback.sh").write_text(_program(node))
    done = subprocess.run(["shellcheck", node / "rollback.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_timer_that_cannot_be_set_leaves_nothing_armed(node: Path) -> None:
    _program_that(node, "systemd-run", "exit 1")
    assert _arm(node) == 1
    assert _left(node) == []


@pytest.mark.parametrize("name", ["a|b.yaml", "a\nb.yaml"])
def test_a_file_whose_name_no_script_can_hold_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="could not be restored"):
        rollback.arm(LocalSystem(str(tmp_path)), "network", "true", 30, [f"/etc/netplan/{name}"])


def test_it_puts_back_what_was_there_and_what_was_not(node: Path) -> None:
    assert _arm(node) == 0
    (node / "kept.yaml").write_text(NEW)
    assert _do(node, "restore", "network").returncode == 0
    assert (node / "kept.yaml").read_text() == FORMER
    (node / "kept.yaml").unlink()
    assert _arm(node) == 0
    (node / "kept.yaml").write_text(NEW)
    assert _do(node, "restore", "network").returncode == 0
    assert not (node / "kept.yaml").exists()
    assert _told(node) == "network\n" * 2 and _left(node) == []


def test_a_boot_puts_back_what_was_not_confirmed(node: Path) -> None:
    assert _arm(node) == _arm(node, "firewall") == 0
    (node / "kept.yaml").write_text(NEW)
    assert _boot(node) == 0
    assert (node / "kept.yaml").read_text() == FORMER
    assert sorted(_told(node).split()) == ["firewall", "network"]
    assert _left(node) == []


def test_a_unit_of_the_boot_that_runs_without_one_leaves_it_to_the_timer(node: Path) -> None:
    assert _arm(node) == 0
    _program_that(node, "systemctl", '[ "$1" = is-active ]')
    assert _boot(node) == 0
    assert not _told(node) and (node / "home/network").is_dir()


def test_what_was_confirmed_stays_at_a_boot(node: Path) -> None:
    assert _arm(node) == _arm(node, "firewall") == 0
    assert _do(node, "confirm", "network").returncode == 0
    assert _do(node, "confirm", "network").returncode == rollback._FIRED
    assert _boot(node) == 0
    assert _told(node) == "firewall\n"
    assert _do(node, "confirm", "firewall").returncode == rollback._FIRED
    assert _left(node) == []


def test_what_cannot_be_put_back_is_kept_and_tried_again(node: Path) -> None:
    """A full disk, say."""
    assert _arm(node) == 0
    (node / "kept.yaml").write_text(NEW)
    _program_that(node, "cp", "exit 1")
    assert _do(node, "restore", "network").returncode != 0
    assert (node / "home/network").is_dir()
    (node / "bin/cp").unlink()
    assert _do(node, "restore", "network").returncode == 0
    assert (node / "kept.yaml").read_text() == FORMER and _left(node) == []


def test_a_run_killed_between_two_timers_does_not_lose_the_former_state(node: Path) -> None:
    """The second timer stops the first one; what that remembers is older than what is there now."""
    assert _arm(node) == 0
    (node / "kept.yaml").write_text("what a killed run has made of it\n")
    remembered = Path(f"{node}/home/network/files{node}/kept.yaml")
    for code in (1, 0):
        _program_that(node, "systemd-run", f"exit {code}")
        assert _arm(node) == code
        assert remembered.read_text() == FORMER


def test_killed_anywhere_while_it_arms_nothing_is_lost_or_left(node: Path) -> None:
    kept = f"{node}/kept.yaml|{node}/kept.yaml.new"
    for _ in _killed_at_every_program(node, "arm", _program(node), "network", "30", "true", kept):
        assert _boot(node) == 0
        assert (node / "kept.yaml").read_text() == FORMER
        assert _do(node, "forget", "network").returncode == 0
        assert _left(node) == []


def test_killed_anywhere_while_it_puts_back_the_boot_does_the_rest(node: Path) -> None:
    assert _arm(node) == 0
    (node / "kept.yaml").write_text(NEW)
    for _ in _killed_at_every_program(node, "restore", "network"):
        assert _boot(node) == 0
        assert (node / "kept.yaml").read_text() == FORMER
        assert _left(node) == []
        assert _arm(node) == 0
        (node / "kept.yaml").write_text(NEW)


def test_killed_anywhere_while_it_confirms_it_is_the_one_or_the_other(node: Path) -> None:
    assert _arm(node) == 0
    (node / "kept.yaml").write_text(NEW)
    for code in _killed_at_every_program(node, "confirm", "network"):
        waits = (node / "home/network").is_dir()
        assert not waits or code
        assert _boot(node) == 0
        assert (node / "kept.yaml").read_text() == (FORMER if waits else NEW)
        assert _do(node, "forget", "network").returncode == 0
        assert _left(node) == []
        (node / "kept.yaml").write_text(FORMER)
        assert _arm(node) == 0
        (node / "kept.yaml").write_text(NEW)


def test_one_that_ends_takes_nothing_from_another_that_begins(node: Path) -> None:
    assert _arm(node) == 0
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            ends, begins = pool.submit(_do, node, "restore", "network"), pool.submit(_arm, node, "firewall")
            assert ends.result().returncode == begins.result() == 0
            assert (node / "home/rollback.sh").exists() and (node / "home/firewall").is_dir()
            ends, begins = pool.submit(_do, node, "confirm", "firewall"), pool.submit(_arm, node, "network")
            assert ends.result().returncode == begins.result() == 0
            assert (node / "home/rollback.sh").exists() and (node / "home/network").is_dir()
    assert _do(node, "confirm", "network").returncode == 0
    assert _left(node) == []
