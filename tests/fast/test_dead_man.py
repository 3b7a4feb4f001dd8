"""The way back: its program as sh runs it, with a systemd that takes its timer, or does not."""

import os
import subprocess
from pathlib import Path

from sparkinstall.resources import dead_man
from sparkinstall.resources.rendered import render
from sparkinstall.system.local import LocalReader


def test_a_timer_is_armed_by_its_folder_alone(tmp_path: Path) -> None:
    on = LocalReader(str(tmp_path))
    assert not dead_man.armed(on)
    (tmp_path / "var/lib/sparkinstall-dead-man/network.confirmed").mkdir(parents=True)
    assert not dead_man.armed(on)
    (tmp_path / "var/lib/sparkinstall-dead-man/network").mkdir()
    assert dead_man.armed(on) and dead_man.armed(on, "network") and not dead_man.armed(on, "firewall")


def _arming(tmp_path: Path, name: str = "network", runs: bool = False) -> int:
    """The real script of `arm` in a folder of its own, with a systemd that does or does not take the timer."""
    for program, code in (("systemctl", 3), ("systemd-run", 0 if runs else 1)):
        (tmp_path / program).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / program).chmod(0o755)
    kept, script = tmp_path / "kept.yaml", f"echo restored >> {tmp_path}/told"
    return _do(tmp_path, "arm", _program(tmp_path), name, "30", script, f"{kept}|{kept}.new").returncode


def _program(tmp_path: Path) -> str:
    places = {name: str(tmp_path / name) for name in dead_man._PLACES}
    return render(dead_man._TEMPLATE, places).decode()


def _do(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return _sh(tmp_path, "-c", _program(tmp_path), "dead-man.sh", *words)


def _sh(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run(["sh", *words], env=env, check=False, timeout=30, capture_output=True, text=True)


def _boot(tmp_path: Path) -> None:
    """What the unit does after a reboot."""
    (unit,) = (tmp_path / "units/multi-user.target.wants").iterdir()
    (command,) = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=/bin/sh ")]
    told = _sh(tmp_path, *command.split()[1:])
    assert (told.returncode, told.stderr) == (0, "")


def _left(tmp_path: Path) -> list[str]:
    """The files that stand of the timers."""
    there = [tmp_path / "this_boot", *(tmp_path / "units").rglob("*.service"), *(tmp_path / "home").rglob("*")]
    return [each.name for each in there if each.exists()]


def test_the_program_of_the_timer_is_sound(tmp_path: Path) -> None:
    (tmp_path / "dead-man.sh").write_text(_program(tmp_path))
    done = subprocess.run(["shellcheck", tmp_path / "dead-man.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_timer_that_cannot_be_set_leaves_nothing_armed(tmp_path: Path) -> None:
    assert _arming(tmp_path) != 0
    assert _left(tmp_path) == []


def test_a_boot_puts_back_what_was_not_confirmed(tmp_path: Path) -> None:
    (tmp_path / "kept.yaml").write_text("the former state\n")
    assert _arming(tmp_path, runs=True) == 0
    assert _arming(tmp_path, "firewall", runs=True) == 0
    (tmp_path / "kept.yaml").write_text("what nobody has confirmed\n")
    _boot(tmp_path)
    assert (tmp_path / "kept.yaml").read_text() == "the former state\n"
    assert (tmp_path / "told").read_text() == "restored\n" * 2
    assert _left(tmp_path) == []


def test_a_restoring_that_the_power_ended_is_begun_again_at_the_boot(tmp_path: Path) -> None:
    (tmp_path / "kept.yaml").write_text("the former state\n")
    assert _arming(tmp_path, runs=True) == 0
    (tmp_path / "kept.yaml").unlink()
    (tmp_path / "home/network").rename(tmp_path / "home/network.firing")
    _boot(tmp_path)
    assert (tmp_path / "kept.yaml").read_text() == "the former state\n"
    assert _left(tmp_path) == []


def test_what_was_confirmed_stays_at_a_boot(tmp_path: Path) -> None:
    assert _arming(tmp_path, runs=True) == _arming(tmp_path, "firewall", runs=True) == 0
    (tmp_path / "systemctl").write_text("#!/bin/sh\n")
    assert _do(tmp_path, "confirm", "network").returncode == 0
    assert _do(tmp_path, "confirm", "network").returncode == dead_man._FIRED
    _boot(tmp_path)
    assert (tmp_path / "told").read_text() == "restored\n"
    assert _do(tmp_path, "confirm", "firewall").returncode == dead_man._FIRED
    assert _left(tmp_path) == []


def test_what_a_killed_arming_has_left_goes(tmp_path: Path) -> None:
    assert _arming(tmp_path, runs=True) == 0
    (tmp_path / "home/network").rename(tmp_path / "home/network.new")
    assert _do(tmp_path, "forget", "network").returncode == 0
    assert _left(tmp_path) == []


def test_a_run_killed_between_two_timers_does_not_lose_the_former_state(tmp_path: Path) -> None:
    """The second timer stops the first one; what that remembers is older than what is there now."""
    (tmp_path / "kept.yaml").write_text("the former state\n")
    assert _arming(tmp_path, runs=True) == 0
    (tmp_path / "kept.yaml").write_text("what a killed run has made of it\n")
    remembered = Path(f"{tmp_path}/home/network/files{tmp_path}/kept.yaml")
    for runs in (False, True):
        assert (_arming(tmp_path, runs=runs) == 0) is runs
        assert remembered.read_text() == "the former state\n"
