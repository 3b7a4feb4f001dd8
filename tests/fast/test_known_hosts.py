"""Every rule of known-bad hosts on a host that it is about, and on a good one.

What a bad host shows was taken from where the rule's evidence is (the threads are named beside each); the files are put
beneath a folder, and what programs answer is given as it was posted.
"""

import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from types import MappingProxyType

import pytest
from msgspec.structs import replace

from sparkinstall.core import catalogue, checks
from sparkinstall.node import Node
from sparkinstall.probes import Finding
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
# MiaAI-Lab/DeepSeek-v4-Flash-DSpark-2x-DGX-Spark #259: 919 MiB of CmaFree with a CmaTotal of 0.
STRANDED = MEMINFO + "CmaTotal:              0 kB\nCmaFree:          940604 kB\n"
# NVIDIA/open-gpu-kernel-modules #1151, without the GPU's id.
XID_79 = "NVRM: Xid (PCI:0000:2b:00): 79, GPU has fallen off the bus."
# stas00/ml-engineering, on debugging NVIDIA GPUs: a repair that is only noted, not one that failed.
XID_63 = "NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: New row marked for remapping, reset gpu to activate."
# vllm-project/vllm #56824, byte for byte on good starts too.
NO_MEMORY = (
    "NVRM: nvCheckOkFailedNoLog: Check failed: Out of memory [NV_ERR_NO_MEMORY] (0x00000051) "
    "returned from _memdescAllocInternal(pMemDesc) @ mem_desc.c:1359"
)
# MiaAI-Lab/DeepSeek-v4-Flash-DSpark-2x-DGX-Spark #146 begins so; the rest is the kernel's own form (pcie/aer.c).
AER_FATAL = "pcieport 0000:00:00.0: AER: Uncorrectable (Fatal) error message received from 0000:00:00.0"
AER_SMALL = "pcieport 0002:00:00.0: AER: Correctable error message received from 0002:01:00.0"
# As mlx5_core writes it (events.c); the first stands where a link carries 13 Gb/s, the second on good links too
# (NVIDIA/dgx-spark-playbooks #108).
NO_BUDGET = "mlx5_core 0000:01:00.0: mlx5_pcie_event:322:(pid 412): PCIe slot power capability was not advertised."
ONLY_27_W = "mlx5_core 0000:01:00.0: mlx5_pcie_event:326:(pid 412): Detected insufficient power on the PCIe slot (27W)."
# tobias-weiss.org, on memory in a cluster of two Sparks.
OOM = "VLLM::Worker_TP invoked oom-killer: gfp_mask=0x102cc2(GFP_HIGHUSER), order=0, oom_score_adj=500"


class Recorded(LocalReader):
    """A folder that stands for a node, whose programs answer what was recorded."""

    def __init__(self, root: Path, answers: Mapping[str, str]) -> None:
        super().__init__(str(root))
        self.answers = answers

    def ask(self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False) -> Result:
        del timeout, env, root
        said = self.answers.get(Path(argv[0]).name)
        return Result(argv, 0 if said is not None else 127, said or "", "")


def host(root: Path, files: Mapping[str, str] = MappingProxyType({}), role: str = "single", **answers: str) -> Host:
    good = {"proc/meminfo": MEMINFO, "proc/sys/kernel/osrelease": "6.17.0-1032-nvidia\n"}
    for name, text in {**good, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    said = {
        "journalctl": KERNEL_GOOD,
        "nvidia-smi": "NVIDIA GB10, 580.173.02, 96, 2405, 61.20\n",
        "systemctl": "active\ninactive\ninactive\n",
    }
    reader = Recorded(root, {**said, **{name.replace("_", "-"): text for name, text in answers.items()}})
    return Host(reader, real_node(root, role))


def connectx(speed: str, lanes: str = "4", vendor: str = "0x15b3") -> dict[str, str]:
    files: dict[str, str] = {"sys/class/infiniband/rocep1s0f0/fw_ver": "28.45.4028\n"}
    for name, gts in (("enp1s0f0np0", "32.0 GT/s PCIe"), ("enP2p1s0f0np0", speed)):
        device = f"sys/class/net/{name}/device"
        files |= {f"{device}/vendor": f"{vendor}\n", f"{device}/current_link_speed": f"{gts}\n"}
        files[f"{device}/current_link_width"] = f"{lanes}\n"
    return files


PYTHON = {"opt/sparkinstall/venv/bin/python": ""}
HOTPLUG = {"etc/nvidia/cx7-hotplug-enabled": ""}
IDLE = "NVIDIA GB10, 580.173.02, 3, 208, 4.33\n"
STUCK = "NVIDIA GB10, 580.173.02, 96, 1377, 20.31\n"
# name: what makes the host bad, what of that is told, and what looks like it and is good.
BAD: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "stranded-memory": ({"proc/meminfo": STRANDED}, {}, "CmaFree 0.90 GiB, CmaTotal 0.00 GiB, kernel 6.17.0"),
    "gpu-xid": (
        {},
        {"journalctl": f"{KERNEL_GOOD}{XID_79}\n"},
        "once: NVRM: Xid (PCI:0000:2b:00): 79, GPU has fallen off the bus: 48 is",
    ),
    "pcie-fatal": ({}, {"journalctl": f"{KERNEL_GOOD}{AER_FATAL}\n"}, "once: pcieport 0000:00:00.0"),
    "driver-no-memory": ({}, {"journalctl": f"{NO_MEMORY}\n" * 23}, "23 times, the last: NVRM"),
    "oom-killer": ({}, {"journalctl": f"{KERNEL_GOOD}{OOM}\n"}, "once: VLLM::Worker_TP"),
    "gpu-low-power": ({}, {"nvidia_smi": STUCK}, "96 % busy, 1377 MHz, 20 W"),
    "gpu-driver": ({}, {"nvidia_smi": "NVIDIA GB10, 595.84, 0, 208, 4.10\n"}, "595.84"),
    "connectx-pcie": (connectx("16.0 GT/s PCIe"), {}, "enP2p1s0f0np0 16 GT/s x4; firmware 28.45.4028"),
    "connectx-hotplug": (HOTPLUG, {"role": "head"}, "/etc/nvidia/cx7-hotplug-enabled is there: DGX OS"),
    "connectx-power": (
        {},
        {"journalctl": f"{KERNEL_GOOD}{NO_BUDGET}\n{ONLY_27_W}\n"},
        "once: mlx5_core 0000:01:00.0: mlx5_pcie_event:322:(pid 412): PCIe slot power",
    ),
    "memory-guard": (
        {},
        {"systemctl": "inactive\ninactive\ninactive\n"},
        "not running: earlyoom.service, nohang.service",
    ),
}
GOOD: list[tuple[str, dict[str, str], dict[str, str]]] = [
    # A kernel that has set some memory apart for good, and gives all of it back.
    ("stranded-memory", {"proc/meminfo": MEMINFO + "CmaTotal: 940604 kB\nCmaFree: 940604 kB\n"}, {}),
    # NVIDIA/NV-Kernels #590: kho=off.
    ("stranded-memory", {"proc/meminfo": MEMINFO + "CmaTotal: 0 kB\nCmaFree: 0 kB\n"}, {}),
    ("gpu-xid", {}, {"journalctl": f"{KERNEL_GOOD}{XID_63}\n"}),
    ("pcie-fatal", {}, {"journalctl": f"{KERNEL_GOOD}{AER_SMALL}\n"}),
    # At rest the clock is low, and means nothing: under the load that it is given it is high.
    ("gpu-low-power", PYTHON, {"nvidia_smi": IDLE, "python": "NVIDIA GB10, 580.173.02, 97, 2405, 61.20\n"}),
    # A GPU of another kind has other clocks.
    ("gpu-low-power", {}, {"nvidia_smi": "NVIDIA GB100, 580.65.06, 99, 1200, 25.00\n"}),
    ("connectx-pcie", connectx("32.0 GT/s PCIe"), {}),
    ("connectx-pcie", connectx("2.5 GT/s PCIe", vendor="0x10ec"), {}),
    # One node alone needs no link; and where the feature was switched off, the file has another name.
    ("connectx-hotplug", HOTPLUG, {}),
    ("connectx-hotplug", {"etc/nvidia/cx7-hotplug-disabled": ""}, {"role": "worker"}),
    ("connectx-power", {}, {"journalctl": f"{KERNEL_GOOD}{ONLY_27_W}\n"}),
    ("memory-guard", {}, {"systemctl": "inactive\nactive\ninactive\n"}),
]


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_bad_host_is_told(name: str, tmp_path: Path) -> None:
    files, answers, words = BAD[name]
    found = judged(RULES[name], host(tmp_path, files, **answers))
    assert found.verdict == RULES[name].verdict
    assert found.found.startswith(words)
    assert RULES[name].why in found.found
    assert found.hint.startswith(RULES[name].hint[:20])
    assert "https://" in found.hint


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_good_host_is_let_alone(name: str, tmp_path: Path) -> None:
    found = judged(RULES[name], host(tmp_path))
    assert (found.verdict, found.hint) == ("pass", ""), found


@pytest.mark.parametrize(("name", "files", "answers"), GOOD)
def test_what_only_looks_bad_is_let_alone(
    name: str, files: dict[str, str], answers: dict[str, str], tmp_path: Path
) -> None:
    assert judged(RULES[name], host(tmp_path, files, **answers)).verdict == "pass"


def test_every_rule_has_a_bad_host_here() -> None:
    assert set(BAD) == set(RULES)


@pytest.mark.parametrize(
    ("name", "answers", "why"),
    [
        ("gpu-xid", {"journalctl": ""}, "the kernel's journal"),
        ("gpu-driver", {"nvidia_smi": ""}, "nvidia-smi gives no answer"),
        ("gpu-low-power", {"nvidia_smi": "NVIDIA GB10, 580.95.05, [N/A], 2405, [N/A]\n"}, "nvidia-smi does not tell"),
        ("gpu-low-power", {"nvidia_smi": IDLE}, "the GPU is idle, and there is no torch yet"),
        ("memory-guard", {"systemctl": ""}, "systemd gives no answer"),
    ],
)
def test_what_a_node_cannot_tell_is_skipped_with_the_reason(
    name: str, answers: dict[str, str], why: str, tmp_path: Path
) -> None:
    found = judged(RULES[name], host(tmp_path, {}, **answers))
    assert found.verdict == "skip"
    assert why in found.found


def low_power(root: Path, files: Mapping[str, str] = MappingProxyType({}), **answers: str) -> tuple[str, str]:
    found = judged(RULES["gpu-low-power"], host(root, {**PYTHON, **files}, **{"nvidia_smi": IDLE, **answers}))
    return found.verdict, found.found


def test_an_idle_gpu_is_judged_under_a_load_and_never_without(tmp_path: Path) -> None:
    assert low_power(tmp_path, python=STUCK)[0] == "fail"
    assert low_power(tmp_path, python=STUCK)[1].startswith("96 % busy, 1377 MHz, 20 W")
    assert low_power(tmp_path, python=IDLE) == ("skip", "3 % busy, 208 MHz, 4 W: it shows only under more load")
    assert low_power(tmp_path) == ("skip", "the GPU is idle, and torch could not keep it busy: exit code 127")


def test_no_load_is_put_on_a_node_with_little_memory(tmp_path: Path) -> None:
    little = {"proc/meminfo": MEMINFO.replace("121900000", "4000000")}
    assert low_power(tmp_path, little, python=STUCK) == (
        "skip",
        "the GPU is idle, and with less than 4 GiB available no load is safe",
    )


def test_what_keeps_the_gpu_busy_is_asked_only_with_measure(tmp_path: Path) -> None:
    node = real_node(tmp_path)
    (low,) = (probe for probe in probes(node) if probe.load)
    assert (low.name, low.level) == ("gpu-low-power", "gpu")
    assert "gpu-low-power" not in {probe.name for probe in checks.chosen(node).probes}
    assert "gpu-low-power" in {probe.name for probe in checks.chosen(node, measure=True).probes}
    assert "gpu-low-power" not in {probe.name for probe in checks.of_no_step(node)}


def test_one_node_alone_is_told_why_a_card_that_may_switch_itself_off_is_no_matter(tmp_path: Path) -> None:
    found = judged(RULES["connectx-hotplug"], host(tmp_path, HOTPLUG))
    assert found.found == "/etc/nvidia/cx7-hotplug-enabled is there, and one node alone needs no link"


def test_a_card_that_is_not_to_be_seen_is_told_as_switched_off_or_missing(tmp_path: Path) -> None:
    rule = RULES["connectx-pcie"]
    assert judged(rule, host(tmp_path)).found == "no ConnectX is on the bus"
    off = "the ConnectX-7 is switched off to save power until a cable is in and the other node is on"
    assert judged(rule, host(tmp_path, HOTPLUG)).found == off


def test_earlyoom_is_told_to_look_at_memory_alone() -> None:
    """Left to itself it acts when memory and swap are both short, and DGX OS has 16 GB of swap (earlyoom(1), `-s`)."""
    assert "-s 100" in RULES["memory-guard"].hint and "restart earlyoom" in RULES["memory-guard"].hint


def test_no_driver_package_is_to_be_installed_by_itself() -> None:
    folder = Path(__file__).parents[2]
    for path in (*folder.glob("knowledge/**/*.yaml"), *folder.glob("docs/*.md"), *folder.glob("sparkinstall/**/*.py")):
        assert not re.search(r"install nvidia-driver", path.read_text(encoding="utf-8")), path


def test_that_the_page_cache_is_memory_in_use_is_no_rule() -> None:
    """vLLM counts it as available where GPU and CPU share one memory (vllm/utils/mem_utils.py)."""
    assert "page-cache" not in RULES


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_is_whole(name: str) -> None:
    rule = RULES[name]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", name)
    assert rule.looks in DETECTORS
    assert rule.verdict in ("warn", "fail")
    assert date(2026, 1, 1) < rule.checked
    assert rule.evidence and all(re.fullmatch(r"https://[^\s]+", link) for link in rule.evidence)
    for text in (rule.title, rule.expected, rule.why, rule.hint, rule.concerns):
        assert text == text.strip() and text
    if "pattern" in rule.limits:
        re.compile(rule.limits["pattern"])


def test_several_rules_ask_each_program_once(tmp_path: Path) -> None:
    asked: list[str] = []

    class Counting(Recorded):
        def ask(
            self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False
        ) -> Result:
            asked.append(argv[0])
            return super().ask(*argv, timeout=timeout, env=env, root=root)

    reader = Counting(tmp_path, host(tmp_path).on.answers)  # type: ignore[attr-defined]
    # The GPU is busy: no load is put on it.
    found: list[Finding] = [probe.look(reader) for probe in probes(real_node(tmp_path))]
    assert len(found) == len(RULES)
    assert sorted(asked) == ["journalctl", "nvidia-smi", "systemctl"]


def real_node(root: Path, role: str = "single") -> Node:
    return replace(node_of(root, role), rehearsal=False)


def test_a_rehearsal_has_no_rules_about_the_machine_around_it(tmp_path: Path) -> None:
    assert list(probes(node_of(tmp_path))) == []


def test_they_can_be_chosen_and_left_out_as_one(tmp_path: Path) -> None:
    node = real_node(tmp_path)
    assert {probe.name for probe in checks.chosen(node, only=["known-hosts"], measure=True).probes} == set(RULES)
    assert checks.chosen(node, only=["known-hosts"]).steps == ()
    assert not {probe.name for probe in checks.chosen(node, skip=["known-hosts"]).probes} & set(RULES)
    assert {probe.name for probe in checks.chosen(node, only=["gpu-xid"]).probes} == {"gpu-xid"}
    assert {probe.name for probe in checks.chosen(node, level="node").probes} >= set(RULES) - {"gpu-low-power"}
    assert not {probe.name for probe in checks.chosen(node, level="static").probes} & set(RULES)
    assert "known-hosts" not in {step.name for step in catalogue.STEPS}


def test_the_page_says_what_the_rules_say() -> None:
    page = (Path(__file__).parents[2] / "docs/checks.md").read_text().split("## Known-bad hosts\n")[1].split("\n## ")[0]
    for rule in RULES.values():
        links = ", ".join(f"[{number}]({link})" for number, link in enumerate(rule.evidence, 1))
        cells = (f"`{rule.name}`", rule.title, rule.verdict, rule.concerns, str(rule.checked), links)
        assert f"| {' | '.join(cells)} |\n" in page + "\n"
    assert page.count("\n| `") == len(RULES)
