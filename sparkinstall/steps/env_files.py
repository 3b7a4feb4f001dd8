"""The env files for one node, a head and a worker: fixes 1, 3, 4, 5 and 7 as a process sees them."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sparkinstall.node import Node, cuda_home, nccl_library
from sparkinstall.probes import Probe, processes
from sparkinstall.resources import Resource
from sparkinstall.resources.findings import recorded
from sparkinstall.resources.rendered import Rendered
from sparkinstall.steps import Step
from sparkinstall.system import Reader

FILES = ("single-node", "multi-node-head", "multi-node-worker")


class EnvFiles(Step):
    name = "env-files"
    why = "variables for one node, a head and a worker"
    needs = ("nccl-fit", "fp8")

    def resources(self, node: Node) -> Iterable[Resource]:
        for name in FILES:
            path = f"{node.env_folder}/{name}.env"
            yield Rendered(path, f"{name}.env.j2", partial(_values, node), waits_for="fp8")

    def probes(self, node: Node) -> Iterable[Probe]:
        return processes.probes(node)


def _values(node: Node, on: Reader) -> Mapping[str, Any] | None:
    decision = recorded(on, node.fp8_decision)
    if "fallback" not in decision:
        return None
    library = nccl_library(node, on)
    return {
        "stack": node.stack.name,
        "venv": on.real(node.venv),
        "library": on.real(library) if library and on.entry(library) else "",
        "cuda_home": cuda_home(node) or "/usr/local/cuda",
        "disabled_kernels": decision["disabled_kernels"],
        "fp8_why": decision["why"],
        "hub_offline": node.config.hub.offline,
        "head": node.config.cluster.head,
        "worker": node.config.cluster.worker,
        "interface": node.config.cluster.interface,
        "ray_port": node.config.cluster.ray_port,
    }
