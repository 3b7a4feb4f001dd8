"""The ConnectX card of the QSFP port: PCIe lanes, firmware, error counters."""

from collections.abc import Mapping

from msgspec import Struct

from sparkinstall.facts.qsfp import Interface, Port
from sparkinstall.facts.sysfs import NET, RDMA, text_of
from sparkinstall.system import Reader

# Not rx_dropped: it includes packets of unused protocols, such as a switch's LLDP.
FRAMES = {
    "rx_crc_errors": "frames arrive damaged: a bad or loose cable or plug",
    "rx_errors": "frames arrive unusable: a bad or loose cable or plug",
    "rx_missed_errors": "frames arrive faster than this node can receive them",
    "tx_errors": "frames cannot be sent",
    "carrier_changes": "the link goes up and down",
}
"""Counters of the kernel and their meanings."""
# Names of mlx5 (drivers/infiniband/hw/mlx5/counters.c).
PACKETS = {
    "out_of_sequence": "RDMA packets to this node are lost on the way",
    "packet_seq_err": "RDMA packets to the other node are lost on the way",
    "local_ack_timeout_err": "the other node does not confirm RDMA packets in time",
    "rnr_nak_retry_err": "the other node is not ready to receive",
    "rx_icrc_encapsulated": "RDMA packets arrive damaged",
}
"""Counters of the RDMA device and their meanings."""


def lanes(on: Reader, interface: str) -> tuple[int, float]:
    """Return the PCIe lanes of an interface's device and their rate in GT/s; zeros if unknown."""
    device = f"{NET}/{interface}/device"
    # The kernel writes `4` and `32.0 GT/s PCIe`.
    width, rate = (text_of(on, f"{device}/current_link_{what}") for what in ("width", "speed"))
    number = rate.partition(" ")[0]
    return int(width) if width.isdecimal() else 0, float(number) if number.replace(".", "", 1).isdecimal() else 0.0


def firmware(on: Reader, half: Interface) -> str:
    """Return the version of the card's firmware from its RDMA device or ethtool; "" if unknown."""
    if half.hca and (said := text_of(on, f"{RDMA}/{half.hca}/fw_ver")):
        return said
    return ethtool(on, "firmware-version", "-i", half.name)


def rdma_firmware(on: Reader) -> list[str]:
    return sorted({text_of(on, f"{RDMA}/{name}/fw_ver") for name in on.names(RDMA)} - {""})


def ethtool(on: Reader, label: str, *words: str) -> str:
    """Return the value after `label:` in the output of `ethtool WORDS`, or ""."""
    rows = (line.partition(":") for line in on.ask("ethtool", *words).out.splitlines())
    return next((value.strip() for name, _, value in rows if name.strip() == label), "")


class Counted(Struct, frozen=True):
    """Counters by `interface counter`, and received packets by interface."""

    errors: Mapping[str, int]
    packets: Mapping[str, int]


def counted(on: Reader, port: Port) -> Counted:
    """Return the readable counters of the kernel and the RDMA devices of both halves since the boot."""
    errors: dict[str, int] = {}
    for half in port.twins:
        places = {name: f"{NET}/{half.name}/statistics/{name}" for name in FRAMES}
        places["carrier_changes"] = f"{NET}/{half.name}/carrier_changes"
        places |= {name: f"{RDMA}/{half.hca}/ports/1/hw_counters/{name}" for name in PACKETS if half.hca}
        said = {name: text_of(on, path) for name, path in places.items()}
        errors |= {f"{half.name} {name}": int(text) for name, text in said.items() if text.isdecimal()}
    return Counted(errors, {half.name: _packets(on, half) for half in port.twins})


def _packets(on: Reader, half: Interface) -> int:
    # The kernel does not count RDMA packets.
    of_rdma = f"{RDMA}/{half.hca}/ports/1/counters/port_rcv_packets"
    said = [text_of(on, f"{NET}/{half.name}/statistics/rx_packets"), text_of(on, of_rdma) if half.hca else ""]
    return sum(int(text) for text in said if text.isdecimal())


def grown(before: Counted, after: Counted) -> dict[str, int]:
    """Return the increase of each counter that grew."""
    more = {name: count - before.errors.get(name, count) for name, count in after.errors.items()}
    return {name: count for name, count in more.items() if count > 0}


def in_words(counters: Mapping[str, int]) -> str:
    """Describe counters: name, number and meaning; a shared meaning is given once."""
    named = ", ".join(f"{name} {count}" for name, count in counters.items())
    meanings = dict.fromkeys({**FRAMES, **PACKETS}[name.rpartition(" ")[2]] for name in counters)
    return f"{named}: {'; '.join(meanings)}"
