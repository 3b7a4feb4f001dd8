"""A Spark's network below a folder: netplan's files, what netplan made of them, and what `ip` shows."""

import ipaddress
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparkinstall.resources.netplan import files
from sparkinstall.system import Result
from tests.support.machine import Machine
from tests.support.sysfs import spark

LAN, FIRST, SECOND = "enP7s7", "enp1s0f0np0", "enP2p1s0f0np0"
LAN_FILE = "etc/netplan/01-lan.yaml"
LAN_LINES = """\
network:
  version: 2
  ethernets:
    enP7s7:
      addresses: [198.51.100.11/24, "2001:db8::11/64"]
      mtu: 1500
      nameservers: {addresses: [198.51.100.254]}
      routes: [{to: default, via: 198.51.100.254}]
"""
# The program behind `netplan generate`, which starts in a tenth of the time.
_QUICK = [each for each in ("/usr/libexec/netplan/generate", "/lib/netplan/generate") if Path(each).exists()]
_GENERATE = (_QUICK[0],) if _QUICK else (files.PROGRAM, "generate")
_STATES = "run/systemd/netif/links"


class LiveNode(Machine):
    """A Spark with the cable in port 0. Its LAN is configured by networkd, as `LAN_LINES` say, and that is live."""

    def __init__(self, root: Path) -> None:
        spark(root)
        super().__init__(str(root))
        self.top = root
        self.services = {"systemd-networkd": "active", "NetworkManager": "inactive"}
        self.links: dict[str, dict[str, Any]] = {}
        self.routes: list[dict[str, Any]] = []
        self.rules: dict[str, str] = {}
        self.put("usr/sbin/netplan", "")
        self.put(LAN_FILE, LAN_LINES)
        self.interface(LAN, "198.51.100.11/24", "2001:db8::11/64", "fe80::11/64")
        self.interface(FIRST)
        self.interface(SECOND)
        self.route("default", LAN, "static", gateway="198.51.100.254")
        self.route("198.51.100.0/24", LAN, "kernel")
        self.netplan_applied()

    def put(self, path: str, text: str) -> None:
        file = self.top / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o600)

    def delete(self, path: str) -> None:
        (self.top / path).unlink()

    def interface(self, name: str, *addresses: str, leased: str = "", **more: Any) -> None:
        """Add or replace an interface as `ip` shows it."""
        found = [_address(each) for each in addresses] + ([{**_address(leased), "dynamic": True}] if leased else [])
        facts = {"mtu": 1500, "flags": ["UP", "LOWER_UP"], "ifindex": len(self.links) + 2, "link_type": "ether"}
        facts |= {"ifindex": self.links[name]["ifindex"]} if name in self.links else {}
        self.links[name] = {"ifname": name, "address": _mac(name), **facts, "addr_info": found, **more}
        if not (self.top / "sys/class/net" / name).exists():
            (self.top / "sys/class/net" / name).mkdir()
        (self.top / "sys/class/net" / name / "address").write_text(f"{_mac(name)}\n")

    def route(self, to: str, name: str, protocol: str = "", **more: Any) -> None:
        """Add a route; without a protocol, as one that was added by hand."""
        self.routes.append({"dst": to, "dev": name, **({"protocol": protocol} if protocol else {}), **more})

    def generated(self) -> None:
        """What a boot or `systemctl daemon-reload` does: netplan writes the files of the renderers."""
        for folder in ("run/systemd/network", "run/NetworkManager"):
            shutil.rmtree(self.top / folder, ignore_errors=True)
        done = _generate("--root-dir", str(self.top))
        assert done.returncode == 0, done.stderr

    def netplan_applied(self) -> None:
        """What `netplan apply` does besides: networkd says which file configures an interface."""
        self.generated()
        for name in self.links:
            file = self.top / f"run/systemd/network/10-netplan-{name}.network"
            servers = [each for each in (file.read_text().splitlines() if file.exists() else ()) if each[:4] == "DNS="]
            self.configured_by(name, f"/{file.relative_to(self.top)}" if file.exists() else "", *servers)

    def configured_by(self, name: str, path: str, *more: str) -> None:
        """What networkd says about an interface."""
        lines = ["ADMIN_STATE=configured", f"NETWORK_FILE={path}"] if path else ["ADMIN_STATE=unmanaged"]
        self.put(f"{_STATES}/{self.links[name]['ifindex']}", "\n".join([*lines, *more, ""]))

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        del timeout, env, root, stdin
        match argv:
            case [files.PROGRAM, "generate", *words]:
                done = _generate(*words)
                return Result(argv, done.returncode, done.stdout, done.stderr)
            case ["ip", *words]:
                return Result(argv, 0, self._shown(words), "")
            case ["systemctl", "is-active", *names]:
                return Result(argv, 0, "".join(f"{self.services[each]}\n" for each in names), "")
        return Result(argv, 127, "", "")

    def _shown(self, words: list[str]) -> str:
        match words:
            case ["-j", "address"]:
                return json.dumps(list(self.links.values()))
            case ["-j", "-4" | "-6" as family, "route", "show", "table", "main"]:
                return json.dumps([each for each in self.routes if _family(each) == family])
            case ["-o", "-4" | "-6" as family, "route", "show", "table", "all"]:
                return "".join(f"{_words(each)}\n" for each in self.routes if _family(each) == family)
            case ["-4" | "-6" as family, "rule", "show"]:
                return self.rules.get(family, "")
        return "[]"


def _generate(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_GENERATE, *words], capture_output=True, text=True, check=False, timeout=300)


def _family(route: Mapping[str, Any]) -> str:
    return "-6" if ":" in f"{route['dst']}{route.get('gateway', '')}" else "-4"


def _words(route: Mapping[str, Any]) -> str:
    named = {"gateway": "via", "dev": "dev", "protocol": "proto", "metric": "metric"}
    return " ".join([route["dst"], *(f"{word} {route[key]}" for key, word in named.items() if key in route)])


def _address(said: str) -> dict[str, Any]:
    found = ipaddress.ip_interface(said)
    family = "inet" if found.version == 4 else "inet6"
    scope = "link" if found.is_link_local else "global"
    return {"family": family, "local": str(found.ip), "prefixlen": found.network.prefixlen, "scope": scope}


def _mac(name: str) -> str:
    return "02:00:5e:00:00:" + format(sum(name.encode()) % 256, "02x")
