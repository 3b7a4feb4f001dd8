"""Fix 1, the other half: an NCCL that lacks what torch takes from it is refused before anything names it."""

from collections.abc import Iterable

from sparkinstall.fixes import NCCL
from sparkinstall.node import Node
from sparkinstall.resources import Resource
from sparkinstall.resources.nccl_abi import NcclFitsTorch
from sparkinstall.steps import Step


class NcclFit(Step):
    name = "nccl-fit"
    why = "NCCL has every symbol that torch takes from it"
    needs = ("environment", "nccl")
    phase = "build"
    impact = "Processes may end with `undefined symbol` as soon as torch is imported."
    fixes = (NCCL,)

    def resources(self, node: Node) -> Iterable[Resource]:
        yield NcclFitsTorch(node)
