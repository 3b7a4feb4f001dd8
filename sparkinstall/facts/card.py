"""The ConnectX card behind the QSFP port: PCIe lanes, firmware, and what it and the kernel have counted."""

from collections.abc import Mapping

from msgspec import Struct

from sparkinstall.facts.qsfp import Interface, Port
from sparkinstall.facts.sysfs import NET, RDMA, text_of
from sparkinstall.system import Reader

# rx_dropped is left out: the kernel counts there what nobody has asked for, such as a switch's LLDP.
FRAMES = {
    "rx_crc_errors": "frames arrive damaged: a cable or a plug that is bad or not wholly in",
    "rx_errors": "frames arrive that cannot be used: a cable or a plug that is bad or not wholly in",
    "rx_missed_errors": "frames arrive faster than this node takes them",
    "tx_errors": "frames cannot be sent",
    "carrier_changes": "the link goes up and down",
}
"""Counters of the kernel, and what each means."""
# As mlx5 names them (drivers/infiniband/hw/mlx5/counters.c).
PACKETS = {
    "out_of_sequence": "RDMA packets to this node are lost on the way",
    "packet_seq_err": "RDMA packets to the other node are lost on the way",
    "local_ack_timeout_err": "the other node does not confirm RDMA packets in time",
    "rnr_nak_retry_err": "the other node is not ready to receive",
    "rx_icrc_encapsulated": "RDMA packets arrive damaged",
}
"""Counters of the RDMA device, and what each means."""


def lanes(on: Reader, interface: str) -> tuple[int, float]:
    """PCIe lanes of the device behind an interface and their rate in GT/s; zeros where the kernel does not tell."""
    device = f"{NET}/{interface}/device"
    # The kernel writes `4` and `32.0 GT/s PCIe`.
    width, rate = (text_of(on, f"{device}/current_link_{what}") for what in ("width", "speed"))
    number = rate.partition(" ")[0]
    return int(width) if width.isdecimal() else 0, float(number) if number.replace(".", "", 1).isdecimal() else 0.0


def firmware(on: Reader, half: Interface) -> str:
    """The version of the card's firmware, as its RDMA device or ethtool tells it; empty where neither does."""
    if half.hca and (said := text_of(on, f"{RDMA}/{half.hca}/fw_ver")):
        return said
    return ethtool(on, "firmware-version", "-i", half.name)


def rdma_firmware(on: Reader) -> list[str]:
    """The firmware versions of all RDMA devices, each once."""
    return sorted({text_of(on, f"{RDMA}/{name}/fw_ver") for name in on.names(RDMA)} - {""})


def ethtool(on: Reader, label: str, *words: str) -> str:
    """The value behind `label:` in what `ethtool WORDS` prints; empty where there is none."""
    rows = (line.partition(":") for line in on.ask("ethtool", *words).out.splitlines())
    return next((value.strip() for name, _, value in rows if name.strip() == label), "")


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
    meanings = dict.fromkeys({**FRAMES, **PACKETS}[name.rpartition(" ")[2]] for name in counters)
    return f"{named}: {'; '.join(meanings)}"
