"""What the renderers read: networkd's `.network` files with their drop-ins, and the profiles that netplan generates."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from ipaddress import ip_interface, ip_network

from msgspec import Struct

from sparkinstall.facts import ip
from sparkinstall.system import Reader

NETWORK = "/run/systemd/network/10-netplan-"
PROFILE = "/run/NetworkManager/system-connections/netplan-"
"""The beginning of each path that netplan generates for networkd, and for NetworkManager."""

_FOLDERS = tuple(f"{top}/systemd/network" for top in ("/usr/lib", "/usr/local/lib", "/run", "/etc"))
"""A file hides one of the same name in an earlier folder."""
_OF_WIFI = {"WLANInterfaceType", "SSID", "BSSID"}
"""Conditions that only a wireless interface can meet."""


class Settings(Struct, frozen=True):
    """A `.network` file with its drop-ins, or a profile. `lines`: section, key and value of each setting."""

    path: str
    lines: tuple[tuple[str, str, str], ...]
    drop_ins: tuple[str, ...] = ()

    def all(self, *keys: str) -> list[str]:
        """Return the values of `keys` (`Section.Key`); an empty value drops those before it."""
        found: list[str] = []
        for section, key, value in self.lines:
            if f"{section}.{key.rstrip('0123456789')}" in keys:
                found = [*found, value] if value else []
        return found

    def matches(self, there: ip.Live, driver: str, unknown: bool = True) -> bool:
        """Return whether it configures this interface; `unknown` is the answer to conditions that are not read here."""
        if profile := self.all("connection.interface-name"):
            return profile[-1] in there.names
        macs: dict[str, Sequence[str]] = {"MACAddress": [there.mac], "PermanentMACAddress": [there.mac]}
        known = {"Name": there.names, "Driver": [driver], "Type": ["ether"], "Kind": [], **macs}
        conditions = {key: value for section, key, value in self.lines if section == "Match" and value}
        return bool(conditions) and all(
            _meets(value, known[key]) if key in known else unknown and key not in _OF_WIFI
            for key, value in conditions.items()
        )

    @property
    def addresses(self) -> set[str]:
        """The addresses that it gives, with prefix length; a pool such as 0.0.0.0/28 is none."""
        said = self.all("Network.Address", "Address.Address", "ipv4.address", "ipv6.address")
        found = [ip_interface(each.partition(",")[0]) for each in said if _is_address(each.partition(",")[0])]
        return {str(each) for each in found if not each.ip.is_unspecified}

    @property
    def leases(self) -> bool:
        """Whether a DHCP server may give an IPv4 address."""
        return bool(
            {"yes", "true", "1", "on", "both", "ipv4", "auto"}.intersection(self.all("Network.DHCP", "ipv4.method"))
        )

    @property
    def gateways(self) -> set[str]:
        profiles = [each.split(",")[1:2] for each in self.all("ipv4.route", "ipv6.route", "ipv4.address")]
        return {*self.all("Network.Gateway", "Route.Gateway", "ipv4.gateway"), *(each[0] for each in profiles if each)}

    @property
    def destinations(self) -> set[str]:
        said = [*self.all("Route.Destination"), *self.all("ipv4.route", "ipv6.route")]
        return {
            str(ip_network(each.partition(",")[0], strict=False))
            for each in said
            if _is_address(each.partition(",")[0])
        }

    @property
    def name_servers(self) -> set[str]:
        """The name servers that it gives, but those with a port or a host name."""
        said = [each for line in self.all("Network.DNS") for each in line.split()]
        return {str(ip_interface(each).ip) for each in said if _is_address(each)}

    @property
    def rules(self) -> set[str]:
        """The addresses of its routing rules, as `ip rule` shows them, such as `from 10.0.0.0/8`."""
        said = [(word, each) for word in ("From", "To") for each in self.all(f"RoutingPolicyRule.{word}")]
        networks = [(word, ip_network(each, strict=False)) for word, each in said if _is_address(each)]
        return {
            f"{word.lower()} {each if each.num_addresses > 1 else each.network_address}"
            for word, each in networks
            if each.prefixlen
        }


def _meets(patterns: str, values: Sequence[str]) -> bool:
    found = any(
        fnmatchcase(value.lower(), pattern)
        for pattern in patterns.lower().removeprefix("!").split()
        for value in values
        if value
    )
    return not found if patterns.startswith("!") else found


def _is_address(text: str) -> bool:
    try:
        ip_interface(text)
    except ValueError:
        return False
    return True


def parse(path: str, *texts: bytes, drop_ins: tuple[str, ...] = ()) -> Settings:
    """Parse a file and its drop-ins; what is no setting is skipped, as its reader does."""
    lines, section = [], ""
    for line in b"\n".join(texts).decode(errors="replace").splitlines():
        text = line.strip()
        key, given, value = text.partition("=")
        if text.startswith("[") and text.endswith("]"):
            section = text[1:-1]
        elif given and not text.startswith(("#", ";")):
            lines.append((section, key.strip(), value.strip()))
    return Settings(path, tuple(lines), drop_ins)


def read_all(on: Reader, generated: Mapping[str, bytes], ending: str) -> list[Settings]:
    """Return the files of networkd with this `ending`, in its order, once netplan has `generated` its own."""
    paths: dict[str, str] = {}
    parts: dict[str, dict[str, str]] = {}
    for folder in _FOLDERS:
        there = [f"{folder}/{name}" for name in on.names(folder)]
        made = [path for path in generated if path.startswith(NETWORK)] if NETWORK.startswith(folder) else []
        for path in (*(each for each in there if not each.startswith(NETWORK) or each.endswith(".d")), *made):
            name = path.rpartition("/")[2]
            if name.endswith(ending):
                paths[name] = path
            elif name.endswith(f"{ending}.d"):
                more = {each: f"{path}/{each}" for each in on.names(path) if each.endswith(".conf")}
                parts.setdefault(name.removesuffix(".d"), {}).update(more)
    found = []
    for name, path in sorted(paths.items()):
        drop_ins = tuple(each for _, each in sorted(parts.get(name, {}).items()))
        content = generated.get(path) or on.read(path) or b""
        found.append(parse(path, content, *(on.read(each) or b"" for each in drop_ins), drop_ins=drop_ins))
    return found


def overriding(on: Reader, there: ip.Live, driver: str) -> str:
    """Return the path of the file or drop-in that networkd would prefer to netplan's for this interface, or ""."""
    ours = f"{NETWORK}{there.name}.network"
    all_files = read_all(on, {ours: f"[Match]\nName={there.name}".encode()}, ".network")
    first = next((each for each in all_files if each.matches(there, driver)), None)
    if first and first.path == ours:
        return next(iter(first.drop_ins), "")
    hiding = [each.path for each in all_files if each.path.rpartition("/")[2] == ours.rpartition("/")[2]]
    return hiding[0] if ours not in hiding or first is None else first.path


def state_of(on: Reader, there: ip.Live, kind: str = "links") -> Mapping[str, str]:
    """Return what networkd says about an interface, such as `NETWORK_FILE`; {} if it does not know it.

    kind: `leases` for the address that a DHCP server gave (`ADDRESS`).
    """
    lines = (on.read(f"/run/systemd/netif/{kind}/{there.index}") or b"").decode(errors="replace").splitlines()
    return {key: value for key, _, value in (line.partition("=") for line in lines)}
