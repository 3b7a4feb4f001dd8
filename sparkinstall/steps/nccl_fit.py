"""Fix 1, the other half: an NCCL that lacks what torch takes from it is refused before anything names it."""

from collections.abc import Iterable
from dataclasses import dataclass

from sparkinstall.node import Node
from sparkinstall.probes import Probe
from sparkinstall.resources import Resource
from sparkinstall.resources.nccl_fit import NcclFitsTorch


@dataclass(frozen=True)
class NcclFit:
    name: str = "nccl-fit"
    why: str = "NCCL has every symbol that torch takes from it"
    needs: tuple[str, ...] = ("environment", "nccl")

    def resources(self, node: Node) -> Iterable[Resource]:
        yield NcclFitsTorch(node)

    def probes(self, node: Node) -> Iterable[Probe]:
        del node
        return ()
