"""The engine's loop, on resources that are as small as can be."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from sparkinstall.core import catalogue, checks
from sparkinstall.core.engine import StepReport, converge, ordered, plan
from sparkinstall.core.session import Session, looked_at
from sparkinstall.errors import Blocked, NeedsRoot, Problem
from sparkinstall.events import Event, ResourceApplied, StepEnded, StepStarted, silent
from sparkinstall.node import Node
from sparkinstall.probes import Probe, passed
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok, Resource, State, Unknown
from sparkinstall.steps import Step
from sparkinstall.system import Reader, System, processes
from sparkinstall.system.local import LocalReader, LocalSystem

NODE = cast(Node, None)


@dataclass
class Thing:
    """Stands as `states` says, one look after the other (the last for good); counts how often it was made."""

    key: str = "thing"
    states: list[State] = field(default_factory=lambda: [Drift("make it"), Ok()])
    raises: BaseException | None = None
    made: int = 0
    meets: threading.Barrier | None = None

    def check(self, on: Reader) -> State:
        del on
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def apply(self, on: System) -> None:
        del on
        self.made += 1
        if self.meets:
            self.meets.wait(timeout=60)
        if self.raises:
            raise self.raises


def some(called: str, things: Sequence[Thing] = (), needs: tuple[str, ...] = ()) -> Step:
    """A step of `things`."""
    asked = needs

    class Some(Step):
        name = called
        why = "because"
        needs = asked

        def resources(self, node: Node) -> Iterable[Resource]:
            del node
            return things

    return Some()


def system(_: str = "") -> System:
    return LocalSystem("/nowhere")


def done(*steps: Step, fresh: bool = False) -> dict[str, StepReport]:
    return {report.name: report for report in converge(steps, NODE, system, silent, fresh)}


def satisfied(note: str = "") -> Thing:
    return Thing(states=[Ok(note)])


def test_a_step_comes_after_what_it_needs_whatever_the_order_given() -> None:
    steps = [some("c", needs=("b",)), some("a"), some("b", needs=("a", "not chosen"))]
    assert [step.name for step in ordered(steps)] == ["a", "b", "c"]


def test_a_circle_is_refused() -> None:
    with pytest.raises(ValueError, match="circle"):
        ordered([some("a", needs=("b",)), some("b", needs=("a",))])


def test_the_steps_of_the_catalogue_stand_in_their_order() -> None:
    assert [step.name for step in ordered(catalogue.STEPS)] == [step.name for step in catalogue.STEPS]


def test_what_is_so_is_not_made_again_and_fresh_makes_it() -> None:
    thing = satisfied()
    assert done(some("a", [thing]))["a"].outcome == "unchanged" and thing.made == 0
    assert done(some("a", [thing]), fresh=True)["a"].outcome == "changed" and thing.made == 1


def test_what_is_not_so_is_made_and_looked_at_again() -> None:
    thing = Thing()
    report = done(some("a", [thing]))["a"]
    assert (report.outcome, thing.made, report.checked[0].changed) == ("changed", 1, True)


def test_what_does_not_become_so_fails() -> None:
    thing = Thing(states=[Drift("make it"), Drift("it is still crooked")])
    report = done(some("a", [thing]))["a"]
    assert report.outcome == "failed" and report.problem is not None
    assert "is still not in the desired state after it was applied" in report.problem.message
    assert report.problem.cause == "it is still crooked"


@pytest.mark.parametrize("state", [Unknown("b"), Conflict("a wall", "climb it")])
def test_what_cannot_be_told_or_stands_in_the_way_is_not_made(state: State) -> None:
    thing = Thing(states=[state])
    report = done(some("a", [thing]))["a"]
    assert report.outcome == "failed" and thing.made == 0
    assert isinstance(report.problem, Blocked) and report.problem.hint


@dataclass
class OfTheNode(Thing):
    """A thing that a rehearsal cannot have."""

    def node_only(self, on: Reader) -> str:
        assert on.rehearsal
        return "apt"


def test_node_only_is_answered_in_a_rehearsal_without_check_or_apply() -> None:
    thing = OfTheNode()
    (report,) = plan([some("a", [thing])], NODE, LocalReader("/nowhere"))
    assert report.checked[0] == NodeOnly("apt", key="thing")
    assert done(some("a", [thing]))["a"].outcome == "node_only"
    assert (thing.made, len(thing.states)) == (0, 2)


def test_node_only_is_not_asked_on_the_node_itself() -> None:
    (report,) = plan([some("a", [OfTheNode()])], NODE, LocalReader())
    assert isinstance(report.checked[0], Drift)


@pytest.mark.parametrize(("root", "outcome"), [("/", "node_only"), ("/nowhere", "drift")])
def test_a_step_that_something_else_does_is_left_to_it_on_the_node_itself(root: str, outcome: str) -> None:
    class Left(Step):
        name = "left"
        why = "because"

        def left_to(self, node: Node, on: Reader) -> str:
            del node, on
            return "ufw filters here"

        def resources(self, node: Node) -> Iterable[Resource]:
            del node
            return [Thing()]

    (report,) = plan([Left()], NODE, LocalReader(root))
    assert report.outcome == outcome


def test_a_probe_that_needs_the_node_is_skipped_in_a_rehearsal_with_its_reason() -> None:
    probe = Probe("gpu", "the GPU", lambda _: passed("it is there"), "node", needs_node="a rehearsal has no GPU")
    found = [checks.look([probe], LocalReader(root), silent)[0] for root in ("/nowhere", "/")]
    assert [(each.verdict, each.found) for each in found] == [
        ("skip", probe.needs_node),
        ("pass", "it is there"),
    ]


def test_what_only_a_node_can_do_is_left_and_does_not_fail() -> None:
    before, after = Thing(states=[NodeOnly("apt")]), Thing(states=[Drift("half of it"), NodeOnly("the rest")])
    reports = done(some("a", [before]), some("b", [after], needs=("a",)), some("c", [Thing()], needs=("b",)))
    assert (reports["a"].outcome, reports["c"].outcome) == ("node_only", "changed")
    assert before.made == 0 and reports["b"].problem is None


def test_a_failed_step_stops_only_what_needs_it() -> None:
    never = Thing()
    reports = done(
        some("a", [Thing(raises=Problem("broken"))]),
        some("b", [never], needs=("a",)),
        some("c", [never], needs=("b",)),
        some("d", [Thing()]),
        some("e", [Thing()], needs=("d",)),
    )
    assert [reports[name].outcome for name in "abcde"] == ["failed", "blocked", "blocked", "changed", "changed"]
    assert (reports["b"].blocked_by, reports["c"].blocked_by) == ("a", "b")
    assert never.made == 0


def test_a_full_disk_in_a_step_is_put_into_words() -> None:
    problem = done(some("a", [Thing(raises=OSError(28, "No space left on device"))]))["a"].problem
    assert problem is not None and problem.code == "storage" and "the disk is full" in problem.message


def test_the_rest_of_a_step_is_not_begun_after_a_failure() -> None:
    rest = Thing()
    assert done(some("a", [Thing(raises=Problem("broken")), rest]))["a"].outcome == "failed"
    assert rest.made == 0


def test_steps_that_do_not_need_each_other_run_at_the_same_time() -> None:
    meeting = threading.Barrier(3)
    reports = done(*(some(name, [Thing(meets=meeting)]) for name in "abc"))
    assert {report.outcome for report in reports.values()} == {"changed"}, "each waited for the other two"


def test_a_step_begins_as_soon_as_its_own_needs_are_done() -> None:
    meeting = threading.Barrier(2)
    reports = done(some("slow", [Thing(meets=meeting)]), some("a"), some("b", [Thing(meets=meeting)], needs=("a",)))
    assert {report.problem for report in reports.values()} == {None}


def test_a_bug_in_a_step_is_a_failure_of_that_step() -> None:
    reports = done(
        some("a", [Thing(raises=ZeroDivisionError("by zero"))]), some("b", needs=("a",)), some("c", [Thing()])
    )
    assert [reports[name].outcome for name in "abc"] == ["failed", "blocked", "changed"]
    problem = reports["a"].problem
    assert problem is not None and "ZeroDivisionError: by zero" in problem.message and problem.hint


def test_an_interrupt_ends_the_programs_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[bool] = []
    monkeypatch.setattr(processes, "stop_all", lambda: stopped.append(True))
    with pytest.raises(KeyboardInterrupt):
        done(some("a", [Thing(raises=KeyboardInterrupt())]))
    assert stopped


def test_plan_looks_and_touches_nothing() -> None:
    things = [Thing(), Thing(states=[Unknown("a")]), Thing(states=[NodeOnly("x")]), Thing(states=[Conflict("x")])]
    reports = plan([some(str(number), [thing]) for number, thing in enumerate(things)], NODE, system())
    assert [report.outcome for report in reports] == ["drift", "drift", "node_only", "drift"]
    assert not any(thing.made for thing in things)


def test_what_happens_is_told_in_order() -> None:
    events: list[Event] = []
    converge([some("a", [Thing("x"), satisfied()])], NODE, system, events.append)
    assert [type(event) for event in events] == [StepStarted, ResourceApplied, StepEnded]
    assert events[1] == ResourceApplied("a", "x", "make it")
    converge([some("a", [Thing(raises=Problem("broken"))]), some("b", needs=("a",))], NODE, system, events.append)
    ends = [(event.step, event.outcome, event.note) for event in events[3:] if isinstance(event, StepEnded)]
    assert ends == [("a", "failed", "broken"), ("b", "blocked", "needs a")]


def test_nothing_chosen_is_nothing_done() -> None:
    assert converge([], NODE, system, silent) == []


def test_every_resource_is_given_the_system_of_its_own_step(tmp_path: Path) -> None:
    asked: list[str] = []

    def system_for(step: str) -> Any:
        asked.append(step)
        return LocalSystem(str(tmp_path))

    converge([some("a", [Thing()]), some("b", [Thing()], needs=("a",))], NODE, system_for, silent)
    assert asked == ["a", "b"]


@pytest.mark.parametrize(("terminal", "asked"), [(True, 1), (False, 0)])
def test_what_only_root_can_tell_is_asked_again_after_the_password(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, asked: int
) -> None:
    class Guarded(Thing):
        def check(self, on: Reader) -> State:
            del on
            if not times:
                raise NeedsRoot("only root can tell")
            return Ok()

    class Asking(LocalSystem):
        def ask_for_sudo(self) -> None:
            times.append("asked")

    times: list[str] = []
    session = Session(NODE, Asking(), cast(Any, None), {}, {})
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda _: terminal})())
    (report,) = looked_at(session, [some("firewall", [Guarded()])])
    assert len(times) == asked
    assert report.outcome == ("unchanged" if terminal else "failed")
