"""The QSFP ports of this node, as the kernel shows them: which has the cable, its two halves, their RDMA devices.

Nothing here is known by a name beforehand but the form that names of such a port have.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from sparkinstall.errors import Problem
from sparkinstall.facts import ip
from sparkinstall.facts.sysfs import CONNECTX_DRIVER, NET, RDMA, driver_of, text_of
from sparkinstall.node import Node
from sparkinstall.system import Reader

_HALVES = 2

# systemd's name for a port of a card with several: PCI domain (none: 0), bus, slot, function, and the port's own
# number. Of a ConnectX-7 the function and the port are the same number.
_HALF = re.compile(r"en(?:P(?P<domain>[0-9]+))?(?P<place>p[0-9]+s[0-9]+f(?P<port>[0-9]+))np(?P=port)")
_GID = re.compile(r"[0-9a-f]{4}(?::[0-9a-f]{4}){7}", re.IGNORECASE)
_MAPPED = "0000:0000:0000:0000:0000:ffff:"
_ROCE_V2 = "RoCE v2"
_SESSION = "carries this ssh session"

# DGX OS (since 26.02) takes the card off its bus while it is of no use, where this file is: dgx-spark-mlnx-hotplug.
HOTPLUG = "/etc/nvidia/cx7-hotplug-enabled"
# The kernel's side of it (NVIDIA/NV-Kernels #271): 0 while no cable counts as plugged in.
_PLUGGED_IN = "/sys/devices/platform/MTKP0001:00/pcie_hotplug/debug_state"
SWITCHED_OFF = "switched off to save power until a cable is in and the other node is on"

# Bits of a route's flags (linux/route.h).
_RTF_UP, _RTF_REJECT = 0x1, 0x200


class LinkProblem(Problem):
    """The QSFP port cannot be told; the message lists the candidates and names the option."""


class Interface(Struct, frozen=True):
    """One half of a QSFP port. `carrier` None: the interface is down, so nobody knows. `speed` in Mb/s, 0: not told.

    `hca` is its RDMA device; empty where there is none.
    """

    name: str
    port: int
    carrier: bool | None
    mtu: int
    speed: int
    hca: str = ""


class Port(Struct, frozen=True):
    """A physical port and its halves (twins), the first PCI domain's first."""

    number: int
    twins: tuple[Interface, ...]

    @property
    def carrier(self) -> bool | None:
        """True where any half has one; None where no half is up."""
        known = [each.carrier for each in self.twins if each.carrier is not None]
        return any(known) if known else None


class Gid(Struct, frozen=True):
    """One entry of an RDMA device's table of addresses. `type` such as `RoCE v2`."""

    index: int
    value: str
    type: str
    interface: str

    @property
    def address(self) -> str:
        """The IPv4 address that it stands for; empty where it stands for another."""
        return mapped_address(self.value)


def ports(on: Reader) -> tuple[Port, ...]:
    """Every QSFP port, in the order of their numbers."""
    halves = [_half(on, name) for name in sorted(filter(_HALF.fullmatch, on.names(NET)), key=_domain)]
    known = [half for half in halves if half is not None]
    numbers = sorted({half.port for half in known})
    return tuple(Port(each, tuple(half for half in known if half.port == each)[:_HALVES]) for each in numbers)


def management(on: Reader) -> Mapping[str, str]:
    """Interfaces that must never be touched, each with why: the default route's, that of this ssh session, Wi-Fi.

    A why goes on after the interface's name: "has the default route". In a rehearsal, which is not
    the machine that the ssh session is on, only the files beneath the root count.

    Raises:
        LinkProblem: `ip` cannot tell which interface has this ssh session's address.
    """
    routes = (
        *default_routes(on.read("/proc/net/route") or b""),
        *default_routes6(on.read("/proc/net/ipv6_route") or b""),
    )
    found = dict.fromkeys(routes, "has the default route")
    for name in _of_this_session(on):
        found.setdefault(name, _SESSION)
    for name in on.names(NET):
        if on.entry(f"{NET}/{name}/wireless") or on.entry(f"{NET}/{name}/phy80211"):
            found.setdefault(name, "is Wi-Fi")
    return _with_relatives(on, found)


def used_port(on: Reader, node: Node) -> Port:
    """The port with the cable, or the one that `network.interface` names.

    In a rehearsal, which has no ports of its own: port 0 as a Spark has it.

    Raises:
        LinkProblem: there is none, or more than one, or the one named must not be touched.
    """
    return _chosen(on, node, management(on))


def port_to_look_at(on: Reader, node: Node) -> Port:
    """The port as `used_port` tells it; where this ssh session came in over it, it may be looked at all the same.

    Raises:
        LinkProblem: there is none, or more than one.
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
        raise _refused(wanted, barred[wanted], found, barred)
    if on.rehearsal and not found:
        return _as_on_a_spark(wanted)
    if not found and switched_off(on):
        raise _off()
    return _named_port(on, wanted, found, barred) if wanted else _cabled_port(found, barred)


def switched_off(on: Reader) -> bool:
    """Whether a ConnectX-7 that is not to be seen is one that DGX OS has switched off."""
    return on.entry(HOTPLUG) is not None or text_of(on, _PLUGGED_IN) == "0"


def addresses(on: Reader) -> Mapping[str, tuple[str, ...]]:
    """The IPv4 addresses of each interface that has any, as `a.b.c.d/length`; empty in a rehearsal.

    Raises:
        LinkProblem: `ip` gives no answer.
    """
    if on.rehearsal:
        return {}
    return {name: each.addresses for name, each in _live(on).items() if each.addresses}


def gids(on: Reader, hca: str) -> tuple[Gid, ...]:
    """The table of an RDMA device; entries that are all zero are left out."""
    table = f"{RDMA}/{hca}/ports/1"
    values = {index: text_of(on, f"{table}/gids/{index}") for index in _numbers(on, f"{table}/gids")}
    return tuple(
        Gid(
            index,
            value,
            text_of(on, f"{table}/gid_attrs/types/{index}"),
            text_of(on, f"{table}/gid_attrs/ndevs/{index}"),
        )
        for index, value in values.items()
        if _GID.fullmatch(value) and value.strip("0:")
    )


def roce_gid(on: Reader, hca: str, address: str) -> int | None:
    """The index of the RoCE v2 GID that is the IPv4 `address`, or None."""
    found = (each.index for each in gids(on, hca) if each.type == _ROCE_V2 and each.address == address)
    return next(found, None)


def roce_ready(on: Reader, port: Port) -> str:
    """Why RoCE cannot be used on this port; empty where it can.

    It can where each half has an RDMA device whose port is active and which has a RoCE v2 GID for an
    IPv4 address of that half.
    """
    return next((why for each in port.twins if (why := _not_ready(on, each))), "")


def mapped_address(gid: str) -> str:
    """The IPv4 address in a GID such as 0000:0000:0000:0000:0000:ffff:c0a8:640a; empty where there is none. Never
    raises."""
    if not _GID.fullmatch(gid) or not gid.lower().startswith(_MAPPED):
        return ""
    return ".".join(str(byte) for byte in bytes.fromhex(gid[-9:].replace(":", "")))


def default_routes(content: bytes) -> tuple[str, ...]:
    """The interfaces of IPv4 default routes in what /proc/net/route says. Never raises."""
    rows = [line.split() for line in content.split(b"\n")]
    return _route_names((row[0], row[3]) for row in rows if len(row) >= 8 and row[1] == row[7] == b"0" * 8)


def default_routes6(content: bytes) -> tuple[str, ...]:
    """The interfaces of IPv6 default routes in what /proc/net/ipv6_route says. Never raises."""
    rows = [line.split() for line in content.split(b"\n")]
    return _route_names((row[9], row[8]) for row in rows if len(row) >= 10 and row[:2] == [b"0" * 32, b"00"])


def _route_names(routes: Iterable[tuple[bytes, bytes]]) -> tuple[str, ...]:
    """Those whose route is in use and leads somewhere: the kernel has one to nowhere at `lo`."""
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
    # An interface without a device is a virtual one: nobody gives it such a name by chance.
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
    # Several devices beneath one card, or one that speaks for a bond: their tables of addresses name the interface.
    return next((each for each in listed or devices if name in _interfaces(on, each)), listed[0] if listed else "")


def _interfaces(on: Reader, hca: str) -> set[str]:
    folder = f"{RDMA}/{hca}/ports/1/gid_attrs/ndevs"
    return {text_of(on, f"{folder}/{index}") for index in on.names(folder)}


def _number(text: str) -> int:
    # -1 is what `speed` says of a link that is down.
    return int(text) if text.isascii() and text.isdecimal() else 0


def _numbers(on: Reader, folder: str) -> list[int]:
    return sorted(int(name) for name in on.names(folder) if name.isascii() and name.isdecimal())


def _of_this_session(on: Reader) -> tuple[str, ...]:
    """The interface that has the address at which this ssh session came in; sshd says which (SSH_CONNECTION)."""
    words = () if on.rehearsal else session()
    if not words:
        return ()
    # A link-local address may be on several interfaces; the one that is meant stands behind it.
    address, _, scope = words[2].partition("%")
    return tuple(name for name, each in _live(on).items() if address in each.all_addresses and scope in ("", name))


def session() -> tuple[str, ...]:
    """Client, its port, server and its port of the ssh session that this process belongs to; empty: there is none.

    sudo takes the variable away; the shell before it still has it.
    """
    said, pid = os.environ.get("SSH_CONNECTION", ""), os.getppid()
    while not said and pid > 1 and os.environ.get("SUDO_USER"):
        said, pid = _of_process(pid)
    words = tuple(said.split())
    return words if len(words) == 4 else ()


def _of_process(pid: int) -> tuple[str, int]:
    """The variable as a process has it, and that process's parent (0: not to be told)."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        # The program's name stands in brackets and may hold any character.
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return "", 0
    found = (each.partition(b"=")[2] for each in variables if each.startswith(b"SSH_CONNECTION="))
    return next(found, b"").decode(errors="replace"), parent


def _live(on: Reader) -> Mapping[str, ip.Live]:
    found = ip.live_or_complaint(on)
    if isinstance(found, str):
        raise LinkProblem(
            "`ip -j addr` does not say which addresses this node has",
            cause=found[-300:],
            hint="is iproute2 installed? `sudo apt-get install iproute2`",
        )
    return found


def _with_relatives(on: Reader, found: Mapping[str, str]) -> Mapping[str, str]:
    """`found`, and what these interfaces run over or are part of: a bridge's members, a VLAN's card, a bond."""
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
    """The port that `wanted` implies, or port 0, with both halves and their devices as DGX OS names them."""
    name = wanted or "enp1s0f0np0"
    form = _HALF.fullmatch(name)
    if form is None:
        raise LinkProblem(
            f"{name} is no half of a QSFP port",
            cause="such a half has a name like enp1s0f0np0 or enP2p1s0f1np1",
            hint=_naming("enp1s0f0np0"),
        )
    number, place = int(form["port"]), form["place"]
    second = f"P{form['domain'] or 2}"
    return Port(
        number,
        tuple(
            Interface(f"en{domain}{place}np{number}", number, None, 1500, 0, f"roce{domain}{place}")
            for domain in ("", second)
        ),
    )


def _named_port(on: Reader, wanted: str, found: tuple[Port, ...], barred: Mapping[str, str]) -> Port:
    port = next((each for each in found if wanted in _names(each)), None)
    if port is None:
        there = wanted in on.names(NET)
        what = f"{wanted} is no half of a QSFP port" if there else f"this node has no interface {wanted}"
        raise LinkProblem(what, cause=_all_described(found, barred), hint=_advice(found, barred))
    for name in _names(port):
        if name in barred:
            raise _refused(name, barred[name], found, barred)
    cabled = [each for each in found if each.carrier and not _why_barred(each, barred)]
    if port.carrier is False and cabled:
        raise LinkProblem(
            f"{wanted} has no carrier, but port {cabled[0].number} has one: the cable is in the other port",
            cause=_all_described(found, barred),
            hint=f"{_naming(cabled[0].twins[0].name)}, or put the cable into port {port.number}",
        )
    return port


def _cabled_port(found: tuple[Port, ...], barred: Mapping[str, str]) -> Port:
    free = [each for each in found if not _why_barred(each, barred)]
    cabled = [each for each in free if each.carrier]
    if len(cabled) == 1:
        return cabled[0]
    # With the cable in a port that must not be touched, the other one is a guess that nobody asked for.
    if len(free) == 1 and not any(each.carrier for each in found):
        return free[0]
    raise LinkProblem(
        _what_is_unclear(found, free, cabled), cause=_all_described(found, barred), hint=_advice(found, barred)
    )


def _off() -> LinkProblem:
    # Not among what to do: to ask the card itself. mstflint after a replug can bring the kernel down
    # (Mellanox/mstflint #1786).
    return LinkProblem(
        "this node has no QSFP port",
        cause=f"its card, a ConnectX-7, is {SWITCHED_OFF}",
        hint="put the cable in at both ends and switch both nodes on. If it stays off, reboot both with the cable in; "
        f"or let it always be on: `sudo mv {HOTPLUG} {HOTPLUG.removesuffix('enabled')}disabled`, then reboot both",
    )


def _what_is_unclear(found: tuple[Port, ...], free: list[Port], cabled: list[Port]) -> str:
    if not found:
        return "this node has no QSFP port"
    if not free:
        return "no QSFP port of this node is free to be set up"
    if cabled:
        return f"{len(cabled)} QSFP ports have a carrier: which one leads to the other node?"
    return "no QSFP port that may be set up has a carrier"


def _refused(name: str, why: str, found: tuple[Port, ...], barred: Mapping[str, str]) -> LinkProblem:
    return LinkProblem(
        f"{name} must not be touched: it {why}", cause=_all_described(found, barred), hint=_advice(found, barred)
    )


def _advice(found: tuple[Port, ...], barred: Mapping[str, str]) -> str:
    if not found:
        return "is the card there (`lspci -d 15b3:`), and its driver loaded (`lsmod | grep mlx5_core`)?"
    free = [each for each in found if not _why_barred(each, barred)]
    cabled = [each for each in free if each.carrier]
    if cabled:
        return _naming(cabled[0].twins[0].name)
    if not free or any(each.carrier for each in found):
        return "let ssh and the default route use another interface (the management port), then run again"
    first = free[0].twins[0].name
    return (
        f"put the cable in, see that the port is up (`sudo ip link set {first} up`), and run again; or {_naming(first)}"
    )


def _naming(name: str) -> str:
    return f"name the port by one of its halves: `--interface {name}` (`network.interface` in the config)"


def _all_described(found: tuple[Port, ...], barred: Mapping[str, str]) -> str:
    if not found:
        return f"no interface has a name such as enp1s0f0np0 and {CONNECTX_DRIVER} as its driver"
    return "; ".join(_described(each, barred) for each in found)


def _described(port: Port, barred: Mapping[str, str]) -> str:
    speed = max(each.speed for each in port.twins)
    carrier = {True: "carrier", False: "no carrier", None: "down, so its carrier is not known"}[port.carrier]
    words = [" + ".join(_names(port)), carrier, *([f"{speed} Mb/s"] if speed else [])]
    why = _why_barred(port, barred)
    return f"port {port.number}: {', '.join(words)}{f' (must not be touched: {why})' if why else ''}"


def _why_barred(port: Port, barred: Mapping[str, str]) -> str:
    return next((f"{name} {barred[name]}" for name in _names(port) if name in barred), "")


def _names(port: Port) -> tuple[str, ...]:
    return tuple(each.name for each in port.twins)


def _not_ready(on: Reader, half: Interface) -> str:
    if not half.hca:
        return f"{half.name} has no RDMA device"
    # The kernel writes a number before the word: `4: ACTIVE`.
    state = text_of(on, f"{RDMA}/{half.hca}/ports/1/state").rpartition(": ")[2]
    if state != "ACTIVE":
        return f"the RDMA device {half.hca} of {half.name} is {state or 'not to be found'} instead of ACTIVE"
    if any(each.type == _ROCE_V2 and each.address and each.interface == half.name for each in gids(on, half.hca)):
        return ""
    return f"the RDMA device {half.hca} has no RoCE v2 GID for an IPv4 address of {half.name}"
