"""The messages between the terminal and a node, typed and versioned.

The terminal sends a `Request`. The node replies with the JSON object that every verb prints with `--json`
(docs/json.md): an `Envelope` whose `data` is the message of that verb. Both ends use the types of this module.
Unknown fields are ignored, so that a newer node may send more; another `version` is refused.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Generic, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType, field, to_builtins
from msgspec.structs import asdict

from sparkinstall.cluster import drift
from sparkinstall.core import fixes
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.converge import Installation
from sparkinstall.core.engine import Checked, Outcome, StepReport
from sparkinstall.core.fixes import FixState, Standing
from sparkinstall.core.session import Session
from sparkinstall.core.status import NodeStatus
from sparkinstall.core.verify import Verification
from sparkinstall.errors import Problem
from sparkinstall.probes import Finding, Level, Probe, Verdict
from sparkinstall.probes.bandwidth import Measured
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok, Unknown
from sparkinstall.system import Undone

VERSION = 1
"""The version of the envelope that both ends speak."""

_Message = TypeVar("_Message", covariant=True)


class Request(Struct, frozen=True):
    """The first line of a node's stdin: the words of the verb, and what the verb reads from its own stdin."""

    argv: tuple[str, ...]
    stdin: str = ""


# --- the parts of a message


class Error(Struct, frozen=True):
    """A problem as JSON."""

    code: str
    message: str
    cause: str = ""
    hint: str = ""
    log: str = ""
    output: tuple[str, ...] = ()

    @classmethod
    def of(cls, problem: Problem) -> "Error":
        return cls(problem.code, problem.message, problem.cause, problem.hint, problem.log, tuple(problem.output))

    def problem(self, host: str = "") -> Problem:
        """The problem it was; with a `host`, the log is named as a file of that host."""
        log = f"{host}:{self.log}" if host and self.log else self.log
        found = Problem(self.message, cause=self.cause, hint=self.hint, log=log, output=self.output)
        found.code = self.code
        return found


# A resource is one flat object: its key, whether this run changed it, and the fields of its state.


class OkResource(Ok, frozen=True, kw_only=True):
    key: str
    changed: bool = False


class DriftResource(Drift, frozen=True, kw_only=True):
    key: str
    changed: bool = False


class UnknownResource(Unknown, frozen=True, kw_only=True):
    key: str
    changed: bool = False


class NodeOnlyResource(NodeOnly, frozen=True, kw_only=True):
    key: str
    changed: bool = False


class ConflictResource(Conflict, frozen=True, kw_only=True):
    key: str
    changed: bool = False


ResourceMessage = OkResource | DriftResource | UnknownResource | NodeOnlyResource | ConflictResource


class StepMessage(Struct, frozen=True):
    """A step as a visit found it."""

    step: str
    outcome: Outcome = "unchanged"
    resources: tuple[ResourceMessage, ...] = ()
    error: Error | None = None
    blocked_by: str | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, report: StepReport) -> "StepMessage":
        flat = [{**to_builtins(each.state), "key": each.key, "changed": each.changed} for each in report.checked]
        resources = msgspec.convert(flat, tuple[ResourceMessage, ...])
        error = Error.of(report.problem) if report.problem else None
        seconds = round(report.seconds, 3)
        return cls(report.name, report.outcome, resources, error, report.blocked_by or None, seconds)

    def report(self) -> StepReport:
        """The report as the node's own engine made it."""
        checked = [Checked(each.key, each, each.changed) for each in self.resources]
        problem = self.error.problem() if self.error else None
        return StepReport(self.step, "", checked, problem, self.blocked_by or "", self.seconds)


class ProbeMessage(Struct, frozen=True):
    """A probe and its finding. `fix`: number of the fix that it proves."""

    name: str
    verdict: Verdict
    found: str
    title: str = ""
    level: Level = "node"
    expected: str = ""
    hint: str = ""
    seconds: float = 0.0
    fix: int | None = None

    @classmethod
    def of(cls, result: ProbeResult) -> "ProbeMessage":
        probe = result.probe
        return cls(
            name=probe.name,
            title=probe.title,
            level=probe.level,
            seconds=round(result.seconds, 3),
            fix=probe.fix.number if probe.fix else None,
            **asdict(result.finding),
        )

    def result(self) -> ProbeResult:
        """The result as the node itself has it."""
        finding = Finding(self.verdict, self.found, self.expected, self.hint)
        probe = Probe(self.name, self.title, lambda _: finding, self.level, fix=fixes.numbered(self.fix))
        return ProbeResult(probe, finding, self.seconds)


class FixMessage(Struct, frozen=True):
    """A fix and its state."""

    number: int
    title: str
    standing: Standing
    note: str = ""

    @classmethod
    def of(cls, state: FixState) -> "FixMessage":
        return cls(state.fix.number, state.fix.title, state.standing, state.note)


# --- what each verb replies


class Look(Struct, frozen=True, dict=True):
    """Reply of `look`; an empty one stands for a node that gave no reply.

    `unproven`: probes that failed when the node was last proven. `armed`: a network change waits for its confirmation.
    `token`: a digest of the Ray token, or None.
    """

    preflight: tuple[ProbeMessage, ...] = ()
    steps: tuple[StepMessage, ...] = ()
    unproven: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    token: str | None = None
    armed: bool = False
    user: str = "USER"
    executor: str = ""

    @cached_property
    def results(self) -> list[ProbeResult]:
        """The preflight checks, as the node's own views have them."""
        return [each.result() for each in self.preflight]

    @cached_property
    def reports(self) -> list[StepReport]:
        """The steps, as the node's own views have them."""
        return [each.report() for each in self.steps]


class Applied(Struct, frozen=True):
    """Reply of `all` and `multi-node`; where nothing was to be done, without `probes` and `fixes`."""

    changed: bool = False
    steps: tuple[StepMessage, ...] | UnsetType = UNSET
    probes: tuple[ProbeMessage, ...] | UnsetType = UNSET
    fixes: tuple[FixMessage, ...] | UnsetType = UNSET

    @classmethod
    def of(cls, done: Installation) -> "Applied":
        if not done.applied:
            return cls(steps=UNSET if done.problems else tuple(map(StepMessage.of, done.reports)))
        return cls(
            done.changed,
            tuple(map(StepMessage.of, done.reports)),
            tuple(map(ProbeMessage.of, done.results)),
            tuple(map(FixMessage.of, done.standing)),
        )


class Verified(Struct, frozen=True, dict=True):
    """Reply of `verify`. `comparables`: name -> value of what should be equal on all nodes."""

    checks: tuple[StepMessage, ...] = ()
    probes: tuple[ProbeMessage, ...] = ()
    fixes: tuple[FixMessage, ...] = ()
    comparables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Verification, session: Session) -> "Verified":
        return cls(
            tuple(map(StepMessage.of, found.reports)),
            tuple(map(ProbeMessage.of, found.results)),
            tuple(map(FixMessage.of, found.standing)),
            drift.comparables(session.node, session.system),
        )

    @cached_property
    def reports(self) -> list[StepReport]:
        """The steps, as the node's own views have them."""
        return [each.report() for each in self.checks]

    @cached_property
    def results(self) -> list[ProbeResult]:
        """The probes, as the node's own views have them."""
        return [each.result() for each in self.probes]


class Status(Struct, frozen=True):
    """Reply of `status`; times are UTC, None where nothing is installed."""

    installed: bool = False
    stack: str = ""
    platform: str = ""
    prefix: str = ""
    since: str | None = None
    last_change: str | None = None
    journal: str = ""
    steps: tuple[StepMessage, ...] = ()
    fixes: tuple[FixMessage, ...] = ()

    @classmethod
    def of(cls, found: NodeStatus) -> "Status":
        steps, states = map(StepMessage.of, found.reports), map(FixMessage.of, found.standing)
        told = {name: value for name, value in asdict(found).items() if name not in ("reports", "standing")}
        return cls(**told, steps=tuple(steps), fixes=tuple(states))


class Uninstalled(Struct, frozen=True):
    """Reply of `uninstall`."""

    changes: tuple[Undone, ...] = ()


class Reached(Struct, frozen=True):
    """Reply of `reach`: the addresses that answer over the link."""

    reached: tuple[str, ...] = ()


class Confirmed(Struct, frozen=True):
    """Reply of `confirm`: the rollback timers that were stopped."""

    confirmed: tuple[str, ...] = ()


class Token(Struct, frozen=True):
    """Reply of `token`: the Ray token of the head."""

    token: str = ""


class Offered(Struct, frozen=True):
    """Reply of `offer`: bytes offered, and bytes sent to each address."""

    files: int = 0
    bytes: int = 0
    sent: Mapping[str, int] = field(default_factory=dict)


class Fetched(Struct, frozen=True):
    """Reply of `fetch`: what arrived; a `warning` is no failure."""

    changed: bool = False
    files: int = 0
    bytes: int = 0
    warning: str | UnsetType = UNSET


class Measurable(Struct, frozen=True):
    """Reply of `measurable`: kind of measurement -> why this node cannot take part, or ""."""

    why_not: Mapping[str, str] = field(default_factory=dict)


class Responded(Struct, frozen=True):
    """Reply of `respond`: the counters of errors that grew."""

    lost: Mapping[str, int] = field(default_factory=dict)


class Asked(Struct, frozen=True):
    """Reply of `ask`: the measurement, and the counters of errors that grew."""

    measured: Measured | None = None
    lost: Mapping[str, int] = field(default_factory=dict)


# --- what a node announces on stderr while its verb runs


class Offer(Struct, frozen=True):
    """Port of the head's list of files, and the sha256 of the list."""

    port: int
    digest: str


class OfferOpen(Struct, frozen=True):
    """The line of a head that waits for its workers."""

    offer: Offer


class Listening(Struct, frozen=True, rename="kebab"):
    """The line of the answering side of a measurement: the ports at which it listens."""

    answers_at: tuple[int, ...]


class Introduction(Struct, frozen=True):
    """What a worker reads from its stdin: where the head's list is, and the token for it."""

    token: str
    port: int
    digest: str


def announced(line: str, announcement: type[_Message]) -> _Message | None:
    """The announcement in a line of stderr; None: it is another line."""
    try:
        return msgspec.json.decode(line, type=announcement)
    except (msgspec.MsgspecError, UnicodeError):
        return None


# --- the reply as a whole


class Envelope(Struct, frozen=True):
    """The whole reply. `data` is the verb's own message."""

    version: int
    exit_code: int
    data: msgspec.Raw
    errors: tuple[Error, ...]


class Reply(Struct, Generic[_Message], frozen=True):
    """What a verb replied: its exit code, its message (None: it failed before it had one), its problems."""

    code: int = 0
    data: _Message | None = None
    problems: Sequence[Problem] = ()


class _Versioned(Struct):
    version: int


def decode(reply: bytes, message: type[_Message], host: str = "") -> Reply[_Message]:
    """The reply of the node `host`, whose verb sends a `message`.

    Raises:
        Problem: it has another version than this end speaks, or its data is no such message.
        msgspec.MsgspecError: it is no envelope.
    """
    version = msgspec.json.decode(reply, type=_Versioned).version
    hint = "run the same version of sparkinstall at the terminal and on the node"
    if version != VERSION:
        raise Problem(
            f"the node replies in version {version} of the protocol, but this sparkinstall speaks version {VERSION}",
            hint=hint,
        )
    envelope = msgspec.json.decode(reply, type=Envelope)
    problems = tuple(each.problem(host) for each in envelope.errors)
    try:
        data = None if bytes(envelope.data) == b"{}" else msgspec.json.decode(envelope.data, type=message)
    except msgspec.ValidationError as error:
        raise Problem("a node's reply does not follow the protocol", cause=str(error), hint=hint) from error
    return Reply(envelope.exit_code, data, problems)
