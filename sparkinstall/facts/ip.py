"""Interfaces, addresses and IPv4 routes of this node, from `ip`."""

import json
from collections.abc import Mapping
from ipaddress import IPv4Network
from typing import Any

from msgspec import Struct

from sparkinstall.system import Reader

_ADDRESS_FLAGS = ("noprefixroute", "nodad", "home", "mngtmpaddr")


class Live(Struct, frozen=True):
    """The current state of an interface. `addresses`: IPv4 with prefix length; `leased`: those from DHCP.

    `all_addresses`: IPv4 and IPv6, without prefix length. `fixed`: IPv4 and IPv6 with prefix length, but those that a
    router or a DHCP server gave for a time; `as_added`: the same as words for `ip address add`, with all properties.
    `names`: its own name and further ones. `master`: the bridge, bond or VRF that it is in.
    """

    name: str
    mtu: int
    up: bool
    carrier: bool
    addresses: tuple[str, ...]
    leased: tuple[str, ...] = ()
    all_addresses: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    as_added: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    index: int = 0
    mac: str = ""
    master: str = ""


def live(on: Reader) -> dict[str, Live]:
    """Return every interface by name; {} if `ip` fails."""
    found = live_or_complaint(on)
    return {} if isinstance(found, str) else found


def live_or_complaint(on: Reader) -> dict[str, Live] | str:
    """Return every interface by name, or the error message of `ip`."""
    answer = on.ask("ip", "-j", "address")
    # Some versions of ip print an empty object for an interface that they leave out.
    found = {each["ifname"]: _live(each) for each in _objects(answer.out) if "ifname" in each}
    return found if answer.ok and found else answer.err.strip()


def _live(shown: Mapping[str, Any]) -> Live:
    every = [each for each in shown.get("addr_info", ()) if "local" in each]
    found = [each for each in every if each.get("family") == "inet"]
    flags = shown.get("flags", ())
    return Live(
        name=shown["ifname"],
        mtu=shown.get("mtu", 0),
        up="UP" in flags,
        carrier="LOWER_UP" in flags,
        addresses=tuple(f"{each['local']}/{each['prefixlen']}" for each in found),
        leased=tuple(f"{each['local']}/{each['prefixlen']}" for each in found if each.get("dynamic")),
        all_addresses=tuple(each["local"] for each in every),
        fixed=tuple(f"{each['local']}/{each['prefixlen']}" for each in every if not each.get("dynamic")),
        as_added=tuple(_as_added(each, shown["ifname"]) for each in every if not each.get("dynamic")),
        names=(shown["ifname"], *shown.get("altnames", ())),
        index=shown.get("ifindex", 0),
        mac=shown.get("address", ""),
        master=shown.get("master", ""),
    )


def _as_added(address: Mapping[str, Any], interface: str) -> str:
    local, length = address["local"], address["prefixlen"]
    words = [f"{local} peer {address['address']}/{length}" if "address" in address else f"{local}/{length}"]
    words += [f"{key} {address[key]}" for key in ("broadcast", "metric") if key in address]
    if address.get("family") == "inet":
        words += [f"scope {address['scope']}"] if address.get("scope", "global") != "global" else []
        words += [f"label {address['label']}"] if address.get("label", interface) != interface else []
    words += [flag for flag in _ADDRESS_FLAGS if address.get(flag)]
    return " ".join([*words, *(["preferred_lft 0"] if address.get("deprecated") else [])])


class Route(Struct, frozen=True):
    """One IPv4 route of the main table; `gateway` is "" for a directly connected subnet."""

    to: IPv4Network
    interface: str
    gateway: str = ""


def routes(on: Reader) -> tuple[Route, ...]:
    """Return the IPv4 routes that have an interface."""
    return tuple(_route(each) for each in asked(on, "-4", "route", "show", "table", "main") if "dev" in each)


def _route(shown: Mapping[str, Any]) -> Route:
    to = "0.0.0.0/0" if shown["dst"] == "default" else shown["dst"]
    return Route(IPv4Network(to, strict=False), shown["dev"], shown.get("gateway", ""))


def asked(on: Reader, *words: str) -> list[dict[str, Any]]:
    """Return the objects that `ip -j WORDS` prints; [] if it fails."""
    return _objects(on.ask("ip", "-j", *words).out)


def _objects(text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text or "[]")
    except ValueError:
        return []
    return [each for each in found if isinstance(each, dict)]
