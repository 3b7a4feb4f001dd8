"""The messages between the terminal and a node, typed and versioned.

The terminal sends a `Request`. The node replies with the JSON object that every verb prints with `--json`
(docs/json.md): an `Envelope` whose `data` is the message of that verb. Both ends use the types of this module.
Unknown fields are ignored, so that a newer node may send more; another `version` is refused.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from sparkinstall.cluster import drift
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.converge import Installation
from sparkinstall.core.engine import StepReport
from sparkinstall.core.fixes import FixState
from sparkinstall.core.session import Session
from sparkinstall.core.verify import Verification
from sparkinstall.envelope import VERSION, Envelope, as_problem
from sparkinstall.errors import Problem
from sparkinstall.probes.bandwidth import Measured
from sparkinstall.system import Undone

_Message = TypeVar("_Message", covariant=True)


class Request(Struct, frozen=True):
    """The first line of a node's stdin: the words of the verb, and what the verb reads from its own stdin."""

    argv: tuple[str, ...]
    stdin: str = ""


# --- what each verb replies; `status` replies a `NodeStatus`


class Identity(Struct, frozen=True):
    """Reply of `identify`: which machine a node is.

    `machine`: what no other machine has, or "" where that is unknown. `addresses`: IPv4 addresses of all interfaces.
    """

    machine: str = ""
    addresses: tuple[str, ...] = ()


class Look(Identity, frozen=True):
    """Reply of `look`; an empty one stands for a node that gave no reply.

    `unproven`: probes that failed when the node was last proven. `armed`: a network change waits for its confirmation.
    `token`: a digest of the Ray token, or None.
    """

    preflight: Sequence[ProbeResult] = ()
    steps: Sequence[StepReport] = ()
    unproven: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    token: str | None = None
    armed: bool = False
    user: str = "USER"
    executor: str = ""


class Planned(Struct, frozen=True):
    """Reply of `plan`. `drift`: `all` would change something."""

    drift: bool
    preflight: Sequence[ProbeResult]
    steps: Sequence[StepReport]


class Applied(Struct, frozen=True):
    """Reply of `all` and `multi-node`; where nothing was to be done, without `probes` and `fixes`."""

    changed: bool = False
    steps: Sequence[StepReport] | UnsetType = UNSET
    probes: Sequence[ProbeResult] | UnsetType = UNSET
    fixes: Sequence[FixState] | UnsetType = UNSET

    @classmethod
    def of(cls, done: Installation) -> "Applied":
        if not done.applied:
            return cls(steps=UNSET if done.problems else done.reports)
        return cls(done.changed, done.reports, done.results, done.standing)


class Verified(Struct, frozen=True):
    """Reply of `verify`. `comparables`: name -> value of what should be equal on all nodes."""

    checks: Sequence[StepReport] = ()
    probes: Sequence[ProbeResult] = ()
    fixes: Sequence[FixState] = ()
    comparables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Verification, session: Session) -> "Verified":
        return cls(found.reports, found.results, found.standing, drift.comparables(session.node, session.system))


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
    """Reply of `offer`: bytes offered, and bytes sent to all workers."""

    files: int = 0
    bytes: int = 0
    sent: int = 0


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
    """The line of a head that waits for its workers: the port of its server, and the sha256 of its certificate."""

    port: int
    fingerprint: str


class Listening(Struct, frozen=True, rename="kebab"):
    """The line of the answering side of a measurement: the ports at which it listens."""

    answers_at: tuple[int, ...]


class Arriving(Struct, frozen=True, rename={"what": "arriving"}):
    """The line of a node that takes a model: bytes so far and their total, or a sentence without them."""

    what: str
    done: int = 0
    total: int = 0

    @property
    def words(self) -> str:
        """The sentence, or how much has come."""
        return f"{self.what}: {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB" if self.total else self.what


class Introduction(Offer, frozen=True):
    """What a worker reads from its stdin: the head's offer, and the token for it."""

    token: str


class ModelSource(Introduction, frozen=True):
    """What a node that takes models reads from its stdin: also the address that offers them."""

    address: str


def announce(announcement: Struct) -> None:
    """Send a line to the terminal while the verb runs."""
    print(msgspec.json.encode(announcement).decode(), file=sys.stderr, flush=True)


def announced(line: str, announcement: type[_Message]) -> _Message | None:
    """The announcement in a line of stderr; None: it is another line."""
    try:
        return msgspec.json.decode(line, type=announcement)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


# --- the reply as a whole


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
    envelope = msgspec.json.decode(reply, type=Envelope[msgspec.Raw], dec_hook=as_problem)
    for problem in envelope.errors:
        problem.log = f"{host}:{problem.log}" if host and problem.log else problem.log
    nothing = bytes(envelope.data) == b"{}"
    try:
        data = None if nothing else msgspec.json.decode(envelope.data, type=message, dec_hook=as_problem)
    except msgspec.ValidationError as error:
        raise Problem("a node's reply does not follow the protocol", cause=str(error), hint=hint) from error
    return Reply(envelope.exit_code, data, envelope.errors)
