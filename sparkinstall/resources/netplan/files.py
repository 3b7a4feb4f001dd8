"""Read netplan's files, and write the one for the QSFP interfaces.

netplan merges all its files, including lists: a second file for an interface does not replace the first.
"""

import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from sparkinstall import safe_yaml
from sparkinstall.errors import Problem
from sparkinstall.facts import ip
from sparkinstall.facts.sysfs import CONNECTX_DRIVER, NET, driver_of, text_of
from sparkinstall.resources.template import render
from sparkinstall.system import Reader

PROGRAM = "/usr/sbin/netplan"
TARGET = "/etc/netplan/40-cx7.yaml"
"""NVIDIA's name for the file of these links."""

OWN_FOLDER = "/etc/netplan"
_FOLDERS = ("/lib/netplan", "/run/netplan", OWN_FOLDER)
"""A file hides one of the same name in an earlier folder."""

_KEYFILES = tuple(f"{top}/NetworkManager/system-connections" for top in ("/etc", "/run", "/usr/lib"))
_INTERFACE_NAME = re.compile(r"(?m)^interface-name[ \t]*=[ \t]*(\S.*)")
_MAC_ADDRESS = re.compile(r"(?m)^mac-address[ \t]*=[ \t]*(\S+)")
_INTERFACES = "/etc/network/interfaces"
_TEMPLATE = "40-cx7.yaml.j2"
# The line of the template that names our interfaces.
_OURS = "# Interfaces: "
# Keys by which another kind of definition refers to its interfaces.
_MADE_OF = ("interfaces", "link")
_SECRET = re.compile(r"(?im)^(.*?\b(?:password|psk|pin|key|private|preshared)[\"']?\s*:[ \t]*)[^\s{\[].*$")


class BadFile(Problem):
    """A netplan file cannot be read."""

    code = "netplan"


class Device(Struct, frozen=True):
    """The properties of an interface that `match:` compares."""

    name: str
    mac: str = ""
    driver: str = ""


class NetplanFile(Struct, frozen=True, dict=True):
    """One file that netplan reads. `said`: its `network` section, every scalar as the text that was written."""

    path: str
    content: bytes

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def ours_to_change(self) -> bool:
        return self.path.startswith(OWN_FOLDER + "/")

    @cached_property
    def said(self) -> Mapping[str, Any]:
        """Raises BadFile: it is not YAML, or repeats a key."""
        try:
            return _mapping(_mapping(safe_yaml.load(self.content, only_text=True)).get("network"))
        except safe_yaml.NotYaml as error:
            raise BadFile(f"{self.path} is not YAML: {error}", hint=f"correct it (`sudoedit {self.path}`)") from error

    def definitions(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """(kind, id, fields), such as ("ethernets", "eth0", {...})."""
        for kind, group in self.said.items():
            for name, fields in _mapping(group).items():
                yield kind, name, _mapping(fields)

    @property
    def formerly_ours(self) -> frozenset[str]:
        """The interfaces that sparkinstall wrote into this file; the cable may have moved to another port."""
        if self.path != TARGET:
            return frozenset()
        lines = self.content.decode(errors="replace").splitlines()[:8]
        return frozenset(word for line in lines if line.startswith(_OURS) for word in line[len(_OURS) :].split())


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def read_all(on: Reader) -> tuple[NetplanFile, ...]:
    """Return the files that netplan reads, in its order: by name, regardless of the folder."""
    paths = {name: f"{folder}/{name}" for folder in _FOLDERS for name in on.names(folder) if name.endswith(".yaml")}
    return tuple(NetplanFile(paths[name], on.read(paths[name]) or b"") for name in sorted(paths))


def beside(on: Reader, device: Device) -> Iterator[tuple[str, str, str]]:
    """Yield the files of other programs that configure `device`: (program, path, command that removes it)."""
    for folder in _KEYFILES:
        for path in (f"{folder}/{name}" for name in on.names(folder) if not name.startswith((".", "netplan-"))):
            entry = on.entry(path)
            if (
                entry
                and entry.kind != "dir"
                and _is_profile_of((on.read(path) or b"").decode(errors="replace"), device)
            ):
                yield "NetworkManager's profile", path, f"sudo rm {shlex.quote(path)} && sudo nmcli connection reload"
    named = re.compile(rf"(?m)^[ \t]*(?:auto|allow-\S+|iface)[ \t](?:[^#\n]*[ \t])?{re.escape(device.name)}(?!\S)")
    places = [_INTERFACES, *(f"{_INTERFACES}.d/{name}" for name in on.names(f"{_INTERFACES}.d"))]
    for path in places if on.entry("/usr/sbin/ifup") or on.entry("/sbin/ifup") else ():
        if named.search((on.read(path) or b"").decode(errors="replace")):
            yield "ifupdown's file", path, f"sudoedit {shlex.quote(path)}"


def _is_profile_of(text: str, device: Device) -> bool:
    names = [each for line in _INTERFACE_NAME.findall(text) for each in re.split(r"[;\s]+", line) if each]
    macs = [each.lower() for each in _MAC_ADDRESS.findall(text)]
    return any(fnmatchcase(device.name, each) for each in names) or bool(device.mac and device.mac.lower() in macs)


def renderer(files: Iterable[NetplanFile]) -> str:
    """Return the renderer that these files name; netplan's default is networkd."""
    said = [each.said["renderer"] for each in files if isinstance(each.said.get("renderer"), str)]
    return str(said[-1]) if said else "networkd"


def devices(on: Reader, names: Iterable[str]) -> tuple[Device, ...]:
    """Return the interfaces of this node and `names`; in a rehearsal only `names`, as on a Spark."""
    there = on.names(NET)
    seen = [Device(name, text_of(on, f"{NET}/{name}/address"), driver_of(on, name)) for name in there]
    return (*seen, *(Device(name, driver=CONNECTX_DRIVER) for name in names if name not in there))


def covers(name: str, fields: Mapping[str, Any], device: Device) -> bool:
    """Return whether the definition `name` configures `device`."""
    match, network_manager = fields.get("match"), _mapping(fields.get("networkmanager"))
    bound = _mapping(network_manager.get("passthrough")).get("connection.interface-name")
    if device.name in (bound, fields.get("set-name")):
        return True
    if not isinstance(match, dict):
        return name == device.name
    if not match:
        # A NetworkManager profile for any interface yields to one that names its interface.
        return not network_manager
    return all(_matches(key, wanted, device) for key, wanted in match.items())


def _matches(key: str, wanted: object, device: Device) -> bool:
    patterns = [str(each) for each in wanted] if isinstance(wanted, list) else str(wanted).split()
    has = {"name": device.name, "macaddress": device.mac, "driver": device.driver}.get(key, "")
    return any(fnmatchcase(has.lower(), each.lower()) for each in patterns) if has else False


def is_pattern(fields: Mapping[str, Any]) -> bool:
    """Return whether a definition can match future interfaces."""
    match = fields.get("match")
    if not isinstance(match, dict) or "macaddress" in match:
        return False
    return bool(set("*?[") & set(str(match.get("name", "*"))))


class Claim(Struct, frozen=True):
    """A definition that configures one of our interfaces. `others`: other interfaces that it configures, in words."""

    file: NetplanFile
    kind: str
    id: str
    others: str = ""


def claims(files: Iterable[NetplanFile], ours: Sequence[str], there: Iterable[Device]) -> list[Claim]:
    """Return the definitions that configure the interfaces `ours`."""
    known = tuple(there)
    return [
        Claim(file, kind, name, _others(name, fields, ours, known))
        for file in files
        for kind, name, fields in file.definitions()
        if kind in ("ethernets", "nm-devices") and any(covers(name, fields, d) for d in known if d.name in ours)
    ]


def _others(name: str, fields: Mapping[str, Any], ours: Sequence[str], known: Sequence[Device]) -> str:
    others = sorted(each.name for each in known if each.name not in ours and covers(name, fields, each))
    if others:
        return ", ".join(others)
    # A rehearsal cannot see other interfaces that the pattern matches.
    return "other interfaces matching its pattern" if is_pattern(fields) and len(known) == len(ours) else ""


def made_of(files: Iterable[NetplanFile], names: Iterable[str]) -> Iterator[tuple[NetplanFile, str, str, str]]:
    """Yield bonds, bridges, VLANs and the like that contain one of `names`: (file, kind, id, name)."""
    wanted = set(names)
    for file in files:
        for kind, name, fields in file.definitions():
            for part in _parts(fields):
                if part in wanted:
                    yield file, kind, name, part


def _parts(fields: Mapping[str, Any]) -> Iterator[str]:
    for key in _MADE_OF:
        value = fields.get(key)
        yield from (str(each) for each in (value if isinstance(value, list) else [value]) if each)


def without(file: NetplanFile, dropped: Sequence[tuple[str, str]]) -> bytes | None:
    """Return `file` without the definitions `dropped` (kind, id); None if nothing remains."""
    root = yaml.compose(file.content, Loader=yaml.CSafeLoader)
    network = _child(root, "network")
    _drop(network, set(dropped))
    if network is None or {str(key.value) for key, _ in network.value} <= {"version"}:
        return None
    names = ", ".join(name for _, name in dropped)
    head = f"# Without {names}, which sparkinstall has moved to {TARGET}; uninstall restores it.\n"
    return head.encode() + yaml.serialize(root, Dumper=yaml.CSafeDumper, encoding="utf-8", allow_unicode=True)


def _child(node: "yaml.Node | None", key: str) -> "yaml.Node | None":
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next((value for name, value in pairs if name.value == key), None)


def _drop(network: "yaml.Node | None", dropped: set[tuple[str, str]]) -> None:
    """Remove definitions, and a kind without any left."""
    if not isinstance(network, yaml.MappingNode):
        return
    for kind, group in network.value:
        if isinstance(group, yaml.MappingNode):
            group.value = [pair for pair in group.value if (kind.value, pair[0].value) not in dropped]
    network.value = [
        (kind, group) for kind, group in network.value if not isinstance(group, yaml.MappingNode) or group.value
    ]


class Half(Struct, frozen=True):
    """The desired state of one half of the port."""

    name: str
    address: IPv4Interface
    mtu: int

    def __str__(self) -> str:
        return f"{self.name}: {self.address}, MTU {self.mtu}"

    def is_live(self, now: Mapping[str, ip.Live]) -> bool:
        """Return whether it is up as desired; `now` has the current state of every interface."""
        there = now.get(self.name)
        if there is None or not there.up or there.mtu != self.mtu:
            return False
        # NetworkManager configures addresses only with a carrier; `verify` reports a missing one.
        return str(self.address) in there.addresses or not there.carrier

    def found(self, now: Mapping[str, ip.Live]) -> str:
        there = now.get(self.name)
        if there is None or not there.up:
            return f"{self.name}: down"
        return f"{self.name}: {', '.join(there.addresses) or 'no address'}, MTU {there.mtu}"


def rendered(halves: Sequence[Half], by: str, former: NetplanFile | None, dropped: set[str]) -> bytes:
    """Return our file: `halves` with the renderer `by`, and other definitions of the `former` file of that name."""
    kept = _kept(former, dropped) if former else []
    by_default = [pair for pair in kept if pair[0].value == "renderer"]
    ethernets = [pair for kind, group in kept if kind.value == "ethernets" for pair in group.value]
    others = [pair for pair in kept if pair[0].value not in ("version", "renderer", "ethernets")]
    values = {"halves": halves, "by": by, "kept_renderer": _indented(by_default, 2)}
    values |= {"kept_ethernets": _indented(ethernets, 4), "kept_kinds": _indented(others, 2)}
    return render(_TEMPLATE, values)


def _kept(former: NetplanFile, dropped: set[str]) -> "Sequence[tuple[yaml.Node, yaml.Node]]":
    network = _child(yaml.compose(former.content, Loader=yaml.CSafeLoader), "network")
    _drop(network, {(kind, name) for kind in ("ethernets", "nm-devices") for name in dropped})
    return network.value if isinstance(network, yaml.MappingNode) else []


def _indented(pairs: "Sequence[tuple[yaml.Node, yaml.Node]]", by: int) -> str:
    if not pairs:
        return ""
    node = yaml.MappingNode("tag:yaml.org,2002:map", list(pairs), flow_style=False)
    text = yaml.serialize(node, Dumper=yaml.CSafeDumper, encoding=None, allow_unicode=True)
    return "".join(" " * by + line for line in str(text).splitlines(keepends=True))


def generate(on: Reader, files: Iterable[NetplanFile], wanted: Mapping[str, bytes | None]) -> Mapping[str, bytes]:
    """Let the real netplan read the files as they will be; return the renderers' files that it makes of them, by path.

    {} in a rehearsal on a machine without netplan.

    Raises:
        Problem: netplan rejects them; contains its message.
    """
    content = {**{each.path: each.content for each in files}, **wanted}
    with tempfile.TemporaryDirectory(prefix="sparkinstall-netplan-") as folder:
        for path, text in content.items():
            if text is not None:
                there = Path(folder + path)
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(text)
                there.chmod(0o600)
        answer = on.ask(PROGRAM, "generate", "--root-dir", folder)
        if answer.ok or (answer.code == 127 and on.rehearsal):
            made = [each for each in Path(folder, "run").rglob("*") if each.is_file()]
            return {str(each).removeprefix(folder): each.read_bytes() for each in made}
        lines = (answer.err or answer.out).replace(folder, "").splitlines()
        said = [line for line in lines if line.strip() and "WARNING" not in line]
    raise Problem(
        "netplan rejects the new files; nothing was changed",
        cause="\n".join(said),
        hint="correct the file that it names (in /etc/netplan), then run the same command again",
    )


def shown(contents: Mapping[str, bytes | None]) -> str:
    """Return files for display in a plan, with Wi-Fi passwords and the like hidden."""
    text = "".join(
        f"{path}:\n{each.decode(errors='replace').rstrip()}\n" for path, each in contents.items() if each is not None
    )
    return _SECRET.sub(r"\1[hidden]", text)
