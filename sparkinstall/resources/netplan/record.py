"""The live state of interfaces: recorded before `netplan apply`, restored and compared with afterwards."""

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from sparkinstall.facts import ip
from sparkinstall.facts.sysfs import text_of
from sparkinstall.resources.netplan import files, networkd
from sparkinstall.system import Reader

_WRITTEN = ("", "static", "boot")
"""Who adds routes that a person or a file names; those of others (kernel, dhcp, ra, a daemon) return by themselves."""
_IPV6 = "/proc/sys/net/ipv6/conf"
_SWITCHES = ("addr_gen_mode", "disable_ipv6")
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
    """
    live, routes = ip.live(on), _routes(on)
    found: dict[str, Any] = {name: _state(on, live[name], routes) for name in sorted(names) if name in live}
    return {**found, _RULES: [f"{family} {line}" for family in ("-4", "-6") for line in _rules(on, family)]}


def _state(on: Reader, there: ip.Live, routes: Mapping[str, list[str]]) -> dict[str, Any]:
    networkd_says = networkd.state_of(on, there)
    return {
        "mtu": there.mtu,
        "up": there.up,
        "addresses": list(there.fixed),
        "routes": routes.get(there.name, []),
        "master": there.master,
        "ipv6": {each: text_of(on, f"{_IPV6}/{there.name}/{each}") for each in _SWITCHES},
        "dhcp": bool(there.leased),
        "dns": networkd_says.get("DNS", ""),
        "file": networkd_says.get("NETWORK_FILE", ""),
    }


def _routes(on: Reader) -> dict[str, list[str]]:
    """Return the routes that a person or a file named, by interface, as words for `ip route add`."""
    found: dict[str, list[str]] = {}
    for family in ("-4", "-6"):
        for line in on.ask("ip", "-o", family, "route", "show", "table", "all").out.splitlines():
            words = [each for each in line.split() if each not in ("linkdown", "dead")]
            after = dict(pairwise(words))
            # A route with several next hops is one line with backslashes, and `ip` does not read it.
            if after.get("proto", "") in _WRITTEN and "dev" in after and "\\" not in line and "expires" not in words:
                found.setdefault(after["dev"], []).append(" ".join((family, *words)))
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
    lines = [f"{files.PROGRAM} apply", _SETTLED]
    for name, was in record.items():
        commands = _rule_commands(was) if name == _RULES else _commands(name, was, added.get(name))
        lines += [f"{command} 2> /dev/null || true" for command in commands]
    return "\n".join(lines)


def _commands(name: str, was: Mapping[str, Any], added: str | None) -> Iterator[str]:
    device = f"dev {shlex.quote(name)}"
    if added and added not in was["addresses"]:
        yield f"ip address del {added} {device}"
    yield f"ip link set {device} mtu {was['mtu']}"
    for switch, value in was.get("ipv6", {}).items():
        if value:
            yield f"echo {value} > {_IPV6}/{shlex.quote(name)}/{switch}"
    if was.get("master"):
        yield f"ip link set {device} master {shlex.quote(was['master'])}"
    yield f"ip link set {device} {'up' if was['up'] else 'down'}"
    # An interface that is down keeps IPv4 addresses only, and no routes.
    for address in was["addresses"]:
        # The kernel has made link-local ones again by now.
        yield f"ip address {'add' if ':' in address else 'replace'} {address} {device}"
    for route in was.get("routes", ()):
        family, _, words = route.partition(" ")
        yield f"ip {family} route add {words}"


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
    for address in was["addresses"]:
        if address not in now["addresses"] and (was["up"] or ":" not in address):
            yield f"{name} lacks {address}", f"ip address add {address} dev {name}"
    if added in now["addresses"] and added not in was["addresses"]:
        yield f"{name} still has {added}", f"ip address del {added} dev {name}"
    for route in was.get("routes", ()):
        if route not in now["routes"]:
            family, _, words = route.partition(" ")
            yield f"{name} lacks the route {words}", f"ip {family} route add {words}"


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
