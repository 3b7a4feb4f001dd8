"""This node's addresses on the QSFP link, and what it can reach before and after a network change."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Interface, IPv4Network
from typing import TypeVar

from msgspec import Struct

from sparkinstall.facts import ip, qsfp
from sparkinstall.node import Node
from sparkinstall.system import Reader, Result

HEADERS = 28
"""Bytes of the IPv4 and ICMP headers: a ping of MTU - 28 bytes is a packet of MTU bytes."""
_FASTEST = re.compile(r"min/avg/max[^=]*= ([\d.]+)/")
_T = TypeVar("_T")
_R = TypeVar("_R")


def own_addresses(node: Node) -> tuple[IPv4Interface, IPv4Interface]:
    """Return this node's addresses on both halves of the port: the same host number in two subnets."""
    network = node.config.network
    first = IPv4Interface(f"{node.address}/{network.prefix_length}")
    return first, twin_of(node, node.address)


def twin_of(node: Node, address: str) -> IPv4Interface:
    """Return the second half's address of the node that has `address` on its first half."""
    network = node.config.network
    one = IPv4Interface(f"{address}/{network.prefix_length}")
    other = IPv4Network(f"{network.twin_subnet}/{network.prefix_length}", strict=False)
    host = int(one.ip) & int(one.network.hostmask)
    return IPv4Interface(f"{other.network_address + host}/{network.prefix_length}")


class Reach(Struct, frozen=True):
    """What a node can reach, for comparison after a network change.

    `session`: the interface of this ssh session, or "".
    """

    defaults: tuple[tuple[str, str], ...]
    management: Mapping[str, tuple[str, ...]]
    session: str
    answered: frozenset[str]


def reach(on: Reader, node: Node, only: Iterable[str] | None = None) -> Reach:
    """Return what can be reached now; ping `only` these addresses if given, else gateways and peers."""
    there = ip.live(on)
    # Check IPv6 routes only on a node managed over IPv6 alone: routers announce them at their own pace.
    defaults = _defaults(on) or _defaults6(on)
    asked = only if only is not None else [*(gateway for _, gateway in defaults if gateway), *node.peers]
    kept = {name: there[name].addresses for name in qsfp.management(on) if name in there}
    addresses = sorted(set(asked))
    answered = at_once(lambda each: pings(on, each, count=1), addresses)
    answering = frozenset(each for each, answers in zip(addresses, answered, strict=True) if answers)
    return Reach(defaults, kept, _session(on), answering)


def _defaults(on: Reader) -> tuple[tuple[str, str], ...]:
    return tuple((each.interface, each.gateway) for each in ip.routes(on) if not each.to.prefixlen)


def _defaults6(on: Reader) -> tuple[tuple[str, str], ...]:
    found = [each for each in ip.asked(on, "-6", "route", "show", "default") if "dev" in each]
    return tuple((each["dev"], _scoped(each.get("gateway", ""), each["dev"])) for each in found)


def _scoped(address: str, interface: str) -> str:
    return f"{address}%{interface}" if address.startswith("fe80:") else address


def _session(on: Reader) -> str:
    client = next(iter(qsfp.session()), "").partition("%")[0]
    asked = ip.asked(on, "route", "get", client) if client else []
    return str(asked[0].get("dev", "")) if asked else ""


def lost(before: Reach, on: Reader, node: Node) -> str:
    """Describe the first thing that was reachable before and no longer is; "" if nothing was lost."""
    now, there = reach(on, node, before.answered), ip.live(on)
    if gone := sorted(set(before.defaults) - {*_defaults(on), *_defaults6(on)}):
        return f"the default route over {gone[0][0]} is gone"
    for name, had in before.management.items():
        if missing := set(had) - set(there[name].addresses if name in there else ()):
            return f"{name} lost its address {min(missing)}"
    if before.session and before.session != now.session:
        return f"the route of this ssh session over {before.session} is gone"
    silent = sorted(before.answered - now.answered)
    return f"{silent[0]} no longer answers" if silent else ""


def pings(on: Reader, address: str, *, count: int = 2, size: int = 0, source: str = "") -> bool:
    """Return whether `address` answers; with `size`, to unfragmented packets of that many bytes."""
    large = ("-M", "do", "-s", str(size)) if size else ()
    origin = ("-I", source) if source else ()
    return ping(on, "-c", str(count), "-i", "0.2", *large, *origin, address)


def fastest_ping(on: Reader, address: str, *, count: int) -> float | None:
    """Return the fastest of several round trips to `address` in milliseconds; None without an answer."""
    # rtt min/avg/max/mdev = 0.661/1.016/1.645/0.300 ms
    found = _FASTEST.search(_pinged(on, "-c", str(count), "-i", "0.2", address).out)
    return float(found[1]) if found else None


def ping(on: Reader, *words: str) -> bool:
    return _pinged(on, *words).ok


def _pinged(on: Reader, *words: str) -> Result:
    asked = ("ping", "-n", "-q", "-W", "1", *words)
    answer = on.ask(*asked, timeout=10)
    if "not permitted" in answer.err:
        # net.ipv4.ping_group_range may allow ping to root only.
        answer = on.ask(*asked, timeout=10, root=True)
    return answer


def at_once(ask: Callable[[_T], _R], of: Sequence[_T]) -> list[_R]:
    """Call `ask` for each in parallel, so that silent peers cost one timeout together."""
    with ThreadPoolExecutor(max_workers=max(1, min(len(of), 16))) as pool:
        return list(pool.map(ask, of))
