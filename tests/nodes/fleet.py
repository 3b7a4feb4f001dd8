"""Sparks on a cable, a terminal with the checkout, and the commands of a user there."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sparkinstall.resources import rollback
from tests.lab.commands import Completed, Process
from tests.lab.fleet import Fleet, FleetNode
from tests.lab.node import Bind, FreshNode
from tests.nodes.fresh import (
    CHECKOUT,
    COMMAND,
    CONFIG,
    CPU_STACK,
    FULL_STACK,
    LEFT_OUT,
    REPOSITORY,
    install_tool,
    let_pytorch_find_cuda,
    own_cache,
    put_before_the_compiler,
    what_nccl_is_built_of,
)
from tests.support.cuda_toolkit import toolkit
from tests.support.nccl_source import tarball
from tests.support.waiting import until

STACKS = "tests/lab/stacks"


@contextmanager
def two_sparks(*, port_1: bool = False, on_cpu: bool = False) -> Iterator[Fleet]:
    """`sparks(2)`."""
    with sparks(2, port_1=port_1, on_cpu=on_cpu) as fleet:
        yield fleet


@contextmanager
def sparks(count: int, *, port_1: bool = False, on_cpu: bool = False) -> Iterator[Fleet]:
    """Nodes, each with a CUDA toolkit, NCCL's source, a stack and a config, and with caches that outlive them.

    The checkout is at the terminal, where `install` installs it. `on_cpu`: the stack is that of vLLM for the CPU.
    """
    toolkit()

    def binds(index: int) -> Sequence[Bind]:
        return [*what_nccl_is_built_of(), *own_cache(f"fleet-cache-{index + 1}", on_cpu=on_cpu)]

    with Fleet(count, bind=binds, terminal_bind=own_cache("fleet-cache-terminal"), port_1=port_1) as fleet:
        _give_cache_to_user(fleet.terminal)
        fleet.terminal.push(REPOSITORY, CHECKOUT, owner="spark", exclude=LEFT_OUT)
        for node in fleet.nodes:
            _prepare(node, CPU_STACK if on_cpu else FULL_STACK)
            if on_cpu:
                let_pytorch_find_cuda(node)
        yield fleet


def install(fleet: Fleet) -> None:
    """Install the command `sparkinstall` at the terminal, as the README says."""
    install_tool(fleet.terminal)


def sparkinstall(fleet: Fleet, *argv: str, **options: Any) -> Completed:
    """Run the installed command at the terminal; options as in `FreshNode.run`, with a limit of half an hour."""
    return fleet.on_terminal(COMMAND, *argv, **{"cwd": "/home/spark", "timeout": 1800, **options})


def _prepare(node: FleetNode, stack: str) -> None:
    _give_cache_to_user(node)
    # The parent folders belong to the user, as if the checkout were here.
    node.run("mkdir", "-p", f"{CHECKOUT}/{STACKS}", user="spark")
    node.push(REPOSITORY / STACKS, f"{CHECKOUT}/{STACKS}", owner="spark")
    node.write("/etc/sparkinstall.yaml", CONFIG.format(stack=stack, tarball=tarball().name))
    put_before_the_compiler(node)


def _give_cache_to_user(node: FreshNode) -> None:
    node.run("chown", "spark:spark", "/home/spark/.cache")


def armed(node: FleetNode) -> bool:
    """Whether a rollback timer waits for a confirmation there, or a rollback runs."""
    # It goes while it is listed: walk passes over that, glob does not.
    _, folders, _ = next(os.walk(node.root / rollback.HOME.lstrip("/")), ("", (), ()))
    return any(not name.endswith(".new") for name in folders)


def until_armed(node: FleetNode, run: Process) -> None:
    """Wait until `run` has started the timer. What follows has to be in time, so this looks often."""
    until(lambda: armed(node), during=run, pause=0.01)
