"""The engine's loop, on minimal resources."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from sparkinstall.core import catalogue, checks
from sparkinstall.core.engine import StepReport, converge, ordered, plan
from sparkinstall.core.session import Session, looked_at
from sparkinstall.errors import Blocked, Interrupted, NeedsRoot, Problem
from sparkinstall.events import Event, ResourceApplied, StepEnded, StepStarted, silent
from sparkinstall.node import Node
from sparkinstall.probes import Probe, passed
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok, Resource, State, Unknown
from sparkinstall.steps import Step
from sparkinstall.system import Reader, System, processes
from sparkinstall.system.local import LocalReader, LocalSystem

NODE = cast(Node, None)


@dataclass
class Item:
    """A resource that returns `states`, one per check (the last one from then on), and counts its applications."""

    key: str = "item"
    states: list[State] = field(default_factory=lambda: [Drift("apply it"), Ok()])
    raises: BaseException | None = None
    applied: int = 0
    barrier: threading.Barrier | None = None

    def check(self, on: Reader) -> State:
        del on
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def apply(self, on: System) -> None:
        del on
        self.applied += 1
        if self.barrier:
            self.barrier.wait(timeout=300)
        if self.raises:
            raise self.raises


def step_of(called: str, items: Sequence[Item] = (), needs: tuple[str, ...] = ()) -> Step:
    """A step of these resources."""
    needed = needs

    class Given(Step):
        name = called
        why = "because"
        needs = needed

        def resources(self, node: Node) -> Iterable[Resource]:
            del node
            return items

    return Given()


def system(_: str = "") -> System:
    return LocalSystem("/nowhere")


def done(*steps: Step, fresh: bool = False) -> dict[str, StepReport]:
    return {report.name: report for report in converge(steps, NODE, system, silent, fresh)}


def up_to_date(note: str = "") -> Item:
    return Item(states=[Ok(note)])


def test_ordered_step_comes_after_the_steps_it_needs() -> None:
    steps = [step_of("c", needs=("b",)), step_of("a"), step_of("b", needs=("a", "not chosen"))]
    assert [step.name for step in ordered(steps)] == ["a", "b", "c"]


def test_ordered_circle_is_refused() -> None:
    with pytest.raises(ValueError, match="cycle"):
        ordered([step_of("a", needs=("b",)), step_of("b", needs=("a",))])


def test_catalogue_is_in_order() -> None:
    assert [step.name for step in ordered(catalogue.STEPS)] == [step.name for step in catalogue.STEPS]


def test_converge_ok_resource_is_applied_only_with_force() -> None:
    item = up_to_date()
    assert done(step_of("a", [item]))["a"].outcome == "unchanged" and item.applied == 0
    assert done(step_of("a", [item]), fresh=True)["a"].outcome == "changed" and item.applied == 1


def test_converge_drift_is_applied_and_checked_again() -> None:
    item = Item()
    report = done(step_of("a", [item]))["a"]
    assert (report.outcome, item.applied, report.checked[0].changed) == ("changed", 1, True)


def test_converge_drift_after_apply_fails() -> None:
    item = Item(states=[Drift("apply it"), Drift("it is still crooked")])
    report = done(step_of("a", [item]))["a"]
    assert report.outcome == "failed" and report.problem is not None
    assert "is still not in the desired state after it was applied" in report.problem.message
    assert report.problem.cause == "it is still crooked"


@pytest.mark.parametrize("state", [Unknown("b"), Conflict("a wall", "climb it")])
def test_converge_unknown_or_conflict_is_not_applied(state: State) -> None:
    item = Item(states=[state])
    report = done(step_of("a", [item]))["a"]
    assert report.outcome == "failed" and item.applied == 0
    assert isinstance(report.problem, Blocked) and report.problem.hint


@dataclass
class OfTheNode(Item):
    """A resource that a rehearsal cannot have."""

    def node_only(self, on: Reader) -> str:
        assert on.rehearsal
        return "apt"


def test_node_only_in_a_rehearsal_is_neither_checked_nor_applied() -> None:
    item = OfTheNode()
    (report,) = plan([step_of("a", [item])], NODE, LocalReader("/nowhere"))
    assert report.checked[0] == NodeOnly("apt", key="item")
    assert done(step_of("a", [item]))["a"].outcome == "node_only"
    assert (item.applied, len(item.states)) == (0, 2)


def test_node_only_on_the_node_is_checked() -> None:
    (report,) = plan([step_of("a", [OfTheNode()])], NODE, LocalReader())
    assert isinstance(report.checked[0], Drift)


@pytest.mark.parametrize(("root", "outcome"), [("/", "node_only"), ("/nowhere", "drift")])
def test_left_to_on_the_node_skips_the_step(root: str, outcome: str) -> None:
    class Left(Step):
        name = "left"
        why = "because"

        def left_to(self, node: Node, on: Reader) -> str:
            del node, on
            return "ufw filters here"

        def resources(self, node: Node) -> Iterable[Resource]:
            del node
            return [Item()]

    (report,) = plan([Left()], NODE, LocalReader(root))
    assert report.outcome == outcome


def test_probe_that_needs_the_node_is_skipped_in_a_rehearsal() -> None:
    probe = Probe("gpu", "the GPU", lambda _: passed("it is there"), "node", needs_node="a rehearsal has no GPU")
    found = [checks.look([probe], LocalReader(root), silent)[0] for root in ("/nowhere", "/")]
    assert [(each.verdict, each.found) for each in found] == [
        ("skip", probe.needs_node),
        ("pass", "it is there"),
    ]


def test_converge_node_only_resource_is_no_failure() -> None:
    before, after = Item(states=[NodeOnly("apt")]), Item(states=[Drift("half of it"), NodeOnly("the rest")])
    reports = done(step_of("a", [before]), step_of("b", [after], needs=("a",)), step_of("c", [Item()], needs=("b",)))
    assert (reports["a"].outcome, reports["c"].outcome) == ("node_only", "changed")
    assert before.applied == 0 and reports["b"].problem is None


def test_converge_failed_step_blocks_only_those_that_need_it() -> None:
    never = Item()
    reports = done(
        step_of("a", [Item(raises=Problem("broken"))]),
        step_of("b", [never], needs=("a",)),
        step_of("c", [never], needs=("b",)),
        step_of("d", [Item()]),
        step_of("e", [Item()], needs=("d",)),
    )
    assert [reports[name].outcome for name in "abcde"] == ["failed", "blocked", "blocked", "changed", "changed"]
    assert (reports["b"].blocked_by, reports["c"].blocked_by) == ("a", "b")
    assert never.applied == 0


def test_converge_full_disk_is_a_storage_error() -> None:
    problem = done(step_of("a", [Item(raises=OSError(28, "No space left on device"))]))["a"].problem
    assert problem is not None and problem.code == "storage" and "the disk is full" in problem.message


def test_converge_failure_skips_the_rest_of_the_step() -> None:
    rest = Item()
    assert done(step_of("a", [Item(raises=Problem("broken")), rest]))["a"].outcome == "failed"
    assert rest.applied == 0


def test_converge_independent_steps_run_in_parallel() -> None:
    barrier = threading.Barrier(3)
    reports = done(*(step_of(name, [Item(barrier=barrier)]) for name in "abc"))
    assert {report.outcome for report in reports.values()} == {"changed"}, "each waited for the other two"


def test_converge_of_another_stack_builds_nccl_only_after_the_environment() -> None:
    broken = step_of("environment", [Item(raises=Problem("not proven"))])
    for switching, outcome in ((True, "blocked"), (False, "changed")):
        nccl = step_of("nccl", [Item()])
        type(nccl).needs_in_a_switch = catalogue.named("nccl").needs_in_a_switch
        reports = converge([broken, nccl], NODE, system, silent, switching=switching)
        assert {report.name: report.outcome for report in reports}["nccl"] == outcome


def test_converge_step_starts_as_soon_as_its_needs_are_done() -> None:
    barrier = threading.Barrier(2)
    reports = done(
        step_of("slow", [Item(barrier=barrier)]), step_of("a"), step_of("b", [Item(barrier=barrier)], needs=("a",))
    )
    assert {report.problem for report in reports.values()} == {None}


def test_converge_exception_fails_only_its_step() -> None:
    reports = done(
        step_of("a", [Item(raises=ZeroDivisionError("by zero"))]), step_of("b", needs=("a",)), step_of("c", [Item()])
    )
    assert [reports[name].outcome for name in "abc"] == ["failed", "blocked", "changed"]
    problem = reports["a"].problem
    assert problem is not None and "ZeroDivisionError: by zero" in problem.message and problem.hint


def test_converge_interrupt_stops_the_programs_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[bool] = []
    monkeypatch.setattr(processes, "stop_all", lambda: stopped.append(True))
    with pytest.raises(KeyboardInterrupt):
        done(step_of("a", [Item(raises=KeyboardInterrupt())]))
    assert stopped


def test_converge_interrupt_says_what_an_interrupted_step_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "stop_all", lambda: None)
    barrier = threading.Barrier(2)
    said = Interrupted("interrupted while downloading", hint="it continues")
    steps = (
        step_of("a", [Item(barrier=barrier, raises=KeyboardInterrupt())]),
        step_of("b", [Item(barrier=barrier, raises=said)]),
    )
    with pytest.raises(Interrupted) as found:
        done(*steps)
    assert found.value is said


def test_plan_applies_nothing() -> None:
    items = [Item(), Item(states=[Unknown("a")]), Item(states=[NodeOnly("x")]), Item(states=[Conflict("x")])]
    reports = plan([step_of(str(number), [item]) for number, item in enumerate(items)], NODE, system())
    assert [report.outcome for report in reports] == ["drift", "drift", "node_only", "drift"]
    assert not any(item.applied for item in items)


def test_converge_reports_events_in_order() -> None:
    events: list[Event] = []
    converge([step_of("a", [Item("x"), up_to_date()])], NODE, system, events.append)
    assert [type(event) for event in events] == [StepStarted, ResourceApplied, StepEnded]
    assert events[1] == ResourceApplied("a", "x", "apply it")
    converge([step_of("a", [Item(raises=Problem("broken"))]), step_of("b", needs=("a",))], NODE, system, events.append)
    ends = [(event.step, event.outcome, event.note) for event in events[3:] if isinstance(event, StepEnded)]
    assert ends == [("a", "failed", "broken"), ("b", "blocked", "needs a")]


def test_converge_without_steps_reports_nothing() -> None:
    assert converge([], NODE, system, silent) == []


def test_converge_gives_each_step_its_own_system(tmp_path: Path) -> None:
    steps: list[str] = []

    def system_for(step: str) -> Any:
        steps.append(step)
        return LocalSystem(str(tmp_path))

    converge([step_of("a", [Item()]), step_of("b", [Item()], needs=("a",))], NODE, system_for, silent)
    assert steps == ["a", "b"]


@pytest.mark.parametrize(("terminal", "asked"), [(True, 1), (False, 0)])
def test_looked_at_needs_root_is_checked_again_after_the_password(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, asked: int
) -> None:
    class Guarded(Item):
        def check(self, on: Reader) -> State:
            del on
            if not times:
                raise NeedsRoot("only root can read it")
            return Ok()

    class Asking(LocalSystem):
        def ask_for_sudo(self) -> None:
            times.append("asked")

    times: list[str] = []
    session = Session(NODE, Asking(), cast(Any, None), {}, {})
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda _: terminal})())
    (report,) = looked_at(session, [step_of("firewall", [Guarded()])])
    assert len(times) == asked
    assert report.outcome == ("unchanged" if terminal else "failed")
