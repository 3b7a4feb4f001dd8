"""The node that is being set up: its settings, its stack, and the places that follow from them."""

import os
from pathlib import Path

from sparkinstall.config import safe_path
from sparkinstall.layout import Layout
from sparkinstall.stacks import Platform
from sparkinstall.system import Reader


class Node(Layout, frozen=True):
    """Settings, stack and paths of a node. `machine` is the architecture of this computer.

    In a rehearsal, `full` asks for the whole environment instead of vLLM's own wheel. `cache` and
    `home` are real paths. `confirm_later`: a network change is rolled back unless another process confirms it.
    `token_file`: where the cluster's token was put for this run alone.
    """

    machine: str
    rehearsal: bool
    full: bool
    home: str
    cache: Path
    confirm_later: bool = False
    token_file: str = ""

    @property
    def partial(self) -> bool:
        """Only vLLM's own wheel is installed; the rest of the lock is resolved."""
        return self.rehearsal and not self.full

    @property
    def foreign(self) -> bool:
        """The wheels are for another architecture: nothing of them can run here."""
        return self.platform != self.machine

    @property
    def wheels(self) -> Platform:
        """The stack's part for this architecture."""
        return self.stack.platforms[self.platform]

    @property
    def nccl_version(self) -> str:
        return self.config.nccl.version or self.stack.nccl.version

    @property
    def user(self) -> str:
        """Who runs sparkinstall, and the services that it sets up."""
        import pwd

        return pwd.getpwuid(os.geteuid()).pw_name

    @property
    def several(self) -> bool:
        """Whether this node is one of several that serve together."""
        return self.role != "single"

    @property
    def with_ray(self) -> bool:
        """Whether Ray holds the nodes together, and so starts vLLM on the workers."""
        return self.several and self.config.cluster.executor == "ray"

    @property
    def filtered(self) -> bool:
        """Whether ports that only the link needs are closed to all others."""
        open_to_others = self.several or self.config.serving.allow is not None
        return open_to_others and self.config.firewall.mode != "off"

    @property
    def members(self) -> tuple[str, ...]:
        """The addresses of all nodes on the QSFP link by rank, the head's first."""
        return (self.config.cluster.head, *self.config.cluster.workers)

    @property
    def address(self) -> str:
        """This node's own address on the QSFP link; session.py has seen that it can be told."""
        cluster = self.config.cluster
        return cluster.address or (cluster.workers[0] if self.role == "worker" else cluster.head)

    @property
    def peers(self) -> tuple[str, ...]:
        """The other nodes' addresses on the QSFP link."""
        return tuple(each for each in self.members if each != self.address)

    @property
    def rank(self) -> int:
        """0 for the head, then the workers in their order."""
        return self.members.index(self.address)

    @property
    def ray_address(self) -> str:
        """Where the head's Ray answers, as address:port."""
        return f"{self.config.cluster.head}:{self.config.cluster.ray_port}"

    @property
    def bare_environment(self) -> dict[str, str]:
        """What a program is started with where nothing of this process's own variables is to reach it."""
        return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": self.home}


def site_packages(node: Node, on: Reader) -> str | None:
    """The environment's site-packages (a node path), or None before there is one."""
    for name in on.names(f"{node.venv}/lib"):
        if name.startswith("python3."):
            return f"{node.venv}/lib/{name}/site-packages"
    return None


def nccl_library(node: Node, on: Reader) -> str | None:
    """The libnccl.so.2 that has to be loaded (a node path), or None where it is not known yet."""
    if node.config.nccl.mode == "source":
        return f"{node.nccl_folder}/lib/libnccl.so.2"
    site = site_packages(node, on)
    return f"{site}/nvidia/nccl/lib/libnccl.so.2" if site else None


def cuda_home(node: Node) -> str | None:
    """The CUDA toolkit (a real path: a rehearsal uses this machine's), or None where there is none."""
    candidates = (node.config.nccl.cuda_home, "/usr/local/cuda", os.environ.get("CUDA_HOME"))
    for each in candidates:
        if each and safe_path(each) is None and Path(each, "bin", "nvcc").is_file():
            return each
    return None
