"""The engine: one loop over steps and resources. plan, all and verify are traversals of the same declarations."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Literal

from msgspec import Struct, field

from sparkinstall.errors import Blocked, Interrupted, Problem, storage_problem
from sparkinstall.events import Emit, ResourceApplied, StepEnded, StepStarted
from sparkinstall.fixes import Fix
from sparkinstall.node import Node
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok, Resource, State, Unknown, state_of
from sparkinstall.steps import Step
from sparkinstall.system import Reader, System, processes

Outcome = Literal["unchanged", "changed", "drift", "node_only", "failed", "blocked"]


class Checked(Struct, frozen=True):
    """A resource and its state; `changed` if this run applied it. `fix`: its fix; None: those of its step."""

    key: str
    state: State
    changed: bool = False
    fix: Fix | None = None


class StepReport(Struct):
    """What was found and done in one step. `seconds` is wall time."""

    name: str
    why: str
    checked: list[Checked] = field(default_factory=list)
    problem: Problem | None = None
    blocked_by: str = ""
    seconds: float = 0.0

    @property
    def outcome(self) -> Outcome:
        if self.problem:
            return "failed"
        if self.blocked_by:
            return "blocked"
        if any(isinstance(each.state, Drift | Unknown | Conflict) for each in self.checked):
            return "drift"
        if any(each.changed for each in self.checked):
            return "changed"
        left = any(isinstance(each.state, NodeOnly) for each in self.checked)
        return "node_only" if left else "unchanged"


Visit = Callable[[Step, StepReport], None]


def ordered(steps: Sequence[Step]) -> list[Step]:
    """Sort `steps` so that each comes after those it needs; needs that were not selected are ignored."""
    chosen = {step.name for step in steps}
    done: list[Step] = []
    waiting = list(steps)
    while waiting:
        ready = [s for s in waiting if not (set(s.needs) & chosen) - {d.name for d in done}]
        if not ready:
            raise ValueError(f"steps need each other in a circle: {[s.name for s in waiting]}")
        done += ready
        waiting = [s for s in waiting if s not in ready]
    return done


def plan(steps: Sequence[Step], node: Node, on: Reader) -> list[StepReport]:
    """Check every resource; change nothing."""
    reports = []
    for step in ordered(steps):
        report = StepReport(step.name, step.why)
        _guarded(step, report, lambda s, r: _look(s, r, node, on))
        reports.append(report)
    return reports


def _look(step: Step, report: StepReport, node: Node, on: Reader) -> None:
    for resource in _resources(step, report, node, on):
        report.checked.append(_checked(resource, state_of(resource, on)))


def _checked(resource: Resource, state: State, changed: bool = False) -> Checked:
    return Checked(resource.key, state, changed, getattr(resource, "fix", None))


def _resources(step: Step, report: StepReport, node: Node, on: Reader) -> Iterable[Resource]:
    """Return the resources of a step; none if the settings leave it to the user, which the report then explains."""
    if reason := "" if on.rehearsal else step.left_to(node, on):
        report.checked.append(Checked(step.name, NodeOnly(reason)))
        return ()
    return step.resources(node)


def converge(
    steps: Sequence[Step], node: Node, system_for: Callable[[str], System], emit: Emit, force: bool = False
) -> list[StepReport]:
    """Bring everything into the desired state. Independent steps run in parallel; a failed step blocks only those that
    need it. `force` also applies what is up to date."""

    def visit(step: Step, report: StepReport) -> None:
        on = system_for(step.name)
        for resource in _resources(step, report, node, on):
            processes.refuse_if_stopped()
            _apply(resource, on, report, emit, force)

    return _side_by_side(ordered(steps), visit, emit)


def _apply(resource: Resource, on: System, report: StepReport, emit: Emit, force: bool) -> None:
    state = state_of(resource, on)
    if isinstance(state, NodeOnly) or (isinstance(state, Ok) and not force):
        report.checked.append(_checked(resource, state))
        return
    _refuse_unapplicable(resource, state)
    resource.apply(on)
    after = state_of(resource, on)
    if not isinstance(after, Ok | NodeOnly):
        raise _not_converged(resource, after)
    report.checked.append(_checked(resource, after, changed=True))
    emit(ResourceApplied(report.name, resource.key, state.summary if isinstance(state, Drift) else "applied again"))


def _refuse_unapplicable(resource: Resource, state: State) -> None:
    if isinstance(state, Conflict):
        raise Blocked(state.message, hint=state.hint)
    if isinstance(state, Unknown):
        raise Blocked(
            f"the state of {resource.key} is unknown until step `{state.waits_for}` has run",
            hint=f"run `sparkinstall run {state.waits_for}` first, or everything with `sparkinstall all`",
        )


def _not_converged(resource: Resource, state: State) -> Problem:
    found = getattr(state, "summary", "") or getattr(state, "message", "") or str(state)
    return Problem(
        f"{resource.key} is still not in the desired state after it was applied",
        cause=found,
        hint="something else may be changing it at the same time; `sparkinstall plan` shows the difference",
    )


def _guarded(step: Step, report: StepReport, visit: Visit) -> None:
    started = time.monotonic()
    try:
        visit(step, report)
    except Problem as problem:
        report.problem = problem
    except OSError as error:
        report.problem = storage_problem(error, f"step {step.name}")
    except Exception as error:  # a crashed check is a result of its step, not the end of the run
        report.problem = Problem(
            f"step {step.name} failed with an internal error: {type(error).__name__}: {error}",
            hint=f"run the step from scratch: `sparkinstall run {step.name} --force`; if that does not help, report it",
        )
    finally:
        report.seconds = time.monotonic() - started


def _side_by_side(steps: Sequence[Step], visit: Visit, emit: Emit) -> list[StepReport]:
    reports = {step.name: StepReport(step.name, step.why) for step in steps}
    stop = threading.Event()
    waiting = list(steps)
    running: dict[Future[None], Step] = {}

    def one(step: Step) -> None:
        if stop.is_set():
            reports[step.name].problem = Interrupted("interrupted before it started")
            return
        emit(StepStarted(step.name))
        _guarded(step, reports[step.name], visit)
        _tell_end(reports[step.name], emit)

    with ThreadPoolExecutor(max_workers=len(steps) or 1) as pool:
        try:
            while waiting or running:
                for step in _ready(waiting, running.values(), reports):
                    waiting.remove(step)
                    if reports[step.name].blocked_by:
                        _tell_end(reports[step.name], emit)
                    else:
                        running[pool.submit(one, step)] = step
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    running.pop(future)
                    future.result()
        except BaseException:
            stop.set()
            processes.stop_all()
            raise
    return list(reports.values())


def _ready(waiting: list[Step], running: Iterable[Step], reports: dict[str, StepReport]) -> list[Step]:
    open_names = {s.name for s in waiting} | {s.name for s in running}
    ready = []
    for step in waiting:
        failed = [n for n in step.needs if n in reports and reports[n].outcome in ("failed", "blocked")]
        if failed:
            reports[step.name].blocked_by = failed[0]
            ready.append(step)
        elif not set(step.needs) & open_names:
            ready.append(step)
    return ready


def _tell_end(report: StepReport, emit: Emit) -> None:
    note = report.problem.message if report.problem else (f"needs {report.blocked_by}" if report.blocked_by else "")
    emit(StepEnded(report.name, report.outcome, report.seconds, note))
