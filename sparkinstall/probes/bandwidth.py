"""Measure the bandwidth of the QSFP link: the programs for both nodes, their output, the verdict.

cluster/bandwidth.py starts the programs on both ends.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import msgspec
from msgspec import Struct, field

from sparkinstall import payloads
from sparkinstall.errors import BadUsage
from sparkinstall.facts import card, machine, qsfp
from sparkinstall.facts.env_file import started_with
from sparkinstall.facts.gpu import DRIVER_FILE
from sparkinstall.facts.network import own_addresses, twin_of
from sparkinstall.node import Node, nccl_library
from sparkinstall.probes import Finding, Probe, failed, passed, skipped, warned
from sparkinstall.schema import either, show
from sparkinstall.system import Reader

Kind = Literal["tcp", "rdma", "nccl"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TITLES: Mapping[Kind, str] = {
    "tcp": "TCP bandwidth over both halves",
    "rdma": "RDMA bandwidth over both halves",
    "nccl": "NCCL bandwidth between two nodes",
}
_SLOW_MODEL = "A model on several nodes answers more slowly than it could."
_IMPACTS: Mapping[Kind, str] = {
    "tcp": "Collectives over sockets, and the loading of models, take longer than they need to.",
    "rdma": _SLOW_MODEL,
    "nccl": _SLOW_MODEL,
}
SECONDS = 5
"""Duration of each measurement in seconds."""
LIMIT = 30
"""Seconds after which a program of a measurement is killed."""
NCCL_LIMIT = 120
"""The same for a program that loads torch first."""

_GIB = 1 << 30
_PIECE = 1 << 26
# NVIDIA's 16 GB froze a node: GPU and system share the memory.
_SHARE = 16
# torch, a CUDA context and NCCL need memory besides the gathered data.
_LEAST = 4 * _GIB
_STREAMS = "4"

# Published figures for two Sparks on one cable, in Gb/s unless noted.
RDMA_BOTH, ONE_HALF, TCP_UNTUNED, DEGRADED = 189.85, 98.0, 96.0, 13.0
NCCL_MARK, NCCL_REACHED = 21.875, (18.9, 23.7)
"""NVIDIA's pass mark for the bus bandwidth of all_gather, and the range that others reached, in GB/s."""
_NEARLY = 0.9
# Degraded cards reached 8 to 25 Gb/s (NVIDIA/dgx-spark-playbooks#108).
_CRAWLING = 30.0
# GB/s of NCCL: even sockets on a good card are faster than a degraded card.
_CRAWLING_BUS = 2.0


def known(name: str) -> Kind:
    """Return the kind with that name.

    Raises:
        BadUsage: there is none.
    """
    if found := next((kind for kind in KINDS if kind == name), None):
        return found
    raise BadUsage(f"there is no measurement {show(name)}", hint=f"it is {either(KINDS)}")


def probe_name(kind: Kind) -> str:
    """`tcp-bandwidth`, ..."""
    return f"{kind}-bandwidth"


def probes(node: Node) -> Iterable[Probe]:
    """Yield placeholders for a single node, which only report that the measurement needs two nodes."""
    for kind in kinds(node.config.network.transport):
        yield declared(kind, partial(_on_one_node, node, kind))


def kinds(transport: str) -> tuple[Kind, ...]:
    """Return what can be measured with this `network.transport`."""
    return tuple(kind for kind in KINDS if kind != "rdma" or transport != "socket")


def _on_one_node(node: Node, kind: Kind, on: Reader) -> Finding:
    return skipped(why_not(node, on, kind) or _BOTH)


def declared(kind: Kind, look: Callable[[Reader], Finding]) -> Probe:
    """Return the probe of that kind with `look` as its measurement."""
    return Probe(
        probe_name(kind), TITLES[kind], look, "link", _IMPACTS[kind], None, "a rehearsal has no QSFP port", True, True
    )


_BOTH = (
    "it needs both ends: run `sparkinstall cluster verify --level link --measure spark-1 spark-2` on a machine "
    "that reaches the nodes over ssh"
)


# --- what is run


def why_not(node: Node, on: Reader, kind: Kind) -> str:
    """Return why this node cannot take part, or ""."""
    if kind == "tcp":
        return _missing(on, "iperf3", "iperf3")
    if kind == "rdma":
        return qsfp.roce_ready(on, qsfp.port_to_look_at(on, node)) or _missing(on, "ib_write_bw", "perftest")
    return _no_nccl(node, on)


def _missing(on: Reader, program: str, package: str) -> str:
    there = on.ask(program, "--version").code != 127
    return "" if there else f"{program} is not installed: `sudo apt-get install {package}`"


def _no_nccl(node: Node, on: Reader) -> str:
    library = nccl_library(node, on)
    if on.read(DRIVER_FILE) is None:
        return "there is no GPU here (no NVIDIA driver is loaded)"
    if on.entry(node.env_file) is None or library is None or on.entry(library) is None:
        return "the env file or NCCL is missing: `sparkinstall all`"
    free = machine.available_memory(on)
    risk = f"below {_LEAST // _GIB} a measurement could freeze the node"
    return "" if size(free) else f"only {free / _GIB:.1f} GiB of memory are available: {risk}"


def size(available: int) -> int:
    """Return how many bytes NCCL may gather with `available` bytes of memory: at most 1 GiB; 0: too little memory."""
    if available < _LEAST:
        return 0
    return min(_GIB, available // _SHARE) // _PIECE * _PIECE


class Program(Struct, frozen=True):
    """One program of a measurement. `over`: the interface or RDMA device that it uses."""

    over: str
    argv: tuple[str, ...]


def programs(node: Node, on: Reader, kind: Kind, ports: Sequence[int], peer: str = "") -> tuple[Program, ...]:
    """Return the programs to run on this node: one per half, or one for NCCL.

    Args:
        ports: one per program, the same on both nodes.
        peer: on the client, the server's address on its first half; "" on the server.
    """
    if kind == "nccl":
        return (_gathering(node, on, ports[0], peer),)
    halves = zip(qsfp.port_to_look_at(on, node).twins, own_addresses(node), ports, strict=True)
    peers = (peer, str(twin_of(node, peer).ip)) if peer else ("", "")
    make = _iperf if kind == "tcp" else _ib_write_bw
    return tuple(make(on, half, str(own.ip), port, to) for (half, own, port), to in zip(halves, peers, strict=True))


def count(kind: Kind) -> int:
    """Return how many programs, and ports, a measurement needs on each node."""
    return 1 if kind == "nccl" else 2


def _within(seconds: int, *argv: str) -> tuple[str, ...]:
    # `timeout` ends it even if this program is killed.
    return ("timeout", "-k", "2", str(seconds), *argv)


def _iperf(_on: Reader, half: qsfp.Interface, own: str, port: int, peer: str) -> Program:
    asks = ("-c", peer, "-t", str(SECONDS), "-O", "1", "-P", _STREAMS, "-J", "--connect-timeout", "5000")
    return Program(half.name, _within(LIMIT, "iperf3", *(asks if peer else ("-s", "-1")), "-B", own, "-p", str(port)))


def _ib_write_bw(on: Reader, half: qsfp.Interface, own: str, port: int, peer: str) -> Program:
    index = qsfp.roce_gid(on, half.hca, own)
    device = ("-d", half.hca, "-i", "1", *(("-x", str(index)) if index is not None else ()))
    how = ("-q", _STREAMS, "-D", str(SECONDS), "-F", "--report_gbits", "--bind_source_ip", own, "-p", str(port))
    return Program(half.hca, _within(LIMIT, "ib_write_bw", *device, *how, *((peer,) if peer else ())))


_WITH_NETWORK_NAMED = ("env", "NCCL_DEBUG=INFO", "NCCL_DEBUG_SUBSYS=INIT,NET")


def _gathering(node: Node, on: Reader, port: int, peer: str) -> Program:
    free = machine.available_memory(on)
    words = ("1", peer) if peer else ("0", node.address)
    asked = ("python", "-c", payloads.source("nccl_bandwidth"), *words, str(port), str(size(free)), str(SECONDS))
    return Program("nccl", _within(NCCL_LIMIT, *started_with(node, on, *_WITH_NETWORK_NAMED, *asked)))


# --- the output


class Measured(Struct, frozen=True):
    """A measurement between two nodes.

    `halves`: Gb/s of each half by interface or RDMA device; `bus`: GB/s of NCCL's all_gather of `size` bytes over the
    `network` that NCCL used (`IB`, `Socket`). `why`: the reason of a failure. `lost`: error counters that grew
    meanwhile, by node.
    """

    kind: Kind
    halves: Mapping[str, float]
    bus: float = 0.0
    size: int = 0
    network: str = ""
    why: str = ""
    lost: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Gb/s over everything."""
        return self.bus * 8 if self.kind == "nccl" else sum(self.halves.values())


def understood(kind: Kind, said: Mapping[str, tuple[str, str]]) -> Measured:
    """Parse stdout and stderr of the client's programs, by interface or device."""
    if kind == "nccl":
        return _of_nccl(*said["nccl"])
    read = of_iperf if kind == "tcp" else of_ib_write_bw
    halves = {over: read(out) for over, (out, _) in said.items()}
    dumb = next((over for over, carried in halves.items() if carried is None), None)
    if dumb is not None:
        return Measured(kind, {}, why=f"{dumb}: {complaint(*said[dumb])}")
    return Measured(kind, {over: carried for over, carried in halves.items() if carried is not None})


def of_iperf(out: str) -> float | None:
    """Return the received Gb/s from `iperf3 -J`, or None. Never raises."""
    try:
        return float(json.loads(out)["end"]["sum_received"]["bits_per_second"]) / 1e9
    except (ValueError, KeyError, TypeError):
        return None


_ROW = re.compile(r"^ *[0-9]+ +[0-9]+ +[0-9.]+ +([0-9]+(?:\.[0-9]+)?) +[0-9.]+ *$", re.MULTILINE)


def of_ib_write_bw(out: str) -> float | None:
    """Return the average Gb/s from the last row of `ib_write_bw --report_gbits`, or None. Never raises."""
    rows = _ROW.findall(out)
    return float(rows[-1]) if rows else None


_NETWORK = re.compile(r"(?:Using network|Assigned NET plugin) ([A-Za-z_]+)")


class _Gathered(Struct, frozen=True):
    """The reply of payloads/nccl_bandwidth.py."""

    bus: float
    size: int
    right: bool


def _of_nccl(out: str, err: str) -> Measured:
    row = next((line for line in reversed(out.splitlines()) if line.startswith('{"bus"')), "")
    network = _NETWORK.search(out)
    if not row:
        return Measured("nccl", {}, why=complaint("", err))
    said = msgspec.json.decode(row, type=_Gathered)
    if not said.right:
        return Measured("nccl", {}, why="the gathered data differs from the sent data: it arrived damaged")
    return Measured("nccl", {}, said.bus, said.size, network[1] if network else "")


def complaint(out: str, err: str) -> str:
    """Return the last message of a failed program."""
    try:
        said = str(json.loads(out)["error"])
    except (ValueError, KeyError, TypeError):
        lines = [line.strip() for line in (err or out).splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "")
    return said[-300:] or "no answer in time"


# --- the verdict


def judged(measured: Measured, transport: str = "auto") -> Finding:
    """Judge a measurement: both halves, one half, sockets, or a degraded card. `transport`: `network.transport`."""
    if measured.why:
        return failed(measured.why, _UNREACHED)
    finding = _of_bus(measured, transport) if measured.kind == "nccl" else _of_halves(measured)
    if measured.lost and finding.verdict == "pass":
        said = "; ".join(f"on {host} {card.in_words(counters)}" for host, counters in measured.lost.items())
        return warned(f"{finding.found}; meanwhile, {said}", _CABLE, finding.expected)
    return finding


def _of_halves(measured: Measured) -> Finding:
    total, kind = measured.total, measured.kind
    full = RDMA_BOTH if kind == "rdma" else TCP_UNTUNED
    expected = f"about {full:.0f} Gb/s over both halves" + ("" if kind == "rdma" else ", untuned")
    shares = " + ".join(f"{carried:.1f} {over}" for over, carried in measured.halves.items())
    said = f"{total:.1f} Gb/s ({shares})"
    weak, strong = min(measured.halves.values()), max(measured.halves.values())
    if total < _CRAWLING and weak * 3 >= strong:
        return failed(f"a degraded card: {said}; such cards reach about {DEGRADED:.0f} Gb/s", _POWER, expected)
    if weak * 3 < strong:
        name = min(measured.halves, key=lambda over: measured.halves[over])
        return failed(f"one half: {said}; {name} reaches a fraction of the other", _HALVES, expected)
    if kind == "rdma" and total <= ONE_HALF / _NEARLY:
        return failed(f"no more than a single half can carry: {said}", _HALVES, expected)
    if total < full * _NEARLY:
        return warned(f"less than both halves can carry: {said}", _QUIET, expected)
    return passed(f"both halves: {said}", expected)


def _of_bus(measured: Measured, transport: str) -> Finding:
    low, high = NCCL_REACHED
    expected = f"{NCCL_MARK} GB/s, NVIDIA's pass mark for two nodes; others reached {low} to {high}"
    network = {"IB": "RoCE", "Socket": "sockets"}.get(measured.network, measured.network or "an unknown network")
    said = f"{measured.bus:.2f} GB/s bus bandwidth over {network}, {measured.size >> 20} MiB gathered"
    if measured.network == "Socket" and measured.bus >= _CRAWLING_BUS:
        return _of_sockets(said, transport, expected)
    if measured.total < _CRAWLING:
        return failed(f"a degraded card, or a wrong NCCL: {said}", f"{_WRONG_NCCL}; if not: {_POWER}", expected)
    if measured.total <= ONE_HALF / _NEARLY:
        return failed(f"no more than a single half can carry: {said}", _DEVICES, expected)
    if measured.bus < low * _NEARLY:
        return warned(f"less than others reached: {said}", _QUIET, expected)
    if measured.bus < NCCL_MARK:
        return warned(f"both halves, below the pass mark: {said}", _QUIET, expected)
    return passed(f"both halves: {said}", expected)


def _of_sockets(said: str, transport: str, expected: str) -> Finding:
    if transport == "socket":
        return passed(f"sockets, as `network.transport` says: {said}")
    return warned(f"sockets: {said}; RoCE is several times faster", _WHY_SOCKETS, expected)


_AGAIN = "`sparkinstall cluster verify --level link --measure` with the nodes"
_UNREACHED = (
    "run `sparkinstall verify --only peers` on both nodes to see whether they reach each other; another firewall "
    "must accept the other node on the link"
)
_POWER = (
    "switch both nodes off, unplug their power for a minute, and measure again: a degraded ConnectX-7 looks "
    "healthy otherwise (github.com/NVIDIA/dgx-spark-playbooks/pull/108)"
)
_HALVES = (
    "`sparkinstall verify --level link` on both nodes: each half needs its carrier and its address, and for RoCE a GID"
)
_DEVICES = f"{_HALVES}; NCCL_IB_HCA in the env file must name the devices of both"
_QUIET = f"stop what else uses the link and the GPU, and measure again: {_AGAIN}"
_CABLE = f"replug the cable at both ends, or try another one, and measure again: {_AGAIN}"
_WHY_SOCKETS = "`sparkinstall plan` on that node explains why; `network.transport: auto` uses RoCE if possible"
_WRONG_NCCL = "`sparkinstall verify --only nccl-loaded` on both nodes shows the loaded NCCL"
