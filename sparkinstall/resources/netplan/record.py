"""The live state of interfaces: recorded before `netplan apply`, restored and compared with afterwards."""

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from sparkinstall.errors import Problem
from sparkinstall.facts import ip
from sparkinstall.facts.sysfs import text_of
from sparkinstall.resources.netplan import files, networkd
from sparkinstall.system import Reader

_WRITTEN = ("", "static", "boot")
"""Who adds routes that a person or a file names; those of others (kernel, dhcp, ra, a daemon) return by themselves."""
_KERNEL = "/proc/sys/net/{}/conf/{}/{}"
_SETTINGS = (
    ("ipv4", "promote_secondaries"),
    *(("ipv6", each) for each in ("accept_ra", "addr_gen_mode", "disable_ipv6", "use_tempaddr")),
)
"""The kernel's settings that networkd writes for each of its interfaces, whatever its files say. Others, such as
`forwarding`, it writes only if a file says so, and other programs change them at any time."""
_MODES = {"0": "eui64", "1": "none", "2": "stable_secret", "3": "random"}
"""The values of `addr_gen_mode` as words for `ip`, which can set it where `/proc/sys` is read-only."""
_RULES = ""
"""The key of the routing rules in a record; every other key is an interface."""
_PATIENCE = 20.0
# networkd goes on after `netplan apply` has ended, and removes what it does not know.
_SETTLED = """\
for _ in 1 2 3 4 5 6 7 8 9 10; do
sleep 1
networkctl --no-legend --no-pager list 2> /dev/null | grep -Eq '(configuring|pending) *$' || break
done"""


def taken(on: Reader, names: Iterable[str]) -> dict[str, Any]:
    """Return the state of the interfaces `names` and the routing rules, as JSON values.

    Addresses and routes that a DHCP server, a router or the kernel gave are left out.

    Raises:
        Problem: `ip` does not show it. What cannot be read is not taken for absent.
    """
    live = ip.live_or_complaint(on)
    if isinstance(live, str):
        raise Problem("the network cannot be read", cause=live, hint="find out why `ip -j address` fails")
    routes, neighbours = _routes(on), _neighbours(on)
    found = {name: _state(on, live[name], routes, neighbours) for name in sorted(names) if name in live}
    return {**found, _RULES: [f"{family} {line}" for family in ("-4", "-6") for line in _rules(on, family)]}


def _state(
    on: Reader, there: ip.Live, routes: Mapping[str, list[str]], neighbours: Mapping[str, list[str]]
) -> dict[str, Any]:
    networkd_says = networkd.state_of(on, there)
    return {
        "mtu": there.mtu,
        "up": there.up,
        "addresses": list(there.as_added),
        "routes": routes.get(there.name, []),
        "neighbours": neighbours.get(there.name, []),
        "master": there.master,
        "kernel": {"/".join(each): text_of(on, _KERNEL.format(each[0], there.name, each[1])) for each in _SETTINGS},
        "dhcp": bool(there.leased),
        "dns": networkd_says.get("DNS", ""),
        "file": networkd_says.get("NETWORK_FILE", ""),
    }


def _routes(on: Reader) -> dict[str, list[str]]:
    """Return the routes that a person or a file named, by interface, as words for `ip route add`."""
    found: dict[str, list[str]] = {}
    for family in ("-4", "-6"):
        for line in on.ask("ip", "-o", family, "route", "show", "table", "all").out.splitlines():
            # The next hops are lines of their own, which `-o` joins with backslashes.
            words = [each for each in line.replace("\\", " ").split() if each not in ("linkdown", "dead")]
            if "nhid" in words:
                # It names its next hop too.
                del words[(at := words.index("nhid")) : at + 2]
            if dict(pairwise(words)).get("proto", "") in _WRITTEN and "expires" not in words:
                for name in {after for word, after in pairwise(words) if word == "dev"}:
                    found.setdefault(name, []).append(" ".join((family, *words)))
    return found


def _neighbours(on: Reader) -> dict[str, list[str]]:
    """Return the permanent neighbours, by interface, as words for `ip neighbour replace`."""
    found: dict[str, list[str]] = {}
    for each in ip.asked(on, "neighbour", "show", "nud", "permanent"):
        if {"dst", "dev", "lladdr"} <= each.keys() and "extern_learn" not in each:
            found.setdefault(each["dev"], []).append(f"{each['dst']} lladdr {each['lladdr']}")
    return found


def _rules(on: Reader, family: str) -> Iterator[str]:
    for line in on.ask("ip", family, "rule", "show").out.splitlines():
        preference, _, rest = line.partition(":")
        if rest and preference not in ("0", "32766", "32767") and "[" not in rest and "proto kernel" not in rest:
            yield f"pref {preference} {' '.join(rest.split())}"


def restoring(record: Mapping[str, Any], added: Mapping[str, str]) -> str:
    """Return lines for /bin/sh that apply netplan's files, and restore what these do not name.

    added: the address that each of our interfaces got, which is removed.
    """
    interfaces = {name: was for name, was in record.items() if name != _RULES}
    commands = [each for name, was in interfaces.items() for each in _commands(name, was, added.get(name))]
    # One route may lead to the next hop of another, whatever their order.
    commands += 2 * [f"ip {each}" for was in interfaces.values() for each in _route_commands(was)]
    commands += _rule_commands(record.get(_RULES, ()))
    return "\n".join([f"{files.PROGRAM} apply", _SETTLED, *(f"{each} 2> /dev/null || true" for each in commands)])


def _commands(name: str, was: Mapping[str, Any], added: str | None) -> Iterator[str]:
    device = f"dev {shlex.quote(name)}"
    if added and not _among(was["addresses"], added):
        yield f"ip address del {added} {device}"
    yield f"ip link set {device} mtu {was['mtu']}"
    for setting, value in was.get("kernel", {}).items():
        if value:
            yield _kernel_command(name, setting, value)
    if was.get("master"):
        yield f"ip link set {device} master {shlex.quote(was['master'])}"
    yield f"ip link set {device} {'up' if was['up'] else 'down'}"
    # An interface that is down keeps IPv4 addresses only, and no routes.
    for address in was["addresses"]:
        # The kernel has made link-local ones again by now.
        yield f"ip address {'add' if ':' in address else 'replace'} {address} {device}"
    for neighbour in was.get("neighbours", ()):
        yield f"ip neighbour replace {neighbour} {device} nud permanent"


def _kernel_command(name: str, setting: str, value: str) -> str:
    if setting == "ipv6/addr_gen_mode":
        return f"ip link set dev {shlex.quote(name)} addrgenmode {_MODES.get(value, value)}"
    family, _, key = setting.partition("/")
    return f"sysctl -q -w net/{family}/conf/{shlex.quote(name)}/{key}={value}"


def _route_commands(was: Mapping[str, Any]) -> Iterator[str]:
    for route in was.get("routes", ()):
        family, _, words = route.partition(" ")
        yield f"{family} route add {words}"


def _among(addresses: Iterable[str], wanted: str) -> bool:
    """Return whether an address is there; earlier versions recorded only the address itself."""
    return any(f"{each} ".startswith(f"{wanted} ") for each in addresses)


def _rule_commands(rules: Iterable[str]) -> Iterator[str]:
    for rule in rules:
        family, _, words = rule.partition(" ")
        yield f"ip {family} rule add {words}"


def differences(record: Mapping[str, Any], on: Reader, added: Mapping[str, str], *, soft: bool = True) -> list[str]:
    """Return what is not as recorded, each with the command that restores it; [] if all is.

    soft: compare also what may take its time or return by itself: DHCP, name servers, networkd's file.
    """
    now = taken(on, [name for name in record if name])
    rules = [each for each in record.get(_RULES, ()) if each not in now[_RULES]]
    found = [(f"the rule {each} is gone", command) for each, command in zip(rules, _rule_commands(rules), strict=True)]
    for name, was in record.items():
        if name and name not in now:
            found.append((f"{name} does not exist", ""))
        elif name:
            found += _of_interface(name, was, now[name], added.get(name, ""))
            found += _soft(name, was, now[name]) if soft else ()
    return [f"{what} (`sudo {command}`)" if command else what for what, command in found]


def _of_interface(name: str, was: Mapping[str, Any], now: Mapping[str, Any], added: str) -> Iterator[tuple[str, str]]:
    yield from _of_link(name, was, now)
    for address in was["addresses"]:
        if not _among(now["addresses"], address) and (was["up"] or ":" not in address):
            yield f"{name} lacks {address}", f"ip address add {address} dev {name}"
    if added and _among(now["addresses"], added) and not _among(was["addresses"], added):
        yield f"{name} still has {added}", f"ip address del {added} dev {name}"
    for neighbour in was.get("neighbours", ()):
        if neighbour not in now["neighbours"]:
            yield (
                f"{name} lacks the neighbour {neighbour}",
                f"ip neighbour replace {neighbour} dev {name} nud permanent",
            )
    for route, command in zip(was.get("routes", ()), _route_commands(was), strict=True):
        if route not in now["routes"]:
            yield f"{name} lacks the route {route.partition(' ')[2]}", f"ip {command}"


def _of_link(name: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    change = f"ip link set dev {name}"
    if was["mtu"] != now["mtu"]:
        yield f"{name} has MTU {now['mtu']}", f"{change} mtu {was['mtu']}"
    if (master := was.get("master", now["master"])) != now["master"]:
        yield (
            f"{name} is a part of {now['master'] or 'nothing'}",
            f"{change} {f'master {master}' if master else 'nomaster'}",
        )
    if was["up"] != now["up"]:
        yield f"{name} is {'up' if now['up'] else 'down'}", f"{change} {'up' if was['up'] else 'down'}"
    for setting, value in was.get("kernel", {}).items():
        if value and value != now["kernel"][setting]:
            yield f"{name} has {setting} {now['kernel'][setting]}", _kernel_command(name, setting, value)


def _soft(name: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if was.get("dhcp") and not now["dhcp"]:
        yield f"{name} has no address from DHCP", f"networkctl renew {name}"
    if was.get("dns") and was["dns"] != now["dns"]:
        yield f"{name} has other name servers", f"resolvectl dns {name} {was['dns']}"
    if was.get("file", now["file"]) != now["file"]:
        yield f"networkd configures {name} with {now['file'] or 'no file'}", f"networkctl reconfigure {name}"


def awaited(record: Mapping[str, Any], on: Reader, added: Mapping[str, str], *, soft: bool = True) -> list[str]:
    """Return the differences that remain after networkd had time to finish."""
    until = time.monotonic() + _PATIENCE
    while (found := differences(record, on, added, soft=soft)) and time.monotonic() < until:
        time.sleep(0.5)
    return found
