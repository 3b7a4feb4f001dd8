"""What `netplan apply` would change besides the QSFP port: an edit that nobody applied, and what was set by hand.

netplan applies all its files at once, and networkd then configures every interface of them again.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from ipaddress import ip_interface, ip_network

from msgspec import Struct

from sparkinstall.errors import Problem
from sparkinstall.facts import ip
from sparkinstall.facts.sysfs import driver_of
from sparkinstall.resources import Conflict
from sparkinstall.resources.netplan import files, networkd
from sparkinstall.resources.netplan.networkd import NETWORK, PROFILE, Settings
from sparkinstall.system import Reader

SERVICES = {"networkd": "systemd-networkd", "NetworkManager": "NetworkManager"}
_WRITTEN_BY_HAND = ("", "static", "boot")
_MADE_AT_ONCE = {"bridge", "bond", "dummy", "vrf"}
"""Kinds of interfaces that networkd creates whatever else there is."""
# Other values may be secret.
_SHOWN = {
    "Address",
    "Gateway",
    "DNS",
    "Domains",
    "MTUBytes",
    "DHCP",
    "Destination",
    "Name",
    "Kind",
    "Id",
    "method",
    "mtu",
}
_SHOWN |= {"Bridge", "Bond", "VLAN", "VRF", "From", "To", "Table", "Priority", "WakeOnLan", "interface-name", "dns"}
_SHOWN |= {"address", "route"}


def running(on: Reader) -> list[str]:
    """Return the renderers whose services run."""
    answers = on.ask("systemctl", "is-active", *SERVICES.values()).out.split()
    return [name for name, answer in zip(SERVICES, answers, strict=False) if answer == "active"]


def pending(
    on: Reader, read: Sequence[files.NetplanFile], wanted: Mapping[str, bytes | None], ours: Collection[str]
) -> Conflict | None:
    """Return the first thing of another interface than `ours` that `netplan apply` would change, or why netplan
    rejects the files; None if nothing."""
    try:
        edits = _edits(on, read, wanted, ours)
    except Problem as problem:
        return _refusal(problem)
    mine = {*ours, *(edits.live[name].mac for name in ours if name in edits.live)}
    for what, hint in (*edits.renderers(), *edits.not_applied(mine), *edits.not_live()):
        return Conflict(f"{what}; `netplan apply` would change that too", f"{hint}, then run again")
    return None


def rejected(on: Reader, read: Sequence[files.NetplanFile], wanted: Mapping[str, bytes | None]) -> Conflict | None:
    """Return why the real netplan rejects the files as they will be; None if it accepts them, or is not here."""
    try:
        files.generate(on, read, wanted)
    except Problem as problem:
        return _refusal(problem)
    return None


def _refusal(problem: Problem) -> Conflict:
    # Its first line has the file, the place in it, and what is wrong; the others show that place.
    return Conflict(f"{problem.message}: {next(iter(problem.cause.splitlines()), '')}", problem.hint)


def _edits(
    on: Reader, read: Sequence[files.NetplanFile], wanted: Mapping[str, bytes | None], ours: Collection[str]
) -> "_Edits":
    made, live = files.generate(on, read, wanted), ip.live(on)
    theirs = {name: each for name, each in live.items() if name not in {*ours, "lo"}}
    return _Edits(on, read, made, live, theirs, running(on))


def configured(
    on: Reader, read: Sequence[files.NetplanFile], wanted: Mapping[str, bytes | None], ours: Collection[str]
) -> list[str]:
    """Return the interfaces of others that a file of netplan or networkd configures.

    Raises:
        Problem: netplan rejects the files.
    """
    edits = _edits(on, read, wanted, ours)
    made = [networkd.parse(path, text) for path, text in edits.made.items() if path.startswith((NETWORK, PROFILE))]
    said = [*networkd.read_all(on, edits.made, ".network"), *made]
    return [name for name in edits.theirs if any(edits._matches(each, name) for each in said)]


class _Edits(Struct, frozen=True):
    """`made`: what netplan generates of the files now. `theirs`: the live interfaces of others.

    Each method yields what was found, and what to do.
    """

    on: Reader
    read: Sequence[files.NetplanFile]
    made: Mapping[str, bytes]
    live: Mapping[str, ip.Live]
    theirs: Mapping[str, ip.Live]
    running: Sequence[str]

    def renderers(self) -> Iterator[tuple[str, str]]:
        for path, content in sorted(self.made.items()):
            by = "networkd" if path.startswith(NETWORK) else "NetworkManager" if path.startswith(PROFILE) else ""
            if not by or not self.running or by in self.running:
                continue
            settings = networkd.parse(path, content)
            for name in self.theirs:
                if self._matches(settings, name):
                    yield (
                        f"netplan's files give {name} to {by}, which does not run on this node",
                        f"correct `renderer` (`sudoedit {self._where(path)}`)",
                    )

    def not_applied(self, mine: Set[str]) -> Iterator[tuple[str, str]]:
        """Compare with what netplan generated at the last boot or `netplan apply`."""
        there = {path: self.on.read(path) or b"" for path in self._generated()}
        added: dict[str, list[str]] = {}
        gone: dict[str, list[str]] = {}
        for path in sorted({*there, *(each for each in self.made if each.startswith((NETWORK, PROFILE)))}):
            was, now = (networkd.parse(path, each.get(path, b"")).lines for each in (there, self.made))
            if path in there and path in self.made and set(was) == set(now):
                continue
            if mine.isdisjoint(
                word
                for _, key, value in (*was, *now)
                if key.endswith(("ame", "ddress", "name"))
                for word in value.split()
            ):
                key = path.removeprefix(NETWORK).removeprefix(PROFILE).rpartition(".")[0]
                added.setdefault(key, []).extend(_words(now, was))
                gone.setdefault(key, []).extend(_words(was, now))
        for name in added:
            less = f" instead of {', '.join(dict.fromkeys(gone[name]))}" if gone[name] else ""
            more = ", ".join(dict.fromkeys(added[name])) or "nothing"
            removing = f"or remove it (`sudoedit {self._where(name)}`)"
            yield (
                f"an edit of netplan's files was never applied: for {name} they say {more}{less}",
                f"apply it while you can reach this node in another way (`sudo netplan try`), {removing}",
            )

    def not_live(self) -> Iterator[tuple[str, str]]:
        """Compare what the renderers would be told with what is live."""
        own = networkd.read_all(self.on, self.made, ".network") if "networkd" in self.running else []
        profiles = [networkd.parse(path, text) for path, text in self.made.items() if path.startswith(PROFILE)]
        shown = [ip.asked(self.on, family, "route", "show", "table", "main") for family in ("-4", "-6")]
        routes = [each for family in shown for each in family if "dst" in each]
        for name, there in self.theirs.items():
            now = networkd.state_of(self.on, there)
            used = now.get("NETWORK_FILE", "")
            said = next((each for each in own if self._matches(each, name, each.path == used)), None)
            would = said.path if said else ""
            if (used or now.get("ADMIN_STATE") == "unmanaged") and would != used:
                yield (
                    f"networkd configures {name} with {used or 'no file'}, and next time with {would or 'none'}",
                    f"see `networkctl status {name}`; correct the files in /etc/netplan or /etc/systemd/network",
                )
            said = said or next((each for each in profiles if self._matches(each, name)), None)
            if said and (found := [*self._differences(said, there, [r for r in routes if r.get("dev") == name])]):
                where = self._where(said.path) if said.path.startswith((NETWORK, PROFILE)) else said.path
                yield (
                    f"{name} is not as {' and '.join((where, *said.drop_ins))} would have it: it {', '.join(found)}",
                    "apply the file while you can reach this node in another way (`sudo netplan try`), or write into it"
                    " what is live",
                )
        for device in networkd.read_all(self.on, self.made, ".netdev") if "networkd" in self.running else []:
            absent = set(device.all("NetDev.Name")) - set(self.live)
            if absent and _MADE_AT_ONCE & set(device.all("NetDev.Kind")) and not device.all("Match.Host"):
                yield f"{device.path} defines {min(absent)}, which does not exist", "apply that file, or remove it"

    def _differences(self, said: Settings, there: ip.Live, routes: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """Yield how an interface differs from its file, as the rest of a sentence."""
        if (mtu := said.all("Link.MTUBytes", "ethernet.mtu")[-1:]) and mtu[0].isdecimal() and int(mtu[0]) != there.mtu:
            yield f"has MTU {there.mtu} instead of {mtu[0]}"
        master = next(iter(said.all("Network.Bridge", "Network.Bond", "Network.VRF")), "")
        if master != there.master and not said.path.startswith(PROFILE) and not said.all("Network.KeepMaster"):
            yield f"is a part of {there.master or 'nothing'} instead of {master or 'nothing'}"
        above = said.all(*(f"Network.{kind}" for kind in ("VLAN", "MACVLAN", "IPVLAN", "VXLAN", "Tunnel")))
        yield from (f"does not carry {each}" for each in above if each not in self.live)
        if not there.up or not there.carrier:
            return
        lease = networkd.state_of(self.on, there, "leases").get("ADDRESS", "")
        has = {each for each in there.fixed if not ip_interface(each).is_link_local}
        for address in sorted(said.addresses - has):
            yield f"lacks the address {address}"
        for address in sorted(has - said.addresses):
            if not said.leases or (lease and lease != address.partition("/")[0]):
                yield f"has the address {address} besides"
        for address in there.leased:
            if not said.leases:
                yield f"has the address {address} from DHCP"
        servers = networkd.state_of(self.on, there).get("DNS", "").split()
        yield from (f"lacks the name server {each}" for each in sorted(said.name_servers - set(servers)))
        rules = [f"{line} " for family in ("-4", "-6") for line in self._rules(family)]
        yield from (f"lacks the rule {each}" for each in sorted(said.rules) if not any(f"{each} " in r for r in rules))
        yield from _route_differences(said, routes)

    def _rules(self, family: str) -> list[str]:
        return self.on.ask("ip", family, "rule", "show").out.splitlines()

    def _matches(self, settings: Settings, name: str, unknown: bool = False) -> bool:
        return settings.matches(self.theirs[name], driver_of(self.on, name), unknown)

    def _generated(self) -> Iterator[str]:
        for beginning in (NETWORK, PROFILE):
            folder = beginning.rpartition("/")[0]
            for name in self.on.names(folder):
                path = f"{folder}/{name}"
                if path.startswith(beginning) and not path.endswith(".d"):
                    yield path

    def _where(self, path: str) -> str:
        """Return the netplan file with the definition from which `path` was generated."""
        for file in reversed(self.read):
            if any(name in path for _, name, _ in file.definitions()):
                return file.path
        return files.OWN_FOLDER


def _words(lines: Sequence[tuple[str, str, str]], others: Sequence[tuple[str, str, str]]) -> list[str]:
    new = [(key, value) for section, key, value in lines if (section, key, value) not in others]
    return [f"`{key}={value}`" if key.rstrip("0123456789") in _SHOWN else f"another `{key}`" for key, value in new]


def _route_differences(said: Settings, routes: Sequence[Mapping[str, str]]) -> Iterator[str]:
    gateways, destinations = said.gateways, said.destinations
    for route in routes:
        to, gateway = route["dst"], route.get("gateway", "")
        if route.get("protocol", "") not in _WRITTEN_BY_HAND:
            continue
        known = to == "default" or str(ip_network(to, strict=False)) in destinations
        if not known or (gateway and gateway not in gateways):
            yield f"has a route to {to}{f' via {gateway}' if gateway else ''} besides"
    if said.all("Route.Table"):
        # Its routes may be in another table than the one that was read.
        return
    networks = {str(ip_network(each["dst"], strict=False)) for each in routes if each["dst"] != "default"}
    missing = [f"to {each}" for each in sorted(destinations - networks) if not each.endswith("/0")]
    via = [each for each in sorted(gateways - {route.get("gateway", "") for route in routes}) if each[0] != "_"]
    yield from (f"lacks the route {each}" for each in (*missing, *(f"via {gateway}" for gateway in via)))
