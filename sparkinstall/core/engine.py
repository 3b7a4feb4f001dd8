"""The engine: one loop over steps and resources. plan, all and verify are traversals of the same declarations."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from graphlib import TopologicalSorter
from typing import Literal

from msgspec import Struct, field
from msgspec.structs import replace

from sparkinstall.errors import Blocked, Interrupted, Problem, storage_problem
from sparkinstall.events import Emit, ResourceApplied, StepEnded, StepStarted
from sparkinstall.node import Node
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok, Resource, State, Unknown, repaired, state_of
from sparkinstall.steps import Step
from sparkinstall.system import Reader, System, processes

Outcome = Literal["unchanged", "changed", "drift", "node_only", "failed", "blocked"]


class StepReport(Struct, frozen=True):
    """What was found and done in one step: the state of each resource. `seconds` is wall time."""

    name: str = field(name="step")
    outcome: Outcome = "unchanged"
    checked: tuple[State, ...] = field(name="resources", default=())
    problem: Problem | None = field(name="error", default=None)
    blocked_by: str | None = None
    seconds: float = 0.0

    @classmethod
    def of(
        cls, name: str, checked: Sequence[State] = (), problem: Problem | None = None, seconds: float = 0.0
    ) -> "StepReport":
        """The report of a step that was begun."""
        return cls(name, _outcome(checked, problem), tuple(checked), problem, None, round(seconds, 3))

    @property
    def is_due(self) -> bool:
        """Whether the step has anything to apply."""
        return self.outcome not in ("unchanged", "node_only")


def _outcome(checked: Sequence[State], problem: Problem | None) -> Outcome:
    if problem:
        return "failed"
    if any(isinstance(each, Drift | Unknown | Conflict) for each in checked):
        return "drift"
    if any(each.changed for each in checked):
        return "changed"
    return "node_only" if any(isinstance(each, NodeOnly) for each in checked) else "unchanged"


Visit = Callable[[Step], Iterable[State]]


def ordered(steps: Sequence[Step]) -> list[Step]:
    """Sort `steps` so that each comes after those it needs; needs that were not selected are ignored.

    Raises:
        CycleError: steps need each other in a circle.
    """
    by_name = {step.name: step for step in steps}
    needs = {step.name: [name for name in step.needs if name in by_name] for step in steps}
    return [by_name[name] for name in TopologicalSorter(needs).static_order()]


def plan(steps: Sequence[Step], node: Node, on: Reader) -> list[StepReport]:
    """Check every resource; change nothing."""

    def visit(step: Step) -> Iterable[State]:
        return _states(step, node, on, lambda resource: state_of(resource, on))

    return [_guarded(step, visit) for step in ordered(steps)]


def _states(step: Step, node: Node, on: Reader, settle: Callable[[Resource], State]) -> Iterator[State]:
    """`settle` each resource of a step; none if the settings leave the step to the user: then the reason."""
    if reason := "" if on.rehearsal else step.left_to(node, on):
        yield NodeOnly(reason, key=step.name)
        return
    for resource in step.resources(node):
        yield settle(resource)


def converge(
    steps: Sequence[Step],
    node: Node,
    system_for: Callable[[str], System],
    emit: Emit,
    force: bool = False,
    switching: bool = False,
) -> list[StepReport]:
    """Bring everything into the desired state. Independent steps run in parallel; a failed step blocks only those that
    need it. `force` also applies what is up to date. `switching`: another stack is installed."""

    def visit(step: Step) -> Iterable[State]:
        on = system_for(step.name)
        return _states(step, node, on, lambda resource: _applied(step, resource, on, emit, force))

    needs = {step.name: (*step.needs, *(step.needs_in_a_switch if switching else ())) for step in steps}
    return _side_by_side(ordered(steps), needs, visit, emit)


def _applied(step: Step, resource: Resource, on: System, emit: Emit, force: bool) -> State:
    processes.refuse_if_stopped()
    state, note = repaired(resource, on)
    if isinstance(state, NodeOnly) or (isinstance(state, Ok) and not force):
        return state
    _refuse_unapplicable(resource, state)
    resource.apply(on)
    after = state_of(resource, on)
    if not isinstance(after, Ok | NodeOnly):
        raise _not_converged(resource, after)
    done = state.summary if isinstance(state, Drift) else "applied again"
    emit(ResourceApplied(step.name, resource.key, f"{done} ({note})" if note else done))
    return replace(after, changed=True)


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


def _guarded(step: Step, visit: Visit) -> StepReport:
    started = time.monotonic()
    checked: list[State] = []
    problem: Problem | None = None
    try:
        for state in visit(step):
            checked.append(state)
    except Problem as error:
        problem = error
    except OSError as error:
        problem = storage_problem(error, f"step {step.name}")
    except Exception as error:  # a crashed check is a result of its step, not the end of the run
        problem = Problem(
            f"step {step.name} failed with an internal error: {type(error).__name__}: {error}",
            hint=f"run the step from scratch: `sparkinstall run {step.name} --force`; if that does not help, report it",
        )
    return StepReport.of(step.name, checked, problem, time.monotonic() - started)


def _side_by_side(
    steps: Sequence[Step], needs: Mapping[str, Sequence[str]], visit: Visit, emit: Emit
) -> list[StepReport]:
    reports: dict[str, StepReport] = {}
    stop = threading.Event()
    waiting = list(steps)
    running: dict[Future[None], Step] = {}

    def one(step: Step) -> None:
        if stop.is_set():
            reports[step.name] = StepReport.of(step.name, problem=Interrupted("interrupted before it started"))
            return
        emit(StepStarted(step.name))
        end(_guarded(step, visit))

    def end(report: StepReport) -> None:
        reports[report.name] = report
        note = report.problem.message if report.problem else f"needs {report.blocked_by}" if report.blocked_by else ""
        emit(StepEnded(report.name, report.outcome, report.seconds, note))

    with _words_of_steps(reports), ThreadPoolExecutor(max_workers=len(steps) or 1) as pool:
        try:
            while waiting or running:
                unfinished = {step.name for step in (*waiting, *running.values())}
                for step in list(waiting):
                    if failed := _failed_need(needs[step.name], reports):
                        waiting.remove(step)
                        end(StepReport(step.name, "blocked", blocked_by=failed))
                    elif not unfinished.intersection(needs[step.name]):
                        waiting.remove(step)
                        running[pool.submit(one, step)] = step
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    running.pop(future)
                    future.result()
        except BaseException:
            stop.set()
            processes.stop_all()
            raise
    return [reports[step.name] for step in steps]


@contextmanager
def _words_of_steps(reports: Mapping[str, StepReport]) -> Iterator[None]:
    """After an interrupt, raise what a step says of it, if one does: a download is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        for report in reports.values():
            # Without a hint it says no more than that it was interrupted.
            if isinstance(report.problem, Interrupted) and report.problem.hint:
                raise report.problem from error
        raise


def _failed_need(needs: Sequence[str], reports: Mapping[str, StepReport]) -> str | None:
    bad = ("failed", "blocked")
    return next((name for name in needs if name in reports and reports[name].outcome in bad), None)
