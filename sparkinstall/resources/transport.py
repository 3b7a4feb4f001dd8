"""How NCCL talks between nodes: RoCE where its devices are really there, sockets elsewhere."""

from typing import Literal

from msgspec import Struct

from sparkinstall.facts import qsfp
from sparkinstall.facts.decisions import NcclTransport, as_text, recorded
from sparkinstall.node import Node
from sparkinstall.resources import Conflict, Drift, Ok, State, Unknown
from sparkinstall.system import Reader, System


class Transport(Struct, frozen=True):
    """The decision, written down: a cable that is out for a moment must not turn RoCE into sockets."""

    node: Node

    @property
    def key(self) -> str:
        return "transport"

    def check(self, on: Reader) -> State:
        wanted, before = self._decide(on), recorded(on, self.node.transport_decision, NcclTransport)
        if not isinstance(wanted, NcclTransport):
            return wanted
        if before and (before == wanted or self._stays(before, wanted)):
            return Ok(f"{before.transport}: {before.why}")
        said = f"NCCL talks over {_NAMES[wanted.transport]}: {wanted.why}"
        return Drift(said, as_text(before), as_text(wanted))

    def _decide(self, on: Reader) -> NcclTransport | Unknown | Conflict:
        asked, port = self.node.config.network.transport, qsfp.port_to_look_at(on, self.node)
        if asked == "socket":
            return _decision(port, "socket", "network.transport says so")
        if on.rehearsal:
            return _decision(port, "socket", _REHEARSED[asked])
        if not _has_address(on, port, self.node.address):
            return Unknown("network") if self.node.config.network.manage else self._left_to_others(port)
        why_not = qsfp.roce_ready(on, port)
        if not why_not:
            return _decision(port, "roce", "both halves of the port have an RDMA device with an address")
        if asked == "roce":
            return Conflict(f"RoCE was asked for, but {why_not}", hint=_SOCKETS)
        return _decision(port, "socket", why_not)

    def _left_to_others(self, port: qsfp.Port) -> Conflict:
        """No step of ours will give the port its address."""
        return Conflict(
            f"{port.twins[0].name} has not this node's address {self.node.address}, and `network.manage` is false",
            hint="give it that address, name the one that it has (`cluster.head` and `cluster.workers`, or --head, "
            "--worker and --address), or let sparkinstall do it: `--set network.manage=true`",
        )

    def talks_over(self, on: Reader) -> str:
        """`roce` or `socket`, as it was decided or would be now; empty where that cannot be told yet."""
        try:
            wanted, before = self._decide(on), recorded(on, self.node.transport_decision, NcclTransport)
        except qsfp.LinkProblem:
            return ""
        if not isinstance(wanted, NcclTransport):
            return ""
        return before.transport if before and self._stays(before, wanted) else wanted.transport

    def _stays(self, before: NcclTransport, wanted: NcclTransport) -> bool:
        auto = self.node.config.network.transport == "auto"
        return auto and before.interface == wanted.interface and before.transport == "roce"

    def apply(self, on: System) -> None:
        decision = self._decide(on)
        assert isinstance(decision, NcclTransport), "the engine applies only what can be told"
        on.write(self.node.transport_decision, as_text(decision).encode())


_SOCKETS = "sockets work everywhere: --set network.transport=socket"
_REHEARSED = {
    "auto": "a rehearsal has no RoCE devices; the node itself decides",
    "roce": "a rehearsal has no RoCE devices; the node itself takes RoCE, or says why it cannot (network.transport)",
}
_NAMES = {"roce": "RoCE", "socket": "sockets"}


def _decision(port: qsfp.Port, transport: Literal["roce", "socket"], why: str) -> NcclTransport:
    return NcclTransport(transport, why, port.twins[0].name, tuple(each.hca for each in port.twins if each.hca))


def _has_address(on: Reader, port: qsfp.Port, address: str) -> bool:
    known = qsfp.addresses(on)
    return any(each.split("/")[0] == address for each in known.get(port.twins[0].name, ()))
