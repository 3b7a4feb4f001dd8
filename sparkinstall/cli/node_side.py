"""The far end of `sparkinstall cluster`: verbs that it runs on each node, and that are not for people."""

from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from msgspec.structs import asdict

from sparkinstall.cli import options
from sparkinstall.cli.options import Target
from sparkinstall.cli.run_command import Answer, answer
from sparkinstall.cluster import protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(help="What `sparkinstall cluster` runs on each node.", no_args_is_help=True)

_LONGEST_PREFACE = 1 << 22
_TRIES = 8


@app.command()
def attend(context: typer.Context) -> None:
    """Run the verb that the first line of stdin names; end it when stdin ends: the caller is gone then.

    The context's object is the function that runs a command line, which the program passes in.
    """
    import os
    import sys
    import threading

    request = msgspec.json.decode(_first_line(), type=protocol.Request)
    watched = os.dup(0)
    _give(request.stdin)
    threading.Thread(target=_end_when_alone, args=(watched,), daemon=True).start()
    sys.argv[1:] = request.argv
    context.obj()


def _first_line() -> bytes:
    import os

    said = b""
    while not said.endswith(b"\n") and len(said) < _LONGEST_PREFACE:
        more = os.read(0, 65536)
        if not more:
            raise typer.Exit(1)
        said += more
    return said


def _give(text: str) -> None:
    """Let stdin hold `text` and no more."""
    import os

    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    os.dup2(reading, 0)
    os.close(reading)


def _end_when_alone(watched: int) -> None:
    import os
    import signal

    while os.read(watched, 4096):
        pass
    # What is said now goes nowhere; it must not end a step in its middle.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.kill(os.getpid(), signal.SIGHUP)


@app.command()
def look(
    config: options.ConfigFile = None,
    set_: options.Set = None,
    only: options.Only = None,
    skip: options.Skip = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Plan, preflight and versions in one answer."""
    asked = Target(config=config, settings=tuple(set_ or ()), verbose=verbose)
    answer("node", lambda: _look(asked, only or [], skip or []), root=None, json=json, verbose=verbose)


def _look(asked: Target, only: list[str], skip: list[str]) -> Answer:
    from sparkinstall.cli.json_output import finding_data, step_data
    from sparkinstall.cli.session import open_session
    from sparkinstall.cluster import drift
    from sparkinstall.core import catalogue, checks, engine
    from sparkinstall.events import silent
    from sparkinstall.probes.preflight import preflight
    from sparkinstall.resources import rollback

    session = open_session(asked)
    node, system = session.node, session.system
    reports = engine.plan(catalogue.chosen(node, only, skip), node, system)
    looked = checks.look(preflight(node), system, silent)
    data = {
        "preflight": [finding_data(each.probe, each.finding, each.seconds) for each in looked],
        "steps": [step_data(report) for report in reports],
        "unproven": session.state.unproven(),
        "versions": drift.versions(node, system),
        "token": drift.token_digest(node, system),
        "armed": rollback.armed(system),
        "user": node.user,
        "executor": node.config.cluster.executor,
    }
    return Answer(data=data)


@app.command()
def reach(
    addresses: Annotated[list[str], typer.Argument()],
    set_: options.Set = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Ping other nodes over the link, with small packets and with the largest."""
    asked = Target(settings=tuple(set_ or ()), verbose=verbose)
    answer("node", lambda: _reach(addresses, asked), root=None, json=json, verbose=verbose)


def _reach(addresses: list[str], asked: Target) -> Answer:
    import time

    from sparkinstall.cli.session import open_session
    from sparkinstall.errors import Exit, Problem

    mtu = open_session(asked).node.config.network.mtu
    waiting = dict.fromkeys(addresses, "")
    for attempt in range(_TRIES):
        # A link that was just set up needs a moment: its neighbour may come up later.
        time.sleep(1 if attempt else 0)
        waiting = {each: why for each in waiting if (why := _unreached(each, mtu))}
        if not waiting:
            return Answer(data={"reached": addresses})
    problems = tuple(
        Problem(why, hint="look at the cable, and at `ip -br address` on both nodes") for why in waiting.values()
    )
    return Answer(Exit.FAILED, {"reached": [each for each in addresses if each not in waiting]}, problems=problems)


def _unreached(address: str, mtu: int) -> str:
    from sparkinstall.facts.network import HEADERS, pings
    from sparkinstall.system.local import LocalReader

    on = LocalReader()
    if pings(on, address, count=1, size=mtu - HEADERS):
        return ""
    if pings(on, address):
        return f"{address} answers small packets, but none of {mtu} bytes: the MTU is not {mtu} on the whole way"
    return f"{address} does not answer over the link"


@app.command()
def offer(
    peers: Annotated[list[str], typer.Argument()],
    set_: options.Set = None,
    only: options.Only = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Give other nodes, at these addresses, what was downloaded and built here; the token is on stdin."""
    asked = Target(settings=tuple(set_ or ()), verbose=verbose)
    answer("node", lambda: _offer(peers, asked, only or []), root=None, json=json, verbose=verbose)


def _offer(peers: list[str], asked: Target, only: list[str]) -> Answer:
    import sys

    from sparkinstall.cli.session import open_session
    from sparkinstall.cluster import artifacts

    def announce(offered: artifacts.Offered) -> None:
        print(artifacts.announcement(offered), file=sys.stderr, flush=True)

    session, token = open_session(asked), sys.stdin.readline().strip()
    print("listing what was downloaded and built", file=sys.stderr, flush=True)
    return Answer(data=artifacts.serve(session.node, session.system, only, peers, token, announce))


@app.command()
def fetch(
    set_: options.Set = None,
    only: options.Only = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Take from the head what is lacking here; where it is, the token and the list's digest are on stdin."""
    asked = Target(settings=tuple(set_ or ()), verbose=verbose)
    answer("node", lambda: _fetch(asked, only or []), root=None, json=json, verbose=verbose)


def _fetch(asked: Target, only: list[str]) -> Answer:
    import sys

    from sparkinstall.cli.session import open_session
    from sparkinstall.cluster import artifacts

    def tell(done: int, total: int) -> None:
        print(f"copied {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)

    session = open_session(asked)
    offered, token = artifacts.introduced(sys.stdin.readline())
    arrived = artifacts.fetch(session.node, session.system, only, offered, token, tell)
    data = {"changed": arrived.files > 0, "files": arrived.files, "bytes": arrived.size}
    return Answer(data={**data, "warning": arrived.why_not} if arrived.why_not else data)


@app.command()
def measurable(
    set_: options.Set = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """For each kind of measurement why this node cannot take part, or nothing."""
    asked = Target(settings=tuple(set_ or ()), verbose=verbose)
    answer("node", lambda: _measurable(asked), root=None, json=json, verbose=verbose)


def _measurable(asked: Target) -> Answer:
    from sparkinstall.cli.session import open_session
    from sparkinstall.cluster import bandwidth

    session = open_session(asked)
    return Answer(data={"why_not": bandwidth.reasons(session.node, session.system)})


@app.command()
def respond(
    kind: Annotated[str, typer.Argument()],
    set_: options.Set = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer one measurement of the bandwidth, and say on stderr at which ports."""
    asked = Target(settings=tuple(set_ or ()), verbose=verbose)
    answer("node", lambda: _respond(kind, asked), root=None, json=json, verbose=verbose)


def _respond(kind: str, asked: Target) -> Answer:
    import sys

    from sparkinstall.cli.session import open_session
    from sparkinstall.cluster import bandwidth
    from sparkinstall.probes.bandwidth import known

    def announce(ports: "Sequence[int]") -> None:
        print(bandwidth.announcement(ports), file=sys.stderr, flush=True)

    session = open_session(asked)
    return Answer(data={"lost": bandwidth.respond(session.node, session.system, known(kind), announce)})


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
    asked = Target(settings=tuple(set_ or ()), verbose=verbose)
    answer("node", lambda: _ask(kind, peer, ports, asked), root=None, json=json, verbose=verbose)


def _ask(kind: str, peer: str, ports: list[int], asked: Target) -> Answer:
    import sys

    from sparkinstall.cli.session import open_session
    from sparkinstall.cluster import bandwidth
    from sparkinstall.probes.bandwidth import SECONDS, known

    session = open_session(asked)
    print(f"measuring for about {SECONDS} seconds", file=sys.stderr, flush=True)
    measured, lost = bandwidth.ask(session.node, session.system, known(kind), peer, ports)
    return Answer(data={"measured": asdict(measured), "lost": lost})


@app.command()
def confirm(json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Keep the network that was applied: it was shown that the node can be reached."""
    answer("node", _confirm, root=None, json=json, verbose=verbose)


def _confirm() -> Answer:
    from sparkinstall.resources import rollback
    from sparkinstall.system.local import LocalSystem

    return Answer(data={"confirmed": rollback.confirm(LocalSystem())})


@app.command()
def token(
    set_: options.Set = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """The cluster's Ray token, for the terminal that hands it to the workers."""
    asked = Target(settings=tuple(set_ or ()), verbose=verbose)
    answer("node", lambda: _token(asked), root=None, json=json, verbose=verbose)


def _token(asked: Target) -> Answer:
    from sparkinstall.cli.session import open_session
    from sparkinstall.errors import Problem

    session = open_session(asked)
    found = session.system.read(session.node.ray_token)
    if not found:
        raise Problem("the head has no Ray token yet", hint="run the same command again: the head makes it")
    return Answer(data={"token": found.decode().strip()})
