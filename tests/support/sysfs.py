"""A node's network as the kernel shows it, written below a folder: /sys/class/net, /sys/class/infiniband, /proc/net.

Nothing here was recorded on a GB10. The sources are: the tables of names, twins and speeds in the project's list of
facts, sections 1 and 3; the form of a table of GIDs in NVIDIA/nccl issue #1538; reports about pairs of Sparks on how
its indices move (MiaAI-Lab/GLM-5.3-Flash-EXL3-2x-DGX-Sparks #26: 4 on one node, 3 on the other;
FujitsuPolycom/sparkring #186 and #290: different for the two halves, and moving); and, for the targets of links and for
unreadable files, the kernel of an ordinary machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ZERO = "0000:0000:0000:0000:0000:0000:0000:0000"
TABLE_ENTRIES = 16
V1, V2 = "IB/RoCE v1", "RoCE v2"

# A file that can be opened and fails when it is read (with EIO; a real one fails with EINVAL).
_UNREADABLE = "/proc/self/mem"
_PLACE = re.compile(r"(?:en|wl)(?:P(\d+))?(?:p(\d+))?s(\d+)(?:f(\d+))?")


def mapped(address: str) -> str:
    """The GID of an IPv4 address."""
    high, low = (bytes(map(int, address.split(".")))[each : each + 2].hex() for each in (0, 2))
    return f"0000:0000:0000:0000:0000:ffff:{high}:{low}"


class Sysfs:
    """The tree below `root`; every method adds to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "sys/class/net").mkdir(parents=True)
        (root / "proc/net").mkdir(parents=True)
        (root / "proc/net/route").write_text("Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n")
        (root / "proc/net/ipv6_route").write_text("")

    def card(self, name: str, driver: str = "mlx5_core", carrier: bool | None = False, mtu: int = 1500) -> Path:
        """Add an interface of a PCI device, with the link to its driver; `carrier` None: it is down. Its folder."""
        device = self._device(name)
        folder = self._interface(device / "net" / name, carrier, mtu, 200000 if driver == "mlx5_core" else 10000)
        _link(folder / "device", device)
        if driver:
            _link(device / "driver", self.root / "sys/bus/pci/drivers" / driver)
        return folder

    def virtual(self, name: str, carrier: bool | None = True) -> Path:
        """An interface without a device: a bridge, a bond, a VLAN, a veth."""
        return self._interface(self.root / "sys/devices/virtual/net" / name, carrier, 1500, -1)

    def wifi(self, name: str) -> None:
        """A Wi-Fi card as kernels without the old wireless extensions show it."""
        (self.card(name, "mt7925e", True) / "phy80211").mkdir()

    def above(self, upper: str, *lowers: str, master: bool = False) -> None:
        """`upper` runs over `lowers`; a bridge and a bond are their `master` too, a VLAN is not."""
        for lower in lowers:
            _link(self._net(upper) / f"lower_{lower}", self._net(lower))
            _link(self._net(lower) / f"upper_{upper}", self._net(upper))
            if master:
                _link(self._net(lower) / "master", self._net(upper))

    def hca(self, name: str, card: str, state: str = "4: ACTIVE", *, below: str = "") -> None:
        """An RDMA device of an interface's card; `below` names another one whose card it is."""
        device = (self._net(below or card) / "device").resolve()
        folder = device / "infiniband" / name
        _link(self.root / "sys/class/infiniband" / name, folder)
        _link(folder / "device", device)
        for each in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
            (folder / "ports/1" / each).mkdir(parents=True)
        (folder / "ports/1/state").write_text(f"{state}\n")
        for index in range(TABLE_ENTRIES):
            self.gid(name, index, ZERO)

    def gid(self, hca: str, index: int, value: str, kind: str = "", interface: str = "") -> None:
        """One entry of the table; the kernel shows neither kind nor interface of an empty one."""
        port = self.root / "sys/class/infiniband" / hca / "ports/1"
        (port / "gids" / str(index)).write_text(f"{value}\n")
        for place, content in (("types", kind), ("ndevs", interface)):
            _file(port / "gid_attrs" / place / str(index), content or None)

    def gids(self, hca: str, interface: str, *values: str, first: int = 0) -> None:
        """Consecutive entries, each of both kinds, as on a ConnectX."""
        for index, value in enumerate(values):
            self.gid(hca, first + 2 * index, value, V1, interface)
            self.gid(hca, first + 2 * index + 1, value, V2, interface)

    def default_route(self, name: str, flags: int = 0x3) -> None:
        with (self.root / "proc/net/route").open("a") as table:
            table.write(f"{name}\t00000000\t010200C0\t{flags:04X}\t0\t0\t100\t00000000\t0\t0\t0\n")
            table.write(f"{name}\t000200C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0\n")

    def default_route6(self, name: str, flags: int = 0x3) -> None:
        with (self.root / "proc/net/ipv6_route").open("a") as table:
            rest = f"{'0' * 32} 00 {'fd' + '0' * 29 + '1'} 00000400 00000002 00000000 {flags:08x} {name:>8}"
            table.write(f"{'0' * 32} 00 {rest}\n")

    def _device(self, name: str) -> Path:
        found = _PLACE.match(name)
        domain, bus, slot, function = (int(each or 0) for each in found.groups()) if found else (0, 31, 0, 0)
        root = self.root / f"sys/devices/pci{domain:04x}:00"
        return root / f"{domain:04x}:00:00.0" / f"{domain:04x}:{bus:02x}:{slot:02x}.{function}"

    def _interface(self, folder: Path, carrier: bool | None, mtu: int, speed: int) -> Path:
        folder.mkdir(parents=True)
        _file(folder / "carrier", None if carrier is None else str(int(carrier)))
        _file(folder / "speed", None if carrier is None else str(speed))
        _file(folder / "mtu", str(mtu))
        _link(self.root / "sys/class/net" / folder.name, folder)
        return folder

    def _net(self, name: str) -> Path:
        return (self.root / "sys/class/net" / name).resolve()


def spark(root: Path, cable: int | None = 0, gid: int = 2) -> Sysfs:
    """A DGX Spark with the cable in port 0 or 1 (None: in neither) and addresses on that port, whose GIDs begin at
    index `gid`; the default route uses the 10 GbE port, and there is Wi-Fi."""
    node = Sysfs(root)
    node.virtual("lo")
    node.card("enP7s7", "r8127", True)
    node.wifi("wlP9s9")
    node.default_route("enP7s7")
    for number in (0, 1):
        subnets = ("192.168.100.10", "192.168.101.10") if number == cable else ("", "")
        for domain, address in zip(("", "P2"), subnets, strict=True):
            place = f"{domain}p1s0f{number}"
            _half(node, f"en{place}np{number}", f"roce{place}", address, gid)
    return node


def _half(node: Sysfs, name: str, hca: str, address: str, gid: int) -> None:
    node.card(name, carrier=bool(address))
    node.hca(hca, name, "4: ACTIVE" if address else "1: DOWN")
    node.gids(hca, name, "fe80:0000:0000:0000:4ebb:47ff:fe00:0001")
    if address:
        node.gids(hca, name, mapped(address), first=gid)


def _file(path: Path, content: str | None) -> None:
    path.unlink(missing_ok=True)
    if content is None:
        path.symlink_to(_UNREADABLE)
    else:
        path.write_text(f"{content}\n")


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent.resolve()))


def card(node: Sysfs, half: str, lanes: str = "4", rate: str = "32.0 GT/s PCIe", version: str = "28.45.4028") -> None:
    device = node.root / "sys/class/net" / half / "device"
    (device / "current_link_width").write_text(f"{lanes}\n")
    (device / "current_link_speed").write_text(f"{rate}\n")
    (hca,) = (device / "infiniband").iterdir()
    (hca / "fw_ver").write_text(f"{version}\n")
