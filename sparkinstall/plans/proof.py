"""Run probes. A probe that crashes is a failure of that probe, never of the run."""

import time
from collections.abc import Iterable, Sequence

from sparkinstall.errors import Problem
from sparkinstall.events import Emit, ProbeStarted
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed
from sparkinstall.records import dataclass
from sparkinstall.steps import Step
from sparkinstall.system import Reader


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
    """The probes of `steps`, in their order."""
    return [probe for step in steps for probe in step.probes(node)]
