"""Debian packages that the other steps and vLLM itself need."""

from collections.abc import Iterable
from dataclasses import dataclass

from sparkinstall.node import Node
from sparkinstall.probes import Probe
from sparkinstall.resources import Resource
from sparkinstall.resources.packages import Packages


@dataclass(frozen=True)
class SystemPackages:
    """The compiler and Python.h (Triton compiles its launcher on the node), git, and Python itself."""

    name: str = "packages"
    why: str = "Debian packages: Python and its headers, compiler, git"
    needs: tuple[str, ...] = ()

    def resources(self, node: Node) -> Iterable[Resource]:
        python = f"python{node.stack.python}"
        names = (
            python,
            f"{python}-dev",
            "build-essential",
            "git",
            *node.config.packages.extra,
        )
        yield Packages(names)

    def probes(self, node: Node) -> Iterable[Probe]:
        del node
        return ()
