"""One file per step. A step declares the desired state of a part of a node; the engine applies it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from sparkinstall.node import Node
from sparkinstall.probes import Probe
from sparkinstall.resources import Resource


class Step(ABC):
    """One part of a node. `needs` names the steps that must be done before.

    `looks_at_files`: some of its probes are static, so that even a run with nothing to do asks them.
    """

    name: ClassVar[str]
    why: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    looks_at_files: ClassVar[bool] = False

    def wanted(self, node: Node) -> bool:
        """Whether `node` has this part at all; every node by default."""
        del node
        return True

    @abstractmethod
    def resources(self, node: Node) -> Iterable[Resource]:
        """The desired state of `node`, in the order in which it can be applied."""

    def probes(self, node: Node) -> Iterable[Probe]:
        """What shows that it behaves so; nothing by default."""
        del node
        return ()
