"""One file per step. A step declares the desired state of one part of a node; the engine applies it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from sparkinstall.fixes import Fix
from sparkinstall.node import Node
from sparkinstall.probes import Probe
from sparkinstall.resources import Resource
from sparkinstall.system import Reader

StepPhase = Literal["packages", "network", "build", "services"]
"""The phase of `cluster` in which a step runs on several nodes."""


class Step(ABC):
    """One part of a node.

    `needs` names the steps that must run before; `needs_in_a_switch` those that must too if another stack is
    installed, which stays in use if they fail. `impact`: the effect of drift on the user, one sentence.
    `fixes`: the fixes that it applies, alone or with other steps. `only_for`: the fix of a resource, by its key, that
    says nothing about the others.
    """

    name: ClassVar[str]
    why: ClassVar[str]
    phase: ClassVar[StepPhase]
    impact: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    needs_in_a_switch: ClassVar[tuple[str, ...]] = ()
    fixes: ClassVar[tuple[Fix, ...]] = ()
    only_for: ClassVar[Mapping[str, Fix]] = {}

    def wanted(self, node: Node) -> bool:
        """Return whether `node` has this part; every node by default."""
        del node
        return True

    def left_to(self, node: Node, on: Reader) -> str:
        """Return what else does this step's work here, and what is left to do by hand; "" by default: nothing does.

        Not called in a rehearsal.
        """
        del node, on
        return ""

    @abstractmethod
    def resources(self, node: Node) -> Iterable[Resource]:
        """Yield the desired state of `node`, in the order in which it is applied."""

    def probes(self, node: Node) -> Iterable[Probe]:
        """Yield the probes that verify its behaviour; none by default."""
        del node
        return ()
