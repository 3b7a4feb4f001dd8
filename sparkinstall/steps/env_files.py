"""The env files for a single node, a head and a worker: the variables of fixes 1, 3, 4, 5 and 7."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

from msgspec.structs import replace

from sparkinstall import ray_ports
from sparkinstall.facts.decisions import Fp8Fallback, NcclTransport, recorded
from sparkinstall.fixes import FP8, HOST_IP, MEMORY_MONITOR, NCCL, TRANSPORT, Fix
from sparkinstall.node import Node, cuda_home, nccl_library
from sparkinstall.probes import Probe, environment, nccl_tests, services
from sparkinstall.resources import Resource, Unknown
from sparkinstall.resources.nccl_abi import NcclFitsTorch
from sparkinstall.resources.nccl_wheel import NcclOfWheel
from sparkinstall.resources.stale_services import StaleServices
from sparkinstall.resources.template import Template
from sparkinstall.resources.transport import Transport
from sparkinstall.steps import Step
from sparkinstall.system import Reader

# Variables that vLLM must not copy between nodes. Since 0.18 it copies its NCCL_* and UCX_* to every Ray worker,
# where interfaces, devices and GIDs may have other names.
OWN_TO_EACH_NODE = (
    *("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_GID_INDEX", "NCCL_IB_DISABLE", "UCX_NET_DEVICES"),
    "VLLM_CONFIG_ROOT",
    # It is in the folder of the unit's own credentials.
    "HF_TOKEN_PATH",
)
FILES = ("single-node", "multi-node-head", "multi-node-worker")
_SPARK_PORT = NcclTransport("socket", interface="enp1s0f0np0")


class EnvFiles(Step):
    name = "env-files"
    why = "variables for one node, a head and a worker"
    needs = ("nccl", "fp8", "network")
    phase = "services"
    impact = "Processes started with the env files lack some of the fixes."
    fixes = (NCCL, HOST_IP, TRANSPORT, FP8, MEMORY_MONITOR)
    only_for: ClassVar[Mapping[str, Fix]] = {NcclFitsTorch.key: NCCL, NcclOfWheel.key: NCCL}

    def resources(self, node: Node) -> Iterable[Resource]:
        # Before any file names the library: it would hang, or lack a symbol and break `import torch`.
        if node.several and node.config.nccl.mode == "wheel":
            yield NcclOfWheel(node)
        yield NcclFitsTorch(node)
        yield StaleServices(node)
        if node.several:
            yield Transport(node)
        for name in FILES:
            path = f"{node.env_folder}/{name}.env"
            yield Template(path, f"{name}.env.j2", partial(_values, node))
        yield Template(node.roce_gid, "roce-gid.sh.j2", lambda _: {"stack": node.stack.name}, mode=0o755)
        if node.with_ray and node.role == "head":
            # vLLM on the head does not copy these to its workers, however it is started.
            names = {"names": list(OWN_TO_EACH_NODE)}
            yield Template(node.vllm_kept_back, "ray-non-carry-over.json.j2", lambda _: names)

    def probes(self, node: Node) -> Iterable[Probe]:
        return (*services.probes(node), *environment.probes(node), *nccl_tests.probes(node))


def _values(node: Node, on: Reader) -> Mapping[str, Any] | Unknown:
    decision, link = recorded(on, node.fp8_decision, Fp8Fallback), _link(node, on)
    if decision is None:
        return Unknown("fp8")
    if isinstance(link, Unknown):
        return link
    return {**_of_one_node(node, on, decision), **_of_several(node, on), **link}


def _of_one_node(node: Node, on: Reader, fp8: Fp8Fallback) -> dict[str, Any]:
    library = nccl_library(node, on)
    return {
        "stack": node.stack.name,
        "venv": on.real(node.venv),
        "library": on.real(library) if library and on.entry(library) else "",
        "cuda_home": cuda_home(node) or "/usr/local/cuda",
        "disabled_kernels": list(fp8.disabled_kernels),
        "fp8_why": fp8.why,
        "hub_offline": node.config.hub.offline,
    }


def _of_several(node: Node, on: Reader) -> dict[str, Any]:
    """Return the values for several nodes. The file of the other role is for reading only: each has its own address."""
    return {
        "head": node.config.cluster.head,
        "worker": node.address if node.role == "worker" else node.config.cluster.workers[0],
        "ray_port": node.config.cluster.ray_port,
        "executor": node.config.cluster.executor,
        "ray_token": on.real(node.ray_token),
        "first_port": ray_ports.FIRST_OF_VLLM,
        "roce_gid": on.real(node.roce_gid),
        "config_root": on.real(node.vllm_config),
    }


def _link(node: Node, on: Reader) -> dict[str, Any] | Unknown:
    """Return the recorded interface and transport of the link, or Unknown before they are recorded."""
    if node.several:
        found = recorded(on, node.transport_decision, NcclTransport)
        if found is None:
            return Unknown("env-files")
    else:
        found = replace(_SPARK_PORT, interface=node.config.network.interface or _SPARK_PORT.interface)
    return {
        "interface": found.interface,
        "hcas": list(found.hcas),
        "transport": found.transport,
        "transport_why": _in_words(node, found),
    }


def _in_words(node: Node, found: NcclTransport) -> str:
    if not node.several:
        return (
            "Sockets, on a Spark's first port: `sparkinstall multi-node` determines the port and transport of this node"
        )
    return ("RoCE: " if found.transport == "roce" else "Sockets: ") + found.why
