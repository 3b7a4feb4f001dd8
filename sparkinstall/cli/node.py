"""The hidden verbs that `sparkinstall cluster` runs on each node; `cluster/agent.py` does their work."""

from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Annotated

import typer

from sparkinstall.cli import options
from sparkinstall.cli.all import ordered
from sparkinstall.cli.app import imported
from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cluster import agent, bandwidth, watching
from sparkinstall.cluster.protocol import Confirmed, Reached, Reply
from sparkinstall.core.models import listed
from sparkinstall.core.session import Target, open_session
from sparkinstall.errors import Exit
from sparkinstall.probes.bandwidth import SECONDS, known
from sparkinstall.resources import rollback
from sparkinstall.schema import show
from sparkinstall.system.local import LocalReader, LocalSystem

app = typer.Typer(add_completion=False, help="What `sparkinstall cluster` runs on each node.", no_args_is_help=True)

Word = Annotated[str, typer.Argument()]


def _address(word: str) -> str:
    try:
        return str(IPv4Address(word))
    except ValueError as error:
        raise typer.BadParameter(f"{show(word)} is no IPv4 address") from error


Address = Annotated[str, typer.Argument(parser=_address)]
Addresses = Annotated[list[str], typer.Argument(parser=_address)]


def _command(body: Callable[..., CommandResult]) -> Callable[..., None]:
    return app.command()(verb("node", "config", "set_")(body))


@app.command()
def attend(context: typer.Context) -> None:
    """Run the verb that the first line of stdin names; end it when stdin ends: the caller is gone then.

    The context's object is the function that runs a command line, which the program passes in.
    """
    agent.serve(context.obj)


@_command
def look(
    target: Target, _: Output, only: options.Only = None, skip: options.Skip = None, order: options.Order = None
) -> CommandResult:
    """Plan, preflight and versions in one reply."""
    session = open_session(ordered(target, order))
    more = imported("serve:checks_of")(session, order) if order else ()
    return CommandResult(data=agent.look(session, only or (), skip or (), more))


@_command
def prepare(target: Target, _: Output) -> CommandResult:
    """Reply what this node has for serving with others; on the head, what is meant is on stdin."""
    return CommandResult(data=imported("serve:prepared")(target))


@_command
def unit(target: Target, _: Output) -> CommandResult:
    """Reply how the service that computes here stands."""
    return CommandResult(data=imported("serve:unit_state")(open_session(target)))


@_command
def log(target: Target, _: Output) -> CommandResult:
    """Reply with the log of the last start of vLLM, without secrets."""
    return CommandResult(data=imported("serve:unit_log")(open_session(target)))


@_command
def restore(target: Target, _: Output, order: options.Order = None) -> CommandResult:
    """Stop what was started, and restore what was served before, which is on stdin."""
    return CommandResult(data=imported("serve:restored")(ordered(target, order)))


@_command
def offer_model(
    target: Target, _: Output, workers: Annotated[int, typer.Argument(min=1)], model: Word, commit: Word
) -> CommandResult:
    """Serve a model of this user's cache to so many workers; the token is on stdin."""
    return CommandResult(data=agent.offer_model(open_session(target), workers, model, commit))


@_command
def identify(_target: Target, _: Output) -> CommandResult:
    """Reply which machine this is."""
    return CommandResult(data=agent.identify(LocalReader()))


@_command
def reach(target: Target, _: Output, addresses: Addresses) -> CommandResult:
    """Ping other nodes over the link, with small packets and with the largest."""
    reply: Reply[Reached] = agent.reach(open_session(target), addresses)
    return CommandResult(Exit(reply.code), reply.data or {}, problems=tuple(reply.problems))


@_command
def offer(
    target: Target, _: Output, workers: Annotated[int, typer.Argument(min=1)], only: options.Only = None
) -> CommandResult:
    """Serve this node's downloads and builds to so many workers; the token is on stdin."""
    return CommandResult(data=agent.offer(open_session(target), workers, only or ()))


@_command
def fetch(target: Target, _: Output, only: options.Only = None) -> CommandResult:
    """Fetch missing artifacts from the head; its `Introduction` is on stdin."""
    return CommandResult(data=agent.fetch(open_session(target), only or ()))


@_command
def receive(_target: Target, _: Output) -> CommandResult:
    """Take the models that another machine offers; its `ModelSource` is on stdin."""
    return CommandResult(data=agent.receive())


@_command
def models(_target: Target, _: Output) -> CommandResult:
    """Reply which models are in this user's cache of the hub."""
    return CommandResult(data=listed())


@_command
def measurable(target: Target, _: Output) -> CommandResult:
    """Report for each kind of measurement why this node cannot take part, or "" if it can."""
    session = open_session(target)
    return CommandResult(data=bandwidth.measurable(session.node, session.system))


@_command
def respond(target: Target, _: Output, kind: Word) -> CommandResult:
    """Answer one measurement of the bandwidth; announce the ports on stderr."""
    session = open_session(target)
    return CommandResult(data=bandwidth.respond(session.node, session.system, known(kind)))


@_command
def ask(
    target: Target, _: Output, kind: Word, peer: Address, ports: Annotated[list[int], typer.Argument()]
) -> CommandResult:
    """Measure the bandwidth to another node, which answers at these ports."""
    session = open_session(target)
    agent.tell(f"measuring for about {SECONDS} seconds")
    return CommandResult(data=bandwidth.ask(session.node, session.system, known(kind), peer, ports))


@_command
def watch(target: Target, _: Output, interval: Annotated[float, typer.Argument(min=0.2)]) -> CommandResult:
    """Announce a sample of this node on stderr at each interval."""
    watching.announce_samples(watching.own_sampler(open_session(target)), interval)
    return CommandResult()


@_command
def confirm(_target: Target, _: Output) -> CommandResult:
    """Keep the network that was applied: the node can be reached."""
    return CommandResult(data=Confirmed(rollback.confirm(LocalSystem())))


@_command
def token(target: Target, _: Output) -> CommandResult:
    """Reply with the Ray token, for the terminal that passes it to the workers."""
    return CommandResult(data=agent.token(open_session(target)))
