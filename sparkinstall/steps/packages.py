"""Debian packages that vLLM and the other steps need."""

from collections.abc import Iterable

from sparkinstall.fixes import PACKAGES
from sparkinstall.node import Node
from sparkinstall.resources import Resource
from sparkinstall.resources.packages import Packages
from sparkinstall.steps import Step


class SystemPackages(Step):
    """The compiler and Python.h (Triton compiles its launcher on the node), git, and Python itself."""

    name = "packages"
    why = "Debian packages: Python and its headers, compiler, git"
    phase = "packages"
    impact = "Triton compiles on this node and fails without the headers and the compiler."
    fixes = (PACKAGES,)

    def resources(self, node: Node) -> Iterable[Resource]:
        python = f"python{node.stack.python}"
        names = (
            python,
            f"{python}-dev",
            "build-essential",
            "git",
            *(("iputils-ping",) if node.several else ()),
            *(("netplan.io",) if node.several and node.config.network.manage else ()),
            *(("nftables",) if node.filtered else ()),
            *node.config.packages.extra,
        )
        yield Packages(names, str(node.debian_packages))
