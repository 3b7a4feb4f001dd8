"""The far end: what a node does for the terminal of `sparkinstall cluster`. Each function returns its reply."""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from msgspec import structs

from sparkinstall.cluster import artifacts, drift, model_copies
from sparkinstall.cluster.protocol import (
    Fetched,
    Identity,
    Introduction,
    Look,
    ModelSource,
    Offered,
    Reached,
    Reply,
    Request,
    Token,
)
from sparkinstall.core import catalogue, checks, engine
from sparkinstall.core.session import Session
from sparkinstall.errors import BadUsage, Problem, storage_errors
from sparkinstall.events import silent
from sparkinstall.facts import ip, machine, qsfp
from sparkinstall.facts.network import HEADERS, pings
from sparkinstall.probes import Probe
from sparkinstall.probes.preflight import preflight
from sparkinstall.resources import rollback
from sparkinstall.system import Reader

_Introduction = TypeVar("_Introduction", bound=Introduction)
_LONGEST_REQUEST = 1 << 22
_TRIES = 8


def serve(run: Callable[[Sequence[str]], None]) -> None:
    """Read a request from stdin and `run` its verb; end the verb when stdin ends: the caller is gone then.

    Raises:
        Problem: stdin cannot be read, or contains no request.
    """
    # Unbuffered: the bytes after the line are for the thread that waits for the end of stdin.
    with storage_errors("reading stdin"), open(0, "rb", buffering=0, closefd=False) as stdin:
        line = stdin.readline(_LONGEST_REQUEST)
    try:
        request = msgspec.json.decode(line, type=Request)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Problem(
            "`node attend` found no request of another node on stdin",
            hint="do not call it yourself: `sparkinstall cluster` does, through ssh",
        ) from error
    # Not StringIO: verbs read bytes too, through `buffer`.
    sys.stdin = io.TextIOWrapper(io.BytesIO(request.stdin.encode()))
    threading.Thread(target=_end_when_alone, daemon=True).start()
    run(request.argv)


def _end_when_alone() -> None:
    while os.read(0, 4096):
        pass
    # Nobody reads the output any more; that must not end a step in its middle.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.kill(os.getpid(), signal.SIGTERM)


def tell(text: str) -> None:
    """Show a line at the terminal while the verb runs."""
    print(text, file=sys.stderr, flush=True)


def look(session: Session, only: Sequence[str], skip: Sequence[str], more: Sequence[Probe] = ()) -> Look:
    """Plan, preflight with `more` checks, and versions in one reply.

    Raises:
        BadUsage: `only` or `skip` names a step that does not exist.
    """
    node, on = session.node, session.system
    return Look(
        steps=engine.plan(catalogue.chosen(node, only, skip), node, on),
        preflight=checks.look([*preflight(node), *more], on, silent),
        unproven=tuple(session.state.unproven()),
        versions=drift.versions(node, on),
        token=drift.token_digest(node, on),
        armed=rollback.armed(on),
        user=node.user,
        executor=node.config.cluster.executor,
        **structs.asdict(identify(on)),
    )


def identify(on: Reader) -> Identity:
    """Which machine this is, whatever is installed on it."""
    addresses = tuple(each.partition("/")[0] for live in ip.live(on).values() for each in live.addresses)
    return Identity(machine.identity(on), addresses)


def reach(session: Session, addresses: Sequence[str]) -> Reply[Reached]:
    """Ping other nodes over the link, with small packets and with the largest; a problem for each that fails."""
    mtu = session.node.config.network.mtu
    waiting = dict.fromkeys(addresses, "")
    for attempt in range(_TRIES):
        # A link that was just set up needs a moment: its neighbour may come up later.
        time.sleep(1 if attempt else 0)
        waiting = {each: why for each in waiting if (why := _unreached(session.system, each, mtu))}
        if not waiting:
            break
    reached = Reached(tuple(each for each in addresses if each not in waiting))
    if not waiting:
        return Reply(0, reached)
    hint = f"check the cable, and `ip -br address` on both nodes{qsfp.if_crossed(session.system, session.node)}"
    return Reply(1, reached, [Problem(why, hint=hint) for why in waiting.values()])


def _unreached(on: Reader, address: str, mtu: int) -> str:
    if pings(on, address, count=1, size=mtu - HEADERS):
        return ""
    if pings(on, address):
        return f"{address} answers small packets, but none of {mtu} bytes: the MTU is not {mtu} on the whole path"
    return f"{address} does not answer over the link"


def offer(session: Session, workers: int, only: Sequence[str]) -> Offered:
    """Serve this node's downloads and builds to so many workers. The token is on stdin.

    Raises:
        CopyFailed, Storage: as `artifacts.serve`.
    """
    token = _line().decode(errors="replace").strip()
    tell("listing downloads and builds")
    return artifacts.serve(session.node, session.system, only, workers, token)


def offer_model(session: Session, workers: int, model: str, commit: str) -> Offered:
    """Serve a model of this user's cache to so many workers. The token is on stdin.

    Raises:
        CopyFailed, BadUsage, ModelError: as `model_copies.offer`.
    """
    token = _line().decode(errors="replace").strip()
    return model_copies.offer(session.node.address, model, commit, workers, token)


def _line() -> bytes:
    with storage_errors("reading stdin"):
        return sys.stdin.buffer.readline(_LONGEST_REQUEST)


def fetch(session: Session, only: Sequence[str]) -> Fetched:
    """Fetch missing artifacts from the head. Its `Introduction` is on stdin.

    Raises:
        CopyFailed, Storage: as `artifacts.fetch_missing`.
    """

    def progress(done: int, total: int) -> None:
        tell(f"copied {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    head = _introduced(Introduction)
    return artifacts.fetch_missing(session.node, session.system, only, head, progress)


def receive() -> Fetched:
    """Take the models that another machine offers. Its `ModelSource` is on stdin.

    Raises:
        CopyFailed, Blocked, Storage: as `model_copies.receive`.
    """
    return model_copies.receive(_introduced(ModelSource))


def _introduced(by: type[_Introduction]) -> _Introduction:
    try:
        return msgspec.json.decode(_line(), type=by)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadUsage("the introduction of the other node on stdin cannot be read") from error


def token(session: Session) -> Token:
    """Return the Ray token of this node, the head.

    Raises:
        Problem: there is none yet.
    """
    found = session.system.read(session.node.ray_token)
    if not found:
        raise Problem("the head has no Ray token yet", hint="run the same command again: the head creates it")
    return Token(found.decode().strip())
