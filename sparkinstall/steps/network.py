"""Fix 2: addresses and MTU 9000 on both halves of the QSFP port."""

from collections.abc import Iterable

from sparkinstall.fixes import HOST_IP, MTU, TRANSPORT
from sparkinstall.node import Node
from sparkinstall.probes import Probe, bandwidth, link
from sparkinstall.resources import Resource
from sparkinstall.resources.netplan.live import LiveLink, Netplan
from sparkinstall.steps import Step


class Network(Step):
    name = "network"
    why = "addresses and MTU 9000 on the QSFP link"
    needs = ("packages",)
    phase = "network"
    impact = "The nodes communicate slowly, or not at all."
    fixes = (MTU, HOST_IP, TRANSPORT)

    def wanted(self, node: Node) -> bool:
        return node.several

    def resources(self, node: Node) -> Iterable[Resource]:
        if node.config.network.manage:
            yield Netplan(node)
            yield LiveLink(node)

    def probes(self, node: Node) -> Iterable[Probe]:
        yield from link.probes(node)
        yield from bandwidth.probes(node)
