"""Whether the GPU's clock stays below its limit."""

from collections.abc import Iterable
from functools import partial

from sparkinstall.facts import gpu
from sparkinstall.facts.gpu import Gpu
from sparkinstall.layout import CLOCK_LOCK_UNIT
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped
from sparkinstall.probes.host_detectors import CannotTell, Host
from sparkinstall.system import Reader

# An idle GPU has a low clock, whether it is locked or not.
_BUSY_PERCENT = 50
# The driver rounds the limit to a step of the clock.
_STEP_MHZ = 15
_HINT = f"`sudo systemctl restart {CLOCK_LOCK_UNIT}`, and `journalctl -u {CLOCK_LOCK_UNIT}` for what nvidia-smi said"
_ON_THE_NODE = "only the GPU of the node itself can show it"


def probes(node: Node, impact: str) -> Iterable[Probe]:
    """Yield the probe of the GPU as it is, and the one that keeps it busy."""
    yield Probe(
        "gpu-clock", "clock of the GPU below its limit", partial(_as_it_is, node), "node", impact,
        needs_node=_ON_THE_NODE,
    )  # fmt: skip
    yield Probe(
        "gpu-clock-under-load", "clock of a busy GPU below its limit", partial(_under_load, node), "gpu", impact,
        needs_node=_ON_THE_NODE, load=True,
    )  # fmt: skip


def _as_it_is(node: Node, on: Reader) -> Finding:
    found = gpu.gpu_or_complaint(on)
    if isinstance(found, Gpu):
        return judged(found, node.config.gpu.max_clock or 0)
    return failed(found or "nvidia-smi does not name a GPU", "`sparkinstall doctor` says what is wrong with the driver")


def _under_load(node: Node, on: Reader) -> Finding:
    try:
        return judged(Host(on, node).gpu_under_load(), node.config.gpu.max_clock or 0)
    except CannotTell as reason:
        return skipped(str(reason))


def judged(of: Gpu, limit: int) -> Finding:
    """Compare the SM clock with `limit` (MHz): above it there is no lock; below it a busy GPU proves one."""
    if of.mhz is None or of.busy is None:
        return skipped("nvidia-smi does not report the clock and the load of the GPU")
    words, expected = f"{of.mhz:.0f} MHz, {of.busy:.0f} % busy", f"at most {limit} MHz"
    if of.mhz > limit + _STEP_MHZ:
        return failed(f"{words}: the clock is not locked", _HINT, expected)
    if of.busy < _BUSY_PERCENT:
        return skipped(f"{words}: only a busy GPU can show it (`sparkinstall verify --only clock-lock --measure`)")
    return passed(words, expected)
