"""`sparkinstall health`: a Spark in, findings out. The cases are in tests/cases/health.yaml."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import msgspec
import pytest
from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.core.session import Session
from sparkinstall.errors import BadUsage
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.measure import health
from sparkinstall.measure.health import Health
from sparkinstall.probes import known_hosts
from sparkinstall.system import Result, read_only
from sparkinstall.system.local import LocalSystem
from tests.support.machine import Machine
from tests.support.nodes import node_of
from tests.support.rehearsals import envelope, in_this_process, output_of
from tests.support.sysfs import spark

AT_REST: Mapping[str, str] = {
    "proc/meminfo": "MemTotal: 127535084 kB\nMemFree: 119400000 kB\nMemAvailable: 121900000 kB\n",
    "proc/pressure/memory": "some avg300=0.01 total=9\nfull avg300=0.00 total=7\n",
    "proc/self/smaps": "aaaac0000000-aaaac0001000 r-xp 00000000 fd:01 77 /usr/bin/python\nKernelPageSize: 4 kB\n",
    "proc/buddyinfo": f"Node 0, zone   Normal {'9 ' * 13} 3200\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.173.02  Release\n",
    "sys/class/dmi/id/bios_version": "5.36_0ACUM027\n",
    "sys/class/net/enp1s0f0np0/carrier_down_count": "2\n",
    "sys/class/net/enp1s0f0np0/device/current_link_speed": "32.0 GT/s PCIe\n",
    "sys/class/net/enp1s0f0np0/device/current_link_width": "4\n",
}
# The first key that a command's words contain decides.
PROGRAMS: Mapping[str, str | list[str]] = {
    "name,compute_cap": "NVIDIA GB10, 12.1, 580.173.02, 3, 208, 4.33\n",
    "clocks_event_reasons": "48, Not Active, Not Active, Not Active\n",
    "clocks.max.sm": "3, 208, 3003, 4.33, 48\n",
    "--boot=-1": "Booting Linux\n",
    "journalctl": "Booting Linux\n",
    "fwupdmgr": '{"Devices": []}\n',
    "is-active": "active\ninactive\ninactive\n",
}


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


class Case(Struct, frozen=True, forbid_unknown_fields=True):
    """A Spark, and what is found on it; the file of the cases describes the fields."""

    why: str
    findings: Sequence[str]
    found: str = ""
    unreadable: Sequence[str] = ()
    role: str = "single"
    settings: Mapping[str, str] = {}
    files: Mapping[str, str | None] = {}
    later: Mapping[str, str] = {}
    programs: Mapping[str, str | list[str]] = {}


CASES = msgspec.yaml.decode((Path(__file__).parents[1] / "cases/health.yaml").read_bytes(), type=list[Case])


class Told(Machine):
    """A folder as a Spark whose programs print what was recorded; a command that may change something is refused."""

    def __init__(self, root: Path, programs: Mapping[str, str | list[str]]) -> None:
        super().__init__(str(root))
        self.told = {key: list(said) if isinstance(said, list) else [said] for key, said in programs.items()}

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        del timeout, env, root, stdin
        read_only.require(argv)
        said = next((said for key, said in self.told.items() if key in " ".join(argv)), [""])
        out = said.pop(0) if len(said) > 1 else said[0]
        return Result(argv, 0 if out else 127, out, "")


def write(root: Path, files: Mapping[str, str | None]) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for name, text in files.items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text.replace("NOW", now))


def examined(root: Path, case: Case, monkeypatch: pytest.MonkeyPatch, strict: bool = False) -> Health:
    spark(root)
    write(root, {**AT_REST, **case.files})
    node = replace(node_of(root, case.role, **case.settings), rehearsal=False, home="/home/spark")
    on = cast("LocalSystem", Told(root, {**PROGRAMS, **case.programs}))
    # The second reading is after a pause.
    monkeypatch.setattr(time, "sleep", lambda _: write(root, case.later))
    session = Session(node, on, StateFolder(LocalSystem(str(root))), {}, {})
    return health.examine(session, 5.0, strict)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_health_of_a_spark_has_its_findings(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(tmp_path, case, monkeypatch)
    assert [each.name for each in found.findings] == list(case.findings), found.findings
    assert found.healthy == (not case.findings)
    assert set(case.unreadable) <= {each.name for each in found.unreadable}
    assert all(each.found and each.means and each.hint for each in found.findings)
    assert all(each.found for each in found.unreadable)
    assert not case.found or case.found in found.findings[0].found, found.findings[0]


def test_health_asks_all_rules_that_a_host_can_break_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = examined(tmp_path, Case("", (), role="head"), monkeypatch)
    names = [each.name for each in (*found.findings, *found.unreadable, *found.ok)]
    marked = {rule.name for rule in known_hosts.rules() if rule.health}
    assert sorted(names) == sorted({*marked, "memory-low", "link-errors", "wedges"})
    assert len(marked) > 10 and "gpu-driver" not in marked


def test_health_with_strict_counts_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(tmp_path, Case("", ()), monkeypatch, strict=True)
    assert (found.findings, found.healthy) == ([], False)
    assert "gpu-low-power" in {each.name for each in found.unreadable}


def test_health_of_a_rehearsal_is_refused(tmp_path: Path) -> None:
    run = in_this_process("health", "--root", tmp_path / "node")
    assert run.returncode == BadUsage.exit_code and "a rehearsal is no machine" in output_of(run)


@pytest.mark.parametrize(
    ("case", "code", "lines"),
    [
        (
            CASES[6],
            3,
            ["✗ gpu-xid", "means: ", "→ reboot", "! memory-guard", "✗ 3 findings, the worst first; 2 of 18 rules "],
        ),
        (
            CASES[0],
            0,
            [
                "· gpu-low-power  unreadable: the GPU has little",
                "✓ 16 rules find nothing; 2 of 18 rules could not be read here",
            ],
        ),
    ],
    ids=["bad", "good"],
)
def test_health_is_shown_in_lines_and_as_json(
    case: Case, code: int, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = examined(tmp_path, case, monkeypatch)
    monkeypatch.setattr("sparkinstall.cli.health.examine", lambda *_: found)
    shown = in_this_process("health")
    assert shown.returncode == code
    assert all(line in shown.stdout for line in lines), shown.stdout
    answer = envelope(in_this_process("health", "--json"))
    assert (answer["exit_code"], answer["data"]["healthy"]) == (code, code == 0)
    assert [each["name"] for each in answer["data"]["findings"]] == list(case.findings)
