"""Restrict Ray, NCCL and the API, which listen on every interface, to the QSFP link."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sparkinstall.facts.packet_filters import NFT
from sparkinstall.layout import FIREWALL_UNIT, unit_path
from sparkinstall.node import Node
from sparkinstall.resources import Resource, firewall
from sparkinstall.resources.firewall import LiveTable, RulesFile
from sparkinstall.resources.systemd import Service, UnitFile
from sparkinstall.steps import Step
from sparkinstall.system import Reader


class Firewall(Step):
    """The rules are tested in the kernel before a unit loads them at every boot."""

    name = "firewall"
    why = "Ray, NCCL and the API only on the QSFP link"
    needs = ("packages", "network")
    phase = "network"
    impact = "Everyone in the LAN can reach Ray and the API."

    def wanted(self, node: Node) -> bool:
        return node.filtered

    def left_to(self, node: Node, on: Reader) -> str:
        return firewall.left_to(node, on)

    def resources(self, node: Node) -> Iterable[Resource]:
        unit = unit_path(FIREWALL_UNIT)
        yield RulesFile(node)
        yield UnitFile(unit, f"{FIREWALL_UNIT}.j2", partial(_values, node), noted_in=node.firewall_unit_record)
        yield LiveTable(node)
        inputs = (node.firewall_rules, unit)
        yield Service(FIREWALL_UNIT, lambda _: inputs, noted_in=node.firewall_started_record)


def _values(node: Node, _: Reader) -> Mapping[str, Any]:
    return {"rules": node.firewall_rules, "nft": NFT}
