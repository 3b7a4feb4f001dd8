"""Fix 1: one NCCL, built for this GPU and loaded by every process on every node."""

from collections.abc import Iterable

from sparkinstall.fixes import NCCL
from sparkinstall.node import Node, cuda_home
from sparkinstall.resources import Resource
from sparkinstall.resources.nccl import NcclLibrary
from sparkinstall.resources.nccl_source import NcclSource
from sparkinstall.steps import Step


class Nccl(Step):
    name = "nccl"
    why = "NCCL built for this GPU, the same on every node"
    needs = ("packages",)
    needs_in_a_switch = ("environment",)
    phase = "build"
    impact = "Several nodes cannot start together: `Message truncated`, or a refused connection."
    fixes = (NCCL,)

    def resources(self, node: Node) -> Iterable[Resource]:
        settings = node.config.nccl
        if settings.mode == "wheel":
            return
        yield NcclLibrary(
            folder=node.nccl_folder,
            source=source(node),
            arch=settings.arch,
            cuda_home=cuda_home(node),
            jobs=settings.jobs,
            only_functions=settings.only_functions,
            left=_left(node),
        )


def source(node: Node) -> "NcclSource":
    pin, settings = node.stack.nccl, node.config.nccl
    return NcclSource(
        version=node.nccl_version,
        tag=pin.tag,
        commit=pin.commit,
        where=settings.source,
        sha256=settings.sha256,
        cache=node.cache / "nccl",
        offline=bool(node.bundle),
    )


def _left(node: Node) -> str:
    """Return why a rehearsal cannot build NCCL here, or ""."""
    if node.foreign:
        return f"building NCCL {node.nccl_version} (this machine is not {node.platform})"
    if cuda_home(node) is None:
        return f"building NCCL {node.nccl_version} (there is no CUDA toolkit here: `nccl.cuda_home`)"
    return ""
