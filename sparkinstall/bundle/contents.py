"""What is in a bundle, by its folders."""

from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.node import Node
from sparkinstall.probes import nccl_tests
from sparkinstall.resources.packages import Packages
from sparkinstall.steps.nccl import source
from sparkinstall.steps.packages import SystemPackages

TOOL, TOOL_WHEELS, WHEELS, NCCL, DEBS = "sparkinstall", "tool", "wheels", "nccl", "debs"
MODELS = "models"


class Repository(Struct, frozen=True):
    """A git repository of one tag that a node builds from; `mirror` is its copy in the cache."""

    tag: str
    commit: str
    mirror: Path


def nccl_member(tag: str) -> str:
    return f"{NCCL}/nccl-{tag}.objects"


def nccl_tests_member() -> str:
    return f"{NCCL}/nccl-tests-{nccl_tests.TAG}.objects"


def model_folder(model: str) -> str:
    """Return the folder of a model of the hub in a bundle."""
    return f"{MODELS}/{model.replace('/', '--')}"


def repositories(node: Node) -> Mapping[str, Repository]:
    """Return the repositories that a node may need, by the path of the file with their objects."""
    nccl, tests = source(node), nccl_tests
    measured = Repository(tests.TAG, tests.COMMIT, tests.mirror(tests.workshop(node)))
    return {
        nccl_member(nccl.tag): Repository(nccl.tag, nccl.commit, nccl.mirror),
        nccl_tests_member(): measured,
    }


def debian_names(node: Node) -> tuple[str, ...]:
    """Return the Debian packages that a node needs."""
    return tuple(name for each in SystemPackages().resources(node) if isinstance(each, Packages) for name in each.names)


def of_several(node: Node) -> Node:
    """Return the same node as one of several."""
    return replace(node, config=replace(node.config, cluster=replace(node.config.cluster, role="head")))
