"""What the QSFP link says of itself without a load: counted errors, the card's lanes and firmware, its GIDs."""

import json
import time
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Interface

from msgspec import Struct

from sparkinstall.facts import qsfp
from sparkinstall.facts.qsfp import NET, RDMA, Interface, Port, text_of
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped, warned
from sparkinstall.probes.network import own_addresses
from sparkinstall.system import Reader

# Seconds between two readings of the counters.
_PAUSE = 1.0
# Of all packets since the boot: so many errors are no accident of a cable that was put in.
_TOLERATED, _FEW = 1e-5, 100

# rx_dropped is left out: the kernel counts there what nobody has asked for, such as a switch's LLDP.
FRAMES = {
    "rx_crc_errors": "frames arrive damaged: a cable or a plug that is bad or not wholly in",
    "rx_errors": "frames arrive that cannot be used: a cable or a plug that is bad or not wholly in",
    "rx_missed_errors": "frames arrive faster than this node takes them",
    "tx_errors": "frames cannot be sent",
    "carrier_changes": "the link goes up and down",
}
# As mlx5 names them (drivers/infiniband/hw/mlx5/counters.c).
PACKETS = {
    "out_of_sequence": "RDMA packets to this node are lost on the way",
    "packet_seq_err": "RDMA packets to the other node are lost on the way",
    "local_ack_timeout_err": "the other node does not confirm RDMA packets in time",
    "rnr_nak_retry_err": "the other node is not ready to receive",
    "rx_icrc_encapsulated": "RDMA packets arrive damaged",
}
_MEANING = {**FRAMES, **PACKETS}


def probes(node: Node) -> Iterable[Probe]:
    """What can be seen of the link without keeping it busy."""
    yield Probe("link-health", "the link's errors, lanes and firmware", lambda on: _health(node, on), "link")
    yield Probe("gids", "RoCE finds each half by its address", lambda on: _gids(node, on), "link")


class Counted(Struct, frozen=True):
    """Counters by `interface counter`, and the packets that came in by interface."""

    errors: Mapping[str, int]
    packets: Mapping[str, int]


def counted(on: Reader, port: Port) -> Counted:
    """What the kernel and the RDMA devices of both halves have counted since the boot; what is not told is left out."""
    errors: dict[str, int] = {}
    for half in port.twins:
        places = {name: f"{NET}/{half.name}/statistics/{name}" for name in FRAMES}
        places["carrier_changes"] = f"{NET}/{half.name}/carrier_changes"
        places |= {name: f"{RDMA}/{half.hca}/ports/1/hw_counters/{name}" for name in PACKETS if half.hca}
        said = {name: text_of(on, path) for name, path in places.items()}
        errors |= {f"{half.name} {name}": int(text) for name, text in said.items() if text.isdecimal()}
    return Counted(errors, {half.name: _packets(on, half) for half in port.twins})


def _packets(on: Reader, half: Interface) -> int:
    # What RDMA carries is not among the kernel's packets.
    of_rdma = f"{RDMA}/{half.hca}/ports/1/counters/port_rcv_packets"
    said = [text_of(on, f"{NET}/{half.name}/statistics/rx_packets"), text_of(on, of_rdma) if half.hca else ""]
    return sum(int(text) for text in said if text.isdecimal())


def grown(before: Counted, after: Counted) -> dict[str, int]:
    """By how much each counter has grown; those that have not are left out."""
    more = {name: count - before.errors.get(name, count) for name, count in after.errors.items()}
    return {name: count for name, count in more.items() if count > 0}


def in_words(counters: Mapping[str, int]) -> str:
    """Counters with their numbers, and what they mean; a meaning that several have is said once."""
    named = ", ".join(f"{name} {count}" for name, count in counters.items())
    meanings = dict.fromkeys(_MEANING[name.rpartition(" ")[2]] for name in counters)
    return f"{named}: {'; '.join(meanings)}"


def many(so_far: Counted) -> dict[str, int]:
    """Counters that stand higher since the boot than a cable that was put in explains."""
    found = {}
    for name, count in so_far.errors.items():
        interface, _, counter = name.partition(" ")
        # It grows whenever the other node starts.
        if counter != "carrier_changes" and count > max(_FEW, so_far.packets[interface] * _TOLERATED):
            found[name] = count
    return found


def firmware(on: Reader, half: Interface) -> str:
    """The version of the card's firmware, as its RDMA device or ethtool tells it; empty where neither does."""
    if half.hca and (said := text_of(on, f"{RDMA}/{half.hca}/fw_ver")):
        return said
    return _of_ethtool(on, "firmware-version", "-i", half.name)


def _of_ethtool(on: Reader, label: str, *words: str) -> str:
    rows = (line.partition(":") for line in on.ask("ethtool", *words).out.splitlines())
    return next((value.strip() for name, _, value in rows if name.strip() == label), "")


def lanes(on: Reader, half: Interface) -> tuple[int, float]:
    """PCIe lanes of a half and their rate in GT/s, as they are in use; zeros where the kernel does not tell."""
    device = f"{NET}/{half.name}/device"
    width, rate = (text_of(on, f"{device}/current_link_{what}") for what in ("width", "speed"))
    number = rate.partition(" ")[0]
    return int(width) if width.isdecimal() else 0, float(number) if number.replace(".", "", 1).isdecimal() else 0.0


def _health(node: Node, on: Reader) -> Finding:
    if on.rehearsal:
        return skipped("a rehearsal has no QSFP port")
    port = qsfp.port_to_look_at(on, node)
    before = counted(on, port)
    time.sleep(_PAUSE)
    now = counted(on, port)
    expected = "no errors, and the same firmware on both halves"
    if complaint := _complaint(on, port, grown(before, now), many(now)):
        return warned(*complaint, expected)
    return passed(_facts(on, port, now), expected)


def _complaint(on: Reader, port: Port, growing: Mapping[str, int], high: Mapping[str, int]) -> tuple[str, str] | None:
    """What is wrong and what to do, the worst first."""
    if growing:
        return f"growing within a second: {in_words(growing)}", _CABLE
    for half in port.twins:
        if text_of(on, f"{NET}/{half.name}/duplex") == "half":
            return f"{half.name} runs half duplex", _CABLE
    if high:
        return f"since the boot: {in_words(high)}", _CABLE
    versions = {half.name: version for half in port.twins if (version := firmware(on, half))}
    if len(set(versions.values())) > 1:
        said = ", ".join(f"{version} on {name}" for name, version in versions.items())
        return f"the halves have different firmware: {said}", _UPDATES
    return None


_CABLE = "put the cable in again at both ends, or try another one; then `sparkinstall verify --only link-health`"
_UPDATES = "install the updates of DGX OS, and switch the node off and on"


def _facts(on: Reader, port: Port, now: Counted) -> str:
    # What to think of the lanes is for `connectx-pcie`, one of the known-bad hosts.
    widths = sorted({lanes(on, half) for half in port.twins})
    known = [f"PCIe x{width} at {rate:g} GT/s" for width, rate in widths if width]
    fec = {_of_ethtool(on, "Active FEC encoding", "--show-fec", half.name) for half in port.twins} - {""}
    versions = {firmware(on, half) for half in port.twins} - {"", "N/A"}
    known += [f"FEC {each}" for each in sorted(fec)] + [f"firmware {each}" for each in sorted(versions)]
    errors = {name: count for name, count in now.errors.items() if count and not name.endswith("carrier_changes")}
    few = ", ".join(f"{name} {count}" for name, count in errors.items())
    known.append(f"few errors since the boot ({few}), none in this second" if few else "no errors since the boot")
    return ", ".join(known)


def decided_transport(node: Node, on: Reader) -> str:
    """`roce` or `socket`, as the env files were made for it; empty before they were."""
    try:
        return str(json.loads(on.read(node.transport_decision) or b"{}").get("transport", ""))
    except (ValueError, AttributeError):
        return ""


def _gids(node: Node, on: Reader) -> Finding:
    if on.rehearsal:
        return skipped("a rehearsal has no RDMA devices")
    transport = decided_transport(node, on)
    if not transport:
        return skipped("it was not decided yet whether NCCL talks over RoCE: `sparkinstall all` does that")
    if transport == "socket":
        return passed("NCCL talks over sockets on this node, and needs none")
    port = qsfp.port_to_look_at(on, node)
    expected = "each half's RDMA device is ACTIVE and has a RoCE v2 GID for that half's address"
    if why := qsfp.roce_ready(on, port):
        return failed(why, _ROCE, expected)
    found = {half.hca: (str(own.ip), qsfp.roce_gid(on, half.hca, str(own.ip))) for half, own in _halves(node, port)}
    for hca, (address, index) in found.items():
        if index is None:
            return failed(f"{hca} has no RoCE v2 GID for {address}", _ROCE, expected)
    return passed(", ".join(f"{hca} index {index}: {address}" for hca, (address, index) in found.items()), expected)


def _halves(node: Node, port: Port) -> list[tuple[Interface, IPv4Interface]]:
    return list(zip(port.twins, own_addresses(node), strict=False))


_ROCE = (
    "`sparkinstall run network` gives the halves their addresses, from which the card makes the GIDs; "
    "if they stay away, take sockets on all nodes: `--set network.transport=socket`"
)
