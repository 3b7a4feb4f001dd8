"""Nodes for tests, and the journaled system of one below a folder."""

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from sparkinstall import fixes, stacks
from sparkinstall.config import ClusterConfig, Config, Layer, ServingConfig, build
from sparkinstall.events import silent
from sparkinstall.fixes import Fix
from sparkinstall.journal.journal import Journal
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.node import Node
from sparkinstall.system.local import LocalSystem

NODE = Node(
    config=Config(),
    stack=stacks.load(stacks.DEFAULT),
    platform="aarch64",
    machine="aarch64",
    rehearsal=False,
    full=False,
    home="/nowhere",
    cache=Path("/nowhere"),
)
# Those that several steps share; a step may declare another one.
FIXES_OF_SPARKS = tuple(each for each in vars(fixes).values() if isinstance(each, Fix))
# One of several nodes that serves: it has all steps, checks and probes.
HEAD = replace(NODE, config=Config(cluster=ClusterConfig(role="head"), serving=ServingConfig(model="m")))


def node_of(root: Path, role: str = "single", **settings: Any) -> Node:
    """A rehearsed node below `root` with these settings (dots as two underscores)."""
    values = {name.replace("__", "."): value for name, value in settings.items()}
    config: Config = build([Layer("test", {"cluster.role": role, **values})])[0]
    stack = stacks.load(config.stack)
    return Node(config, stack, "x86_64", "x86_64", True, False, str(root), root / "cache")


def system_of(root: Path) -> JournaledSystem:
    home = root / "var/lib/sparkinstall"
    home.mkdir(parents=True, exist_ok=True)
    return JournaledSystem(LocalSystem(str(root)), Journal(home, "run"), "test", home / "log", silent)


def node_with(**settings: object) -> Node:
    """A Spark at the head of a cluster, with these settings (dots as two underscores)."""
    named = {name.replace("__", "."): value for name, value in settings.items()}
    config = build([Layer("test", {"cluster.role": "head", **named})])[0]
    return Node(config, stacks.load("0.18.1"), "aarch64", "aarch64", False, False, "/home/spark", Path("/nowhere"))
