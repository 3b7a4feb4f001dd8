"""NCCL's transport between nodes: RoCE if its devices exist, else sockets."""

from typing import ClassVar, Literal

from msgspec import Struct

from sparkinstall.facts import qsfp
from sparkinstall.facts.decisions import NcclTransport, RecordDamaged, as_text, recorded
from sparkinstall.node import Node
from sparkinstall.resources import Conflict, Drift, Ok, State, Unknown
from sparkinstall.system import Reader, System


class Transport(Struct, frozen=True):
    """The recorded decision, so that a briefly unplugged cable does not turn RoCE into sockets."""

    key: ClassVar[str] = "transport"
    node: Node

    def check(self, on: Reader) -> State:
        wanted, before = self._decide(on), recorded(on, self.node.transport_decision, NcclTransport)
        if not isinstance(wanted, NcclTransport):
            return wanted
        if before and (before == wanted or self._stays(before, wanted)):
            return Ok(f"{before.transport}: {before.why}")
        summary = f"NCCL uses {_NAMES[wanted.transport]}: {wanted.why}"
        return Drift(summary, as_text(before), as_text(wanted))

    def _decide(self, on: Reader) -> NcclTransport | Unknown | Conflict:
        asked, port = self.node.config.network.transport, qsfp.port_to_look_at(on, self.node)
        if asked == "socket":
            return _decision(port, "socket", "set by network.transport")
        if on.rehearsal:
            return _decision(port, "socket", _REHEARSED[asked])
        there = [each.partition("/")[0] for each in qsfp.addresses(on).get(port.names[0], ())]
        if self.node.address not in there:
            return Unknown("network") if self.node.config.network.manage else self._left_to_others(port)
        why_not = qsfp.roce_ready(on, port)
        if not why_not:
            return _decision(port, "roce", "both halves of the port have an RDMA device with an address")
        if asked == "roce":
            return Conflict(f"network.transport is roce, but {why_not}", hint=_SOCKETS)
        return _decision(port, "socket", why_not)

    def _left_to_others(self, port: qsfp.Port) -> Conflict:
        """Return the conflict of a port without its address that no step may configure."""
        return Conflict(
            f"{port.names[0]} does not have this node's address {self.node.address}; `network.manage` is false",
            hint="configure that address, specify the one it has (`cluster.head` and `cluster.workers`, or --head, "
            "--worker and --address), or let sparkinstall do it: `--set network.manage=true`",
        )

    def talks_over(self, on: Reader) -> str:
        """Return the recorded or current decision, `roce` or `socket`; "" if still unknown."""
        try:
            wanted, before = self._decide(on), recorded(on, self.node.transport_decision, NcclTransport)
        except (qsfp.LinkProblem, RecordDamaged):
            return ""
        if not isinstance(wanted, NcclTransport):
            return ""
        return before.transport if before and self._stays(before, wanted) else wanted.transport

    def _stays(self, before: NcclTransport, wanted: NcclTransport) -> bool:
        auto = self.node.config.network.transport == "auto"
        return auto and before.interface == wanted.interface and before.transport == "roce"

    def apply(self, on: System) -> None:
        decision = self._decide(on)
        assert isinstance(decision, NcclTransport), "the engine applies no Unknown"
        on.write(self.node.transport_decision, as_text(decision).encode())


_SOCKETS = "sockets work everywhere: --set network.transport=socket"
_REHEARSED = {
    "auto": "a rehearsal has no RoCE devices; the node itself decides",
    "roce": "a rehearsal has no RoCE devices; the node itself uses RoCE or reports why it cannot (network.transport)",
}
_NAMES = {"roce": "RoCE", "socket": "sockets"}


def _decision(port: qsfp.Port, transport: Literal["roce", "socket"], why: str) -> NcclTransport:
    return NcclTransport(transport, why, port.names[0], tuple(each.hca for each in port.twins if each.hca))
