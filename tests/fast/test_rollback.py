"""The rollback script, run by sh with a systemd that sets the timer or fails."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from sparkinstall import causes
from sparkinstall.errors import Blocked, Problem
from sparkinstall.facts import qsfp
from sparkinstall.resources import rollback
from sparkinstall.resources.firewall import LiveTable, RulesFile
from sparkinstall.resources.netplan.live import LiveLink, Netplan
from sparkinstall.resources.template import render
from sparkinstall.system import UNDO_FUNCTIONS, Undo
from sparkinstall.system.local import LocalReader, LocalSystem
from tests.support.fake_sudo import AsAnotherUser, fake_sudo
from tests.support.mounts import fill, small_disk
from tests.support.nodes import node_with
from tests.support.recording import RecordingSystem

FORMER, NEW = "the former state\n", "an unconfirmed state\n"
CHANGE = Undo("netplan", "the QSFP link", {}, {})
# All programs that the script starts.
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
    """A folder as a node: systemd sets every timer, and none runs yet."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "kept.yaml").write_text(FORMER)
    fake_program(tmp_path, "systemd-run", "exit 0")
    fake_program(tmp_path, "systemctl", "exit 3")
    return tmp_path


def fake_program(node: Path, name: str, does: str) -> None:
    (node / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
    (node / "bin" / name).chmod(0o755)


def script(node: Path) -> str:
    return render(rollback._TEMPLATE, {name: str(node / name) for name in rollback._PLACES}).decode()


def arm(node: Path, name: str = "network") -> int:
    kept, undo = node / "kept.yaml", f"echo {name} >> {node}/rolled-back"
    return rollback_verb(node, "arm", script(node), name, "30", undo, f"{kept}|{kept}.new").returncode


def rollback_verb(node: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_sh(node, "-c", script(node), "rollback.sh", *words)


def run_sh(node: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{node}/counting:{node}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", *words], env=env, check=False, timeout=300, capture_output=True, text=True, start_new_session=True
    )


def boot(node: Path) -> int:
    """Run the unit, if there is one, as after a reboot."""
    units = [*(node / "units/multi-user.target.wants").glob("*")]
    for unit in units:
        (command,) = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=/bin/sh ")]
        return run_sh(node, *command.split()[1:]).returncode
    return 0


def files_left(node: Path) -> list[str]:
    """The files of the timers."""
    return [each.name for each in (*(node / "units").rglob("*.service"), *(node / "home").rglob("*"))]


def rolled_back(node: Path) -> str:
    return (node / "rolled-back").read_text() if (node / "rolled-back").exists() else ""


def killed_at_every_program(node: Path, *words: str) -> Iterator[int]:
    """Run a verb once for every program that it starts, and kill it at the start of that program."""
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
        code = rollback_verb(node, *words).returncode
        (node / "last").write_text("0\n")
        yield code
    assert code == 0 and last > 3


def test_armed_follows_the_folder_of_the_timer(tmp_path: Path) -> None:
    on = LocalReader(str(tmp_path))
    assert not rollback.armed(on)
    (tmp_path / "var/lib/sparkinstall-rollback/network.gone").mkdir(parents=True)
    assert not rollback.armed(on)
    (tmp_path / "var/lib/sparkinstall-rollback/network").mkdir()
    assert rollback.armed(on) and rollback.armed(on, "network") and not rollback.armed(on, "firewall")


def test_script_passes_shellcheck(node: Path) -> None:
    (node / "rollback.sh").write_text(script(node))
    done = subprocess.run(["shellcheck", node / "rollback.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_arm_without_a_timer_leaves_nothing(node: Path) -> None:
    fake_program(node, "systemd-run", "exit 1")
    assert arm(node) == 1
    assert files_left(node) == []


@pytest.mark.parametrize("name", ["a|b.yaml", "a\nb.yaml"])
def test_arm_with_an_unsafe_file_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="could not be restored"):
        rollback.arm(LocalSystem(str(tmp_path)), "network", CHANGE, "true", 30, [f"/etc/netplan/{name}"])


def test_restore_restores_files_and_removes_new_ones(node: Path) -> None:
    assert arm(node) == 0
    (node / "kept.yaml").write_text(NEW)
    assert rollback_verb(node, "restore", "network").returncode == 0
    assert (node / "kept.yaml").read_text() == FORMER
    (node / "kept.yaml").unlink()
    assert arm(node) == 0
    (node / "kept.yaml").write_text(NEW)
    assert rollback_verb(node, "restore", "network").returncode == 0
    assert not (node / "kept.yaml").exists()
    assert rolled_back(node) == "network\n" * 2 and files_left(node) == []


def test_boot_restores_what_is_unconfirmed(node: Path) -> None:
    assert arm(node) == arm(node, "firewall") == 0
    (node / "kept.yaml").write_text(NEW)
    assert boot(node) == 0
    assert (node / "kept.yaml").read_text() == FORMER
    assert sorted(rolled_back(node).split()) == ["firewall", "network"]
    assert files_left(node) == []


def test_boot_unit_with_a_running_timer_does_nothing(node: Path) -> None:
    assert arm(node) == 0
    fake_program(node, "systemctl", '[ "$1" = is-active ]')
    assert boot(node) == 0
    assert not rolled_back(node) and (node / "home/network").is_dir()


def test_boot_keeps_what_is_confirmed(node: Path) -> None:
    assert arm(node) == arm(node, "firewall") == 0
    assert rollback_verb(node, "confirm", "network").returncode == 0
    assert rollback_verb(node, "confirm", "network").returncode == rollback._FIRED
    assert boot(node) == 0
    assert rolled_back(node) == "firewall\n"
    assert rollback_verb(node, "confirm", "firewall").returncode == rollback._FIRED
    assert files_left(node) == []


def test_restore_that_fails_can_be_repeated(node: Path) -> None:
    """For example on a full disk."""
    assert arm(node) == 0
    (node / "kept.yaml").write_text(NEW)
    fake_program(node, "cp", "exit 1")
    assert rollback_verb(node, "restore", "network").returncode != 0
    assert (node / "home/network").is_dir()
    (node / "bin/cp").unlink()
    assert rollback_verb(node, "restore", "network").returncode == 0
    assert (node / "kept.yaml").read_text() == FORMER and files_left(node) == []


@pytest.mark.parametrize(("script", "waits"), [("kill -9 $$", True), ("kill $$", True), ("false", False)])
def test_restore_whose_script_was_killed_is_repeated(node: Path, script: str, waits: bool) -> None:
    assert arm(node) == 0
    (node / "home/network/script").write_text(f"{script}\n")
    assert (rollback_verb(node, "restore", "network").returncode != 0) == waits
    assert (node / "home/network").is_dir() == waits


TAKEN = {
    "a folder of others": "mkdir -p {0}/mydata",
    "a file in the folder": "mkdir {0}; echo precious > {0}/notes",
    "a file": "echo precious > {0}",
    "a link": "ln -s /tmp {0}",
}


@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN)
def test_arm_with_its_folder_taken_is_refused(tmp_path: Path, take: str) -> None:
    (tmp_path / "var/lib").mkdir(parents=True)
    subprocess.run(["sh", "-ec", take.format(tmp_path / "var/lib/sparkinstall-rollback")], check=True)
    on = RecordingSystem()
    there = LocalReader(str(tmp_path))
    on.entry, on.names = there.entry, there.names  # type: ignore[method-assign]
    with pytest.raises(Blocked, match=f"{rollback.HOME} is not sparkinstall's"):
        rollback.arm(on, "network", CHANGE, "true", 30)
    assert not on.changed and not rollback.armed(on) and rollback.confirm(on) == ()


@pytest.mark.parametrize(("unit", "foreign"), [(b"[Service]\n", True), (b"", True), (None, False)])
def test_arm_with_a_unit_of_its_name_is_refused(unit: bytes | None, foreign: bool, node: Path) -> None:
    path = "/etc/systemd/system/sparkinstall-rollback.service"
    if unit is None:
        assert arm(node) == 0
        unit = (node / "units/sparkinstall-rollback.service").read_bytes()
    on = RecordingSystem({path: unit})
    with pytest.raises(Blocked, match=path) if foreign else nullcontext():
        rollback.arm(on, "network", CHANGE, "true", 30)
    assert bool(on.changed) != foreign


def test_arm_after_a_killed_run_keeps_the_former_state(node: Path) -> None:
    """The second timer replaces the first one, whose copy is older than the present file."""
    assert arm(node) == 0
    (node / "kept.yaml").write_text("the state that a killed run left\n")
    recorded = Path(f"{node}/home/network/files{node}/kept.yaml")
    for code in (1, 0):
        fake_program(node, "systemd-run", f"exit {code}")
        assert arm(node) == code
        assert recorded.read_text() == FORMER


def test_arm_killed_anywhere_keeps_the_former_state(node: Path) -> None:
    kept = f"{node}/kept.yaml|{node}/kept.yaml.new"
    for _ in killed_at_every_program(node, "arm", script(node), "network", "30", "true", kept):
        assert boot(node) == 0
        assert (node / "kept.yaml").read_text() == FORMER
        assert rollback_verb(node, "forget", "network").returncode == 0
        assert files_left(node) == []


TIMERS = """\
for each; do case $each in
    --unit=*) : > {node}/timer-${{each#--unit=}}.timer ;;
    *.timer) [ "$1" != stop ] || rm -f {node}/timer-$each ;;
esac; done
"""


@pytest.mark.parametrize("verb", ["arm", "restore", "confirm"])
def test_forget_after_a_kill_anywhere_leaves_no_timer(node: Path, verb: str) -> None:
    """As `uninstall` does: what is armed it confirms, and what is left of a killed script it removes."""
    for program in ("systemd-run", "systemctl"):
        fake_program(node, program, TIMERS.format(node=node))
    kept = f"{node}/kept.yaml|{node}/kept.yaml.new"
    words = {"arm": (script(node), "network", "30", "true", kept)}.get(verb, ("network",))
    if verb != "arm":
        assert arm(node) == 0
    for _ in killed_at_every_program(node, verb, *words):
        if (node / "home/network").is_dir():
            assert rollback_verb(node, "confirm", "network").returncode == 0
        else:
            assert rollback_verb(node, "forget", "network").returncode == 0
        assert files_left(node) == [] and not [*node.glob("timer-*")]
        if verb != "arm":
            assert arm(node) == 0


def test_timer_whose_script_is_gone_ends_well(node: Path) -> None:
    """Killed after the restore and before the timer was stopped: the timer's unit must not be started for ever."""
    fake_program(node, "systemd-run", f"printf '%s\\n' \"$@\" > {node}/started")
    assert arm(node) == 0
    words = (node / "started").read_text().splitlines()
    command = words[words.index("/bin/sh") + 1 :]
    assert run_sh(node, *command).returncode == 0
    assert rolled_back(node) == "network\n" and files_left(node) == []
    assert run_sh(node, *command).returncode == 0
    assert rolled_back(node) == "network\n"


@pytest.mark.parametrize("what", [Netplan, LiveLink, RulesFile, LiveTable])
def test_arm_is_preceded_by_its_record_in_the_journal(what: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """So `uninstall` finds the timer, wherever the run is killed."""
    ip = {"ip -j address": '[{"ifname": "lo"}]'}
    on, node = RecordingSystem({"/usr/sbin/netplan": b""}, ip), node_with()
    port = qsfp.Port(0, tuple(qsfp.Interface(name, 0, True, 1500, 0) for name in ("enp1s0f0np0", "enP2p1s0f0np0")))
    monkeypatch.setattr(qsfp, "port_to_look_at", lambda *_: port)
    monkeypatch.setattr(qsfp, "used_port", lambda *_: port)
    on.failing = ("sh -c",)
    with pytest.raises(Problem, match="could not be started"):
        what(node).apply(on)
    (armed,) = [each for each in on.changed if each.startswith("sh -c") and " arm " in each]
    before = on.changed[: on.changed.index(armed)]
    kinds = [each.split()[1] for each in before if each.startswith("promise ")]
    assert kinds == ["netplan" if what in (Netplan, LiveLink) else "nftables"]
    timer = "network" if kinds == ["netplan"] else "firewall"
    dropped = RecordingSystem({f"{rollback.HOME}/{timer}/paths": b""}, ip)
    dropped.files["/usr/sbin/netplan"] = b""
    UNDO_FUNCTIONS[kinds[0]]([Undo(kinds[0], "it", {}, {})], dropped)
    assert any(" confirm " in each for each in dropped.changed)


def test_restore_killed_anywhere_is_completed_at_boot(node: Path) -> None:
    assert arm(node) == 0
    (node / "kept.yaml").write_text(NEW)
    for _ in killed_at_every_program(node, "restore", "network"):
        assert boot(node) == 0
        assert (node / "kept.yaml").read_text() == FORMER
        assert files_left(node) == []
        assert arm(node) == 0
        (node / "kept.yaml").write_text(NEW)


def test_confirm_killed_anywhere_confirms_or_rolls_back(node: Path) -> None:
    assert arm(node) == 0
    (node / "kept.yaml").write_text(NEW)
    for code in killed_at_every_program(node, "confirm", "network"):
        waits = (node / "home/network").is_dir()
        assert not waits or code
        assert boot(node) == 0
        assert (node / "kept.yaml").read_text() == (FORMER if waits else NEW)
        assert rollback_verb(node, "forget", "network").returncode == 0
        assert files_left(node) == []
        (node / "kept.yaml").write_text(FORMER)
        assert arm(node) == 0
        (node / "kept.yaml").write_text(NEW)


def test_restore_or_confirm_during_an_arm_keeps_its_files(node: Path) -> None:
    assert arm(node) == 0
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            ends, begins = pool.submit(rollback_verb, node, "restore", "network"), pool.submit(arm, node, "firewall")
            assert ends.result().returncode == begins.result() == 0
            assert (node / "home/rollback.sh").exists() and (node / "home/firewall").is_dir()
            ends, begins = pool.submit(rollback_verb, node, "confirm", "firewall"), pool.submit(arm, node, "network")
            assert ends.result().returncode == begins.result() == 0
            assert (node / "home/rollback.sh").exists() and (node / "home/network").is_dir()
    assert rollback_verb(node, "confirm", "network").returncode == 0
    assert files_left(node) == []


# --- why a timer could not be started


@pytest.fixture
def placed(node: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node as this machine: the script's places are below it, and its programs are the first on the PATH."""
    for name in rollback._PLACES:
        monkeypatch.setitem(rollback._PLACES, name, str(node / name))
    monkeypatch.setenv("PATH", f"{node}/bin", prepend=":")
    return node


def why_not_armed(on: LocalSystem, node: Path) -> Problem:
    with pytest.raises(Problem) as found:
        rollback.arm(on, "network", CHANGE, "true", 30, [str(node / "kept.yaml")])
    assert found.value.message == "the rollback timer could not be started; nothing was changed"
    return found.value


@pytest.mark.parametrize("place", ["home", "units"])
def test_arm_on_a_full_disk_names_the_place(placed: Path, place: str) -> None:
    with small_disk(placed / place, "12k") as disk:
        fill(disk / "filler")
        found = why_not_armed(LocalSystem(), placed)
        assert found.cause.startswith(f"the disk is full: {disk}") and "free some space" in found.hint


@pytest.mark.parametrize("refusal", ["sudo: a password is required", "Sorry, user a is not allowed to run 'x'."])
def test_arm_refused_by_sudo_says_so(placed: Path, monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    fake_sudo(placed / "sudo", monkeypatch, refusal)
    found = why_not_armed(AsAnotherUser(), placed)
    assert found.cause == f"sudo refused it: {refusal}" and "run `sh` with sudo for `rollback.sh`" in found.hint


@pytest.mark.parametrize(
    "does", ["echo System has not been booted with systemd as init system >&2; exit 1", "exec no-such-program", ""]
)
def test_arm_without_systemd_says_so(placed: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    monkeypatch.setattr(causes, "BOOTED", str(placed / "no-systemd"))
    fake_program(placed, "systemd-run", does or "echo 'x: 88: systemd-run: not found' >&2; exit 127")
    found = why_not_armed(LocalSystem(), placed)
    assert ("systemd does not run here" in found.cause) == ("no-such" not in does)
