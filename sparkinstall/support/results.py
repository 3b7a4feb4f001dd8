"""Collect the results of other verbs for the support bundle. An unavailable result is listed as missing."""

import platform
import traceback
from collections.abc import Callable
from typing import Any

from msgspec import Struct, to_builtins

from sparkinstall import given, stacks
from sparkinstall.assets import user_cache
from sparkinstall.cluster.protocol import Verified
from sparkinstall.config import Config
from sparkinstall.core import checks, verify
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.core.verify import VerifyOptions
from sparkinstall.envelope import plain
from sparkinstall.errors import Problem
from sparkinstall.events import silent
from sparkinstall.node import Node
from sparkinstall.probes.preflight import preflight
from sparkinstall.system.local import LocalSystem


class Results(Struct, frozen=True):
    """The node, results as JSON values by member name, and what is missing and why."""

    node: Node
    members: dict[str, Any]
    missing: list[str]


def results(target: Target, options: VerifyOptions, on: LocalSystem) -> Results:
    """Collect settings, preflight and verification; a node with invalid settings counts as one without any."""
    missing: list[str] = []
    try:
        session = open_session(target)
    except Problem as problem:
        node = _unset(on)
        members = {"settings.json": {"error": problem}}
        missing.append(f"settings: {problem.message}")
    else:
        node = session.node
        missing += _trouble(session)
        members = {
            "settings.json": _noted(session.settings, "settings", missing),
            "verify.json": _noted(lambda: Verified.of(verify.verify(session, options), session), "verify", missing),
        }
    members["preflight.json"] = _noted(lambda: _preflight(node, on), "preflight", missing)
    return Results(node, {name: to_builtins(value, enc_hook=plain) for name, value in members.items()}, missing)


def _trouble(session: Session) -> list[str]:
    """Note what is wrong with the journal; its readable part is in the archive anyway."""
    try:
        problem = session.state.trouble(session.node)
    except Problem as refused:
        problem = refused
    return [f"journal: {problem.message}"] if problem else []


def _noted(ask: Callable[[], Any], what: str, missing: list[str]) -> Any:
    try:
        return ask()
    except Problem as problem:
        missing.append(f"{what}: {problem.message}")
        return {"error": problem}
    except Exception as error:  # a bug is a reason to make the archive
        missing.append(f"{what}: {type(error).__name__}: {error}")
        return {"traceback": traceback.format_exc().splitlines()}


def _preflight(node: Node, on: LocalSystem) -> list[ProbeResult]:
    """Run the preflight and the probes of the machine: all there is if nothing is installed."""
    probes = [*preflight(node), *checks.of_no_step(node)]
    return checks.look((each for each in probes if not each.load), on, silent)


def _unset(on: LocalSystem) -> Node:
    """Return the node with default settings."""
    machine = platform.machine()
    return Node(
        config=Config(), stack=stacks.load(stacks.DEFAULT), platform=machine, machine=machine,
        rehearsal=on.rehearsal, full=False, home=str(given.home()), cache=user_cache(),
    )  # fmt: skip
