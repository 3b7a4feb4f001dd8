"""The messages between the terminal and a node: what a verb is asked, and what it replies, typed and versioned.

The node encodes, `cluster/remote.py` decodes. A reply is the JSON object that every verb prints with `--json`
(docs/json.md); its `data` is decoded as the message of that verb. Unknown fields are ignored, so that a newer node
may say more; another `version` is refused.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field

from sparkinstall.core import fixes
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.engine import Checked, StepReport
from sparkinstall.errors import Problem
from sparkinstall.probes import Finding, Level, Probe, Verdict
from sparkinstall.probes.bandwidth import Measured
from sparkinstall.resources import State

VERSION = 1
"""The version of the envelope that both ends speak."""

_Message = TypeVar("_Message")


class Request(Struct, frozen=True):
    """The first line of a node's stdin: the words of the verb, and what the verb reads from its own stdin."""

    argv: tuple[str, ...]
    stdin: str = ""


class Error(Struct, frozen=True):
    """A problem on its way."""

    code: str
    message: str
    cause: str = ""
    hint: str = ""
    log: str = ""
    output: tuple[str, ...] = ()

    def problem(self, host: str = "") -> Problem:
        """The problem it was; with a `host`, the log is named as a file of that host."""
        log = f"{host}:{self.log}" if host and self.log else self.log
        found = Problem(self.message, cause=self.cause, hint=self.hint, log=log, output=self.output)
        found.code = self.code
        return found


class Envelope(Struct, frozen=True):
    """The whole reply. `data` is the verb's own message."""

    version: int
    exit_code: int
    data: dict[str, Any]
    errors: tuple[Error, ...]


class StepMessage(Struct, frozen=True):
    """A step as a visit found it. Each of `resources` has its `key`, `changed`, and the fields of its state."""

    step: str
    resources: tuple[dict[str, Any], ...] = ()
    error: Error | None = None
    blocked_by: str | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        # A state that this version does not know is refused while the reply is decoded.
        self.report()

    def report(self) -> StepReport:
        """The report as the node's own engine made it."""
        checked = [
            Checked(str(each.get("key", "")), msgspec.convert(each, State), bool(each.get("changed")))
            for each in self.resources
        ]
        problem = self.error.problem() if self.error else None
        return StepReport(self.step, "", checked, problem, self.blocked_by or "", self.seconds)


class ProbeMessage(Struct, frozen=True):
    """A probe and its finding."""

    name: str
    verdict: Verdict
    found: str
    title: str = ""
    level: Level = "node"
    expected: str = ""
    hint: str = ""
    seconds: float = 0.0
    fix: int | None = None

    def result(self) -> ProbeResult:
        """The result as the node itself has it."""
        finding = Finding(self.verdict, self.found, self.expected, self.hint)
        probe = Probe(self.name, self.title, lambda _: finding, self.level, fix=fixes.numbered(self.fix))
        return ProbeResult(probe, finding, self.seconds)


class Look(Struct, frozen=True, dict=True):
    """Reply of `look`; an empty one stands for a node that gave no reply.

    `unproven`: probes that failed when the node was last proven. `armed`: a network change waits for its confirmation.
    `token`: a digest of the Ray token, None where there is none.
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


class Verified(Struct, frozen=True, dict=True):
    """Reply of `verify`. `comparables`: name -> value of what should be equal on all nodes."""

    checks: tuple[StepMessage, ...] = ()
    probes: tuple[ProbeMessage, ...] = ()
    comparables: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def reports(self) -> list[StepReport]:
        """The steps, as the node's own views have them."""
        return [each.report() for each in self.checks]

    @cached_property
    def results(self) -> list[ProbeResult]:
        """The probes, as the node's own views have them."""
        return [each.result() for each in self.probes]


class Applied(Struct, frozen=True):
    """Reply of `all`, `multi-node`, `fetch`: whether anything changed; a `warning` is no failure."""

    changed: bool = False
    warning: str = ""


class Measurable(Struct, frozen=True):
    """Reply of `measurable`: kind of measurement -> why this node cannot take part; empty where it can."""

    why_not: Mapping[str, str] = field(default_factory=dict)


class Responded(Struct, frozen=True):
    """Reply of `respond`: the counters of errors that grew."""

    lost: Mapping[str, int] = field(default_factory=dict)


class Asked(Struct, frozen=True):
    """Reply of `ask`: the measurement, and the counters of errors that grew."""

    measured: Measured
    lost: Mapping[str, int] = field(default_factory=dict)


class Token(Struct, frozen=True):
    """Reply of `token`: the Ray token of the head."""

    token: str


def decode(reply: bytes) -> Envelope:
    """The envelope of a reply.

    Raises:
        Problem: it has another version than this end speaks.
        msgspec.MsgspecError: it is no envelope.
    """
    version = msgspec.json.decode(reply, type=_Versioned).version
    if version != VERSION:
        raise Problem(
            f"the node replies in version {version} of the protocol, but this sparkinstall speaks version {VERSION}",
            hint="run the same version of sparkinstall at the terminal and on the node",
        )
    return msgspec.json.decode(reply, type=Envelope)


class _Versioned(Struct):
    version: int


def read(data: Mapping[str, Any], message: type[_Message]) -> _Message:
    """The data of a reply as the message that its verb sends.

    Raises:
        Problem: the data is no such message.
    """
    try:
        return msgspec.convert(data, message)
    except msgspec.ValidationError as error:
        raise Problem(
            "a node's reply does not follow the protocol",
            cause=str(error),
            hint="run the same version of sparkinstall at the terminal and on the node",
        ) from error
