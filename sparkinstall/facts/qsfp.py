"""The QSFP ports of this node as the kernel shows them: which has the cable, its halves, their RDMA devices.

No interface name is assumed, only the pattern of names of such a port.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv6Address
from pathlib import Path

from msgspec import Struct

from sparkinstall.errors import Problem
from sparkinstall.facts import ip
from sparkinstall.facts.sysfs import CONNECTX_DRIVER, NET, RDMA, driver_of, text_of
from sparkinstall.node import Node
from sparkinstall.system import Reader

_HALVES = 2

# systemd's name of a port on a multi-port card: PCI domain (none: 0), bus, slot, function, and port number.
# On a ConnectX-7 function and port have the same number.
_HALF = re.compile(r"en(?:P(?P<domain>[0-9]+))?(?P<place>p[0-9]+s[0-9]+f(?P<port>[0-9]+))np(?P=port)")
_GID = re.compile(r"[0-9a-f]{4}(?::[0-9a-f]{4}){7}", re.IGNORECASE)
_ROCE_V2 = "RoCE v2"
_SESSION = "carries this ssh session"

# If this file exists, DGX OS (since 26.02, dgx-spark-mlnx-hotplug) removes an unused card from its bus.
HOTPLUG = "/etc/nvidia/cx7-hotplug-enabled"
# The kernel's side of it (NVIDIA/NV-Kernels #271): 0 while no cable counts as plugged in.
_PLUGGED_IN = "/sys/devices/platform/MTKP0001:00/pcie_hotplug/debug_state"
SWITCHED_OFF = "switched off to save power until a cable is plugged in and the other node is on"

# Bits of a route's flags (linux/route.h).
_RTF_UP, _RTF_REJECT = 0x1, 0x200


class LinkProblem(Problem):
    """The QSFP port cannot be determined; the message lists the candidates and names the option."""


class Interface(Struct, frozen=True):
    """One half of a QSFP port. `carrier` is None while the interface is down; `speed` in Mb/s, 0 if unknown.

    `hca` is its RDMA device, or "".
    """

    name: str
    port: int
    carrier: bool | None
    mtu: int
    speed: int
    hca: str = ""


class Port(Struct, frozen=True):
    """A physical port and its halves (twins), ordered by PCI domain."""

    number: int
    twins: tuple[Interface, ...]

    @property
    def carrier(self) -> bool | None:
        """True if any half has a carrier; None if no half is up."""
        known = [each.carrier for each in self.twins if each.carrier is not None]
        return any(known) if known else None

    @property
    def names(self) -> tuple[str, ...]:
        """The interfaces of its halves."""
        return tuple(each.name for each in self.twins)


class Gid(Struct, frozen=True):
    """One entry of an RDMA device's GID table. `type` such as `RoCE v2`."""

    index: int
    value: str
    type: str
    interface: str

    @property
    def address(self) -> str:
        """The IPv4 address that it represents, or ""."""
        return mapped_address(self.value)


def ports(on: Reader) -> tuple[Port, ...]:
    """Return every QSFP port, by number."""
    halves = [_half(on, name) for name in sorted(filter(_HALF.fullmatch, on.names(NET)), key=_domain)]
    known = [half for half in halves if half is not None]
    numbers = sorted({half.port for half in known})
    return tuple(Port(each, tuple(half for half in known if half.port == each)[:_HALVES]) for each in numbers)


def management(on: Reader) -> Mapping[str, str]:
    """Return interfaces that must never be changed, with the reason: default route, this ssh session, Wi-Fi.

    A reason continues the interface's name: "has the default route". A rehearsal reads only the files below its root,
    not this machine's ssh session.

    Raises:
        LinkProblem: `ip` cannot tell which interface has this ssh session's address.
    """
    routes, routes6 = (on.read(f"/proc/net/{table}") or b"" for table in ("route", "ipv6_route"))
    found = dict.fromkeys((*default_routes(routes), *default_routes6(routes6)), "has the default route")
    for name in _of_this_session(on):
        found.setdefault(name, _SESSION)
    for name in on.names(NET):
        if on.entry(f"{NET}/{name}/wireless") or on.entry(f"{NET}/{name}/phy80211"):
            found.setdefault(name, "is Wi-Fi")
    return _with_relatives(on, found)


def used_port(on: Reader, node: Node) -> Port:
    """Return the port with the cable, or the one that `network.interface` names.

    Of two cables between two nodes, the one that already has this node's address, else that of the first port. A
    rehearsal has no ports and gets port 0 of a Spark.

    Raises:
        LinkProblem: there is none, the named one must not be changed, or more than two nodes have two cables each.
    """
    return _chosen(on, node, management(on))


def port_to_look_at(on: Reader, node: Node) -> Port:
    """Return the same port as `used_port`, for reading only, so also if this ssh session uses it.

    Raises:
        LinkProblem: as `used_port`.
    """
    barred = management(on)
    try:
        return _chosen(on, node, barred)
    except LinkProblem:
        free = {name: why for name, why in barred.items() if why != _SESSION}
        if free == barred:
            raise
        return _chosen(on, node, free)


def _chosen(on: Reader, node: Node, barred: Mapping[str, str]) -> Port:
    found, wanted = ports(on), node.config.network.interface
    if wanted and wanted in barred:
        raise _unusable(f"{wanted} must not be changed: it {barred[wanted]}", found, barred)
    if on.rehearsal and not found:
        return _as_on_a_spark(wanted)
    if not found and switched_off(on):
        raise _off()
    return _named_port(on, wanted, found, barred) if wanted else _cabled_port(on, node, found, barred)


def unused_cable(on: Reader, node: Node) -> str:
    """Return in words that another port than the used one has a cable too; "" if none has that may be set up.

    Raises:
        LinkProblem: as `used_port`.
    """
    port, barred = port_to_look_at(on, node), management(on)
    others = [each for each in ports(on) if each.number != port.number and each.carrier]
    spare = next((each for each in others if not _why_barred(each, barred)), None)
    return f"port {spare.number} has a cable too, which stays unused: it would add 4.8 % only" if spare else ""


def if_crossed(on: Reader, node: Node) -> str:
    """Return the hint for a node that does not answer, if there is a second cable; else "".

    Each node chooses its port alone.

    Raises:
        LinkProblem: as `used_port`.
    """
    both = "both ends of one cable must be in use: unplug the other, or name a port on each node with `--interface`"
    return f"; of two cables, {both}" if unused_cable(on, node) else ""


def switched_off(on: Reader) -> bool:
    """Return whether DGX OS has switched the ConnectX-7 off."""
    return on.entry(HOTPLUG) is not None or text_of(on, _PLUGGED_IN) == "0"


def addresses(on: Reader) -> Mapping[str, tuple[str, ...]]:
    """Return the IPv4 addresses by interface, as `a.b.c.d/length`; {} in a rehearsal.

    Raises:
        LinkProblem: `ip` fails.
    """
    if on.rehearsal:
        return {}
    return {name: each.addresses for name, each in _live(on).items() if each.addresses}


def gids(on: Reader, hca: str) -> tuple[Gid, ...]:
    """Return the GID table of an RDMA device, without zero entries."""
    table = f"{RDMA}/{hca}/ports/1"
    values = {index: text_of(on, f"{table}/gids/{index}") for index in _numbers(on, f"{table}/gids")}
    types, names = f"{table}/gid_attrs/types", f"{table}/gid_attrs/ndevs"
    return tuple(
        Gid(index, value, text_of(on, f"{types}/{index}"), text_of(on, f"{names}/{index}"))
        for index, value in values.items()
        if _GID.fullmatch(value) and value.strip("0:")
    )


def roce_gid(on: Reader, hca: str, address: str) -> int | None:
    """Return the index of the RoCE v2 GID of the IPv4 `address`, or None."""
    return next((each.index for each in gids(on, hca) if each.type == _ROCE_V2 and each.address == address), None)


def roce_ready(on: Reader, port: Port) -> str:
    """Return why RoCE cannot be used on this port; "" if it can.

    Each half needs an active RDMA device with a RoCE v2 GID for an IPv4 address of that half.
    """
    return next((why for each in port.twins if (why := _not_ready(on, each))), "")


def mapped_address(gid: str) -> str:
    """Return the IPv4 address in a GID such as 0000:0000:0000:0000:0000:ffff:c0a8:640a, or "". Never raises."""
    return str(IPv6Address(gid).ipv4_mapped or "") if _GID.fullmatch(gid) else ""


def default_routes(content: bytes) -> tuple[str, ...]:
    """Return the interfaces of IPv4 default routes in /proc/net/route. Never raises."""
    rows = [line.split() for line in content.split(b"\n")]
    return _route_names((row[0], row[3]) for row in rows if len(row) >= 8 and row[1] == row[7] == b"0" * 8)


def default_routes6(content: bytes) -> tuple[str, ...]:
    """Return the interfaces of IPv6 default routes in /proc/net/ipv6_route. Never raises."""
    rows = [line.split() for line in content.split(b"\n")]
    return _route_names((row[9], row[8]) for row in rows if len(row) >= 10 and row[:2] == [b"0" * 32, b"00"])


def _route_names(routes: Iterable[tuple[bytes, bytes]]) -> tuple[str, ...]:
    """Return interfaces of routes that are up; the kernel keeps a null route at `lo`."""
    used = [name for name, flags in routes if _bits(flags) & (_RTF_UP | _RTF_REJECT) == _RTF_UP]
    return tuple(dict.fromkeys(os.fsdecode(name) for name in used))


def _bits(word: bytes) -> int:
    try:
        return int(word, 16)
    except ValueError:
        return 0


def _domain(name: str) -> tuple[int, str]:
    form = _HALF.fullmatch(name)
    return int(form["domain"] or 0) if form else 0, name


def _half(on: Reader, name: str) -> Interface | None:
    form = _HALF.fullmatch(name)
    # An interface without a device is virtual: nobody gives it such a name by chance.
    if form is None or driver_of(on, name) not in ("", CONNECTX_DRIVER):
        return None
    carrier = {"1": True, "0": False}.get(text_of(on, f"{NET}/{name}/carrier"))
    mtu, speed = (_number(text_of(on, f"{NET}/{name}/{what}")) for what in ("mtu", "speed"))
    return Interface(name, int(form["port"]), carrier, mtu, speed, _hca(on, name))


def _hca(on: Reader, name: str) -> str:
    devices = on.names(RDMA)
    listed = [each for each in devices if name in on.names(f"{RDMA}/{each}/device/net")]
    if len(listed) == 1:
        return listed[0]
    # For several devices of one card, or one for a bond, the GID table names the interface.
    named = [each for each in listed or devices if any(gid.interface == name for gid in gids(on, each))]
    return next(iter((*named, *listed)), "")


def _number(text: str) -> int:
    # `speed` is -1 while the link is down.
    return int(text) if text.isascii() and text.isdecimal() else 0


def _numbers(on: Reader, folder: str) -> list[int]:
    return sorted(int(name) for name in on.names(folder) if name.isascii() and name.isdecimal())


def _of_this_session(on: Reader) -> tuple[str, ...]:
    """Return the interface with the server address of this ssh session (SSH_CONNECTION)."""
    words = () if on.rehearsal else session()
    if not words:
        return ()
    # A link-local address may be on several interfaces; its suffix names the right one.
    address, _, scope = words[2].partition("%")
    return tuple(name for name, each in _live(on).items() if address in each.all_addresses and scope in ("", name))


def session() -> tuple[str, ...]:
    """Return client, its port, server and its port of the ssh session of this process, or ().

    sudo removes the variable; a parent process still has it.
    """
    said, pid = os.environ.get("SSH_CONNECTION", ""), os.getppid()
    while not said and pid > 1 and os.environ.get("SUDO_USER"):
        said, pid = _of_process(pid)
    words = tuple(said.split())
    return words if len(words) == 4 else ()


def _of_process(pid: int) -> tuple[str, int]:
    """Return the variable of a process, and its parent's pid (0 if unknown)."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        # The program's name is in parentheses and may contain any character.
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return "", 0
    found = (each.partition(b"=")[2] for each in variables if each.startswith(b"SSH_CONNECTION="))
    return next(found, b"").decode(errors="replace"), parent


def _live(on: Reader) -> Mapping[str, ip.Live]:
    found = ip.live_or_complaint(on)
    if isinstance(found, str):
        raise LinkProblem(
            "`ip -j addr` does not list this node's addresses",
            cause=found[-300:],
            hint="install iproute2: `sudo apt-get install iproute2`",
        )
    return found


def _with_relatives(on: Reader, found: Mapping[str, str]) -> Mapping[str, str]:
    """Add the interfaces below and above those in `found`: members of a bridge, the card of a VLAN, a bond."""
    complete, waiting = dict(found), list(found)
    while waiting:
        name = waiting.pop()
        for other, how in _relatives(on, name):
            if other not in complete:
                complete[other] = f"{how} {name}, which {complete[name]}"
                waiting.append(other)
    return complete


def _relatives(on: Reader, name: str) -> Iterator[tuple[str, str]]:
    master = on.entry(f"{NET}/{name}/master")
    if master is not None:
        yield master.target.rpartition("/")[2], "is made of"
    for each in on.names(f"{NET}/{name}"):
        if each.startswith("lower_"):
            yield each.removeprefix("lower_"), "carries"


def _as_on_a_spark(wanted: str | None) -> Port:
    """Return the port that `wanted` implies, or port 0, with halves and devices as DGX OS names them."""
    name = wanted or "enp1s0f0np0"
    form = _HALF.fullmatch(name)
    if form is None:
        raise LinkProblem(
            f"{name} is not a half of a QSFP port",
            cause="halves have names like enp1s0f0np0 or enP2p1s0f1np1",
            hint=_naming("enp1s0f0np0"),
        )
    number = int(form["port"])
    halves = [f"{domain}{form['place']}" for domain in ("", f"P{form['domain'] or 2}")]
    return Port(number, tuple(Interface(f"en{h}np{number}", number, None, 1500, 0, f"roce{h}") for h in halves))


def _named_port(on: Reader, wanted: str, found: tuple[Port, ...], barred: Mapping[str, str]) -> Port:
    port = next((each for each in found if wanted in each.names), None)
    if port is None:
        there = wanted in on.names(NET)
        what = f"{wanted} is not a half of a QSFP port" if there else f"this node has no interface {wanted}"
        raise _unusable(what, found, barred)
    for name in port.names:
        if name in barred:
            raise _unusable(f"{name} must not be changed: it {barred[name]}", found, barred)
    cabled = [each for each in found if each.carrier and not _why_barred(each, barred)]
    if port.carrier is False and cabled:
        what = f"{wanted} has no carrier, but port {cabled[0].number} has one: the cable is in the other port"
        hint = f"{_naming(cabled[0].names[0])}, or plug the cable into port {port.number}"
        raise _unusable(what, found, barred, hint)
    return port


def _cabled_port(on: Reader, node: Node, found: tuple[Port, ...], barred: Mapping[str, str]) -> Port:
    free = [each for each in found if not _why_barred(each, barred)]
    cabled = [each for each in free if each.carrier]
    if len(cabled) > 1 and len(node.members) > 2:
        raise _ring(len(node.members), cabled, found, barred)
    if cabled:
        return _with_address(on, node, cabled) if len(cabled) > 1 else cabled[0]
    # If the cable is in a port that must not be changed, choosing the other port would be a guess.
    if len(free) == 1 and not any(each.carrier for each in found):
        return free[0]
    raise _unusable(_what_is_missing(found, free), found, barred)


def _with_address(on: Reader, node: Node, cabled: list[Port]) -> Port:
    """Return the port that has this node's address, so that a second cable changes nothing; else the first."""
    mine = {name for name, all_of_it in addresses(on).items() if node.address in {a.split("/")[0] for a in all_of_it}}
    return next((port for port in cabled if mine.intersection(port.names)), cabled[0])


def _ring(nodes: int, cabled: list[Port], found: tuple[Port, ...], barred: Mapping[str, str]) -> LinkProblem:
    return _unusable(
        f"{len(cabled)} QSFP ports of this node have a cable, and the cluster has {nodes} nodes: a ring without a "
        "switch is not supported",
        found,
        barred,
        "connect the same port of every node to a switch. If both cables lead to a switch already, "
        f"{_naming(cabled[0].names[0])}. A ring of three is NVIDIA's own way, to be set up by hand: port 0 of each "
        "node to port 1 of the next, NCCL 2.30 update 1 or newer, and NCCL_IB_SUBNET_AWARE_ROUTING=1",
    )


def _off() -> LinkProblem:
    # Do not suggest mstflint: after a replug it can crash the kernel (Mellanox/mstflint #1786).
    return LinkProblem(
        "this node has no QSFP port",
        cause=f"its card, a ConnectX-7, is {SWITCHED_OFF}",
        hint="plug the cable in at both ends and switch both nodes on. If the card stays off, reboot both with "
        "the cable plugged in; or keep it always on: "
        f"`sudo mv {HOTPLUG} {HOTPLUG.removesuffix('enabled')}disabled`, then reboot both",
    )


def _what_is_missing(found: tuple[Port, ...], free: list[Port]) -> str:
    if not found:
        return "this node has no QSFP port"
    if not free:
        return "no QSFP port of this node may be set up"
    return "no QSFP port that may be set up has a carrier"


def _unusable(what: str, found: tuple[Port, ...], barred: Mapping[str, str], hint: str = "") -> LinkProblem:
    """Return the problem `what`, with a description of every port; `hint` replaces the general advice."""
    none = f"no interface has a name such as enp1s0f0np0 and {CONNECTX_DRIVER} as its driver"
    cause = "; ".join(_described(each, barred) for each in found) or none
    return LinkProblem(what, cause=cause, hint=hint or _advice(found, barred))


def _advice(found: tuple[Port, ...], barred: Mapping[str, str]) -> str:
    if not found:
        return "check that the card is present (`lspci -d 15b3:`) and its driver loaded (`lsmod | grep mlx5_core`)"
    free = [each for each in found if not _why_barred(each, barred)]
    cabled = [each for each in free if each.carrier]
    if cabled:
        return _naming(cabled[0].names[0])
    if not free or any(each.carrier for each in found):
        return "move ssh and the default route to another interface (the management port), then run again"
    first = free[0].names[0]
    return f"plug the cable in, set the port up (`sudo ip link set {first} up`), and run again; or {_naming(first)}"


def _naming(name: str) -> str:
    return f"name the port by one of its halves: `--interface {name}` (`network.interface` in the config)"


def _described(port: Port, barred: Mapping[str, str]) -> str:
    speed = max(each.speed for each in port.twins)
    carrier = {True: "carrier", False: "no carrier", None: "down, carrier unknown"}[port.carrier]
    words = [" + ".join(port.names), carrier, *([f"{speed} Mb/s"] if speed else [])]
    why = _why_barred(port, barred)
    return f"port {port.number}: {', '.join(words)}{f' (must not be changed: {why})' if why else ''}"


def _why_barred(port: Port, barred: Mapping[str, str]) -> str:
    return next((f"{name} {barred[name]}" for name in port.names if name in barred), "")


def _not_ready(on: Reader, half: Interface) -> str:
    if not half.hca:
        return f"{half.name} has no RDMA device"
    # The kernel prefixes the word with a number: `4: ACTIVE`.
    state = text_of(on, f"{RDMA}/{half.hca}/ports/1/state").rpartition(": ")[2]
    if state != "ACTIVE":
        return f"the RDMA device {half.hca} of {half.name} is {state or 'missing'} instead of ACTIVE"
    if any(each.type == _ROCE_V2 and each.address and each.interface == half.name for each in gids(on, half.hca)):
        return ""
    return f"the RDMA device {half.hca} has no RoCE v2 GID for an IPv4 address of {half.name}"
