"""Sentences made of nouns: one file a step. A step says what should be so; the engine makes it so."""

from collections.abc import Iterable
from typing import Protocol

from sparkinstall.node import Node
from sparkinstall.probes import Probe
from sparkinstall.resources import Resource


class Step(Protocol):
    """One part of a node. `needs` names the steps that must be done before."""

    @property
    def name(self) -> str: ...

    @property
    def why(self) -> str: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    def resources(self, node: Node) -> Iterable[Resource]: ...

    def probes(self, node: Node) -> Iterable[Probe]: ...
