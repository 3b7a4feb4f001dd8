"""Network namespaces and the wires between them, like machines on a desk.

Every wire has one end in a machine and the other in a namespace `switch`, so that it can be pulled: the machine then
has no carrier, and nothing else of it changes. A machine's end is created each time it is switched on, as after a real
power-on: without addresses, at MTU 1500.
"""

from __future__ import annotations

import fcntl
import secrets
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.lab import cache
from tests.lab.commands import CommandFailedError, run

LAN = "enP7s7"
# A port of the card is two interfaces, one on each half of its PCIe lanes.
PORT_0 = ("enp1s0f0np0", "enP2p1s0f0np0")
PORT_1 = ("enp1s0f1np1", "enP2p1s0f1np1")
SWITCHES = dict(zip((LAN, *PORT_0), ("lan", "half0", "half1"), strict=True))

LAN_MTU = 1500
SWITCH_MTU = 9216
NETNS = Path("/run/netns")
PREFIX = "lab-"


@dataclass
class Plugs:
    """A machine's interfaces, and whether it is on."""

    number: int
    netns: str
    interfaces: tuple[str, ...]
    on: bool = False
    pulled: set[str] = field(default_factory=set)


class Cabling:
    """The wires of one set of machines, until `remove`; `direct`: port 0 joins two machines without a switch."""

    def __init__(self, *, direct: bool) -> None:
        self._direct = direct
        self._lock = threading.RLock()
        self._machines: list[Plugs] = []
        self._up: set[str] = set()
        with cache.locked(cache.folder() / "cablings.lock"):
            sweep()
            self.tag = f"{PREFIX}{secrets.token_hex(4)}"
            self._mark, self._held = _hold(self.tag)
        self.switch = f"{self.tag}-switch"
        try:
            self._make_switches()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove all its namespaces, and with them the wires."""
        with self._lock:
            _remove_namespaces(self.tag)
            self._mark.unlink(missing_ok=True)
            self._held.close()

    def add(self, name: str, interfaces: Iterable[str]) -> Plugs:
        """Add a machine without power; port 1 has no cable on any machine."""
        plugs = Plugs(len(self._machines), f"{self.tag}-{name}", tuple(interfaces))
        self._machines.append(plugs)
        return plugs

    def power_on(self, plugs: Plugs) -> None:
        """Create the machine's namespace and its ends of the wires again."""
        with self._lock:
            self.power_off(plugs)
            run("ip", "netns", "add", plugs.netns)
            for index, interface in enumerate(plugs.interfaces):
                self._lay(plugs, interface, f"02:00:5e:00:{plugs.number:02x}:{index:02x}")
            plugs.on = True
            self._settle()

    def power_off(self, plugs: Plugs) -> None:
        """Remove them; on a direct cable the other side has no carrier from now on."""
        with self._lock:
            plugs.on = False
            for interface in plugs.interfaces:
                # The kernel removes a namespace's wires with it, but only some time later.
                with suppress(CommandFailedError):
                    ip(self.switch, "link", "del", _end(plugs, interface))
                self._up.discard(_end(plugs, interface))
            _remove_namespace(plugs.netns)
            self._settle()

    def pull(self, plugs: Plugs, interfaces: Iterable[str]) -> None:
        """Pull these plugs: no carrier until `insert`, a reboot notwithstanding."""
        with self._lock:
            plugs.pulled.update(interfaces)
            self._settle()

    def insert(self, plugs: Plugs, interfaces: Iterable[str]) -> None:
        """Insert these plugs again."""
        with self._lock:
            plugs.pulled.difference_update(interfaces)
            self._settle()

    def _make_switches(self) -> None:
        run("ip", "netns", "add", self.switch)
        ip(self.switch, "link", "set", "lo", "up")
        for interface, bridge in SWITCHES.items():
            ip(self.switch, "link", "add", bridge, "mtu", str(_switch_mtu(interface)), "type", "bridge")
            ip(self.switch, "link", "set", bridge, "up")

    def _lay(self, plugs: Plugs, interface: str, hardware_address: str) -> None:
        here, mtu = _end(plugs, interface), str(_switch_mtu(interface))
        there = ("name", interface, "netns", plugs.netns, "mtu", "1500", "address", hardware_address)
        ip(self.switch, "link", "add", here, "mtu", mtu, "type", "veth", "peer", *there)
        if interface in SWITCHES:
            ip(self.switch, "link", "set", here, "master", SWITCHES[interface])
        # As after a desktop's network manager: up, without an address.
        ip(plugs.netns, "link", "set", interface, "up")

    def _settle(self) -> None:
        """Set each wire's carrier by the plugs and the power at its ends."""
        for plugs in self._machines:
            for interface in plugs.interfaces if plugs.on else ():
                here = _end(plugs, interface)
                if (live := self._is_live(plugs, interface)) != (here in self._up):
                    ip(self.switch, "link", "set", here, "up" if live else "down")
                    (self._up.add if live else self._up.discard)(here)

    def _is_live(self, plugs: Plugs, interface: str) -> bool:
        if interface not in SWITCHES:
            return False
        ends = [plugs]
        if self._direct and interface in PORT_0:
            ends = [other for other in self._machines if interface in other.interfaces]
        return all(end.on and interface not in end.pulled for end in ends)


def ip(netns: str, *words: str) -> None:
    """Run `ip` in a namespace."""
    run("ip", "-n", netns, *words)


def sweep() -> None:
    """Remove the namespaces of crashed test runs. The caller holds the lock of all cablings."""
    for mark in cache.folder().glob(f"{PREFIX}*.cabling"):
        with mark.open("wb") as held, suppress(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_namespaces(mark.stem)
            # Another run may have removed its own between the listing and the lock.
            mark.unlink(missing_ok=True)


def _hold(tag: str) -> tuple[Path, IO[bytes]]:
    # Locked while this process lives: an unlocked mark is that of a crashed run.
    mark = cache.folder() / f"{tag}.cabling"
    held = mark.open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    return mark, held


def _remove_namespaces(tag: str) -> None:
    for path in sorted(NETNS.glob(f"{tag}-*")):
        _remove_namespace(path.name)


def _remove_namespace(name: str) -> None:
    if (NETNS / name).exists():
        run("ip", "netns", "del", name)


def _end(plugs: Plugs, interface: str) -> str:
    """The name of a wire's end at the switch; the kernel allows 15 characters."""
    return f"{plugs.number}-{interface}"


def _switch_mtu(interface: str) -> int:
    return LAN_MTU if interface == LAN else SWITCH_MTU
