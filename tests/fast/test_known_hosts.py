"""Every rule of known-bad hosts, on a bad host and on a good one.

The cases are in tests/cases/known-hosts.yaml. The data of a bad host are from the evidence of the rule (the threads are
named there): its files are written below a folder, and the output of its programs is as posted.
"""

import os
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from types import MappingProxyType

import msgspec
import pytest
import yaml
from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.core import catalogue, checks
from sparkinstall.facts.machine import free_blocks
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Verdict
from sparkinstall.probes.host_detectors import DETECTORS, Host
from sparkinstall.probes.known_hosts import judged, probes, rules
from sparkinstall.steps.env_files import FILES
from sparkinstall.system import Result
from sparkinstall.system.local import LocalReader
from tests.support.nodes import node_of

RULES = {rule.name: rule for rule in rules()}

# dgx-spark: MemTotal as in the project's list of facts; a node at rest.
MEMINFO = "MemTotal:       127535084 kB\nMemFree:        119400000 kB\nMemAvailable:   121900000 kB\n"
KERNEL_GOOD = """\
Booting Linux on physical CPU 0x0000000000 [0x410fd801]
NVRM: loading NVIDIA UNIX Open Kernel Module for aarch64  580.173.02  Release Build
mlx5_core 0000:01:00.0 enp1s0f0np0: Link up
"""


class Recorded(LocalReader):
    """A folder as a node, whose programs print what was recorded."""

    def __init__(self, root: Path, answers: Mapping[str, str]) -> None:
        super().__init__(str(root))
        self.answers = answers

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        del timeout, env, root, stdin
        name = "previous" if "--boot=-1" in argv else Path(argv[0]).name
        output = self.answers.get("slowdown" if "clocks_event_reasons" in " ".join(argv) else name)
        return Result(argv, 0 if output is not None else 127, output or "", "")


# As the template of the env file writes it.
ENV_FILE = 'set -a\nPATH="/opt/sparkinstall/venv/bin:/usr/local/cuda/bin:/usr/bin"\n'
AT_REST: Mapping[str, str | None] = {
    "proc/meminfo": MEMINFO,
    "proc/sys/kernel/osrelease": "6.17.0-1032-nvidia\n",
    "proc/cmdline": "BOOT_IMAGE=/boot/vmlinuz-6.17.0-1032-nvidia ro quiet\n",
    "proc/self/smaps": "aaaac0000000-aaaac0001000 r-xp 00000000 fd:01 77 /usr/bin/python\nKernelPageSize: 4 kB\n",
    # 100 GiB in blocks of 32 MiB, order 13.
    "proc/buddyinfo": f"Node 0, zone   Normal {'9 ' * 13} 3200\n",
    "proc/pressure/memory": "some avg10=0.00 avg300=0.01 total=9\nfull avg10=0.00 avg300=0.00 total=7\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.173.02  Release\n",
    "sys/class/dmi/id/bios_version": "5.36_0ACUM027\n",
    **{f"opt/sparkinstall/env/{name}.env": ENV_FILE for name in FILES},
}
PROGRAMS = {
    "journalctl": KERNEL_GOOD,
    "previous": KERNEL_GOOD,
    "nvidia-smi": "NVIDIA GB10, 12.1, 580.173.02, 96, 2405, 61.20\n",
    "slowdown": "61, Not Active, Not Active, Not Active\n",
    "systemctl": "active\ninactive\ninactive\n",
    "fwupdmgr": '{"Devices": []}\n',
    "ninja": "1.13.0\n",
    "nvcc": "Built on Wed_Aug_20_01:58:59_PM_PDT_2025\nCuda compilation tools, release 13.0, V13.0.88\n",
    "ping": "rtt min/avg/max/mdev = 0.213/0.282/0.340/0.050 ms\n",
}


def host(
    root: Path,
    files: Mapping[str, str | None] = MappingProxyType({}),
    role: str = "single",
    workers: Sequence[str] = (),
    links: Mapping[str, str] = MappingProxyType({}),
    programs: Mapping[str, str] = MappingProxyType({}),
) -> Host:
    for name, text in {**AT_REST, **files}.items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    for name, target in links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
    reader = Recorded(root, {**PROGRAMS, **programs})
    return Host(reader, real_node(root, role, workers))


class Case(Struct, frozen=True, forbid_unknown_fields=True):
    """A host, and the verdict of a rule on it; the file of the cases describes the fields."""

    rule: str
    why: str
    verdict: Verdict
    found: str = ""
    source: str = ""
    role: str = "single"
    workers: Sequence[str] = ()
    files: Mapping[str, str | None] = {}
    links: Mapping[str, str] = {}
    kernel: Sequence[str] = ()
    previous: Sequence[str] = ()
    programs: Mapping[str, str] = {}


CASES = msgspec.convert(
    yaml.safe_load(Path(__file__).parents[1].joinpath("cases/known-hosts.yaml").read_text()), list[Case]
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}: {case.why}")
def test_rule_on_a_host_gives_its_verdict(case: Case, tmp_path: Path) -> None:
    journal, previous = (KERNEL_GOOD + "".join(f"{line}\n" for line in of) for of in (case.kernel, case.previous))
    programs = {"journalctl": journal, "previous": previous, **case.programs}
    found = judged(RULES[case.rule], host(tmp_path, case.files, case.role, case.workers, case.links, programs))
    assert (found.verdict, case.found in found.found) == (case.verdict, True), found
    assert "1234" not in found.found
    if case.verdict in ("warn", "fail"):
        assert found.verdict == ("warn" if case.previous else RULES[case.rule].verdict)
        assert RULES[case.rule].why in found.found
        assert found.hint.removeprefix("if it recurs: " if case.previous else "").startswith(RULES[case.rule].hint[:20])
        assert "https://" in found.hint


@pytest.mark.parametrize("name", sorted(RULES))
def test_rule_on_a_node_at_rest_passes(name: str, tmp_path: Path) -> None:
    found = judged(RULES[name], host(tmp_path, role="head"))
    assert (found.verdict, found.hint) == ("pass", ""), found


def test_cases_have_a_bad_host_and_a_look_alike_for_every_rule() -> None:
    assert {case.rule for case in CASES if case.verdict in ("warn", "fail")} == set(RULES)
    # Nothing looks like these without being bad.
    alone = {"driver-no-memory", "oom-killer", "gpu-driver"}
    assert {case.rule for case in CASES if case.verdict == "pass"} >= set(RULES) - alone


PYTHON = {"opt/sparkinstall/venv/bin/python": ""}
IDLE = "NVIDIA GB10, 12.1, 580.173.02, 3, 208, 4.33\n"
STUCK = "NVIDIA GB10, 12.1, 580.173.02, 96, 1377, 20.31\n"


def low_power(
    root: Path, files: Mapping[str, str] = MappingProxyType({}), python: str | None = None
) -> tuple[str, str]:
    programs = {"nvidia-smi": IDLE} | ({"python": python} if python else {})
    found = judged(RULES["gpu-low-power"], host(root, {**PYTHON, **files}, programs=programs))
    return found.verdict, found.found


def test_gpu_low_power_idle_gpu_is_judged_under_load_only(tmp_path: Path) -> None:
    assert low_power(tmp_path, python=STUCK)[0] == "fail"
    assert low_power(tmp_path, python=STUCK)[1].startswith("96 % busy, 1377 MHz, 20 W")
    assert low_power(tmp_path, python=IDLE) == ("skip", "3 % busy, 208 MHz, 4 W: visible only under more load")
    assert low_power(tmp_path) == ("skip", "the GPU is idle, and torch could not keep it busy: exit code 127")


def test_gpu_low_power_with_little_memory_is_skipped(tmp_path: Path) -> None:
    little = {"proc/meminfo": MEMINFO.replace("121900000", "4000000")}
    assert low_power(tmp_path, little, python=STUCK) == (
        "skip",
        "the GPU is idle, and with less than 4 GiB available no load is safe",
    )


def test_gpu_low_power_without_measure_is_not_chosen(tmp_path: Path) -> None:
    node = real_node(tmp_path)
    (low,) = (probe for probe in probes(node) if probe.load)
    assert (low.name, low.level) == ("gpu-low-power", "gpu")
    assert "gpu-low-power" not in {probe.name for probe in checks.chosen(node).probes}
    assert "gpu-low-power" in {probe.name for probe in checks.chosen(node, measure=True).probes}
    assert "gpu-low-power" not in {probe.name for probe in checks.of_no_step(node)}


def test_memory_guard_hint_makes_earlyoom_ignore_swap() -> None:
    """By default it acts when memory and swap are both short, and DGX OS has 16 GB of swap (earlyoom(1), `-s`)."""
    assert "-s 100" in RULES["memory-guard"].hint and "restart earlyoom" in RULES["memory-guard"].hint


def test_hints_never_install_a_driver_package_alone() -> None:
    folder = Path(__file__).parents[2]
    for path in (*folder.glob("knowledge/**/*.yaml"), *folder.glob("docs/*.md"), *folder.glob("sparkinstall/**/*.py")):
        assert not re.search(r"install nvidia-driver", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", sorted(RULES))
def test_rule_fields_are_valid(name: str) -> None:
    rule = RULES[name]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", name)
    assert rule.looks in DETECTORS
    assert rule.verdict in ("warn", "fail")
    assert date(2026, 1, 1) < rule.checked
    assert rule.evidence and all(re.fullmatch(r"https://[^\s]+", each.link) for each in rule.evidence)
    for text in (*(each.seen for each in rule.evidence), rule.title, rule.expected, rule.why, rule.hint, rule.concerns):
        assert text == text.strip() and text


def test_probes_of_all_rules_run_each_program_once(tmp_path: Path) -> None:
    asked: list[str] = []

    class Counting(Recorded):
        def ask(
            self,
            *argv: str,
            timeout: float = 30,
            env: Mapping[str, str] | None = None,
            root: bool = False,
            stdin: str = "",
        ) -> Result:
            asked.append(argv[0])
            return super().ask(*argv, timeout=timeout, env=env, root=root, stdin=stdin)

    reader = Counting(tmp_path, host(tmp_path).on.answers)  # type: ignore[attr-defined]
    # The GPU is busy, so no load is added.
    found: list[Finding] = [probe.look(reader) for probe in probes(real_node(tmp_path, "head"))]
    assert len(found) == len(RULES)
    # One journal for each boot, one ping for each half; why the clock is low is a question of its own.
    wanted = ["fwupdmgr", "journalctl", "journalctl", "ninja", "nvcc", "nvidia-smi", "nvidia-smi", "ping", "ping"]
    assert sorted(asked) == [*wanted, "systemctl"]


def real_node(root: Path, role: str = "single", workers: Sequence[str] = ()) -> Node:
    settings = {"cluster__workers": list(workers)} if workers else {}
    return replace(node_of(root, role, **settings), rehearsal=False, home="/home/spark")


def test_probes_of_a_rehearsal_are_none(tmp_path: Path) -> None:
    assert list(probes(node_of(tmp_path))) == []


def test_known_hosts_are_chosen_and_skipped_by_one_name(tmp_path: Path) -> None:
    node = real_node(tmp_path, "head")
    assert {probe.name for probe in checks.chosen(node, only=["known-hosts"], measure=True).probes} == set(RULES)
    assert checks.chosen(node, only=["known-hosts"]).steps == ()
    assert not {probe.name for probe in checks.chosen(node, skip=["known-hosts"]).probes} & set(RULES)
    assert {probe.name for probe in checks.chosen(node, only=["gpu-xid"]).probes} == {"gpu-xid"}
    assert {probe.name for probe in checks.chosen(node, level="node").probes} >= set(RULES) - {
        "gpu-low-power",
        "round-trip",
    }
    assert not {probe.name for probe in checks.chosen(node, level="static").probes} & set(RULES)
    assert "known-hosts" not in {step.name for step in catalogue.STEPS}


def test_checks_page_has_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs/checks.md").read_text().split("## Known-bad hosts\n")[1].split("\n## ")[0]
    for rule in RULES.values():
        links = "; ".join(f"[{each.seen}]({each.link})" for each in rule.evidence)
        cells = (f"`{rule.name}`", rule.title, rule.verdict, rule.concerns, str(rule.checked), links)
        assert f"| {' | '.join(cells)} |\n" in page + "\n"
    assert page.count("\n| `") == len(RULES)


def test_jit_compilers_are_found_by_the_path_of_the_env_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real programs: those that only this terminal finds are no help to a service."""
    for folder in ("of-the-terminal", "of-the-service"):
        for name, said in (("ninja", "1.13.0"), ("nvcc", "Cuda compilation tools, release 13.0, V13.0.88")):
            program = tmp_path / folder / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/bin/sh\necho '{said}'\n")
            program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/of-the-terminal:{os.environ['PATH']}")
    node = real_node(tmp_path)
    env_file = tmp_path / node.env_file.lstrip("/")
    env_file.parent.mkdir(parents=True)
    env_file.write_text(f"PATH={tmp_path}/of-the-service:{tmp_path}/nothing\n")
    assert judged(RULES["jit-compilers"], Host(LocalReader(str(tmp_path)), node)).found == "ninja 1.13.0, nvcc 13.0"
    (tmp_path / "of-the-service/ninja").unlink()
    found = judged(RULES["jit-compilers"], Host(LocalReader(str(tmp_path)), node))
    assert (found.verdict, found.found.partition(";")[0]) == ("warn", "ninja is not there")


def test_free_blocks_of_this_machine_are_its_free_memory() -> None:
    """The kernel's own files: the blocks of /proc/buddyinfo make up the free pages of /proc/zoneinfo.

    MemFree also counts memory that a virtual machine's kernel has not prepared yet.
    """
    blocks = free_blocks(LocalReader())
    free = sum(map(int, re.findall(r"^ +nr_free_pages (\d+)$", Path("/proc/zoneinfo").read_text(), re.MULTILINE)))
    assert 0.5 * free < sum(blocks.values()) / min(blocks) < 1.5 * free
    assert min(blocks) in (4, 16, 64)
