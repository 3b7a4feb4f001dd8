"""The use case of `serve`: a recipe or a model becomes settings, and vLLM is started with them until it answers."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import msgspec
from msgspec import Struct

from sparkinstall.core import engine, serve_checks
from sparkinstall.core.catalogue import named
from sparkinstall.core.converge import Dialog, Installation, InstallOptions, Supply, converge
from sparkinstall.core.readiness import LIMIT, LIMIT_OF_SEVERAL, Following, Ready
from sparkinstall.core.serve_record import Serving, record
from sparkinstall.core.serve_settings import Wanted, overridden, require_decided, require_known
from sparkinstall.core.session import IDENTITY, Session, Target, open_session
from sparkinstall.errors import BadUsage, Interrupted, NotThere, Problem
from sparkinstall.events import Emit, silent
from sparkinstall.facts.decisions import as_text
from sparkinstall.facts.units import show
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.layout import LIFE_UNIT, VLLM_UNIT
from sparkinstall.node import Node
from sparkinstall.recipes import Change
from sparkinstall.resources import Drift
from sparkinstall.resources.stale_services import StaleServices
from sparkinstall.resources.systemd import Service, stop_for_now
from sparkinstall.services import VLLM
from sparkinstall.system import processes

STEPS = ("model", "serving", "life")
_SERVICES = ("serving", "life")


class Explained(Struct, frozen=True):
    """What the logs say of a vLLM that has ended: the cause, what to do, and lines that show it."""

    cause: str = ""
    hint: str = ""
    lines: Sequence[str] = ()


class ServeDialog(Struct, frozen=True):
    """How `serve` talks to its caller.

    `explain` searches the logs of the last start, and within `uninterrupted` no interrupt arrives. `say` is given a
    sentence before a check that takes long.
    """

    install: Dialog
    explain: Callable[[], Explained]
    uninterrupted: Callable[[], AbstractContextManager[None]]
    say: Callable[[str], None] = lambda _: None


class ServeOptions(Struct, frozen=True):
    """`limit`: seconds until the first answer must have come. `ignore`: checks that may fail."""

    ignore: tuple[str, ...] = ()
    limit: float = LIMIT


class Answering(Struct, frozen=True):
    """Result of `serve`. `changed`: vLLM was started; else it already ran with these settings."""

    changed: bool
    serving: Serving
    changes: Sequence[Change] = ()


class ServeStatus(Struct, frozen=True):
    """Result of `serve status`. `active`: as systemd says; `starts`: how often it has restarted it by itself.

    `serving`: the record of the last start that answered; `current`: it is still that start.
    """

    model: str | None
    recipe: str | None
    active: str
    starts: int
    current: bool
    serving: Serving | None


class Before(Struct, frozen=True):
    """What a failure restores: the options, and the run of the unit."""

    options: dict[str, Any]
    invocation: str
    active: bool


def serve(session: Session, target: Target, wanted: Wanted, options: ServeOptions, dialog: ServeDialog) -> Answering:
    """Start vLLM with what is wanted, and wait until it answers.

    If that fails, it is stopped, and the node's settings and its former service are restored.

    Raises:
        Problem: see above; also the checks' failure, before anything is changed.
    """
    supply = require_possible(session, wanted, dialog.say)
    install = InstallOptions(only=STEPS, ignore=options.ignore, verb="serve")
    with _restoring(session, target, dialog, before_serving(session)):
        done = converge(session, install, dialog.install, supply)
        serving = _started(session, done, options.limit, dialog)
    return Answering(done.changed, serving, (*wanted.changes, *overridden(session, wanted.served)))


def restart(session: Session, target: Target, options: ServeOptions, dialog: ServeDialog) -> Answering:
    """Start vLLM again with the settings that it has.

    Raises:
        Problem: as `serve`.
    """
    _require_served(session)
    install = InstallOptions(only=_SERVICES, ignore=options.ignore, force=True, verb="serve restart")
    with _restoring(session, target, dialog, before_serving(session)):
        done = converge(session, install, dialog.install)
        return Answering(True, _started(session, done, options.limit, dialog))


def wait(session: Session, options: ServeOptions, dialog: ServeDialog) -> Answering:
    """Wait until the vLLM that was started by something else answers: systemd at boot, `cluster`, or a person.

    Raises:
        BadUsage: nothing is served here, or this node has no API.
        NotReady: it has ended, or has not answered in time; nothing is changed.
    """
    _require_served(session)
    if session.node.role == "worker":
        raise BadUsage("a worker has no API", hint=f"ask on the head, {session.node.config.cluster.head}")
    return Answering(False, _started(session, Installation(), options.limit, dialog))


def after_install(
    session: Session, target: Target, wanted: Wanted, before: Before, done: Installation, dialog: ServeDialog
) -> Answering:
    """Wait until vLLM answers, which `all` has set up and started.

    Raises:
        Problem: as `serve`; what else was installed stays.
    """
    limit = LIMIT_OF_SEVERAL if session.node.several else LIMIT
    with _restoring(session, target, dialog, before):
        serving = _started(session, done, limit, dialog)
    return Answering(done.changed, serving, (*wanted.changes, *overridden(session, wanted.served)))


def require_possible(session: Session, wanted: Wanted, say: Callable[[str], None]) -> Supply:
    """Return the checks of what is to be served. `say` is given a sentence before one that takes long.

    Raises:
        BadUsage, BadConfig: it cannot be served here, or a setting says otherwise.
    """
    require_decided(session, wanted.served)
    return Supply(tuple(serve_checks.probes(session.node, wanted, say)))


def stop(session: Session) -> None:
    """Stop vLLM; it does not start at boot either.

    Raises:
        BadUsage: nothing is served here.
    """
    _require_served(session)
    with session.state.hold("serve stop", silent) as run:
        _stop(_journaled(session, run, silent))


def _stop(on: JournaledSystem) -> None:
    """Stop vLLM, and first what watches it."""
    for unit in (LIFE_UNIT, VLLM_UNIT):
        if show(on, unit, "LoadState")["LoadState"] == "loaded":
            stop_for_now(on, unit)


def status(session: Session) -> ServeStatus:
    """Return what is served, and whether it still is what was recorded."""
    serving = last_record(session)
    names = ("ActiveState", "NRestarts", "InvocationID")
    now = dict.fromkeys(names, "") if session.node.rehearsal else show(session.system, VLLM_UNIT, *names)
    config = session.node.config.serving
    return ServeStatus(
        model=config.model,
        recipe=config.recipe,
        active=now["ActiveState"] or "unknown",
        starts=int(now["NRestarts"] or 0),
        current=serving is not None and serving.invocation == now["InvocationID"],
        serving=serving,
    )


def last_record(session: Session) -> Serving | None:
    """Return the record of the last start that answered, None if there is none, or it is of another version."""
    content = session.system.read(session.node.serving_record)
    try:
        return msgspec.json.decode(content, type=Serving) if content else None
    except msgspec.DecodeError:
        return None


def before_serving(session: Session, *, within_all: bool = False) -> Before:
    """Return what a failure to serve restores; `within_all`: the other options of this run stay."""
    options = session.state.options()
    if within_all:
        former = options.get("settings", {})
        settings = {name: former[name] for name in IDENTITY if name in former} | session.options.get("settings", {})
        kept = {name: value for name, value in session.options.items() if name not in ("served", "settings")}
        served = {name: value for name, value in options.items() if name == "served"}
        options = {**kept, **served, **({"settings": settings} if settings else {})}
    now = show(session.system, VLLM_UNIT, "InvocationID", "ActiveState")
    return Before(options, now["InvocationID"], now["ActiveState"] == "active")


def require_installed(session: Session, name: str) -> None:
    """Check that something can be served on this node.

    Raises:
        BadUsage, NotThere: it cannot.
        RecipeError, ModelError: nor could it after an installation, because there is nothing of that name.
    """
    require_one_node(session, name)
    if not (session.system.entry(session.node.env_file) and session.system.entry(session.node.python)):
        require_known(name)
        raise NotThere(
            "vLLM is not installed on this node", hint=f"install and serve at once: `sparkinstall all --serve {name}`"
        )


def require_one_node(session: Session, name: str) -> None:
    """Check that this is a node, and not one of several.

    Raises:
        BadUsage: it is another.
    """
    require_a_node(session)
    node = session.node
    if node.several:
        raise BadUsage(
            f"this node is the {node.role} of several, and they must start together",
            hint=f"`sparkinstall cluster HOST HOST --serve {name}` starts vLLM on all of them",
        )


def require_a_node(session: Session) -> None:
    """Check that services can be started here.

    Raises:
        BadUsage: this is a rehearsal.
    """
    if session.node.rehearsal:
        raise BadUsage(
            "a rehearsal starts no services", hint="on the node, without `--root`: `sparkinstall serve NAME`"
        )


def _require_served(session: Session) -> None:
    require_a_node(session)
    if not VLLM.wanted(session.node):
        raise BadUsage("no model is served on this node", hint="`sparkinstall serve RECIPE|MODEL` serves one")


def _started(session: Session, done: Installation, limit: float, dialog: ServeDialog) -> Serving:
    """Wait for the first answer, and record what runs."""
    for report in done.reports:
        if report.problem and report.outcome == "failed":
            raise report.problem
    known = last_record(session)
    with dialog.install.watching() as emit:
        following = Following(session.node, session.system, emit, limit)
        ready = following.until_ready(known.invocation if known else "")
    return _recorded(session, ready)


def _recorded(session: Session, ready: Ready) -> Serving:
    found, known = record(session, ready), last_record(session)
    if known and known.invocation == found.invocation:
        # It was not started by this run, so its phases were not seen.
        return known
    with session.state.hold("serve", silent) as run:
        _journaled(session, run, silent).write(session.node.serving_record, as_text(found).encode(), 0o600)
    return found


def _journaled(session: Session, run: str, emit: Emit) -> JournaledSystem:
    state = session.state
    return JournaledSystem(session.system, state.journal(run), "serving", state.logs(run) / "serving.log", emit)


# --- after a failure


def restore(session: Session, target: Target, before: Before) -> str:
    """Restore what was before on a node that was to serve with others; return that in words."""
    options = session.state.options()
    recorded, former = options.get("served"), before.options.get("served")
    if recorded not in (former, session.options.get("served")):
        return "another run has changed what is served since, so nothing is restored"
    if recorded == former:
        # The order has not come so far here.
        return "nothing was changed"
    started = show(session.system, VLLM_UNIT, "InvocationID")["InvocationID"] not in ("", before.invocation)
    return _restored(session, target, before, started)


@contextmanager
def _restoring(session: Session, target: Target, dialog: ServeDialog, before: Before) -> Iterator[None]:
    """If the work within fails, explain it from the logs, and restore what was before."""
    try:
        yield
    except (Problem, KeyboardInterrupt) as error:
        problem = error if isinstance(error, Problem) else Interrupted("interrupted")
        with dialog.uninterrupted():
            # After Ctrl-C in the middle of a step, no program would be started any more.
            processes.start_again()
            _undo(session, target, dialog, before, problem)
        raise problem from error


def _undo(session: Session, target: Target, dialog: ServeDialog, before: Before, problem: Problem) -> None:
    started = show(session.system, VLLM_UNIT, "InvocationID")["InvocationID"] not in ("", before.invocation)
    if _is_of_another_run(session, before, started):
        problem.message = f"{problem.message}; another run has changed what is served since, so nothing is restored"
        return
    if started and not isinstance(problem, Interrupted):
        _explain(problem, dialog.explain())
    if started or session.state.options() != before.options:
        problem.message = f"{problem.message}; {_restored(session, target, before, started)}"


def _is_of_another_run(session: Session, before: Before, started: bool) -> bool:
    """Whether another run has started vLLM or set something else: while this one waits, it does not hold the node."""
    is_ours = session.state.last_run.endswith(f"-{os.getpid()}")
    return session.state.options() not in (before.options, session.options) or (started and not is_ours)


def _explain(problem: Problem, found: Explained) -> None:
    if found.cause:
        problem.cause, problem.hint = found.cause, found.hint or problem.hint
    problem.output = tuple(found.lines) or problem.output


def _restored(session: Session, target: Target, before: Before, started: bool) -> str:
    """Stop what was started, restore the settings, and what was served before; return that in words."""
    state = session.state
    with state.hold("serve", silent) as run:
        on = _journaled(session, run, silent)
        if started:
            _stop(on)
        if state.options() == before.options:
            return "vLLM is stopped"
        state.remember_options(before.options)
        former = open_session(Target(root=target.root)).node
        if not VLLM.wanted(former):
            _without_unit(StaleServices(former), on)
            return f"{'vLLM is stopped, and ' if started else ''}no model is served, as before"
        return _former_restored(former, on, before)


def _former_restored(node: Node, on: JournaledSystem, before: Before) -> str:
    """Bring back what was served before, as it was: running or not."""
    model, steps = node.config.serving.model, [each for each in map(named, _SERVICES) if each.wanted(node)]
    if not before.active:
        for resource in (each for step in steps for each in step.resources(node)):
            if not isinstance(resource, Service) and isinstance(resource.check(on), Drift):
                resource.apply(on)
        return f"vLLM is stopped, and the settings are those of before, for {model}"
    reports = engine.converge(steps, node, lambda _: on, silent)
    if failures := [report.problem.message for report in reports if report.problem]:
        return f"the settings are those of before, but {model} is not started again: {failures[0]}"
    again = any(report.outcome == "changed" for report in reports)
    return f"{model} is {'started again' if again else 'served'}, as before"


def _without_unit(stale: StaleServices, on: JournaledSystem) -> None:
    if isinstance(stale.check(on), Drift):
        stale.apply(on)
