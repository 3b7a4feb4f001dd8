"""`doctor`: worst first, with impact and hint; masked, so that it can be shown in public."""

import getpass
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sparkinstall.cli import doctor
from sparkinstall.core import catalogue, checks, fixes
from sparkinstall.core.checks import Chosen, ProbeResult
from sparkinstall.core.engine import StepReport
from sparkinstall.errors import BadUsage, Blocked, NeedsRoot
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.probes import Finding, Probe, failed, known_hosts, passed, skipped, warned
from sparkinstall.probes.preflight import preflight
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok, Unknown
from sparkinstall.support import doctor as checkup
from tests.support.nodes import HEAD
from tests.support.rehearsals import empty_rehearsal, envelope, in_this_process, output_of

GOOD, USAGE, DRIFT = 0, 2, 3
DECLARED = {
    probe.name: probe
    for probe in (
        *preflight(HEAD), *known_hosts.probes(HEAD), *(each for step in catalogue.STEPS for each in step.probes(HEAD))
    )
}  # fmt: skip
GROUPS = ("broken", "look_at", "ok", "skipped")

Findings = Callable[..., None]


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A rehearsal that has a journal and nothing else."""
    return empty_rehearsal(tmp_path / "node")


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> Findings:
    """Set the findings of the probes and of the preflight checks."""

    def these(probes: dict[str, Finding], before: dict[str, Finding] | None = None) -> None:
        chosen = Chosen((), tuple(_probe(name, finding) for name, finding in probes.items()), False)
        monkeypatch.setattr(checks, "chosen", lambda *_, **__: chosen)
        first = [_probe(name, finding) for name, finding in (before or {}).items()]
        monkeypatch.setattr("sparkinstall.probes.preflight.preflight", lambda _: first)

    return these


def _probe(name: str, finding: Finding) -> Probe:
    declared = DECLARED.get(name, Probe(name, "", lambda _: finding, "node"))
    return replace(declared, title=f"title of {name}", look=lambda _: finding, needs_node="")


def names(answer: dict[str, Any]) -> dict[str, list[str]]:
    return {group: [item["name"] for item in answer["data"][group]] for group in GROUPS if answer["data"][group]}


# --- output


def test_doctor_shows_the_worst_first_with_impact_and_hint(finds: Findings, node: Path) -> None:
    finds(
        {
            "fine": passed("x"),
            "link": warned("13 Gb/s", "see the issue", "200 Gb/s"),
            "unseen": skipped("no GPU here"),
            "wheel-gate": failed("torch is the CPU build", "`sparkinstall run environment --force`", "a CUDA build"),
        }
    )
    run = in_this_process("doctor", "--root", node)
    lines = [line.strip() for line in run.stdout.splitlines()]
    order = ["Broken (1)", "Worth a look (1)", "Ok (1): fine", "Skipped (1)", "1 thing is broken"]
    places = [next(at for at, line in enumerate(lines) if each in line) for each in order]
    assert places == sorted(places), run.stdout
    assert "wheel-gate  title of wheel-gate  fix 6" in lines
    assert f"means     {DECLARED['wheel-gate'].impact}" in lines
    assert f"do        `sparkinstall run environment --force --root {node}`" in lines
    assert "unseen: no GPU here" in lines
    assert run.returncode == DRIFT


def test_doctor_shows_the_machine_first(finds: Findings, node: Path) -> None:
    (node / "etc").mkdir()
    (node / "etc/dgx-release").write_text(
        'DGX_PRETTY_NAME="NVIDIA DGX Spark"\nDGX_SWBUILD_VERSION=7.2.3\nDGX_SERIAL_NUMBER="1324500099999"\n'
        'DGX_OTA_VERSION="7.5.0"\nDGX_OTA_VERSION="7.6.0"\n'
    )
    finds({"fine": passed("x")})
    run = in_this_process("doctor", "--root", node)
    first = run.stdout.splitlines()[0]
    assert first.startswith("NVIDIA DGX Spark, DGX OS 7.6.0 (factory image 7.2.3), stack 0.29.0 for ")
    assert ", sparkinstall " in first
    assert "1324500099999" not in run.stdout


def test_doctor_merges_equal_findings(finds: Findings, node: Path) -> None:
    same = failed("there is no environment", "run `sparkinstall all`")
    finds({"wheel-gate": same, "imports": same, "host-ip": same})
    shown = in_this_process("doctor", "--root", node).stdout
    assert "wheel-gate, imports, host-ip" in shown
    assert shown.count("there is no environment") == 1
    assert "3 things are broken" in shown
    assert "fix 3, 6" in shown
    assert "means" not in shown, "the impact differs for each of them"


def test_doctor_single_failure_is_not_called_the_first(finds: Findings, node: Path) -> None:
    finds({"imports": failed("x", "y")})
    alone = in_this_process("doctor", "--root", node).stdout
    assert "1 thing is broken\n" in alone and "begin with the first" not in alone
    assert f"means  {DECLARED['imports'].impact}" in alone


def test_doctor_json_has_every_group(finds: Findings, node: Path) -> None:
    finds({"a": failed("x", "y"), "b": warned("x", "y"), "c": passed("x"), "d": skipped("x")}, {"os": passed("x")})
    answer = envelope(in_this_process("doctor", "--root", node, "--json"))
    assert names(answer) == {"broken": ["a"], "look_at": ["b"], "ok": ["os", "c"], "skipped": ["d"]}
    assert set(answer["data"]) == {"machine", "installed", *GROUPS, "masked"}
    fields = {"name", "kind", "weight", "title", "found", "expected", "means", "hint", "fixes", "seconds"}
    assert set(answer["data"]["broken"][0]) == fields


@pytest.mark.parametrize(
    ("finding", "code"),
    [(passed("x"), GOOD), (warned("x", "y"), GOOD), (skipped("x"), GOOD), (failed("x", "y"), DRIFT)],
)
def test_doctor_exits_like_verify(finds: Findings, node: Path, finding: Finding, code: int) -> None:
    finds({"p": finding})
    assert in_this_process("doctor", "--root", node).returncode == code
    assert in_this_process("verify", "--root", node).returncode == code


# --- a node without an installation


def test_doctor_on_a_bare_node_runs_the_preflight_checks(tmp_path: Path) -> None:
    run = in_this_process("doctor", "--root", tmp_path / "node")
    assert run.returncode == GOOD, output_of(run)
    assert f"`sparkinstall all --root {tmp_path}/node`" in run.stdout
    assert "this node is ready to be set up" in run.stdout
    assert not (tmp_path / "node").exists()
    answer = envelope(in_this_process("doctor", "--root", tmp_path / "node", "--json"))
    assert answer["data"]["installed"] is False
    assert {"clock", "disk"} <= set(names(answer)["ok"])


def test_doctor_without_a_check_says_so(tmp_path: Path) -> None:
    run = in_this_process("doctor", "--root", tmp_path / "node", "--only", "fp8")
    assert "nothing was checked" in run.stdout
    assert "stands in the way" not in run.stdout


def test_doctor_failed_preflight_check_is_broken(finds: Findings, tmp_path: Path) -> None:
    finds({}, {"driver": failed("nvidia-smi does not answer", "install the driver")})
    run = in_this_process("doctor", "--root", tmp_path / "node")
    assert run.returncode == DRIFT
    assert DECLARED["driver"].impact in run.stdout


def test_doctor_on_a_bare_node_runs_the_probes_of_the_machine(
    finds: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = _probe("gpu-xid", failed("XID 79", "power it off")), _probe("imports", failed("no", "no"))
    finds({})
    monkeypatch.setattr(checks, "chosen", lambda *_, **__: Chosen((), (own, other), True))
    monkeypatch.setattr(checks, "of_no_step", lambda _: [own])
    answer = envelope(in_this_process("doctor", "--root", tmp_path / "node", "--json"))
    assert names(answer) == {"broken": ["gpu-xid"]}


def test_doctor_on_a_node_of_another_user_shows_the_preflight_checks(
    finds: Findings, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: StateFolder) -> bool:
        raise Blocked("it belongs to the user with id 1000", hint="run sparkinstall as that user")

    finds({}, {"clock": passed("x")})
    monkeypatch.setattr(StateFolder, "exists", property(refuse))
    run = in_this_process("doctor", "--root", node)
    assert run.returncode == DRIFT
    assert "run sparkinstall as that user" in run.stdout and "Ok (1): clock" in run.stdout


def test_doctor_only_a_probe_skips_the_preflight_checks(node: Path) -> None:
    answer = envelope(in_this_process("doctor", "--root", node, "--only", "wheel-gate", "--json"))
    assert [item["name"] for group in GROUPS for item in answer["data"][group]] == ["wheel-gate"]
    wrong = in_this_process("doctor", "--root", node, "--only", "wheel-gat")
    assert wrong.returncode == USAGE and "did you mean `wheel-gate`?" in output_of(wrong)


# --- the weight of one item


def of_step(*states: Any, problem: Any = None) -> checkup.Item:
    return checkup.of_step(StepReport.of("nccl", states, problem))


def test_of_checks_weighs_every_state() -> None:
    assert of_step(Ok("")).weight == "ok"
    assert of_step(Ok(""), NodeOnly("x")).weight == "skipped"
    drift = of_step(Drift("build it"), Unknown("packages"), NodeOnly("x"))
    assert (drift.weight, drift.found) == ("broken", "not done: build it")
    assert (drift.hint, drift.fixes) == ("`sparkinstall run nccl`", (1,))
    assert of_step(Drift("write /opt/x.env")).found == "missing: /opt/x.env"
    assert of_step(Drift("change /opt/x.env")).found == "differs: /opt/x.env"
    assert of_step(Unknown("packages")).weight == "skipped", "a step that waits for another one is not broken"
    assert of_step(Conflict("it is a dir", hint="move it away")).hint == "move it away"
    assert of_step(problem=Blocked("x", hint="y")).hint == "y"


def test_of_checks_state_readable_only_by_root_is_skipped() -> None:
    item = of_step(problem=NeedsRoot("only root can read /etc/netplan/40-cx7.yaml"))
    assert (item.weight, "sudo -v" in item.hint) == ("skipped", True)


@pytest.mark.parametrize(("installed", "weight"), [(True, "look-at"), (False, "broken")])
def test_of_preflight_sudo_on_an_installed_node_is_no_failure(installed: bool, weight: str) -> None:
    probe = _probe("sudo", failed("x", "y"))
    results = [ProbeResult.of(probe, failed("x", "y"))]
    assert checkup.of_probes("preflight", [probe], results, installed)[0].weight == weight


def test_impact_of_steps_and_probes_is_a_sentence() -> None:
    impacts = [step.impact for step in catalogue.STEPS] + [probe.impact for probe in DECLARED.values()]
    assert [each for each in impacts if not each.endswith(".") or each != each.strip()] == []


def test_fixes_have_unique_numbers_and_probes_name_known_fixes() -> None:
    assert len({fix.number for fix in fixes.FIXES}) == len(fixes.FIXES)
    assert {probe.fix for probe in DECLARED.values() if probe.fix} <= set(fixes.FIXES)


# --- masking


def test_doctor_masks_personal_data(finds: Findings, node: Path) -> None:
    (node / "etc").mkdir()
    (node / "etc/hostname").write_text("livingroom\n")
    (node / "etc/passwd").write_text("marianne:x:1000:1000:Marianne Musterfrau,,,:/home/marianne:/bin/bash\n")
    secrets = ["livingroom", "marianne", "Musterfrau", "10.11.12.13", "48:b0:2d:aa:bb:cc", "hf_abcdefghijklmnopqrstuv"]
    finds({"p": failed(" ".join(secrets), f"ask {secrets[1]}", f"not {secrets[3]}")})
    for options in ([], ["--json"], ["-v"]):
        run = in_this_process("doctor", "--root", node, *options)
        assert [secret for secret in secrets if secret in output_of(run)] == []
    shown = in_this_process("doctor", "--root", node).stdout
    assert (
        "masked, so that it can be made public: 1 host name, 2 user names, 1 address, 1 MAC address, credentials"
        in shown
    )
    assert "not <ip-1>" in shown


def test_doctor_masks_an_error(tmp_path: Path) -> None:
    home = str(Path.home())
    run = in_this_process("doctor", "--root", tmp_path / "node", "--config", f"{home}/nowhere-at-all.yaml")
    assert run.returncode == USAGE
    assert "~/nowhere-at-all.yaml" in output_of(run) and f"{home}/nowhere" not in output_of(run)


def test_doctor_masks_the_folder_of_a_rehearsal(
    tmp_path: Path, finds: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home/marianne"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    finds({}, {"clock": passed("x")})
    run = in_this_process("doctor", "--root", home / "node")
    assert "run `sparkinstall all --root ~/node`" in run.stdout
    assert "the home folder" in run.stdout and str(home) not in output_of(run)
    monkeypatch.setattr(checks, "chosen", _blocked)
    refused = in_this_process("doctor", "--root", home / "node")
    assert "`sparkinstall uninstall --root ~/node`" in output_of(refused) and str(home) not in output_of(refused)


def _blocked(*_: object, **__: object) -> Chosen:
    raise BadUsage("it cannot be", hint="`sparkinstall uninstall`")


def test_identity_knows_the_names_of_this_machine() -> None:
    from sparkinstall.support import identity
    from sparkinstall.system.local import LocalReader

    known = identity.known(LocalReader())
    assert socket.gethostname() in known.hosts
    assert getpass.getuser() in known.users
    assert str(Path.home()) in known.homes


def test_identity_knows_networks_and_serials(tmp_path: Path) -> None:
    from sparkinstall.support import identity
    from sparkinstall.system.local import LocalReader

    for folder in ("etc/netplan", "etc/NetworkManager/system-connections", "sys/class/dmi/id"):
        (tmp_path / folder).mkdir(parents=True)
    wifi = (
        'network:\n  wifis:\n    wlP9s9:\n      access-points:\n        "Casa Verde": {password: x}\n        Nord: {}\n'
    )
    (tmp_path / "etc/netplan/90-wifi.yaml").write_text(wifi)
    (tmp_path / "etc/netplan/91-broken.yaml").write_text("network: [\n")
    (tmp_path / "etc/NetworkManager/system-connections/Cafe Sol.nmconnection").write_text("x")
    (tmp_path / "etc/dgx-release").write_text('DGX_SERIAL_NUMBER="1324500099999"\n')
    (tmp_path / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (tmp_path / "sys/class/dmi/id/product_serial").write_text("ABC-123456\n")
    (tmp_path / "sys/class/dmi/id/board_serial").write_text("Default string\n")
    known = identity.known(LocalReader(str(tmp_path)))
    assert set(known.networks) == {"Cafe Sol", "Casa Verde", "Nord"}
    assert set(known.serials) == {"0123456789abcdef0123456789abcdef", "1324500099999", "ABC-123456"}


def test_item_rows_long_list_is_cut_unless_verbose() -> None:
    item = checkup.Item("x", "check", "broken", "t", "\n".join(f"file {at}" for at in range(20)))
    assert dict(doctor.item_rows(item, False))["found"].splitlines()[-1] == "... (-v shows all 20)"
    assert len(dict(doctor.item_rows(item, True))["found"].splitlines()) == 20
