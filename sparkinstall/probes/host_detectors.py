"""The detectors that rules of `knowledge/hosts.yaml` name in `looks`: each looks at one kind of evidence on a host."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from msgspec import Struct

from sparkinstall import payloads
from sparkinstall.facts import card, firmware, gpu, machine, network, qsfp
from sparkinstall.facts.env_file import assignments
from sparkinstall.facts.gpu import Gpu
from sparkinstall.facts.sysfs import NET, RDMA, is_connectx, text_of
from sparkinstall.facts.units import journal
from sparkinstall.node import Node
from sparkinstall.probes import Level
from sparkinstall.system import Reader, Result

# The end of a boot's journal is enough: a card that floods it repeats the same message.
_LINES = 20000
_KIB_PER_MIB, _KIB_PER_GIB = 2**10, 2**20
# torch and a CUDA context need part of the memory that all programs share.
_ROOM_KB = 4 * _KIB_PER_GIB
_VERSION = re.compile(r"\d+(?:\.\d+)+")


class Observation(Struct, frozen=True):
    """The result of a detector. `bad`: the rule matches. `past`: only in the previous boot, so it is a warning."""

    bad: bool
    words: str
    past: bool = False


class CannotTell(Exception):
    """The detector cannot decide on this node, and why."""


class Host(Struct, frozen=True, dict=True):
    """Facts that several rules use, each read once. `may_load`: an idle GPU may be kept busy to judge it."""

    on: Reader
    node: Node
    may_load: bool = True

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
        return self._journal("-b")

    @cached_property
    def previous_journal(self) -> tuple[str, ...]:
        """The kernel's log of the previous boot; empty if the journal does not have it."""
        return self._journal("--boot=-1")

    def _journal(self, boot: str) -> tuple[str, ...]:
        return tuple(journal(self.on, "-k", boot, "-o", "cat", "-n", str(_LINES)).splitlines())

    @cached_property
    def gpu_answer(self) -> Result:
        return self.on.ask(*gpu.QUERY)

    @cached_property
    def gpu(self) -> Gpu | None:
        """The first GPU; None if nvidia-smi fails."""
        return gpu.understood(self.gpu_answer)

    def gpu_under_load(self) -> Gpu:
        """The first GPU while the environment's torch keeps it busy for about four seconds.

        Raises:
            CannotTell: torch is missing, memory is short, no load is wanted, or the load failed.
        """
        if not self.may_load:
            raise CannotTell("the GPU has little to do, and only one that is busy shows it")
        python = self.node.python
        if self.on.entry(python) is None:
            raise CannotTell("the GPU is idle, and torch is not installed to keep it busy: `sparkinstall all`")
        if self.meminfo.get("MemAvailable", 0) < _ROOM_KB:
            room = _ROOM_KB // _KIB_PER_GIB
            raise CannotTell(f"the GPU is idle, and with less than {room} GiB available no load is safe")
        command = (self.on.real(python), "-c", payloads.source("gpu_load"), *gpu.QUERY)
        answer = self.on.ask(*command, timeout=60, env=self.node.bare_environment)
        if found := gpu.understood(answer):
            return found
        why = answer.last_line[:200] or f"exit code {answer.code}"
        raise CannotTell(f"the GPU is idle, and torch could not keep it busy: {why}")


class CmaLimits(Struct, frozen=True, forbid_unknown_fields=True):
    cma_free_kb: int


class BootOptionLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """`kernel`: the releases that need `option`, unless they were configured without `config`."""

    kernel: re.Pattern[str]
    option: str
    config: str


class KernelLogLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """`previous`: look at the previous boot too."""

    pattern: re.Pattern[str]
    times: int
    previous: bool = False


class FragmentLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """Judge a host with `free_percent` of its memory free: `block_percent` of that is in blocks of `block_mib`."""

    block_mib: int
    block_percent: int
    free_percent: int


class PressureLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """`full_percent` of the last five minutes in which every task that could run waited for memory."""

    full_percent: float


class PowerLimits(Struct, frozen=True, forbid_unknown_fields=True):
    busy_percent: int
    sm_mhz: int
    watts: int


class SlowdownLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """`reasons`: what nvidia-smi calls them, after `clocks_event_reasons.`"""

    reasons: tuple[str, ...]


class DriverLimits(Struct, frozen=True, forbid_unknown_fields=True):
    major: str


class MismatchLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """`pattern`: what nvidia-smi says; `libraries`: links whose targets end in the version of the installed driver."""

    pattern: re.Pattern[str]
    libraries: tuple[str, ...]


class FirmwareLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """`uefi`: the first good version; `numbering`: how a UEFI that counts likewise writes its version."""

    uefi: str
    numbering: re.Pattern[str]


class BusLimits(Struct, frozen=True, forbid_unknown_fields=True):
    gts: int
    lanes: int


class DownLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """So many times since the boot, of one half of a port."""

    times: int


class RoundTripLimits(Struct, frozen=True, forbid_unknown_fields=True):
    milliseconds: float
    pings: int


class ServiceLimits(Struct, frozen=True, forbid_unknown_fields=True):
    units: tuple[str, ...]


class ServicePathLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """The oldest good version of each program."""

    programs: Mapping[str, str]


class FileLimits(Struct, frozen=True, forbid_unknown_fields=True):
    path: str


class SettingsFileLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """`paths`: the first part may be `~`."""

    paths: tuple[str, ...]


class Detector(Struct, frozen=True):
    """A detector: the type of a rule's `limits`, the function that checks them, and the level of its probe."""

    limits: type[Any]
    look: Callable[[Host, Any], Observation]
    level: Level = "node"


# --- memory and kernel


def _stranded_memory(host: Host, limits: CmaLimits) -> Observation:
    free, total = host.meminfo.get("CmaFree"), host.meminfo.get("CmaTotal")
    if not host.meminfo:
        raise CannotTell("there is no /proc/meminfo")
    if free is None or total is None:
        return Observation(False, f"kernel {host.kernel} has no such memory (CMA)")
    words = f"CmaFree {free / _KIB_PER_GIB:.2f} GiB, CmaTotal {total / _KIB_PER_GIB:.2f} GiB, kernel {host.kernel}"
    return Observation(free - total >= limits.cma_free_kb, words)


def _boot_option(host: Host, limits: BootOptionLimits) -> Observation:
    release = ", ".join(filter(None, (f"kernel {host.kernel}", machine.os_version(host.on))))
    if not limits.kernel.fullmatch(host.kernel):
        return Observation(False, f"{release}: needs no {limits.option}")
    given = machine.boot_option(host.on, limits.option.partition("=")[0])
    if given == limits.option:
        return Observation(False, f"{release}: started with {given}")
    config = host.on.read(f"/boot/config-{host.kernel}") or b""
    if not given and f"# {limits.config} is not set" in config.decode(errors="replace").splitlines():
        return Observation(False, f"{release}: off unless asked for")
    return Observation(True, f"{release}: started {f'with {given}' if given else f'without {limits.option}'}")


def _kernel_log(host: Host, limits: KernelLogLimits) -> Observation:
    if not host.journal:
        raise CannotTell("the kernel's journal of this boot is empty or readable only by root (`sudo -v` first)")
    if met := _met(host.journal, limits):
        return Observation(True, _told(met))
    if limits.previous and (met := _met(host.previous_journal, limits)):
        return Observation(True, f"in the previous boot, {_told(met)}", past=True)
    return Observation(False, "none")


def _met(lines: Sequence[str], limits: KernelLogLimits) -> list[str]:
    met = [line for line in lines if limits.pattern.search(line)]
    return met if len(met) >= limits.times else []


def _told(met: Sequence[str]) -> str:
    times = "once" if len(met) == 1 else f"{len(met)} times, the last"
    return f"{times}: {met[-1].strip()[:160].rstrip('.')}"


def _fragments(host: Host, limits: FragmentLimits) -> Observation:
    blocks = machine.free_blocks(host.on)
    if not blocks:
        raise CannotTell("the kernel does not report the sizes of its free blocks of memory")
    free, total = sum(blocks.values()), host.meminfo.get("MemTotal", 0)
    large = sum(kib for size, kib in blocks.items() if size >= limits.block_mib * _KIB_PER_MIB)
    words = (
        f"{large / _KIB_PER_GIB:.1f} of {free / _KIB_PER_GIB:.1f} GiB free in blocks of {limits.block_mib} MiB or more"
    )
    if max(blocks) < limits.block_mib * _KIB_PER_MIB:
        return Observation(False, f"this kernel has no blocks of {limits.block_mib} MiB")
    if free * 100 < total * limits.free_percent:
        return Observation(False, f"{words}; judged only with {limits.free_percent} % of the memory free")
    return Observation(large * 100 < free * limits.block_percent, words)


def _pressure(host: Host, limits: PressureLimits) -> Observation:
    # `full avg10=0.00 avg60=0.00 avg300=0.00 total=0`; a kernel with psi=0 has the file, and refuses to read it.
    rows = [line.split() for line in text_of(host.on, "/proc/pressure/memory").splitlines()]
    averages = {row[0]: dict(word.partition("=")[::2] for word in row[1:]) for row in rows if row}
    try:
        waited = float(averages["full"]["avg300"])
    except (KeyError, ValueError):
        raise CannotTell("the kernel does not report how long tasks wait for memory") from None
    words = f"in the last five minutes everything waited for memory for {waited:g} % of the time"
    return Observation(waited >= limits.full_percent, words)


# --- GPU and firmware


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


def _slowdown(host: Host, limits: SlowdownLimits) -> Observation:
    names = [f"clocks_event_reasons.{reason}" for reason in limits.reasons]
    answer = host.on.ask(
        "nvidia-smi", f"--query-gpu=temperature.gpu,{','.join(names)}", "--format=csv,noheader,nounits"
    )
    celsius, *states = [cell.strip() for cell in answer.out.partition("\n")[0].split(",")]
    told = dict(zip(limits.reasons, states, strict=False))
    if not answer.ok or len(states) != len(names) or not {"Active", "Not Active"} & set(states):
        raise CannotTell("nvidia-smi does not tell why the GPU's clock is low")
    active = [reason.replace("_", " ") for reason, state in told.items() if state == "Active"]
    degrees = f" at {celsius} degrees" if celsius.isdecimal() else ""
    return Observation(bool(active), f"{', '.join(active) or 'none'}{degrees}")


def _driver(host: Host, limits: DriverLimits) -> Observation:
    driver = _gpu(host).driver
    return Observation(driver.split(".")[0] != limits.major, driver)


def _gpu(host: Host) -> Gpu:
    if host.gpu is None:
        raise CannotTell("nvidia-smi does not answer")
    return host.gpu


def _driver_mismatch(host: Host, limits: MismatchLimits) -> Observation:
    loaded, installed = gpu.loaded_driver(host.on), gpu.installed_driver(host.on, limits.libraries)
    answer = host.gpu_answer
    complaint = next((line for line in (answer.out + answer.err).splitlines() if limits.pattern.search(line)), "")
    words = f"loaded {loaded or 'none'}, installed {installed or 'unknown'}"
    if complaint:
        return Observation(True, f"nvidia-smi reports: {machine.printable(complaint.strip())} ({words})")
    if not loaded:
        raise CannotTell(f"there is no {gpu.DRIVER_FILE}: no NVIDIA driver is loaded")
    return Observation(bool(installed) and installed != loaded, words)


def _firmware(host: Host, limits: FirmwareLimits) -> Observation:
    uefi = machine.uefi_version(host.on)
    told = f"UEFI {uefi or 'unknown'}"
    if limits.numbering.fullmatch(uefi) and _numbers(uefi) < _numbers(limits.uefi):
        return Observation(True, f"{told}, older than {limits.uefi}")
    pending = firmware.pending(host.on)
    if isinstance(pending, str):
        raise CannotTell(f"{told}; pending updates are unknown: {pending}")
    if not pending:
        return Observation(False, f"{told}; fwupd has no update")
    number = "1 update is" if len(pending) == 1 else f"{len(pending)} updates are"
    return Observation(True, f"{number} not installed: {', '.join(each.words for each in pending)} ({told})")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


# --- the QSFP link


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


def _link_down(host: Host, limits: DownLimits) -> Observation:
    halves = [half for port in qsfp.ports(host.on) for half in port.twins]
    if not halves:
        return Observation(False, "this node has no QSFP port")
    places = {half.name: [f"{NET}/{half.name}/carrier_down_count"] for half in halves}
    for half in halves:
        places[half.name] += [f"{RDMA}/{half.hca}/ports/1/counters/link_downed"] if half.hca else []
    said = {name: [text_of(host.on, path) for path in paths] for name, paths in places.items()}
    counts = {name: max(map(int, filter(str.isdecimal, texts)), default=None) for name, texts in said.items()}
    known = {name: count for name, count in counts.items() if count is not None}
    if not known:
        raise CannotTell("the kernel does not count how often the links went down")
    bad = {name: count for name, count in known.items() if count >= limits.times}
    words = ", ".join(f"{name} {count} times" for name, count in (bad or known).items())
    return Observation(bool(bad), f"down since the boot: {words}")


def _round_trip(host: Host, limits: RoundTripLimits) -> Observation:
    node = host.node
    if len(node.peers) != 1:
        return Observation(False, "known for a cable between two nodes only")
    (peer,) = node.peers
    addresses = (peer, str(network.twin_of(node, peer).ip))
    times = network.at_once(lambda each: network.fastest_ping(host.on, each, count=limits.pings), addresses)
    answered = {address: each for address, each in zip(addresses, times, strict=True) if each is not None}
    if not answered:
        raise CannotTell(f"{peer} does not answer")
    slow = {address: each for address, each in answered.items() if each > limits.milliseconds}
    words = ", ".join(f"{address} {each:g} ms" for address, each in (slow or answered).items())
    return Observation(bool(slow), f"{words} (the fastest of {limits.pings} pings)")


# --- services and files


def _service(host: Host, limits: ServiceLimits) -> Observation:
    units = limits.units
    states = host.on.ask("systemctl", "is-active", *units).out.split()
    if len(states) != len(units):
        raise CannotTell("systemd does not answer")
    running = [unit for unit, state in zip(units, states, strict=True) if state == "active"]
    return Observation(not running, ", ".join(running) or f"not running: {', '.join(units)}")


def _service_path(host: Host, limits: ServicePathLimits) -> Observation:
    """Start each program as a service would find it: by the PATH that systemd reads from the env file."""
    written = host.on.read(host.node.env_file)
    if written is None:
        raise CannotTell("there is no env file yet: `sparkinstall all`")
    environment = host.node.bare_environment | {k: v for k, v in assignments(written).items() if k == "PATH"}
    answers = {name: host.on.ask(name, "--version", env=environment) for name in limits.programs}
    versions = {name: _VERSION.search(answer.out) for name, answer in answers.items() if answer.ok}
    found = {name: match[0] for name, match in versions.items() if match}
    bad = [f"{name} is not there" for name in limits.programs if name not in found]
    bad += [f"{name} is {v}" for name, v in found.items() if _numbers(v) < _numbers(limits.programs[name])]
    told = ", ".join(bad or (f"{name} {version}" for name, version in found.items()))
    return Observation(bool(bad), f"{told}; PATH={environment['PATH']}" if bad else told)


def _file(host: Host, limits: FileLimits) -> Observation:
    """Detect a file that can cost a node its link; a single node has none."""
    path = limits.path
    if host.on.entry(path) is None:
        return Observation(False, f"there is no {path}")
    return Observation(
        host.node.several, f"{path} exists{'' if host.node.several else ', but a single node needs no link'}"
    )


def _settings_file(host: Host, limits: SettingsFileLimits) -> Observation:
    """Detect a file of settings that sets something; comments alone do no harm."""
    paths = [path.replace("~", host.node.home, 1) for path in limits.paths]
    found = {path: _settings(host.on.read(path) or b"") for path in paths}
    told = [f"{path} sets {', '.join(settings)}" for path, settings in found.items() if settings]
    return Observation(bool(told), "; ".join(told) or f"no setting in {' or '.join(paths)}")


def _settings(content: bytes) -> list[str]:
    lines = (line.strip() for line in content[:65536].decode(errors="replace").splitlines())
    return [machine.printable(line) for line in lines if "=" in line and not line.startswith("#")][:20]


DETECTORS: Mapping[str, Detector] = {
    "stranded_memory": Detector(CmaLimits, _stranded_memory),
    "boot_option": Detector(BootOptionLimits, _boot_option),
    "kernel_log": Detector(KernelLogLimits, _kernel_log),
    "fragments": Detector(FragmentLimits, _fragments),
    "pressure": Detector(PressureLimits, _pressure),
    "low_power": Detector(PowerLimits, _low_power, "gpu"),
    "slowdown": Detector(SlowdownLimits, _slowdown),
    "driver": Detector(DriverLimits, _driver),
    "driver_mismatch": Detector(MismatchLimits, _driver_mismatch),
    "firmware": Detector(FirmwareLimits, _firmware),
    "connectx": Detector(BusLimits, _connectx),
    "link_down": Detector(DownLimits, _link_down),
    "round_trip": Detector(RoundTripLimits, _round_trip, "link"),
    "service": Detector(ServiceLimits, _service),
    "service_path": Detector(ServicePathLimits, _service_path),
    "file": Detector(FileLimits, _file),
    "settings_file": Detector(SettingsFileLimits, _settings_file),
}
