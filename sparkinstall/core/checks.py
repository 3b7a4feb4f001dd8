"""Choose probes and run them. A probe that crashes is a failure of that probe, never of the run."""

import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from msgspec import Struct
from msgspec.structs import asdict, replace

from sparkinstall.core import catalogue
from sparkinstall.errors import BadUsage, Problem, storage_problem
from sparkinstall.events import Emit, ProbeStarted
from sparkinstall.node import Node
from sparkinstall.probes import LEVELS, Finding, Level, Probe, failed, known_hosts, skipped
from sparkinstall.schema import require_known
from sparkinstall.steps import Step
from sparkinstall.system import Reader

HOSTS = "known-hosts"
"""Group name of the probes that belong to no step and detect known-bad hosts."""


class ProbeResult(Finding, frozen=True, kw_only=True):
    """The finding of a probe, and its duration in seconds. `fix`: the number of the fix that it verifies."""

    name: str
    title: str = ""
    level: Level = "node"
    seconds: float = 0.0
    fix: int | None = None

    @classmethod
    def of(cls, probe: Probe, finding: Finding, seconds: float = 0.0) -> "ProbeResult":
        fix = probe.fix.number if probe.fix else None
        return cls(
            **asdict(finding), name=probe.name, title=probe.title, level=probe.level, seconds=round(seconds, 3), fix=fix
        )


def look(probes: Iterable[Probe], on: Reader, emit: Emit) -> list[ProbeResult]:
    """Run every probe, regardless of what others find."""
    found: list[ProbeResult] = []
    for waits, some in groupby(probes, lambda probe: probe.level == "link" and not probe.load):
        group = list(some)
        found += _side_by_side(group, on, emit) if waits else [_looked(probe, on, emit) for probe in group]
    return found


def _side_by_side(probes: Sequence[Probe], on: Reader, emit: Emit) -> list[ProbeResult]:
    """Run probes of the link in parallel: they wait for replies and for growing counters."""
    with ThreadPoolExecutor(max_workers=len(probes)) as pool:
        return list(pool.map(lambda probe: _looked(probe, on, emit), probes))


def _looked(probe: Probe, on: Reader, emit: Emit) -> ProbeResult:
    emit(ProbeStarted(probe.name))
    started = time.monotonic()
    finding = _guarded(probe, on)
    return ProbeResult.of(probe, finding, time.monotonic() - started)


def _guarded(probe: Probe, on: Reader) -> Finding:
    if on.rehearsal and probe.needs_node:
        return skipped(probe.needs_node)
    try:
        return probe.look(on)
    except Problem as problem:
        return failed(problem.message, problem.hint)
    except OSError as error:
        storage = storage_problem(error, f"the probe {probe.name}")
        return failed(storage.message, storage.hint)
    except Exception as error:  # a crashed probe has proven nothing
        return failed(f"the probe itself failed: {type(error).__name__}: {error}", "report it, with this line")


def of_steps(steps: Sequence[Step], node: Node) -> list[Probe]:
    """Return the probes of `steps`, in order, without those that cause load."""
    return [probe for step in steps for probe in step.probes(node) if not probe.load]


def of_files(steps: Sequence[Step], node: Node) -> list[Probe]:
    """Return the probes that only read files."""
    return [probe for probe in of_steps(steps, node) if probe.level == "static"]


def of_no_step(node: Node) -> list[Probe]:
    """Return the probes of the machine itself, without those that cause load."""
    return [probe for probe in known_hosts.probes(node) if not probe.load]


def _names(node: Node) -> list[str]:
    """Return the names of all steps and probes of any node: one list of names may be used for several nodes."""
    cluster, serving = replace(node.config.cluster, role="head"), replace(node.config.serving, model="any")
    whole = replace(node, config=replace(node.config, cluster=cluster, serving=serving), rehearsal=False)
    probes = [*(probe for step in catalogue.STEPS for probe in step.probes(whole)), *known_hosts.probes(whole)]
    return [*(step.name for step in catalogue.STEPS), HOSTS, *(probe.name for probe in probes)]


class Chosen(Struct, frozen=True):
    """What a verification runs. `whole`: nothing was excluded by name."""

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
    """Return the selected checks and probes of `node`, probes ordered by level.

    Args:
        only, skip: names of steps (their checks and probes), of probes, and `known-hosts`.
        level: the highest level to run; None: all.
        measure: include probes that keep the GPU or the link busy; those in `only` always run.

    Raises:
        BadUsage: there is no step or probe of that name, or nothing is left.
    """
    groups = {step.name: list(step.probes(node)) for step in catalogue.of(node)}
    groups[HOSTS] = list(known_hosts.probes(node))
    if only or skip:
        require_known((*only, *skip), _names(node), "step or probe")
    far = LEVELS.index(level) if level else len(LEVELS)
    wanted = [name for name in groups if (not only or name in only) and name not in skip]
    probes = [
        probe
        for group, probes in groups.items()
        for probe in probes
        if (group in wanted or probe.name in only)
        and probe.name not in skip
        and LEVELS.index(probe.level) <= far
        and (measure or probe.name in only or not probe.load)
    ]
    steps = tuple(step for step in catalogue.of(node) if step.name in wanted)
    if not steps and not probes:
        hint = "omit some of --only, --skip and --level; what needs a served model is left out where none is served"
        raise BadUsage("nothing is left to check", hint=hint)
    return Chosen(steps, tuple(sorted(probes, key=lambda each: LEVELS.index(each.level))), not only and not skip)
