"""Every rule of known-bad hosts, on a bad host and on a good one.

The cases are in tests/cases/known-hosts.yaml. The data of a bad host are from the evidence of the rule (the threads are
named there): its files are written below a folder, and the output of its programs is as posted.
"""

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
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Verdict
from sparkinstall.probes.known_hosts import DETECTORS, Host, judged, probes, rules
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

    def ask(self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False) -> Result:
        del timeout, env, root
        output = self.answers.get(Path(argv[0]).name)
        return Result(argv, 0 if output is not None else 127, output or "", "")


def host(root: Path, files: Mapping[str, str] = MappingProxyType({}), role: str = "single", **answers: str) -> Host:
    good = {"proc/meminfo": MEMINFO, "proc/sys/kernel/osrelease": "6.17.0-1032-nvidia\n"}
    for name, text in {**good, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    good_answers = {
        "journalctl": KERNEL_GOOD,
        "nvidia-smi": "NVIDIA GB10, 12.1, 580.173.02, 96, 2405, 61.20\n",
        "systemctl": "active\ninactive\ninactive\n",
    }
    reader = Recorded(root, {**good_answers, **{name.replace("_", "-"): text for name, text in answers.items()}})
    return Host(reader, real_node(root, role))


class Case(Struct, frozen=True, forbid_unknown_fields=True):
    """A host, and the verdict of a rule on it; the file of the cases describes the fields."""

    rule: str
    why: str
    verdict: Verdict
    found: str = ""
    source: str = ""
    role: str = "single"
    files: Mapping[str, str] = {}
    kernel: Sequence[str] = ()
    programs: Mapping[str, str] = {}


CASES = msgspec.convert(
    yaml.safe_load(Path(__file__).parents[1].joinpath("cases/known-hosts.yaml").read_text()), list[Case]
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}: {case.why}")
def test_rule_on_a_host_gives_its_verdict(case: Case, tmp_path: Path) -> None:
    journal = KERNEL_GOOD + "".join(f"{line}\n" for line in case.kernel)
    found = judged(RULES[case.rule], host(tmp_path, case.files, case.role, **{"journalctl": journal, **case.programs}))
    assert (found.verdict, case.found in found.found) == (case.verdict, True), found
    if case.verdict in ("warn", "fail"):
        assert found.verdict == RULES[case.rule].verdict
        assert RULES[case.rule].why in found.found
        assert found.hint.startswith(RULES[case.rule].hint[:20])
        assert "https://" in found.hint


@pytest.mark.parametrize("name", sorted(RULES))
def test_rule_on_a_node_at_rest_passes(name: str, tmp_path: Path) -> None:
    found = judged(RULES[name], host(tmp_path))
    assert (found.verdict, found.hint) == ("pass", ""), found


def test_cases_have_a_bad_host_for_every_rule() -> None:
    assert {case.rule for case in CASES if case.verdict in ("warn", "fail")} == set(RULES)


PYTHON = {"opt/sparkinstall/venv/bin/python": ""}
IDLE = "NVIDIA GB10, 12.1, 580.173.02, 3, 208, 4.33\n"
STUCK = "NVIDIA GB10, 12.1, 580.173.02, 96, 1377, 20.31\n"


def low_power(root: Path, files: Mapping[str, str] = MappingProxyType({}), **answers: str) -> tuple[str, str]:
    found = judged(RULES["gpu-low-power"], host(root, {**PYTHON, **files}, **{"nvidia_smi": IDLE, **answers}))
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
    assert rule.evidence and all(re.fullmatch(r"https://[^\s]+", link) for link in rule.evidence)
    for text in (rule.title, rule.expected, rule.why, rule.hint, rule.concerns):
        assert text == text.strip() and text


def test_probes_of_all_rules_run_each_program_once(tmp_path: Path) -> None:
    asked: list[str] = []

    class Counting(Recorded):
        def ask(
            self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False
        ) -> Result:
            asked.append(argv[0])
            return super().ask(*argv, timeout=timeout, env=env, root=root)

    reader = Counting(tmp_path, host(tmp_path).on.answers)  # type: ignore[attr-defined]
    # The GPU is busy, so no load is added.
    found: list[Finding] = [probe.look(reader) for probe in probes(real_node(tmp_path))]
    assert len(found) == len(RULES)
    assert sorted(asked) == ["journalctl", "nvidia-smi", "systemctl"]


def real_node(root: Path, role: str = "single") -> Node:
    return replace(node_of(root, role), rehearsal=False)


def test_probes_of_a_rehearsal_are_none(tmp_path: Path) -> None:
    assert list(probes(node_of(tmp_path))) == []


def test_known_hosts_are_chosen_and_skipped_by_one_name(tmp_path: Path) -> None:
    node = real_node(tmp_path)
    assert {probe.name for probe in checks.chosen(node, only=["known-hosts"], measure=True).probes} == set(RULES)
    assert checks.chosen(node, only=["known-hosts"]).steps == ()
    assert not {probe.name for probe in checks.chosen(node, skip=["known-hosts"]).probes} & set(RULES)
    assert {probe.name for probe in checks.chosen(node, only=["gpu-xid"]).probes} == {"gpu-xid"}
    assert {probe.name for probe in checks.chosen(node, level="node").probes} >= set(RULES) - {"gpu-low-power"}
    assert not {probe.name for probe in checks.chosen(node, level="static").probes} & set(RULES)
    assert "known-hosts" not in {step.name for step in catalogue.STEPS}


def test_checks_page_has_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs/checks.md").read_text().split("## Known-bad hosts\n")[1].split("\n## ")[0]
    for rule in RULES.values():
        links = ", ".join(f"[{number}]({link})" for number, link in enumerate(rule.evidence, 1))
        cells = (f"`{rule.name}`", rule.title, rule.verdict, rule.concerns, str(rule.checked), links)
        assert f"| {' | '.join(cells)} |\n" in page + "\n"
    assert page.count("\n| `") == len(RULES)
