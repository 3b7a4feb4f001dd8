"""The memory of a Spark: what a node has available, and what vLLM and the system take of it beside a model."""

from collections.abc import Sequence

from msgspec import Struct

from sparkinstall.facts import machine
from sparkinstall.models import Figure, unknown
from sparkinstall.system import Reader

GIB = 1 << 30
OVERHEAD = Figure(9 * GIB, "reported", "about 9 GiB beside weights and KV cache were reported on a Spark; unverified")
RESERVE = Figure(4 * GIB, "chosen", "kept free for the system")
SPARK_TOTAL = Figure(int(121.69 * GIB), "reported", "what vLLM reports as the memory of a Spark")

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_PATIENCE = 20.0


class Memory(Struct, frozen=True):
    """What a node has available now, and in all; `others`: what the other nodes have, if several serve it."""

    available: Figure
    total: Figure
    others: tuple[Figure, ...] = ()


def memory_of(on: Reader, given: int | None, peers: Sequence[str] = ()) -> Memory:
    """Return the memory of a node: as given, or that of this one if it is a Spark; with `peers` the least."""
    is_spark = machine.has_gb10(on)
    total = machine.parse_meminfo(on.read("/proc/meminfo") or b"").get("MemTotal", 0) << 10 if is_spark else 0
    whole = Figure(total, "measured", "MemTotal of this node") if total else SPARK_TOTAL
    if given is not None:
        return Memory(Figure(given, "given", "--memory"), whole)
    found = machine.available_memory(on) if is_spark else 0
    if not found:
        why = "this machine is not a Spark: say what one has available with --memory, such as 101GiB"
        return Memory(unknown(why), whole)
    own = Figure(found, "measured", "MemAvailable of this node, now")
    others = tuple(_memory_of_peer(on, peer) for peer in peers)
    return Memory(min((own, *others), key=lambda each: each.value or found + 1), whole, others)


def _memory_of_peer(on: Reader, peer: str) -> Figure:
    said = on.ask(*_SSH, peer, "cat /proc/meminfo", timeout=_PATIENCE)
    found = machine.parse_meminfo(said.out.encode()).get("MemAvailable", 0) << 10 if said.ok else 0
    if not found:
        return unknown(f"{peer} does not tell its memory: {said.last_line or f'ssh ended with code {said.code}'}")
    return Figure(found, "measured", f"MemAvailable of {peer}, now")
