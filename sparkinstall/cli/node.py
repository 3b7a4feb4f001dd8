"""The hidden verbs that `sparkinstall cluster` runs on each node."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from sparkinstall.cli import options
from sparkinstall.cli.run_command import Answer, answer
from sparkinstall.cluster import agent, bandwidth
from sparkinstall.cluster.protocol import Measurable
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.errors import Exit
from sparkinstall.probes.bandwidth import SECONDS, known

app = typer.Typer(help="What `sparkinstall cluster` runs on each node.", no_args_is_help=True)


def _open(settings: Sequence[str] | None) -> Session:
    return open_session(Target(settings=tuple(settings or ())))


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

    def body() -> Answer:
        session = open_session(Target(config=config, settings=tuple(set_ or ())))
        unproven = session.state.unproven()
        return Answer(data=agent.look(session.node, session.system, unproven, only or (), skip or ()))

    answer("node", body, root=None, json=json, verbose=verbose)


@app.command()
def reach(
    addresses: Annotated[list[str], typer.Argument()],
    set_: options.Set = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Ping other nodes over the link, with small packets and with the largest."""

    def body() -> Answer:
        session = _open(set_)
        reached, problems = agent.reach(session.node, session.system, addresses)
        return Answer(Exit.FAILED if problems else Exit.GOOD, reached, problems=tuple(problems))

    answer("node", body, root=None, json=json, verbose=verbose)


@app.command()
def offer(
    peers: Annotated[list[str], typer.Argument()],
    set_: options.Set = None,
    only: options.Only = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Send what was downloaded and built here to the nodes at these addresses; the token is on stdin."""

    def body() -> Answer:
        session = _open(set_)
        token = sys.stdin.readline().strip()
        return Answer(data=agent.offer(session.node, session.system, peers, only or (), token))

    answer("node", body, root=None, json=json, verbose=verbose)


@app.command()
def fetch(
    set_: options.Set = None,
    only: options.Only = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Fetch missing artifacts from the head. Reads port, token and manifest digest from stdin."""

    def body() -> Answer:
        session = _open(set_)
        return Answer(data=agent.fetch(session.node, session.system, only or (), sys.stdin.readline()))

    answer("node", body, root=None, json=json, verbose=verbose)


@app.command()
def measurable(set_: options.Set = None, json: options.Json = False, verbose: options.Verbose = False) -> None:
    """For each kind of measurement why this node cannot take part, or nothing."""

    def body() -> Answer:
        session = _open(set_)
        return Answer(data=Measurable(bandwidth.reasons(session.node, session.system)))

    answer("node", body, root=None, json=json, verbose=verbose)


@app.command()
def respond(
    kind: Annotated[str, typer.Argument()],
    set_: options.Set = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer one measurement of the bandwidth; announce the ports on stderr."""

    def body() -> Answer:
        session = _open(set_)
        return Answer(data=bandwidth.respond(session.node, session.system, known(kind), agent.announce))

    answer("node", body, root=None, json=json, verbose=verbose)


@app.command()
def ask(
    kind: Annotated[str, typer.Argument()],
    peer: Annotated[str, typer.Argument()],
    ports: Annotated[list[int], typer.Argument()],
    set_: options.Set = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure the bandwidth to another node, which answers at these ports."""

    def body() -> Answer:
        session = _open(set_)
        agent.tell(f"measuring for about {SECONDS} seconds")
        return Answer(data=bandwidth.ask(session.node, session.system, known(kind), peer, ports))

    answer("node", body, root=None, json=json, verbose=verbose)


@app.command()
def confirm(json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Keep the network that was applied: the node can be reached."""
    answer("node", lambda: Answer(data=agent.confirm()), root=None, json=json, verbose=verbose)


@app.command()
def token(set_: options.Set = None, json: options.Json = False, verbose: options.Verbose = False) -> None:
    """The cluster's Ray token, for the terminal that passes it to the workers."""

    def body() -> Answer:
        session = _open(set_)
        return Answer(data=agent.token(session.node, session.system))

    answer("node", body, root=None, json=json, verbose=verbose)
