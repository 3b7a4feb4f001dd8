"""Probes of the QSFP link: its halves, large packets to other nodes, error counters, firmware, GIDs for RoCE."""

import time
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Interface

from sparkinstall import fixes
from sparkinstall.facts import card, ip, qsfp
from sparkinstall.facts.decisions import NcclTransport, recorded
from sparkinstall.facts.network import HEADERS, at_once, own_addresses, pings, twin_of
from sparkinstall.facts.qsfp import Port
from sparkinstall.facts.sysfs import NET, text_of
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped, warned
from sparkinstall.system import Reader

_NO_PORT = "a rehearsal has no QSFP port"
_FULL_SPEED = 200_000
# Seconds between two readings of the counters.
_PAUSE = 1.0
# Errors per packet since the boot; plugging a cable in causes fewer.
_TOLERATED, _FEW = 1e-5, 100


def probes(node: Node) -> Iterable[Probe]:
    """Yield the probes of the link that cause no load."""
    yield Probe(
        "link", "the QSFP link and its two halves", lambda on: _link(node, on), "link",
        "The nodes communicate at half the speed, or not at all.", fixes.MTU, needs_node=_NO_PORT,
    )  # fmt: skip
    yield Probe(
        "peers", "large packets to every other node", lambda on: _peers(node, on), "link",
        "Large packets are lost between the nodes: collectives hang or time out.", fixes.MTU, others=True,
        needs_node="a rehearsal has no other nodes",
    )  # fmt: skip
    yield Probe(
        "link-health", "errors, PCIe lanes and firmware of the link", lambda on: _health(node, on), "link",
        "The link loses packets or runs below its rate: collectives are slow or hang.", needs_node=_NO_PORT,
    )  # fmt: skip
    yield Probe(
        "gids", "a RoCE GID for the address of each half", lambda on: _gids(node, on), "link",
        "NCCL falls back to sockets, or does not start, because RoCE lacks an address.",
        needs_node="a rehearsal has no RDMA devices",
    )  # fmt: skip


def _link(node: Node, on: Reader) -> Finding:
    port, there, mtu = qsfp.port_to_look_at(on, node), ip.live(on), node.config.network.mtu
    expected = f"a carrier, MTU {mtu}, and an address in a subnet of its own on each half"
    if problem := _complaint(node, port, there):
        return failed(problem[0], problem[1], expected)
    speed = min(each.speed for each in port.twins)
    said = ", ".join(f"{each.name} {addr.ip}" for each, addr in zip(port.twins, own_addresses(node), strict=False))
    if 0 < speed < _FULL_SPEED:
        return warned(
            f"{said}: {speed} Mb/s", "the cable or the other end does not carry 200 Gb/s: try another cable", expected
        )
    spare = qsfp.unused_cable(on, node)
    said += f", MTU {mtu}" + (f", {speed // 1000} Gb/s" if speed else "") + (f"; {spare}" if spare else "")
    return passed(said, expected)


def _complaint(node: Node, port: Port, there: Mapping[str, ip.Live]) -> tuple[str, str] | None:
    """Return what is wrong with the port, and what to do."""
    if len(port.twins) < 2:
        return f"{port.twins[0].name} has no second half", "look at `lspci`: each port shows as two devices"
    for each, address in zip(port.twins, own_addresses(node), strict=True):
        now = there.get(each.name)
        if now is None or not now.up:
            return f"{each.name} is down", "run `sparkinstall run network`"
        if not now.carrier:
            return f"{each.name} has no carrier", "plug the cable in at both ends, and switch the other node on"
        if now.mtu != node.config.network.mtu:
            return f"{each.name} has MTU {now.mtu}", "run `sparkinstall run network`"
        if str(address) not in now.addresses:
            return f"{each.name} does not have the address {address}", "run `sparkinstall run network`"
    return _shared_subnet(port, there)


def _shared_subnet(port: Port, there: Mapping[str, ip.Live]) -> tuple[str, str] | None:
    one, other = ([IPv4Interface(a).network for a in there[each.name].addresses] for each in port.twins)
    if any(mine.overlaps(its) for mine in one for its in other):
        names = " and ".join(port.names)
        return f"{names} are in one subnet", "remove the additional address; `ip -4 address` shows all of them"
    return None


def _peers(node: Node, on: Reader) -> Finding:
    if not node.peers:
        return skipped("there is no other node: `cluster.workers` is empty")
    if missing := _not_here(node, on):
        # A ping from a missing address fails, and would tell nothing about the other node.
        return failed(f"this node's own address is not configured: {missing}", "run `sparkinstall run network` here")
    found = at_once(lambda each: _peer(node, on, each), node.peers)
    worst = max(found, key=lambda each: ("pass", "warn", "fail").index(each.verdict))
    if worst.verdict == "pass":
        return passed(f"{', '.join(node.peers)} answer packets of {node.config.network.mtu} bytes", worst.expected)
    return worst


def _not_here(node: Node, on: Reader) -> str:
    """Return this node's addresses that no interface has; "" also if `ip` fails."""
    have = {str(IPv4Interface(each).ip) for one in ip.live(on).values() for each in one.addresses}
    own = [str(each.ip) for each in own_addresses(node)]
    return " and ".join(each for each in own if have and each not in have)


def _peer(node: Node, on: Reader, peer: str) -> Finding:
    mtu = node.config.network.mtu
    expected = f"every node answers whole packets of {mtu} bytes on both halves"
    here, there = (str(each.ip) for each in own_addresses(node)), (peer, str(twin_of(node, peer).ip))
    ways = list(zip(there, here, strict=True))
    if all(pings(on, to, count=1, size=mtu - HEADERS, source=own) for to, own in ways):
        return passed(f"{peer} answers packets of {mtu} bytes", expected)
    # Ping it again, because a packet may get lost.
    small = [pings(on, to, source=own) for to, own in ways]
    if not any(small):
        hint = f"set up the other node, then `sparkinstall verify`{qsfp.if_crossed(on, node)}"
        return warned(f"{peer} does not answer", hint, expected)
    for (to, own), answers in zip(ways, small, strict=True):
        if answers and not pings(on, to, size=mtu - HEADERS, source=own):
            said = f"{to} answers small packets and not large ones: its MTU, or that of a switch, is below {mtu}"
            return failed(said, "set up the other node (`sparkinstall run network` there)", expected)
    if not all(small):
        said = f"{peer} answers on one half only: {ways[small.index(False)][0]} does not"
        return warned(said, "set up the other node with `network.manage: true`, then `sparkinstall verify`", expected)
    return passed(f"{peer} answers packets of {mtu} bytes", expected)


def _health(node: Node, on: Reader) -> Finding:
    port = qsfp.port_to_look_at(on, node)
    before = card.counted(on, port)
    time.sleep(_PAUSE)
    now = card.counted(on, port)
    expected = "no errors, and the same firmware on both halves"
    if complaint := _trouble(on, port, card.grown(before, now), _many(now)):
        return warned(*complaint, expected)
    return passed(_facts(on, port, now), expected)


def _many(so_far: card.Counted) -> dict[str, int]:
    """Return counters that are higher since the boot than plugging in a cable explains."""
    found = {}
    for name, count in so_far.errors.items():
        interface, _, counter = name.partition(" ")
        # This counter grows whenever the other node starts.
        if counter != "carrier_changes" and count > max(_FEW, so_far.packets[interface] * _TOLERATED):
            found[name] = count
    return found


def _trouble(on: Reader, port: Port, growing: Mapping[str, int], high: Mapping[str, int]) -> tuple[str, str] | None:
    """Return the worst problem, and what to do."""
    if growing:
        return f"growing within a second: {card.in_words(growing)}", _CABLE
    for half in port.twins:
        if text_of(on, f"{NET}/{half.name}/duplex") == "half":
            return f"{half.name} runs half duplex", _CABLE
    if high:
        return f"since the boot: {card.in_words(high)}", _CABLE
    versions = {half.name: version for half in port.twins if (version := card.firmware(on, half))}
    if len(set(versions.values())) > 1:
        said = ", ".join(f"{version} on {name}" for name, version in versions.items())
        return f"the halves have different firmware: {said}", _UPDATES
    return None


_CABLE = "replug the cable at both ends, or try another one; then `sparkinstall verify --only link-health`"
_UPDATES = "install the updates of DGX OS, and switch the node off and on"


def _facts(on: Reader, port: Port, now: card.Counted) -> str:
    # `connectx-pcie`, one of the known-bad hosts, judges the lanes.
    widths = sorted({card.lanes(on, half.name) for half in port.twins})
    known = [f"PCIe x{width} at {rate:g} GT/s" for width, rate in widths if width]
    fec = {card.ethtool(on, "Active FEC encoding", "--show-fec", half.name) for half in port.twins} - {""}
    versions = {card.firmware(on, half) for half in port.twins} - {"", "N/A"}
    known += [f"FEC {each}" for each in sorted(fec)] + [f"firmware {each}" for each in sorted(versions)]
    errors = {name: count for name, count in now.errors.items() if count and not name.endswith("carrier_changes")}
    few = ", ".join(f"{name} {count}" for name, count in errors.items())
    known.append(f"few errors since the boot ({few}), none in this second" if few else "no errors since the boot")
    return ", ".join(known)


def _gids(node: Node, on: Reader) -> Finding:
    decided = recorded(on, node.transport_decision, NcclTransport)
    if decided is None:
        return skipped("NCCL's transport is not decided yet: `sparkinstall all` does that")
    if decided.transport == "socket":
        return passed("NCCL uses sockets on this node, and needs none")
    port = qsfp.port_to_look_at(on, node)
    expected = "each half's RDMA device is ACTIVE and has a RoCE v2 GID for that half's address"
    if why := qsfp.roce_ready(on, port):
        return failed(why, _ROCE, expected)
    halves = [(half.hca, str(own.ip)) for half, own in zip(port.twins, own_addresses(node), strict=False)]
    found = {hca: (address, qsfp.roce_gid(on, hca, address)) for hca, address in halves}
    for hca, (address, index) in found.items():
        if index is None:
            return failed(f"{hca} has no RoCE v2 GID for {address}", _ROCE, expected)
    return passed(", ".join(f"{hca} index {index}: {address}" for hca, (address, index) in found.items()), expected)


_ROCE = (
    "`sparkinstall run network` configures the addresses, from which the card derives the GIDs; "
    "if they remain missing, use sockets on all nodes: `--set network.transport=socket`"
)
