"""One file per step. A step declares the desired state of a part of a node; the engine applies it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal

from sparkinstall.fixes import Fix
from sparkinstall.node import Node
from sparkinstall.probes import Probe
from sparkinstall.resources import Resource
from sparkinstall.system import Reader

StepPhase = Literal["packages", "network", "build", "services"]
"""When a step is due on several nodes; `cluster` makes its phases of it."""


class Step(ABC):
    """One part of a node.

    `needs` names the steps that must be done before. `impact`: what drift in it means for a person, one
    sentence. `fixes`: those that it applies, alone or with other steps.
    """

    name: ClassVar[str]
    why: ClassVar[str]
    phase: ClassVar[StepPhase]
    impact: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    fixes: ClassVar[tuple[Fix, ...]] = ()

    def wanted(self, node: Node) -> bool:
        """Whether `node` has this part at all; every node by default."""
        del node
        return True

    def left_to(self, node: Node, on: Reader) -> str:
        """Why this node leaves the step to somebody else; empty, the default: it does not. Never in a rehearsal."""
        del node, on
        return ""

    @abstractmethod
    def resources(self, node: Node) -> Iterable[Resource]:
        """The desired state of `node`, in the order in which it can be applied."""

    def probes(self, node: Node) -> Iterable[Probe]:
        """What shows that it behaves so; nothing by default."""
        del node
        return ()
