"""Choose probes and run them. A probe that crashes is a failure of that probe, never of the run."""

import time
from collections.abc import Collection, Iterable, Sequence

from sparkinstall.errors import Problem
from sparkinstall.events import Emit, ProbeStarted
from sparkinstall.node import Node
from sparkinstall.plans import catalogue
from sparkinstall.probes import LEVELS, Finding, Level, Probe, failed, known_hosts
from sparkinstall.records import dataclass
from sparkinstall.steps import Step
from sparkinstall.system import Reader

HOSTS = "known-hosts"
"""What the probes go by that belong to no step: they look for machines that are known to be bad."""


@dataclass(frozen=True)
class Looked:
    """A probe, what it found, and how long it took in seconds."""

    probe: Probe
    finding: Finding
    seconds: float


def look(probes: Iterable[Probe], on: Reader, emit: Emit) -> list[Looked]:
    """Ask every probe; all of them run, whatever one of them finds."""
    found = []
    for probe in probes:
        emit(ProbeStarted(probe.name))
        started = time.monotonic()
        finding = _guarded(probe, on)
        found.append(Looked(probe, finding, time.monotonic() - started))
    return found


def _guarded(probe: Probe, on: Reader) -> Finding:
    try:
        return probe.look(on)
    except Problem as problem:
        return failed(problem.what, problem.mend)
    except Exception as error:  # a probe that crashes has not shown anything good
        return failed(f"the probe itself failed: {type(error).__name__}: {error}", "report it, with this line")


def of_steps(steps: Sequence[Step], node: Node) -> list[Probe]:
    """The probes of `steps`, in their order, but those that put a load on the node."""
    return [probe for step in steps for probe in step.probes(node) if not probe.load]


def of_no_step(node: Node) -> list[Probe]:
    """The probes of the machine itself, whatever is installed on it."""
    return list(known_hosts.probes(node))


@dataclass(frozen=True)
class Chosen:
    """What a proof goes through. `whole`: nothing was left out by name."""

    steps: tuple[Step, ...]
    probes: tuple[Probe, ...]
    whole: bool


def chosen(
    node: Node,
    only: Collection[str] = (),
    skip: Collection[str] = (),
    level: Level | None = None,
    measure: bool = False,
) -> Chosen:
    """The checks and probes of `node` that are asked for, the probes by level.

    Args:
        only, skip: names of steps (their checks and their probes), of probes, and `known-hosts`.
        level: as far as this one; None: all the way.
        measure: also what keeps the GPU or the link busy; what `only` names runs in any case.

    Raises:
        BadUsage: there is no step or probe of that name.
    """
    groups = {step.name: list(step.probes(node)) for step in catalogue.of(node)} | {HOSTS: of_no_step(node)}
    names = [probe.name for probes in groups.values() for probe in probes]
    steps_there_are = [step.name for step in catalogue.STEPS]
    catalogue.require_known((*only, *skip), [*steps_there_are, HOSTS, *names], "step or probe")
    far = LEVELS.index(level) if level else len(LEVELS)
    wanted = [name for name in groups if (not only or name in only) and name not in skip]
    probes = [
        probe
        for group, probes in groups.items()
        for probe in probes
        if probe.name in only
        or (
            group in wanted
            and probe.name not in skip
            and LEVELS.index(probe.level) <= far
            and (measure or not probe.load)
        )
    ]
    steps = tuple(step for step in catalogue.of(node) if step.name in wanted)
    return Chosen(steps, tuple(sorted(probes, key=lambda each: LEVELS.index(each.level))), not only and not skip)
