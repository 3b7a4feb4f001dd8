"""The hidden verbs that `sparkinstall cluster` runs on each node; `cluster/agent.py` does their work."""

from collections.abc import Callable
from typing import Annotated

import typer
from msgspec import Struct

from sparkinstall.cli import options
from sparkinstall.cli.run_command import Answer, answer
from sparkinstall.cluster import agent
from sparkinstall.cluster.protocol import Reply
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.errors import Exit

app = typer.Typer(help="What `sparkinstall cluster` runs on each node.", no_args_is_help=True)

Words = Annotated[list[str], typer.Argument()]
Word = Annotated[str, typer.Argument()]


def _reply(work: Callable[[Session], Struct], target: Target, json: bool) -> None:
    def body() -> Answer:
        reply = work(open_session(target))
        if isinstance(reply, Reply):
            return Answer(Exit(reply.code), reply.data or {}, problems=tuple(reply.problems))
        return Answer(data=reply)

    answer("node", body, root=None, json=json, verbose=target.verbose)


def _target(set_: list[str] | None, verbose: bool) -> Target:
    return Target(settings=tuple(set_ or ()), verbose=verbose)


@app.command()
def attend(context: typer.Context) -> None:
    """Run the verb that the first line of stdin names; end it when stdin ends: the caller is gone then.

    The context's object is the function that runs a command line, which the program passes in.
    """
    try:
        agent.serve(context.obj)
    except EOFError:
        raise typer.Exit(1) from None


@app.command()
def look(
    config: options.ConfigFile = None,
    set_: options.Set = None,
    only: options.Only = None,
    skip: options.Skip = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Plan, preflight and versions in one reply."""
    target = Target(config=config, settings=tuple(set_ or ()), verbose=verbose)
    _reply(lambda session: agent.look(session, only or (), skip or ()), target, json)


@app.command()
def reach(
    addresses: Words, set_: options.Set = None, json: options.Json = False, verbose: options.Verbose = False
) -> None:
    """Ping other nodes over the link, with small packets and with the largest."""
    _reply(lambda session: agent.reach(session, addresses), _target(set_, verbose), json)


@app.command()
def offer(
    peers: Words,
    set_: options.Set = None,
    only: options.Only = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Send what was downloaded and built here to the nodes at these addresses; the token is on stdin."""
    _reply(lambda session: agent.offer(session, peers, only or ()), _target(set_, verbose), json)


@app.command()
def fetch(
    set_: options.Set = None,
    only: options.Only = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Fetch missing artifacts from the head. Reads port, token and manifest digest from stdin."""
    _reply(lambda session: agent.fetch(session, only or ()), _target(set_, verbose), json)


@app.command()
def measurable(set_: options.Set = None, json: options.Json = False, verbose: options.Verbose = False) -> None:
    """For each kind of measurement why this node cannot take part, or nothing."""
    _reply(agent.measurable, _target(set_, verbose), json)


@app.command()
def respond(kind: Word, set_: options.Set = None, json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Answer one measurement of the bandwidth; announce the ports on stderr."""
    _reply(lambda session: agent.respond(session, kind), _target(set_, verbose), json)


@app.command()
def ask(
    kind: Word,
    peer: Word,
    ports: Annotated[list[int], typer.Argument()],
    set_: options.Set = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure the bandwidth to another node, which answers at these ports."""
    _reply(lambda session: agent.ask(session, kind, peer, ports), _target(set_, verbose), json)


@app.command()
def confirm(json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Keep the network that was applied: the node can be reached."""
    answer("node", lambda: Answer(data=agent.confirm()), root=None, json=json, verbose=verbose)


@app.command()
def token(set_: options.Set = None, json: options.Json = False, verbose: options.Verbose = False) -> None:
    """The cluster's Ray token, for the terminal that passes it to the workers."""
    _reply(agent.token, _target(set_, verbose), json)
