"""The timer of `health`: its units, what it writes for node_exporter, its removal, and what is said of its last run."""

import shutil
from pathlib import Path

import pytest
from msgspec import json

from sparkinstall.core import catalogue
from sparkinstall.errors import BadUsage, Interrupted
from sparkinstall.facts.health import MARK, last_run, metrics, summary
from sparkinstall.facts.life import LifeState, Wedge
from sparkinstall.layout import HEALTH_TIMER, HEALTH_UNIT, unit_path
from sparkinstall.measure.health import Health, Item
from sparkinstall.probes.health import judged
from sparkinstall.resources import Conflict, Drift, Ok
from sparkinstall.resources.metrics_file import FirstMetrics, MetricsFolder, remove
from sparkinstall.resources.stale_services import StaleServices
from sparkinstall.resources.systemd import complaints_of_systemd
from sparkinstall.system import Undo
from sparkinstall.system.local import LocalReader
from tests.support.nodes import node_of, node_with, system_of
from tests.support.recording import RecordingSystem
from tests.support.rehearsals import envelope, in_this_process, output_of

NOW = 1_796_000_000.0
PATH = "/var/lib/prometheus/node-exporter/sparkinstall_health.prom"
VERDICTS = [("memory-low", "pass"), ("gpu-xid", "fail"), ("firmware", "warn"), ("gpu-low-power", "skip")]
SHOWN = {"firmware": -1, "gpu-xid": 2, "memory-low": 0}
WEDGED = LifeState(
    "2026-11-30T00:53:15Z", "alive", "", 3, 2, (Wedge("2026-11-30T00:10:00Z", "it generates nothing"),), ("x",)
)


def item(name: str, verdict: str) -> Item:
    return Item(name, name, verdict, "found", "", "means", "hint")  # type: ignore[arg-type]


def samples(text: str) -> dict[str, float]:
    """The value of each sample."""
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


# --- the text


def test_metrics_have_help_type_and_one_sample_per_rule() -> None:
    text = metrics(VERDICTS, None, NOW)
    assert text.startswith(MARK) and text.endswith("\n")
    lines = text.splitlines()
    names = {line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")}
    for name in names:
        assert sum(line.startswith(f"# HELP {name} ") for line in lines) == 1
        assert lines.count(f"# TYPE {name} gauge") == 1
    state = "sparkinstall_health_state"
    assert [line for line in lines if line.startswith(state)] == [
        f'{state}{{rule="memory-low"}} 0', f'{state}{{rule="gpu-xid"}} 2',
        f'{state}{{rule="firmware"}} 1', f'{state}{{rule="gpu-low-power"}} -1',
    ]  # fmt: skip
    assert f"sparkinstall_health_last_run_timestamp_seconds {NOW:.0f}" in lines


def test_metrics_tell_what_the_proof_of_life_has_noted() -> None:
    found = samples(metrics(VERDICTS, WEDGED, NOW))
    assert found["sparkinstall_life_wedges"] == found["sparkinstall_life_restarts"] == 1
    assert found["sparkinstall_life_restarts_left"] == 2
    assert found["sparkinstall_life_last_wedge_timestamp_seconds"] == 1795997400
    assert not [name for name in samples(metrics(VERDICTS, None, NOW)) if name.startswith("sparkinstall_life")]


def test_last_run_is_read_from_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "state").write_text(metrics(VERDICTS, WEDGED, NOW))
    run = last_run(LocalReader(str(tmp_path)), "/state")
    assert run and (run.rules, run.findings, run.unreadable) == (4, ("gpu-xid", "firmware"), ("gpu-low-power",))
    assert summary(run) == "finds gpu-xid, firmware; 1 of 4 rules could not be read"
    assert run.age(NOW + 30) == 30
    (tmp_path / "state").write_text("nothing of ours 1\n")
    assert last_run(LocalReader(str(tmp_path)), "/state") is None


def test_health_prints_metrics_with_the_code_of_its_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Health(False, [item("gpu-xid", "fail")], [item("firmware", "skip")], [item("memory-low", "pass")])
    monkeypatch.setattr("sparkinstall.cli.health.examine", lambda *_: found)
    shown = in_this_process("health", "--metrics")
    assert shown.returncode == 3
    rules = {name: value for name, value in samples(shown.stdout).items() if "rule=" in name}
    assert rules == {f'sparkinstall_health_state{{rule="{name}"}}': value for name, value in SHOWN.items()}


def test_health_says_in_its_last_line_what_could_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable = [item(f"rule-{n}", "skip") for n in range(12)]
    found = Health(True, [], unreadable, [item("memory-low", "pass")])
    monkeypatch.setattr("sparkinstall.cli.health.examine", lambda *_: found)
    shown = in_this_process("health")
    assert shown.returncode == 0
    last = shown.stdout.splitlines()[-1]
    assert last.startswith("! 12 of 13 rules could not be read here, so this says little: the other 1 find nothing")


# --- the units


def test_timer_is_a_step_only_with_the_setting(tmp_path: Path) -> None:
    assert "health" not in [step.name for step in catalogue.of(node_of(tmp_path))]
    assert "health" in [step.name for step in catalogue.of(node_of(tmp_path, health__timer=True))]


def test_units_run_health_as_the_user_and_only_root_touches_the_folder(tmp_path: Path) -> None:
    node = node_of(tmp_path, health__timer=True, health__every_minutes=3, health__folder="/srv/metrics")
    on = system_of(tmp_path)
    for each in list(catalogue.named("health").resources(node))[:3]:
        each.apply(on)
    service, timer = ((tmp_path / unit_path(name)[1:]).read_text() for name in (HEALTH_UNIT, HEALTH_TIMER))
    assert f"\nUser={node.user}\n" in service and "\nNoNewPrivileges=yes\n" in service
    assert "\nSuccessExitStatus=3\n" in service and " health --metrics\n" in service
    final = "/srv/metrics/sparkinstall_health.prom"
    assert f"\nExecStartPost=+/usr/bin/mv -fT {final}.new {final}\n" in service
    assert "\nOnUnitActiveSec=3min\n" in timer
    assert (tmp_path / "srv/metrics").is_dir()
    if shutil.which("systemd-analyze"):
        reader = LocalReader(str(tmp_path))
        assert complaints_of_systemd(reader, HEALTH_UNIT, service.encode()) == []
        assert complaints_of_systemd(reader, HEALTH_TIMER, timer.encode()) == []


def test_folder_with_a_file_of_others_in_the_place_of_ours_is_a_conflict() -> None:
    folder = MetricsFolder(PATH, HEALTH_UNIT)
    assert isinstance(folder.check(RecordingSystem({PATH: b"other 1\n"})), Conflict)
    assert isinstance(folder.check(RecordingSystem()), Drift)
    ours = {PATH: MARK.encode(), "/var/lib/sparkinstall/journal.jsonl": f'"subject": "{PATH}"'.encode()}
    assert isinstance(folder.check(RecordingSystem(ours)), Ok)


def test_first_run_is_started_at_once_and_its_failure_is_told() -> None:
    first = FirstMetrics(PATH, HEALTH_UNIT)
    on = RecordingSystem()
    first.apply(on)
    assert on.changed == [f"systemctl start {HEALTH_UNIT}"]
    assert isinstance(first.check(on), Drift) and isinstance(first.check(RecordingSystem({PATH: MARK.encode()})), Ok)
    on.failing = ("systemctl start",)
    on.answers["journalctl"] = "Starting\nsparkinstall: /etc/sparkinstall.yaml: unknown setting\nFailed\n"
    with pytest.raises(Exception, match=f"{HEALTH_UNIT} has failed") as caught:
        first.apply(on)
    assert getattr(caught.value, "cause", "") == "sparkinstall: /etc/sparkinstall.yaml: unknown setting"


def test_metrics_are_removed_only_if_they_are_ours() -> None:
    records = [Undo("metrics", PATH, {"kind": "absent"}, {"unit": HEALTH_UNIT})]
    ours = RecordingSystem({PATH: MARK.encode(), f"{PATH}.new": b""})
    assert remove(records, ours).outcome == "removed"
    assert ours.changed == [f"rm -f -- {PATH} {PATH}.new", f"systemctl reset-failed {HEALTH_UNIT}"]
    others = RecordingSystem({PATH: b"other 1\n"})
    assert remove(records, others).outcome == "nothing"
    assert not [line for line in others.changed if line.startswith("rm")]


def test_timer_without_the_setting_is_removed_by_the_next_run() -> None:
    paths = [unit_path(name) for name in (HEALTH_TIMER, HEALTH_UNIT)]
    on = RecordingSystem(
        {PATH: MARK.encode(), **{path: f"# {path}, created by sparkinstall.\n".encode() for path in paths}}
    )
    StaleServices(node_with()).apply(on)
    assert f"systemctl disable --now {HEALTH_TIMER}" in on.changed
    assert [f"remove {path}" in on.changed for path in paths] == [True, True]
    assert f"rm -f -- {PATH}" in on.changed


# --- the verb


def test_health_install_in_a_rehearsal_is_undone_without_a_trace(tmp_path: Path) -> None:
    root = tmp_path / "node"
    done = in_this_process("health", "--install", "--every", "9", "--root", root)
    assert done.returncode == 0, output_of(done)
    assert "runs every 9 minutes" in done.stdout
    assert (root / unit_path(HEALTH_TIMER)[1:]).is_file()
    plan = envelope(in_this_process("plan", "--root", root, "--json"))["data"]
    assert "health" in [step["step"] for step in plan["steps"]]
    assert in_this_process("health", "--uninstall", "--root", root).returncode == 0
    assert not root.exists()
    again = in_this_process("health", "--uninstall", "--root", root)
    assert again.returncode == 0 and "Nothing to undo" in again.stdout


def test_health_uninstall_asks_only_if_the_timer_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, asked = tmp_path / "node", list[str]()
    monkeypatch.setattr("sparkinstall.cli.health.confirm", lambda question, **_: asked.append(question))
    nothing = in_this_process("health", "--uninstall", "--root", root)
    assert (nothing.returncode, asked) == (0, []), output_of(nothing)
    assert nothing.stdout.startswith("Nothing to undo: the timer of `health` is not installed.")
    assert in_this_process("health", "--install", "--root", root).returncode == 0
    assert in_this_process("health", "--uninstall", "--root", root).returncode == 0
    assert len(asked) == 1 and not root.exists()


def test_health_uninstall_that_is_refused_undoes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Interrupted("cancelled; nothing was changed")

    root = tmp_path / "node"
    assert in_this_process("health", "--install", "--root", root).returncode == 0
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    monkeypatch.setattr("sparkinstall.cli.health.confirm", refuse)
    assert in_this_process("health", "--uninstall", "--root", root).returncode == Interrupted.exit_code
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_health_uninstall_keeps_what_other_steps_have_and_their_options(tmp_path: Path) -> None:
    root = tmp_path / "node"
    clock = ("run", "clock-lock", "--set", "gpu.max_clock=2200", "--root", root)
    assert in_this_process("health", "--install", "--root", root).returncode == 0
    assert in_this_process(*clock).returncode == 0
    assert in_this_process("health", "--uninstall", "--root", root).returncode == 0
    options = json.decode((root / "var/lib/sparkinstall/options.json").read_bytes())
    assert options["settings"] == {"gpu.max_clock": 2200}
    assert not (root / "var/lib/prometheus").exists()
    assert (root / "etc/systemd/system/sparkinstall-clock-lock.service").is_file()
    # The folder that both use was made by the first of them.
    assert in_this_process("uninstall", "--root", root).returncode == 0
    assert not root.exists()


def test_health_uninstall_names_a_config_that_still_asks_for_it(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("health: {timer: true}\n")
    words = ("--root", tmp_path / "node", "--config", config)
    assert in_this_process("health", "--install", *words).returncode == 0
    told = in_this_process("health", "--uninstall", *words)
    assert f"{config} still asks for it" in told.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("--install", "--uninstall"), ("--install", "--metrics"), ("--metrics", "--json"), ("--every", "3"),
        ("--folder", "/srv"), ("--uninstall", "--folder", "/srv"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(words: tuple[str, ...]) -> None:
    run = in_this_process("health", *words)
    assert run.returncode == BadUsage.exit_code, output_of(run)


@pytest.mark.parametrize(("option", "value"), [("--every", "0"), ("--every", "1441"), ("--folder", "relative")])
def test_value_that_the_setting_refuses_is_refused(option: str, value: str, tmp_path: Path) -> None:
    run = in_this_process("health", "--install", option, value, "--root", tmp_path / "node")
    assert run.returncode == BadUsage.exit_code, output_of(run)
    assert not (tmp_path / "node").exists()


# --- the probe


def test_last_run_is_judged_by_its_age() -> None:
    node = node_with(health__timer=True, health__every_minutes=5)
    run = last_run(RecordingSystem({PATH: metrics(VERDICTS, None, NOW).encode()}), PATH)
    assert judged(node, run, NOW + 60).verdict == "pass"
    assert "finds gpu-xid, firmware" in judged(node, run, NOW + 60).found
    assert judged(node, run, NOW + 1200).found == "its last run was 20 minutes ago"
    assert judged(node, None, NOW).verdict == "fail"
