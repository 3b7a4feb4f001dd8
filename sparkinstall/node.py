"""The node being set up: settings, stack, and the paths derived from them."""

import os
from pathlib import Path

from sparkinstall import given
from sparkinstall.config import safe_path
from sparkinstall.layout import Layout
from sparkinstall.stacks import Platform
from sparkinstall.system import Reader

DEBIAN_PACKAGES = "debs"
"""The folder in the cache of the Debian packages that a bundle has brought."""


class Node(Layout, frozen=True):
    """Settings, stack and paths of a node. `machine` is the architecture of this computer.

    In a rehearsal, `full` installs the whole environment instead of only vLLM's wheel. `cache` and
    `home` are real paths. `confirm_later`: a network change is rolled back unless another process confirms it.
    `token_file`: the file of the cluster's token, for this run only. `bundle`: the bundle that this run installs from,
    so that nothing is downloaded.
    """

    machine: str
    rehearsal: bool
    full: bool
    home: str
    cache: Path
    confirm_later: bool = False
    token_file: str = ""
    bundle: str = ""

    @property
    def debian_packages(self) -> Path:
        """The folder of the Debian packages that a bundle has brought."""
        return self.cache / DEBIAN_PACKAGES

    @property
    def partial(self) -> bool:
        """Whether only vLLM's wheel is installed, and the rest of the lock just resolved."""
        return self.rehearsal and not self.full

    @property
    def foreign(self) -> bool:
        """Whether the wheels are for another architecture and cannot run here."""
        return self.platform != self.machine

    @property
    def wheels(self) -> Platform:
        return self.stack.platforms[self.platform]

    @property
    def nccl_version(self) -> str:
        return self.config.nccl.version or self.stack.nccl.version

    @property
    def user(self) -> str:
        """The user who runs sparkinstall and the services."""
        return given.user()

    @property
    def several(self) -> bool:
        """Whether this node is one of several that serve together."""
        return self.role != "single"

    @property
    def with_ray(self) -> bool:
        """Whether vLLM uses Ray, which then starts it on the workers."""
        return self.several and self.config.cluster.executor == "ray"

    @property
    def filtered(self) -> bool:
        """Whether ports that only the link needs are blocked on other interfaces."""
        open_to_others = self.several or self.config.serving.allow is not None
        return open_to_others and self.config.firewall.mode != "off"

    @property
    def members(self) -> tuple[str, ...]:
        """The addresses of all nodes on the QSFP link by rank; the head's is first."""
        return (self.config.cluster.head, *self.config.cluster.workers)

    @property
    def address(self) -> str:
        """This node's address on the QSFP link; session.py has checked that it is known."""
        cluster = self.config.cluster
        return cluster.address or (cluster.workers[0] if self.role == "worker" else cluster.head)

    @property
    def peers(self) -> tuple[str, ...]:
        """The other nodes' addresses on the QSFP link."""
        return tuple(each for each in self.members if each != self.address)

    @property
    def rank(self) -> int:
        """0 for the head, then the workers in order."""
        return self.members.index(self.address)

    @property
    def ray_address(self) -> str:
        """address:port of the head's Ray."""
        return f"{self.config.cluster.head}:{self.config.cluster.ray_port}"

    @property
    def bare_environment(self) -> dict[str, str]:
        """The environment of a program that must not inherit this process's variables."""
        return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": self.home}


def site_packages(node: Node, on: Reader) -> str | None:
    """Return the environment's site-packages (a node path), or None before it exists."""
    for name in on.names(f"{node.venv}/lib"):
        if name.startswith("python3."):
            return f"{node.venv}/lib/{name}/site-packages"
    return None


def nccl_library(node: Node, on: Reader) -> str | None:
    """Return the libnccl.so.2 that should be loaded (a node path), or None if still unknown."""
    if node.config.nccl.mode == "source":
        return f"{node.nccl_folder}/lib/libnccl.so.2"
    site = site_packages(node, on)
    return f"{site}/nvidia/nccl/lib/libnccl.so.2" if site else None


def cuda_home(node: Node) -> str | None:
    """Return the CUDA toolkit (a real path: a rehearsal uses this machine's), or None."""
    candidates = (node.config.nccl.cuda_home, "/usr/local/cuda", os.environ.get("CUDA_HOME"))
    for each in candidates:
        if each and safe_path(each) is None and Path(each, "bin", "nvcc").is_file():
            return each
    return None
