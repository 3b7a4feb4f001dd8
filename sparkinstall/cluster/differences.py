"""In what nodes differ that should be alike: each tells what it has, and the terminal shows only what is not equal."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

from msgspec import Struct

from sparkinstall import elf
from sparkinstall.cluster import sameness
from sparkinstall.errors import Problem
from sparkinstall.facts import machine, qsfp
from sparkinstall.facts.qsfp import Port
from sparkinstall.node import Node, nccl_library, site_packages
from sparkinstall.probes import link_health, network
from sparkinstall.resources.decisions import recorded
from sparkinstall.steps.fp8 import cutlass_patch
from sparkinstall.system import Reader

Weight = Literal["fail", "warn", "note"]
"""Nodes that differ in it: do not work together; work, and may behave differently; are well, but it is good to know."""


class Kind(Struct, frozen=True):
    """Something to be compared. `mend` is done on the node that is wrong."""

    weight: Weight
    hint: str


_THERE = "on the node that is wrong"
_PACKAGES = f"`sparkinstall run environment --force` {_THERE}"
_UPDATES = "the same updates of DGX OS on every node (`sudo apt-get update`, `sudo apt-get full-upgrade`), and a reboot"
_ENV = f"`sparkinstall run env-files` {_THERE}, with the same settings as on the others"
_LOOKED_UP = "nothing: each node looks it up for itself whenever it starts something"
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("stack", "python", *sameness.PACKAGES), Kind("fail", _PACKAGES)),
    "lock": Kind("fail", _PACKAGES),
    **{f"{name}-files": Kind("fail", _PACKAGES) for name in sameness.PACKAGES},
    "nccl": Kind("fail", f"`sparkinstall run nccl --force` {_THERE}"),
    # Two builds of one recipe differ: nvcc writes names of temporary files into what it makes.
    "nccl-build-id": Kind("warn", "`sparkinstall cluster` with the nodes copies the head's NCCL to those without one"),
    "transport": Kind("fail", "`sparkinstall plan` says why a node has no RoCE; or `network.transport: socket` on all"),
    "fp8": Kind("fail", f"`sparkinstall run fp8 --force` {_THERE}, or decide it for all: `fp8.fallback: on` or `off`"),
    "fp8-file": Kind("fail", f"`sparkinstall run fp8` {_THERE}"),
    "mtu": Kind("fail", f"`sparkinstall run network` {_THERE}"),
    "gid": Kind("note", _LOOKED_UP),
    **dict.fromkeys(("driver", "kernel", "os", "firmware"), Kind("warn", _UPDATES)),
}
_OF_ENV = Kind("warn", _ENV)

# What must differ from node to node, or may: its address, the port's names, and what the head alone has.
_OWN = {
    *("VLLM_HOST_IP", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_IB_HCA"),
    *("UCX_NET_DEVICES", "VLLM_CONFIG_ROOT", "VLLM_NO_USAGE_STATS"),
}
_ASSIGNMENT = re.compile(r"^([A-Za-z_]\w*)=(.*)$", re.MULTILINE)
_DRIVER = re.compile(rb"(?:Kernel Module|for \S+) +([0-9][0-9.]+)")


def comparables(node: Node, on: Reader) -> dict[str, str]:
    """Name -> value of what should be the same on every node; what is not there, or cannot be read, is left out."""
    found = {"stack": node.stack.name}
    for part in _PARTS:
        # One file that cannot be read must not take all the rest with it.
        with suppress(OSError, ValueError, Problem):
            found |= part(node, on)
    return {name: value for name, value in found.items() if value}


def _of_lock(node: Node, on: Reader) -> dict[str, str]:
    return {"lock": str(recorded(on, f"{node.venv}/sparkinstall.json").get("lock", ""))[:12]}


def _of_files(node: Node, on: Reader) -> dict[str, str]:
    """A digest of what each wheel has brought: two of one version need not be the same."""
    site = site_packages(node, on)
    folders = on.names(site) if site else ()
    records = {name: f"{site}/{each}/RECORD" for each in folders if (name := _of_interest(each))}
    return {f"{name}-files": _digest(_contents(on.read(path) or b"")) for name, path in records.items()}


def _of_nccl(node: Node, on: Reader) -> dict[str, str]:
    """Of the library itself: what was noted when it was built says nothing of one that was put in its place."""
    path = nccl_library(node, on)
    found = elf.build_id(on.real(path)) if path and on.entry(path) else None
    return {"nccl-build-id": found[:12]} if found else {}


def _of_interest(folder: str) -> str:
    name = folder.partition("-")[0].lower()
    return name if folder.endswith(".dist-info") and name in sameness.PACKAGES else ""


def _contents(record: bytes) -> bytes:
    """The rows of a RECORD without those that the installer makes itself: scripts, its own notes."""
    rows = (row for row in record.splitlines() if row[:3] != b"../" and b".dist-info/" not in row.partition(b",")[0])
    return b"\n".join(sorted(row for row in rows if not row.partition(b",")[0].endswith(b".pyc")))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12] if content else ""


def _of_fp8(node: Node, on: Reader) -> dict[str, str]:
    decided = recorded(on, node.fp8_decision).get("fallback")
    return {"fp8": f"fallback {'on' if decided else 'off'}"} if isinstance(decided, bool) else {}


def _of_fp8_file(node: Node, on: Reader) -> dict[str, str]:
    site = site_packages(node, on)
    return {"fp8-file": _digest(on.read(f"{site}/{cutlass_patch().target}") or b"")} if site else {}


def _of_link(node: Node, on: Reader) -> dict[str, str]:
    if not node.several:
        return {}
    port = qsfp.port_to_look_at(on, node)
    versions = {link_health.firmware(on, half) for half in port.twins} - {"", "N/A"}
    mtus = " + ".join(str(half.mtu) for half in port.twins)
    return {"mtu": mtus, "gid": _gids(node, on, port), "firmware": ", ".join(sorted(versions))}


def _gids(node: Node, on: Reader, port: Port) -> str:
    own = network.own_addresses(node)
    found = [qsfp.roce_gid(on, half.hca, str(at.ip)) for half, at in zip(port.twins, own, strict=False) if half.hca]
    return " + ".join("none" if index is None else str(index) for index in found)


def _of_system(node: Node, on: Reader) -> dict[str, str]:
    del node
    if on.rehearsal:
        return {}
    driver = _DRIVER.search(on.read("/proc/driver/nvidia/version") or b"")
    release = machine.release(on)
    return {
        "driver": driver[1].decode() if driver else "",
        "kernel": (on.read("/proc/sys/kernel/osrelease") or b"").decode().strip(),
        "os": release.get("DGX_OTA_VERSION") or release.get("DGX_SWBUILD_VERSION") or "",
    }


def _of_env(node: Node, on: Reader) -> dict[str, str]:
    text = (on.read(node.env_file) or b"").decode(errors="replace")
    return {f"env {name}": value.strip('"') for name, value in _ASSIGNMENT.findall(text) if name not in _OWN}


_PARTS = (
    *(sameness.versions, _of_lock, _of_files, _of_nccl),
    *(_of_fp8, _of_fp8_file, _of_link, _of_system, _of_env),
)


class Row(Struct, frozen=True):
    """Something that is not the same on all nodes, with what each has, in the order of the nodes."""

    name: str
    weight: Weight
    values: tuple[str, ...]
    hint: str


class Comparison(Struct, frozen=True):
    """What nodes differ in, the worst first, of so many things that were `compared`."""

    hosts: tuple[str, ...]
    rows: tuple[Row, ...]
    compared: int

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.weight == "fail")


def compared(nodes: Sequence[tuple[str, Mapping[str, str]]]) -> Comparison:
    """Compare what each node has told of itself, by host; what a node does not have is an empty value."""
    names = list(dict.fromkeys(name for _, told in nodes for name in told))
    told = {name: tuple(values.get(name, "") for _, values in nodes) for name in names}
    rows = [Row(name, _kind(name).weight, each, _kind(name).hint) for name, each in told.items() if len(set(each)) > 1]
    order: Sequence[Weight] = ("fail", "warn", "note")
    return Comparison(
        tuple(host for host, _ in nodes), tuple(sorted(rows, key=lambda row: order.index(row.weight))), len(names)
    )


def _kind(name: str) -> Kind:
    # A newer version of us on a node may tell what this one does not know.
    return _OF_ENV if name.startswith("env ") else KINDS.get(name, Kind("note", ""))
