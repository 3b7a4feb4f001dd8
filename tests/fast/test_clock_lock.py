"""The lock of the GPU's clock: the unit, its removal, and what the probes say of a clock."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from sparkinstall import config
from sparkinstall.core import catalogue
from sparkinstall.errors import BadConfig
from sparkinstall.layout import CLOCK_LOCK_UNIT, unit_path
from sparkinstall.probes import Probe
from sparkinstall.resources import Drift, NodeOnly, Ok, state_of
from sparkinstall.resources.stale_services import StaleServices
from sparkinstall.resources.systemd import Service, UnitFile, complaints_of_systemd
from sparkinstall.steps.clock_lock import ClockLock
from sparkinstall.system.local import LocalReader
from tests.support.machine import OnASpark
from tests.support.nodes import node_of, node_with, system_of
from tests.support.recording import RecordingSystem

PATH = unit_path(CLOCK_LOCK_UNIT)


def rehearsed(root: Path, clock: int) -> str:
    """The text of the unit that a rehearsal writes."""
    on = system_of(root)
    for each in ClockLock().resources(node_of(root, gpu__max_clock=clock)):
        if not isinstance(state_of(each, on), NodeOnly):
            each.apply(on)
    return (root / PATH[1:]).read_text()


@pytest.mark.parametrize(("settings", "there"), [({}, False), ({"gpu__max_clock": 2200}, True)])
@pytest.mark.parametrize("role", ["single", "head", "worker"])
def test_clock_lock_is_a_step_only_with_the_setting(
    settings: dict[str, Any], there: bool, role: str, tmp_path: Path
) -> None:
    names = [step.name for step in catalogue.of(node_of(tmp_path, role, **settings))]
    assert ("clock-lock" in names) is there


@pytest.mark.parametrize("clock", [1400, 2200, 3000])
def test_clock_lock_unit_locks_at_start_and_resets_at_stop(clock: int, tmp_path: Path) -> None:
    text = rehearsed(tmp_path, clock)
    assert f"\nExecStart=/usr/bin/nvidia-smi -lgc 300,{clock}\n" in text
    assert "\nExecStopPost=/usr/bin/nvidia-smi -rgc\n" in text
    assert "\nRemainAfterExit=yes\n" in text, "else systemd would reset the clock as soon as it is locked"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_clock_lock_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    text = rehearsed(tmp_path, 2200)
    assert complaints_of_systemd(LocalReader(str(tmp_path)), CLOCK_LOCK_UNIT, text.encode()) == []


def test_clock_lock_of_another_limit_is_a_change_of_the_unit_and_a_restart(tmp_path: Path) -> None:
    rehearsed(tmp_path, 2200)
    unit, service = ClockLock().resources(node_of(tmp_path, gpu__max_clock=2000))
    state = unit.check(system_of(tmp_path))
    assert isinstance(unit, UnitFile) and isinstance(state, Drift) and "300,2000" in state.after
    assert isinstance(service, Service) and tuple(service.inputs(system_of(tmp_path))) == (PATH,)


@pytest.mark.parametrize("value", [0, 300, 1399, 3001, 99999, -1, 2200.5, "fast", True])
def test_max_clock_outside_of_its_limits_is_refused(value: Any) -> None:
    with pytest.raises(BadConfig, match=r"gpu\.max_clock.*1400 to 3000"):
        config.build([config.Layer("test", {"gpu.max_clock": value})])


@pytest.mark.parametrize(("text", "value"), [("2200", 2200), ("1400", 1400), ("null", None), ("", None)])
def test_max_clock_of_a_command_line_is_a_number(text: str, value: int | None) -> None:
    assert config.parse_assignment(f"gpu.max_clock={text}") == ("gpu.max_clock", value)


def test_clock_lock_without_the_setting_is_removed_by_the_next_run(tmp_path: Path) -> None:
    rehearsed(tmp_path, 2200)
    on, former = system_of(tmp_path), StaleServices(node_of(tmp_path))
    assert isinstance(StaleServices(node_of(tmp_path, gpu__max_clock=2200)).check(on), Ok)
    state = former.check(on)
    assert isinstance(state, Drift) and state.summary == f"stop {CLOCK_LOCK_UNIT}: no longer required"
    former.apply(on)
    assert isinstance(former.check(on), Ok) and not (tmp_path / PATH[1:]).exists()


def test_clock_lock_without_the_setting_is_stopped_on_a_node_and_so_resets_the_clock() -> None:
    on = RecordingSystem({PATH: f"# {PATH}, created by sparkinstall.\n".encode()})
    StaleServices(node_with(cluster__role="single")).apply(on)
    stopped, removed = f"systemctl disable --now {CLOCK_LOCK_UNIT}", f"remove {PATH}"
    assert on.changed == [f"promise service {CLOCK_LOCK_UNIT}", stopped, removed, "systemctl daemon-reload"]


# --- probes


def found(root: Path, gpu: str, clock: int = 2200) -> tuple[str, str]:
    """Verdict and words of the probe that takes the GPU as it is; `gpu`: the load in percent and the clock in MHz."""
    line = f"NVIDIA GB10, 12.1, 580.178.04, {gpu}, 40.00\n"
    probe, _ = probes(clock)
    finding = probe.look(OnASpark(root, {"nvidia-smi": line}))
    return finding.verdict, finding.found


def probes(clock: int = 2200) -> list[Probe]:
    return list(ClockLock().probes(node_with(gpu__max_clock=clock)))


@pytest.mark.parametrize(
    ("gpu", "clock", "verdict", "words"),
    [
        ("96, 2190", 2200, "pass", "2190 MHz, 96 % busy"),
        ("96, 2205", 2200, "pass", "2205 MHz, 96 % busy"),
        ("50, 1395", 1400, "pass", "1395 MHz, 50 % busy"),
        ("96, 2418", 2200, "fail", "2418 MHz, 96 % busy: the clock is not locked"),
        ("0, 2418", 2200, "fail", "2418 MHz, 0 % busy: the clock is not locked"),
        ("96, 2190", 2000, "fail", "2190 MHz, 96 % busy: the clock is not locked"),
        ("0, 208", 2200, "skip", "208 MHz, 0 % busy: only a busy GPU"),
        ("49, 2190", 2200, "skip", "2190 MHz, 49 % busy: only a busy GPU"),
        ("[N/A], 2190", 2200, "skip", "nvidia-smi does not report"),
        ("96, [N/A]", 2200, "skip", "nvidia-smi does not report"),
    ],
)
def test_gpu_clock_is_proven_by_a_busy_gpu_only(gpu: str, clock: int, verdict: str, words: str, tmp_path: Path) -> None:
    said, text = found(tmp_path, gpu, clock)
    assert said == verdict and text.startswith(words)


@pytest.mark.parametrize(
    ("programs", "words"),
    [
        ({}, "nvidia-smi does not name a GPU"),
        ({"nvidia-smi": "Failed to initialize NVML: Driver/library version mismatch\n"}, "Failed to initialize NVML"),
    ],
)
def test_gpu_clock_without_an_answer_of_nvidia_smi_fails(programs: dict[str, str], words: str, tmp_path: Path) -> None:
    finding = probes()[0].look(OnASpark(tmp_path, programs))
    assert finding.verdict == "fail" and finding.found.startswith(words) and finding.hint


def test_gpu_clock_under_load_needs_torch_and_runs_only_when_asked(tmp_path: Path) -> None:
    quiet, loud = probes()
    assert (quiet.load, loud.load) == (False, True)
    finding = loud.look(OnASpark(tmp_path, {"nvidia-smi": "NVIDIA GB10, 12.1, 580.178.04, 0, 208, 4.00\n"}))
    assert finding.verdict == "skip" and "torch is not installed" in finding.found


def test_gpu_clock_in_a_rehearsal_is_of_the_node_only() -> None:
    assert all(each.needs_node for each in probes())
