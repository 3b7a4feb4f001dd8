"""What `ip` says of this node: interfaces with their addresses, and IPv4 routes."""

import json
from collections.abc import Mapping
from ipaddress import IPv4Network
from typing import Any

from msgspec import Struct

from sparkinstall.system import Reader


class Live(Struct, frozen=True):
    """An interface as it is now. `addresses`: IPv4, with prefix length; `leased` those that DHCP gave.

    `all_addresses`: those of IPv6 too, without a length.
    """

    name: str
    mtu: int
    up: bool
    carrier: bool
    addresses: tuple[str, ...]
    leased: tuple[str, ...] = ()
    all_addresses: tuple[str, ...] = ()


def live(on: Reader) -> dict[str, Live]:
    """Every interface by name; empty where `ip` gives no answer."""
    found = live_or_complaint(on)
    return {} if isinstance(found, str) else found


def live_or_complaint(on: Reader) -> dict[str, Live] | str:
    """Every interface by name, or what `ip` says where it gives no answer."""
    answer = on.ask("ip", "-j", "address")
    # Some versions of ip leave an empty object where they left an interface out.
    found = {each["ifname"]: _live(each) for each in _objects(answer.out) if "ifname" in each}
    return found if answer.ok and found else answer.err.strip()


def _live(said: Mapping[str, Any]) -> Live:
    every = [each for each in said.get("addr_info", ()) if "local" in each]
    found = [each for each in every if each.get("family") == "inet"]
    flags = said.get("flags", ())
    return Live(
        name=said["ifname"],
        mtu=said.get("mtu", 0),
        up="UP" in flags,
        carrier="LOWER_UP" in flags,
        addresses=tuple(f"{each['local']}/{each['prefixlen']}" for each in found),
        leased=tuple(f"{each['local']}/{each['prefixlen']}" for each in found if each.get("dynamic")),
        all_addresses=tuple(each["local"] for each in every),
    )


class Route(Struct, frozen=True):
    """One IPv4 route of the main table; `gateway` empty where the subnet is on the link itself."""

    to: IPv4Network
    interface: str
    gateway: str = ""


def routes(on: Reader) -> tuple[Route, ...]:
    """The IPv4 routes that lead somewhere."""
    return tuple(_route(each) for each in asked(on, "-4", "route", "show", "table", "main") if "dev" in each)


def _route(said: Mapping[str, Any]) -> Route:
    to = "0.0.0.0/0" if said["dst"] == "default" else said["dst"]
    return Route(IPv4Network(to, strict=False), said["dev"], said.get("gateway", ""))


def asked(on: Reader, *words: str) -> list[dict[str, Any]]:
    """The objects that `ip -j WORDS` prints; none where it gives no answer."""
    return _objects(on.ask("ip", "-j", *words).out)


def _objects(text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text or "[]")
    except ValueError:
        return []
    return [each for each in found if isinstance(each, dict)]
