"""What differs between nodes that should be equal: each node lists its values, the terminal compares them."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from msgspec import Struct

from sparkinstall import elf
from sparkinstall.errors import Blocked, Problem
from sparkinstall.facts import card, gpu, machine, network, qsfp
from sparkinstall.facts.decisions import Fp8Fallback, RecordDamaged, VenvStamp, recorded
from sparkinstall.facts.env_file import assignments
from sparkinstall.facts.qsfp import Port
from sparkinstall.node import Node, nccl_library, site_packages
from sparkinstall.resources.nccl import Stamp
from sparkinstall.resources.transport import Transport
from sparkinstall.resources.venv import installed
from sparkinstall.steps.fp8 import cutlass_patch
from sparkinstall.system import Reader

PACKAGES = ("vllm", "torch", "ray", "triton", "transformers")
"""Packages whose versions must be equal on all nodes."""
_DECIDES = ("version", "arch", "compiler", "source", "only_functions")
_LABELS = {"python": "Python", "nccl": "NCCL", "vllm": "vLLM", "transport": "transport for NCCL"}
_VERSION = re.compile(rb"^version(?:_info)? *= *(\S+)", re.MULTILINE)
Weight = Literal["fail", "warn", "note"]
"""fail: the nodes cannot work together. warn: they may behave differently. note: informational."""


class Kind(Struct, frozen=True):
    """How a difference counts, and what to do on the node that is wrong.

    `before_ray`: Ray is not started while the nodes differ in it.
    """

    weight: Weight
    hint: str
    before_ray: bool = False


_THERE = "on the node that is wrong"
_REINSTALL = f"`sparkinstall run environment --force` {_THERE}"
_UPDATES = "the same updates of DGX OS on every node (`sudo apt-get update`, `sudo apt-get full-upgrade`), and a reboot"
_KHO = f"`sudo apt install nvidia-spark-grub-kho` and a reboot {_THERE}: a kernel 7.0 needs kho=off"
_ENV = f"`sparkinstall run env-files` {_THERE}, with the same settings as on the others"
_LOOKED_UP = "nothing: each node looks it up when it starts a process"
_ROCE = "`sparkinstall plan` says why a node has no RoCE; or `network.transport: socket` on all"
KINDS: Mapping[str, Kind] = {
    "stack": Kind("fail", _REINSTALL),
    **dict.fromkeys(("python", *PACKAGES), Kind("fail", _REINSTALL, before_ray=True)),
    "lock": Kind("fail", _REINSTALL),
    **{f"{name}-files": Kind("fail", _REINSTALL) for name in PACKAGES},
    "nccl": Kind("fail", f"`sparkinstall run nccl --force` {_THERE}", before_ray=True),
    # Two builds of one recipe differ: nvcc writes the names of temporary files into its output.
    "nccl-build-id": Kind("warn", "`sparkinstall cluster` with the nodes copies the head's NCCL to those without one"),
    "transport": Kind("fail", _ROCE, before_ray=True),
    "fp8": Kind("fail", f"`sparkinstall run fp8 --force` {_THERE}, or decide it for all: `fp8.fallback: on` or `off`"),
    "fp8-file": Kind("fail", f"`sparkinstall run fp8` {_THERE}"),
    "mtu": Kind("fail", f"`sparkinstall run network` {_THERE}"),
    "gid": Kind("note", _LOOKED_UP),
    "kho": Kind("warn", _KHO),
    **dict.fromkeys(("driver", "kernel", "os", "firmware"), Kind("warn", _UPDATES)),
}
_ENV_KIND = Kind("warn", _ENV)

# These differ, or may differ, from node to node: addresses, names of ports, what only the head has.
_OWN = {
    *("VLLM_HOST_IP", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_IB_HCA"),
    *("UCX_NET_DEVICES", "VLLM_CONFIG_ROOT", "VLLM_NO_USAGE_STATS"),
}


def comparables(node: Node, on: Reader) -> dict[str, str]:
    """Name -> value of what should be equal on every node; a missing or unreadable value is left out."""
    found = {"stack": node.stack.name}
    for part in _PARTS:
        # An unreadable file must not hide the other values.
        with suppress(OSError, ValueError, Problem):
            found |= part(node, on)
    return {name: value for name, value in found.items() if value}


def _of_lock(node: Node, on: Reader) -> dict[str, str]:
    stamp = recorded(on, node.venv_stamp, VenvStamp)
    return {"lock": stamp.lock[:12]} if stamp else {}


def _of_files(node: Node, on: Reader) -> dict[str, str]:
    """A digest of the files of each package: two wheels of one version may differ."""
    site = site_packages(node, on)
    folders = on.names(site) if site else ()
    records = {name: f"{site}/{each}/RECORD" for each in folders if (name := _of_interest(each))}
    return {f"{name}-files": _digest(_contents(on.read(path) or b"")) for name, path in records.items()}


def _of_nccl(node: Node, on: Reader) -> dict[str, str]:
    """The build-id of the library itself: the build record does not describe a library that replaced ours."""
    return {"nccl-build-id": _build_id(node, on)[:12]}


def _of_interest(folder: str) -> str:
    name = folder.partition("-")[0].lower()
    return name if folder.endswith(".dist-info") and name in PACKAGES else ""


def _contents(record: bytes) -> bytes:
    """The rows of a RECORD without those that the installer adds: scripts and its own metadata."""
    rows = (row for row in record.splitlines() if row[:3] != b"../" and b".dist-info/" not in row.partition(b",")[0])
    return b"\n".join(sorted(row for row in rows if not row.partition(b",")[0].endswith(b".pyc")))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12] if content else ""


def _of_fp8(node: Node, on: Reader) -> dict[str, str]:
    decided = recorded(on, node.fp8_decision, Fp8Fallback)
    return {"fp8": f"fallback {'on' if decided.fallback else 'off'}"} if decided else {}


def _of_fp8_file(node: Node, on: Reader) -> dict[str, str]:
    site = site_packages(node, on)
    return {"fp8-file": _digest(on.read(f"{site}/{cutlass_patch().target}") or b"")} if site else {}


def _of_link(node: Node, on: Reader) -> dict[str, str]:
    if not node.several:
        return {}
    port = qsfp.port_to_look_at(on, node)
    versions = {card.firmware(on, half) for half in port.twins} - {"", "N/A"}
    mtus = " + ".join(str(half.mtu) for half in port.twins)
    return {"mtu": mtus, "gid": _gids(node, on, port), "firmware": ", ".join(sorted(versions))}


def _gids(node: Node, on: Reader, port: Port) -> str:
    own = network.own_addresses(node)
    found = [qsfp.roce_gid(on, half.hca, str(at.ip)) for half, at in zip(port.twins, own, strict=False) if half.hca]
    return " + ".join("none" if index is None else str(index) for index in found)


def _of_system(node: Node, on: Reader) -> dict[str, str]:
    del node
    release = machine.release(on)
    return {
        "driver": gpu.loaded_driver(on),
        "kernel": (on.read("/proc/sys/kernel/osrelease") or b"").decode().strip(),
        "kho": machine.boot_option(on, "kho") or "not set",
        "os": release.get("DGX_OTA_VERSION") or release.get("DGX_SWBUILD_VERSION") or "",
    }


def _of_env(node: Node, on: Reader) -> dict[str, str]:
    found = assignments(on.read(node.env_file) or b"")
    return {f"env {name}": value for name, value in found.items() if name not in _OWN}


def versions(node: Node, on: Reader) -> dict[str, str]:
    """Name -> version of each installed component; a missing one is left out."""
    packages, python = installed(node, on), _VERSION.search(on.read(f"{node.venv}/pyvenv.cfg") or b"")
    found = {
        **{name: packages.get(name, "") for name in PACKAGES},
        "python": python[1].decode(errors="replace") if python else "",
        "nccl": _nccl(node, on),
        "transport": Transport(node).talks_over(on) if node.several else "",
    }
    return {name: value for name, value in found.items() if value}


def _nccl(node: Node, on: Reader) -> str:
    if node.config.nccl.mode == "source":
        # Not the build-id: two builds of one recipe differ in it.
        try:
            stamp = recorded(on, node.nccl_stamp, Stamp)
        except RecordDamaged:
            # The step `nccl` reports it.
            return ""
        return " ".join(str(getattr(stamp.recipe, name)) for name in _DECIDES) if stamp else ""
    return _build_id(node, on)


def _build_id(node: Node, on: Reader) -> str:
    path = nccl_library(node, on)
    real = Path(on.real(path)) if path else None
    return elf.build_id(real) or "" if real and real.is_file() else ""


_PARTS = (*(versions, _of_lock, _of_files, _of_nccl), *(_of_fp8, _of_fp8_file, _of_link, _of_system, _of_env))


class Row(Struct, frozen=True):
    """A value that differs: that of each node by host; empty: it has none."""

    name: str
    weight: Weight
    values: Mapping[str, str]
    hint: str


class Comparison(Struct, frozen=True):
    """The differences, the worst first. `compared`: the number of values compared."""

    rows: tuple[Row, ...]
    compared: int


def compared(nodes: Mapping[str, Mapping[str, str]]) -> Comparison:
    """Compare the values of all nodes, given by host."""
    rows = []
    names = dict.fromkeys(name for own in nodes.values() for name in own)
    for name in names:
        values = {host: own.get(name, "") for host, own in nodes.items()}
        if len(set(values.values())) > 1:
            rows.append(Row(name, _kind(name).weight, values, _kind(name).hint))
    order: Sequence[Weight] = ("fail", "warn", "note")
    return Comparison(tuple(sorted(rows, key=lambda row: order.index(row.weight))), len(names))


def _kind(name: str) -> Kind:
    # A newer version on a node may list values that this one does not know.
    return _ENV_KIND if name.startswith("env ") else KINDS.get(name, Kind("note", ""))


# --- before Ray starts


def token_digest(node: Node, on: Reader) -> str | None:
    """A digest that tells two Ray tokens apart; it does not reveal them, since a token is long and random."""
    token = on.read(node.ray_token)
    return hashlib.sha256(token.strip()).hexdigest()[:16] if token else None


def require_same(nodes: Mapping[str, Mapping[str, str]]) -> None:
    """Compare each node with the first one in what must be equal before Ray starts; values by host.

    Raises:
        Blocked: two nodes differ; it names both, and all differences between them.
    """
    (first, wanted), *others = nodes.items()
    required = sorted(name for name, kind in KINDS.items() if kind.before_ray)
    for host, found in others:
        different = [name for name in required if wanted.get(name) != found.get(name)]
        if different:
            values = (f"{_LABELS.get(n, n)}: {_of(wanted, n)} on {first}, {_of(found, n)} on {host}" for n in different)
            raise Blocked(
                f"{first} and {host} differ in {', '.join(_LABELS.get(n, n) for n in different)}",
                cause="; ".join(values),
                hint=f"nothing was started. {_hint(different, first, host)}",
            )


def _hint(different: Sequence[str], first: str, host: str) -> str:
    if list(different) == ["transport"]:
        return (
            "RoCE and sockets cannot connect to each other: `sparkinstall plan` there says why it has no RoCE; "
            "or use sockets on all nodes: `--set network.transport=socket`"
        )
    return (
        "Install the same stack on every node: "
        f"`sparkinstall run environment nccl --force` on the one that is wrong ({first} or {host})"
    )


def _of(found: Mapping[str, str], name: str) -> str:
    return found.get(name, "none")[:80]
