"""`sparkinstall multi-node`: set up this node as one of several."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import replace

from sparkinstall.cli import app, options
from sparkinstall.cli.all import ordered
from sparkinstall.cli.install import install
from sparkinstall.cli.run_command import NODE, CommandResult, Output, verb
from sparkinstall.core.converge import InstallOptions
from sparkinstall.core.session import Target
from sparkinstall.errors import BadUsage


class Role(StrEnum):
    """The role of a node among several."""

    head = "head"
    worker = "worker"


@verb("multi-node", *NODE)
def multi_node(
    target: Target,
    output: Output,
    role: Annotated[Role, options.link(help="The role of this node.")],
    head: Annotated[str | None, options.link(metavar="ADDRESS", help="The head's address on the link.")] = None,
    worker: Annotated[
        list[str] | None, options.link(metavar="ADDRESS", help="A worker's address on the link (once for each).")
    ] = None,
    address: Annotated[str | None, options.link(metavar="ADDRESS", help="This node's address on the link.")] = None,
    interface: Annotated[str | None, options.link(metavar="NAME", help="The QSFP interface with the cable.")] = None,
    model: options.Model = None,
    token_file: Annotated[
        Path | None, options.link(metavar="FILE", allow_dash=True, help="The head's Ray token; - reads it from stdin.")
    ] = None,
    leave_armed: Annotated[
        bool,
        typer.Option("--leave-armed", hidden=True, help="Leave the confirmation of the network to another process."),
    ] = False,
    only: options.Only = None,
    skip: options.Skip = None,
    ignore: options.Ignore = None,
    bundle: options.Bundle = None,
    serve: options.Serve = None,
    order: options.Order = None,
    yes: options.Yes = False,
) -> CommandResult:
    """Set up this node as the head or a worker: network, Ray, vLLM. Later verbs remember the role."""
    given = {
        "cluster.role": role.value,
        "cluster.head": head,
        "cluster.workers": worker or None,
        "cluster.address": address,
        "network.interface": interface,
        "serving.model": model,
    }
    target = replace(target, role=given, confirm_later=leave_armed, token_file=token_file, bundle=bundle)
    names = (tuple(only or ()), tuple(skip or ()), tuple(ignore or ()))
    chosen = InstallOptions(*names, verb="multi-node")
    if serve is None:
        return install(ordered(target, order), output, chosen, yes)
    if model is not None:
        raise BadUsage("--serve and --model both name what is served", hint="name one of them")
    done: CommandResult = app.imported("serve:install_and_serve")(target, output, chosen, serve, yes)
    return done
