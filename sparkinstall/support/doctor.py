"""Sort the results of all checks and probes of a node by severity: broken, look at, skipped, ok."""

import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import __version__
from sparkinstall.core import catalogue, checks, verify
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.engine import StepReport
from sparkinstall.core.session import Session
from sparkinstall.core.verify import VerifyOptions
from sparkinstall.errors import BadUsage, NeedsRoot, NotThere, Problem
from sparkinstall.events import Emit, silent
from sparkinstall.facts import machine
from sparkinstall.facts.gpu import first_gpu
from sparkinstall.node import Node
from sparkinstall.probes import Probe, Verdict, preflight
from sparkinstall.resources import Conflict, Drift, NodeOnly, State, Unknown
from sparkinstall.support import identity
from sparkinstall.support.mask import Mask
from sparkinstall.system import Reader

Weight = Literal["broken", "look-at", "skipped", "ok"]
Kind = Literal["preflight", "check", "probe"]
_FOUND = {"write": "missing", "change": "differs"}

_WEIGHTS: Mapping[Verdict, Weight] = {"fail": "broken", "warn": "look-at", "skip": "skipped", "pass": "ok"}
_SUDO = "`sudo -v` in this terminal, then the same command again"


class Item(Struct, frozen=True):
    """One check or probe. `fixes`: numbers of its fixes; `means`: the impact of a failure."""

    name: str
    kind: Kind
    weight: Weight
    title: str
    found: str
    expected: str = ""
    means: str = ""
    hint: str = ""
    fixes: tuple[int, ...] = ()
    seconds: float = 0.0


class Checkup(Struct, frozen=True):
    """What an examination found, masked: the items by their weight. `masked`: what was masked, in words."""

    machine: Mapping[str, str]
    installed: bool
    broken: tuple[Item, ...]
    look_at: tuple[Item, ...]
    ok: tuple[Item, ...]
    skipped: tuple[Item, ...]
    masked: str


class Examination(Struct, frozen=True):
    """A checkup. `wrong`: there is drift or a failure, or that could not be determined.

    `root_option` is masked too: the folder of a rehearsal may be in a user's home.
    """

    checkup: Checkup
    wrong: bool
    root_option: str


def examine(session: Session, options: VerifyOptions, point: Callable[[str], str], emit: Emit = silent) -> Examination:
    """Run the preflight, and the checks and probes that `options` choose; `point` completes the commands of a hint.

    Raises:
        BadUsage: an unknown name or level.
    """
    items, installed, wrong = _examined(session, options, emit)
    mask = Mask(identity.known(session.system))
    shown: dict[Weight, list[Item]] = defaultdict(list)
    for item in items:
        title, found, expected, hint = map(mask.text, (item.title, item.found, item.expected, point(item.hint)))
        shown[item.weight].append(replace(item, title=title, found=found, expected=expected, hint=hint))
    facts: dict[str, str] = mask.data(machine_facts(session.node, session.system))
    root = mask.text(session.root_option)
    broken, look_at, ok, skipped = (tuple(shown[weight]) for weight in ("broken", "look-at", "ok", "skipped"))
    checkup = Checkup(facts, installed, broken, look_at, ok, skipped, mask.summary())
    return Examination(checkup, wrong or bool(broken), root)


def _examined(session: Session, options: VerifyOptions, emit: Emit) -> tuple[list[Item], bool, bool]:
    """Return the items, whether sparkinstall has installed anything, and whether `verify` finds it wrong."""
    try:
        found = verify.verify(session, options, emit)
    except BadUsage:
        raise
    except NotThere:
        return [*_before(session, options, False), *_of_machine(session, options)], False, False
    except Problem as problem:
        return [of_problem(problem), *_before(session, options, True), *_of_machine(session, options)], True, True
    probes = of_probes("probe", found.probes, found.results)
    items = [*_before(session, options, True), *map(of_step, found.reports), *probes]
    return items, True, found.wrong


def _before(session: Session, options: VerifyOptions, installed: bool) -> list[Item]:
    """Run the preflight, unless single names were selected."""
    probes = [] if options.only else list(preflight.preflight(session.node))
    return of_probes("preflight", probes, checks.look(probes, session.system, silent), installed)


def _of_machine(session: Session, options: VerifyOptions) -> list[Item]:
    """Run only the probes of the machine, which need no installation."""
    chosen = checks.chosen(session.node, options.only, options.skip, options.level, options.measure)
    own = {probe.name for probe in checks.of_no_step(session.node)}
    probes = [probe for probe in chosen.probes if probe.name in own]
    return of_probes("probe", probes, checks.look(probes, session.system, silent))


def machine_facts(node: Node, on: Reader) -> dict[str, str]:
    """Return machine and software versions by name, without personal data; in a rehearsal only what is set up there."""
    release = machine.os_version(on)
    ours = {"stack": f"{node.stack.name} for {node.platform}", "sparkinstall": __version__}
    if on.rehearsal:
        named = {"machine": machine.product(on) or "a rehearsal"} | ({"release": release} if release else {})
        return {**named, **ours}
    gpu = first_gpu(on)
    found = {
        "machine": machine.product(on) or "an unnamed machine",
        "gpu": gpu.name if gpu else "",
        "driver": gpu.driver if gpu else "",
        "kernel": platform.release(),
        "os": machine.os_release(on).get("PRETTY_NAME", ""),
        "release": release,
    }
    return {**{name: value for name, value in found.items() if value}, **ours}


def of_step(report: StepReport) -> Item:
    """Return the item of a step: are its files, packages and services up to date?"""
    weight, found, hint = _judged(report)
    step = catalogue.named(report.name)
    return Item(
        report.name, "check", weight, step.why, found, means=step.impact, hint=hint,
        fixes=tuple(fix.number for fix in step.fixes), seconds=report.seconds,
    )  # fmt: skip


def _judged(report: StepReport) -> tuple[Weight, str, str]:
    if report.problem:
        weight: Weight = "skipped" if isinstance(report.problem, NeedsRoot) else "broken"
        return weight, report.problem.message, _SUDO if weight == "skipped" else report.problem.hint
    states = report.checked
    wrong = list(dict.fromkeys(text for text in map(_wrong, states) if text))
    if wrong:
        hint = next((state.hint for state in states if isinstance(state, Conflict) and state.hint), "")
        return "broken", "\n".join(wrong), hint or f"`sparkinstall run {report.name}`"
    # A resource that waits for another step is not broken itself.
    waits = [f"known after {state.waits_for}" for state in states if isinstance(state, Unknown)]
    left = [f"node only: {state.reason}" for state in states if isinstance(state, NodeOnly)]
    unseen = list(dict.fromkeys([*waits, *left]))
    return ("skipped", "; ".join(unseen), "") if unseen else ("ok", "ok", "")


def _wrong(state: State) -> str:
    if isinstance(state, Drift):
        # The summary names the action of a plan; say what was found instead.
        verb, _, file = state.summary.partition(" ")
        return f"{_FOUND[verb]}: {file}" if verb in _FOUND else f"not done: {state.summary}"
    return state.message if isinstance(state, Conflict) else ""


def of_probes(
    kind: Kind, probes: Sequence[Probe], results: Sequence[ProbeResult], installed: bool = False
) -> list[Item]:
    """Turn the results of `probes` into items; on a node that is `installed`, some failures weigh less."""
    return [_of_probe(kind, *each, installed) for each in zip(probes, results, strict=True)]


def _of_probe(kind: Kind, probe: Probe, result: ProbeResult, installed: bool) -> Item:
    weight = _WEIGHTS[result.verdict]
    if weight == "broken" and installed and probe.to_install:
        weight = "look-at"
    return Item(
        result.name, kind, weight, result.title, result.found, result.expected,
        probe.impact, result.hint, (result.fix,) if result.fix else (), result.seconds,
    )  # fmt: skip


def of_problem(problem: Problem) -> Item:
    """Return the item of a problem that prevents all checks."""
    means = "Nothing that sparkinstall set up could be checked."
    return Item(
        "installed", "check", "broken", "installation by sparkinstall", problem.message, "", means, problem.hint
    )
