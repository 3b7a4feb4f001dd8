"""Detect hosts known to be bad: rules are data (`knowledge/hosts.yaml`) that name one of these detectors."""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from functools import cached_property, lru_cache
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import payloads, schema
from sparkinstall.assets import asset
from sparkinstall.facts import card, gpu, machine, qsfp
from sparkinstall.facts.gpu import Gpu
from sparkinstall.facts.sysfs import NET, is_connectx, text_of
from sparkinstall.facts.units import journal
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, passed, skipped
from sparkinstall.system import Reader

KNOWLEDGE = "knowledge/hosts.yaml"
# The end of a boot's journal is enough: a card that floods it repeats the same message.
_LINES = 20000
_GIB_KB = 2**20
# torch and a CUDA context need part of the memory that all programs share.
_ROOM_KB = 4 * _GIB_KB


class Rule(Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of bad host. `looks` names the detector, `limits` are its arguments; `checked`: when the evidence was
    read; `load`: the detector keeps the GPU busy."""

    name: str
    title: str
    looks: str
    limits: Any
    verdict: Literal["warn", "fail"]
    expected: str
    why: str
    impact: str
    hint: str
    concerns: str
    checked: date
    evidence: tuple[str, ...]
    load: bool = False

    def __post_init__(self) -> None:
        if self.looks not in DETECTORS:
            raise ValueError(f"looks names no detector: use {schema.either(tuple(DETECTORS))}")


class Observation(Struct, frozen=True):
    """The result of a detector; `bad`: the rule matches."""

    bad: bool
    words: str


class CannotTell(Exception):
    """The detector cannot decide on this node, and why."""


class Host(Struct, frozen=True, dict=True):
    """Facts that several rules use, each read once."""

    on: Reader
    node: Node

    @cached_property
    def meminfo(self) -> Mapping[str, int]:
        """`/proc/meminfo` in kB."""
        return machine.parse_meminfo(self.on.read("/proc/meminfo") or b"")

    @cached_property
    def kernel(self) -> str:
        return text_of(self.on, "/proc/sys/kernel/osrelease")

    @cached_property
    def journal(self) -> tuple[str, ...]:
        """The kernel's log since the boot; empty if unreadable."""
        return tuple(journal(self.on, "-k", "-b", "-o", "cat", "-n", str(_LINES)).splitlines())

    @cached_property
    def gpu(self) -> Gpu | None:
        """The first GPU; None if nvidia-smi fails."""
        return gpu.understood(self.on.ask(*gpu.QUERY))

    def gpu_under_load(self) -> Gpu:
        """The first GPU while the environment's torch keeps it busy for about four seconds.

        Raises:
            CannotTell: torch is missing, memory is short, or the load failed.
        """
        python = self.node.python
        if self.on.entry(python) is None:
            raise CannotTell("the GPU is idle, and torch is not installed to keep it busy: `sparkinstall all`")
        if self.meminfo.get("MemAvailable", 0) < _ROOM_KB:
            raise CannotTell(f"the GPU is idle, and with less than {_ROOM_KB // _GIB_KB} GiB available no load is safe")
        command = (self.on.real(python), "-c", payloads.source("gpu_load"), *gpu.QUERY)
        answer = self.on.ask(*command, timeout=60, env=self.node.bare_environment)
        if found := gpu.understood(answer):
            return found
        why = answer.last_line[:200] or f"exit code {answer.code}"
        raise CannotTell(f"the GPU is idle, and torch could not keep it busy: {why}")


class CmaLimits(Struct, frozen=True, forbid_unknown_fields=True):
    cma_free_kb: int


class KernelLogLimits(Struct, frozen=True, forbid_unknown_fields=True):
    pattern: re.Pattern[str]
    times: int


class PowerLimits(Struct, frozen=True, forbid_unknown_fields=True):
    busy_percent: int
    sm_mhz: int
    watts: int


class DriverLimits(Struct, frozen=True, forbid_unknown_fields=True):
    major: str


class BusLimits(Struct, frozen=True, forbid_unknown_fields=True):
    gts: int
    lanes: int


class ServiceLimits(Struct, frozen=True, forbid_unknown_fields=True):
    units: tuple[str, ...]


class FileLimits(Struct, frozen=True, forbid_unknown_fields=True):
    path: str


class Detector(Struct, frozen=True):
    """A detector: the type of a rule's `limits`, and the function that checks them."""

    limits: type[Any]
    look: Callable[[Host, Any], Observation]


def probes(node: Node) -> Iterable[Probe]:
    """Yield one probe per rule. They concern the machine, so a rehearsal has none."""
    if node.rehearsal:
        return
    hosts: dict[int, Host] = {}

    def judge(rule: Rule) -> Callable[[Reader], Finding]:
        return lambda on: judged(rule, hosts.setdefault(id(on), Host(on, node)))

    for rule in rules():
        yield Probe(rule.name, rule.title, judge(rule), "gpu" if rule.load else "node", rule.impact, load=rule.load)


def judged(rule: Rule, host: Host) -> Finding:
    try:
        sight = DETECTORS[rule.looks].look(host, rule.limits)
    except CannotTell as why:
        return skipped(str(why))
    if not sight.bad:
        return passed(sight.words, rule.expected)
    return Finding(rule.verdict, f"{sight.words}: {rule.why}", rule.expected, f"{rule.hint} ({rule.evidence[0]})")


@lru_cache(maxsize=1)
def rules() -> tuple[Rule, ...]:
    """Return the shipped rules, in order."""
    found = schema.read_file(tuple[Rule, ...], asset(KNOWLEDGE))
    return tuple(replace(each, limits=_limits(each)) for each in found)


def _limits(rule: Rule) -> Any:
    return schema.read(DETECTORS[rule.looks].limits, rule.limits, f"{KNOWLEDGE}, {rule.name}", at="limits")


def _stranded_memory(host: Host, limits: CmaLimits) -> Observation:
    free, total = host.meminfo.get("CmaFree"), host.meminfo.get("CmaTotal")
    if not host.meminfo:
        raise CannotTell("there is no /proc/meminfo")
    if free is None or total is None:
        return Observation(False, f"kernel {host.kernel} has no such memory (CMA)")
    words = f"CmaFree {free / _GIB_KB:.2f} GiB, CmaTotal {total / _GIB_KB:.2f} GiB, kernel {host.kernel}"
    return Observation(free - total >= limits.cma_free_kb, words)


def _kernel_log(host: Host, limits: KernelLogLimits) -> Observation:
    if not host.journal:
        raise CannotTell("the kernel's journal of this boot is empty or readable only by root (`sudo -v` first)")
    met = [line for line in host.journal if limits.pattern.search(line)]
    if len(met) < limits.times:
        return Observation(False, "none")
    times = "once" if len(met) == 1 else f"{len(met)} times, the last"
    return Observation(True, f"{times}: {met[-1].strip()[:160].rstrip('.')}")


def _low_power(host: Host, limits: PowerLimits) -> Observation:
    found = _gpu(host)
    if not machine.is_gb10(found.name):
        return Observation(False, f"known for a GB10 only; this is {found.name}")
    busy, mhz, watts = _work(found)
    if busy <= limits.busy_percent:
        busy, mhz, watts = _work(host.gpu_under_load())
    words = f"{busy:.0f} % busy, {mhz:.0f} MHz, {watts:.0f} W"
    if busy <= limits.busy_percent:
        raise CannotTell(f"{words}: visible only under more load")
    return Observation(mhz < limits.sm_mhz and watts < limits.watts, words)


def _work(of: Gpu) -> tuple[float, float, float]:
    """Return the GPU's utilization in percent, clock in MHz, and power in W."""
    if of.busy is None or of.mhz is None or of.watts is None:
        raise CannotTell("nvidia-smi does not report the GPU's utilization, clock, or power")
    return of.busy, of.mhz, of.watts


def _driver(host: Host, limits: DriverLimits) -> Observation:
    driver = _gpu(host).driver
    return Observation(driver.split(".")[0] != limits.major, driver)


def _gpu(host: Host) -> Gpu:
    if host.gpu is None:
        raise CannotTell("nvidia-smi does not answer")
    return host.gpu


def _connectx(host: Host, limits: BusLimits) -> Observation:
    found = {name: card.lanes(host.on, name) for name in host.on.names(NET) if is_connectx(host.on, name)}
    if not found:
        off = qsfp.switched_off(host.on)
        return Observation(False, f"the ConnectX-7 is {qsfp.SWITCHED_OFF}" if off else "no ConnectX is on the bus")
    told = {name: bus for name, bus in found.items() if all(bus)}
    slow = {name: bus for name, bus in told.items() if bus[1] < limits.gts or bus[0] < limits.lanes}
    if not told:
        raise CannotTell("the kernel does not report the speed of the card's PCIe link")
    words = ", ".join(f"{name} {gts:g} GT/s x{lanes}" for name, (lanes, gts) in (slow or told).items())
    versions = ", ".join(card.rdma_firmware(host.on))
    return Observation(bool(slow), words + (f"; firmware {versions}" if versions else ""))


def _service(host: Host, limits: ServiceLimits) -> Observation:
    units = limits.units
    states = host.on.ask("systemctl", "is-active", *units).out.split()
    if len(states) != len(units):
        raise CannotTell("systemd does not answer")
    running = [unit for unit, state in zip(units, states, strict=True) if state == "active"]
    return Observation(not running, ", ".join(running) or f"not running: {', '.join(units)}")


def _file(host: Host, limits: FileLimits) -> Observation:
    """Detect a file that can cost a node its link; a single node has none."""
    path = limits.path
    if host.on.entry(path) is None:
        return Observation(False, f"there is no {path}")
    return Observation(
        host.node.several, f"{path} exists{'' if host.node.several else ', but a single node needs no link'}"
    )


DETECTORS: Mapping[str, Detector] = {
    "stranded_memory": Detector(CmaLimits, _stranded_memory),
    "kernel_log": Detector(KernelLogLimits, _kernel_log),
    "low_power": Detector(PowerLimits, _low_power),
    "driver": Detector(DriverLimits, _driver),
    "connectx": Detector(BusLimits, _connectx),
    "service": Detector(ServiceLimits, _service),
    "file": Detector(FileLimits, _file),
}
