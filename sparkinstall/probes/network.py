"""How the QSFP link behaves: its halves as they are now, whether large packets arrive, and what must stay reachable."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Interface, IPv4Network
from typing import Any, TypeVar

from msgspec import Struct

from sparkinstall.facts import qsfp
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped, warned
from sparkinstall.system import Reader

HEADERS = 28
"""Bytes of the IPv4 and ICMP headers: a ping of MTU - 28 bytes is a packet of MTU bytes."""
_FULL_SPEED = 200_000
_T = TypeVar("_T")
_R = TypeVar("_R")


class Live(Struct, frozen=True):
    """An interface as it is now. `addresses`: IPv4, with prefix length; `leased` those that DHCP gave."""

    name: str
    mtu: int
    up: bool
    carrier: bool
    addresses: tuple[str, ...]
    leased: tuple[str, ...] = ()


def live(on: Reader) -> dict[str, Live]:
    """Every interface by name; empty where `ip` gives no answer."""
    return {each["ifname"]: _live(each) for each in _asked(on, "address") if "ifname" in each}


def _live(said: Mapping[str, Any]) -> Live:
    found = [each for each in said.get("addr_info", ()) if each.get("family") == "inet"]
    flags = said.get("flags", ())
    return Live(
        name=said["ifname"],
        mtu=said.get("mtu", 0),
        up="UP" in flags,
        carrier="LOWER_UP" in flags,
        addresses=tuple(f"{each['local']}/{each['prefixlen']}" for each in found),
        leased=tuple(f"{each['local']}/{each['prefixlen']}" for each in found if each.get("dynamic")),
    )


class Route(Struct, frozen=True):
    """One IPv4 route of the main table; `gateway` empty where the subnet is on the link itself."""

    to: IPv4Network
    interface: str
    gateway: str = ""


def routes(on: Reader) -> tuple[Route, ...]:
    """The IPv4 routes that lead somewhere."""
    return tuple(_route(each) for each in _asked(on, "-4", "route", "show", "table", "main") if "dev" in each)


def _route(said: Mapping[str, Any]) -> Route:
    to = "0.0.0.0/0" if said["dst"] == "default" else said["dst"]
    return Route(IPv4Network(to, strict=False), said["dev"], said.get("gateway", ""))


def _asked(on: Reader, *words: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(on.ask("ip", "-j", *words).out or "[]")
    except ValueError:
        return []
    return [each for each in found if isinstance(each, dict)]


def own_addresses(node: Node) -> tuple[IPv4Interface, IPv4Interface]:
    """This node's address on the first half of the port, and on the second: the same host in the other subnet."""
    network = node.config.network
    first = IPv4Interface(f"{node.address}/{network.prefix_length}")
    return first, twin_of(node, node.address)


def twin_of(node: Node, address: str) -> IPv4Interface:
    """The address on the second half of the node that has `address` on the first."""
    network = node.config.network
    one = IPv4Interface(f"{address}/{network.prefix_length}")
    other = IPv4Network(f"{network.twin_subnet}/{network.prefix_length}", strict=False)
    host = int(one.ip) & int(one.network.hostmask)
    return IPv4Interface(f"{other.network_address + host}/{network.prefix_length}")


def neighbour(on: Reader, interface: str, address: str) -> str:
    """The MAC address of who answers to `address` on the cable; empty where nobody does.

    A ping goes out for the sake of the question that comes before it: whose address is this?
    """
    # What the kernel remembers of the address may be long past.
    on.ask("ip", "neighbour", "flush", "to", address, "dev", interface, root=True)
    _ping(on, "-c", "1", "-I", interface, address)
    found = _asked(on, "neighbour", "show", "to", address, "dev", interface)
    return next((str(each.get("lladdr")) for each in found if "REACHABLE" in each.get("state", ())), "")


class Reach(Struct, frozen=True):
    """What a node can reach, to be compared after its network was changed.

    `session`: the interface over which this ssh session comes; empty where there is none.
    """

    defaults: tuple[tuple[str, str], ...]
    management: Mapping[str, tuple[str, ...]]
    session: str
    answered: frozenset[str]


def reach(on: Reader, node: Node, only: Iterable[str] | None = None) -> Reach:
    """What can be reached now; `only` these addresses are asked for an answer, instead of gateways and peers."""
    there = live(on)
    # Only a node that is managed over IPv6 alone waits for that: routers announce their route in their own time.
    defaults = _defaults(on) or _defaults6(on)
    asked = only if only is not None else [*(gateway for _, gateway in defaults if gateway), *node.peers]
    kept = {name: there[name].addresses for name in qsfp.management(on) if name in there}
    return Reach(defaults, kept, _session(on), frozenset(_that_answer(on, asked)))


def _defaults(on: Reader) -> tuple[tuple[str, str], ...]:
    return tuple((each.interface, each.gateway) for each in routes(on) if not each.to.prefixlen)


def _defaults6(on: Reader) -> tuple[tuple[str, str], ...]:
    found = [each for each in _asked(on, "-6", "route", "show", "default") if "dev" in each]
    return tuple((each["dev"], _scoped(each.get("gateway", ""), each["dev"])) for each in found)


def _scoped(address: str, interface: str) -> str:
    return f"{address}%{interface}" if address.startswith("fe80:") else address


def _session(on: Reader) -> str:
    client = next(iter(qsfp.session()), "").partition("%")[0]
    asked = _asked(on, "route", "get", client) if client else []
    return str(asked[0].get("dev", "")) if asked else ""


def _that_answer(on: Reader, addresses: Iterable[str]) -> list[str]:
    asked = sorted(set(addresses))
    answered = at_once(lambda each: pings(on, each, count=1), asked)
    return [each for each, answers in zip(asked, answered, strict=True) if answers]


def lost(before: Reach, on: Reader, node: Node) -> str:
    """What could be reached before and cannot be now, in words; empty: all of it can."""
    now, there = reach(on, node, before.answered), live(on)
    if gone := sorted(set(before.defaults) - {*_defaults(on), *_defaults6(on)}):
        return f"the default route over {gone[0][0]} is gone"
    for name, had in before.management.items():
        if missing := set(had) - set(there[name].addresses if name in there else ()):
            return f"{name} has lost its address {min(missing)}"
    if before.session and before.session != now.session:
        return f"this ssh session's way back, over {before.session}, is gone"
    silent = sorted(before.answered - now.answered)
    return f"{silent[0]} answered before and does not now" if silent else ""


def pings(on: Reader, address: str, *, count: int = 2, size: int = 0, source: str = "") -> bool:
    """Whether `address` answers; with a `size` (bytes), to packets of that size that must not be cut up."""
    large = ("-M", "do", "-s", str(size)) if size else ()
    origin = ("-I", source) if source else ()
    return _ping(on, "-c", str(count), "-i", "0.2", *large, *origin, address)


def _ping(on: Reader, *words: str) -> bool:
    asked = ("ping", "-n", "-q", "-W", "1", *words)
    answer = on.ask(*asked, timeout=10)
    if "not permitted" in answer.err:
        # Where an ordinary user may not ping (net.ipv4.ping_group_range), root may.
        answer = on.ask(*asked, timeout=10, root=True)
    return answer.ok


def at_once(ask: Callable[[_T], _R], of: Sequence[_T]) -> list[_R]:
    """`ask` of each, side by side: a peer that is silent costs its second once."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=max(1, min(len(of), 16))) as pool:
        return list(pool.map(ask, of))


def probes(node: Node) -> Iterable[Probe]:
    """The two measurements of the link."""
    yield Probe("link", "the QSFP link and its two halves", lambda on: _link(node, on), "link")
    yield Probe("peers", "large packets to every other node", lambda on: _peers(node, on), "link", others=True)


def _link(node: Node, on: Reader) -> Finding:
    if on.rehearsal:
        return skipped("a rehearsal has no QSFP port")
    port, there, mtu = qsfp.port_to_look_at(on, node), live(on), node.config.network.mtu
    expected = f"a carrier, MTU {mtu}, and an address in a subnet of its own on each half"
    if problem := _complaint(node, port, there):
        return failed(problem[0], problem[1], expected)
    speed = min(each.speed for each in port.twins)
    said = ", ".join(f"{each.name} {addr.ip}" for each, addr in zip(port.twins, own_addresses(node), strict=False))
    if 0 < speed < _FULL_SPEED:
        return warned(
            f"{said}: {speed} Mb/s", "the cable or the other end does not carry 200 Gb/s: try another cable", expected
        )
    return passed(f"{said}, MTU {mtu}" + (f", {speed // 1000} Gb/s" if speed else ""), expected)


def _complaint(node: Node, port: qsfp.Port, there: Mapping[str, Live]) -> tuple[str, str] | None:
    """What is wrong with the port and what to do."""
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
            return f"{each.name} has not the address {address}", "run `sparkinstall run network`"
    return _shared_subnet(port, there)


def _shared_subnet(port: qsfp.Port, there: Mapping[str, Live]) -> tuple[str, str] | None:
    one, other = ([IPv4Interface(a).network for a in there[each.name].addresses] for each in port.twins)
    if any(mine.overlaps(its) for mine in one for its in other):
        names = " and ".join(each.name for each in port.twins)
        return f"{names} are in one subnet", "take the further address away; `ip -4 address` shows all of them"
    return None


def _peers(node: Node, on: Reader) -> Finding:
    if on.rehearsal:
        return skipped("a rehearsal has no other nodes")
    if not node.peers:
        return skipped("there is no other node: `cluster.workers` is empty")
    if missing := _not_here(node, on):
        # A ping from an address that is not there fails, and would say nothing of the other node.
        return failed(f"this node has not its own address {missing}", "run `sparkinstall run network` here")
    found = at_once(lambda each: _peer(node, on, each), node.peers)
    worst = max(found, key=lambda each: ("pass", "warn", "fail").index(each.verdict))
    if worst.verdict == "pass":
        return passed(f"{', '.join(node.peers)} answer packets of {node.config.network.mtu} bytes", worst.expected)
    return worst


def _not_here(node: Node, on: Reader) -> str:
    """Those of this node's own addresses that no interface has; empty also where `ip` tells nothing."""
    have = {str(IPv4Interface(each).ip) for one in live(on).values() for each in one.addresses}
    own = [str(each.ip) for each in own_addresses(node)]
    return " and ".join(each for each in own if have and each not in have)


def _peer(node: Node, on: Reader, peer: str) -> Finding:
    mtu = node.config.network.mtu
    expected = f"every node answers whole packets of {mtu} bytes on both halves"
    here, there = (str(each.ip) for each in own_addresses(node)), (peer, str(twin_of(node, peer).ip))
    ways = list(zip(there, here, strict=True))
    if all(pings(on, to, count=1, size=mtu - HEADERS, source=own) for to, own in ways):
        return passed(f"{peer} answers packets of {mtu} bytes", expected)
    return _unlike_a_peer(node, on, peer, ways, expected)


def _unlike_a_peer(node: Node, on: Reader, peer: str, ways: Sequence[tuple[str, str]], expected: str) -> Finding:
    """What is wrong with a peer that has left a large packet unanswered: asked again, for one may get lost."""
    mtu = node.config.network.mtu
    small = [pings(on, to, source=own) for to, own in ways]
    large = [a and pings(on, to, size=mtu - HEADERS, source=own) for (to, own), a in zip(ways, small, strict=True)]
    if not any(small):
        return warned(f"{peer} does not answer", "set up the other node, then `sparkinstall verify`", expected)
    for (to, _), answers, whole in zip(ways, small, large, strict=True):
        if answers and not whole:
            said = f"{to} answers small packets and not large ones: its MTU, or that of a switch, is below {mtu}"
            return failed(said, "set up the other node (`sparkinstall run network` there)", expected)
    if not all(small):
        silent = ways[small.index(False)][0]
        said = f"{peer} answers on one half only: {silent} does not"
        return warned(said, "set up the other node with `network.manage: true`, then `sparkinstall verify`", expected)
    return passed(f"{peer} answers packets of {mtu} bytes", expected)
