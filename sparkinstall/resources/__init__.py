"""Resources: a file, the packages, a Python environment, a built library, a patched file.

A resource answers `check()` (is the node in the desired state? what would change?) and `apply()`.
"""

from typing import Protocol, runtime_checkable

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.facts.decisions import RecordDamaged
from sparkinstall.system import Reader, System


class _State(Struct, frozen=True, kw_only=True, tag_field="state"):
    """What every state has. The engine sets `key`, that of the resource, and `changed`: this run applied it."""

    key: str = ""
    changed: bool = False


class Ok(_State, frozen=True, tag="ok"):
    """The node is in the desired state. `note`: details for a reader."""

    note: str = ""


class Drift(_State, frozen=True, tag="drift"):
    """The node differs. `before` and `after` are texts to compare line by line; may be empty."""

    summary: str
    before: str = ""
    after: str = ""


class Unknown(_State, frozen=True, tag="unknown"):
    """The state is unknown until step `waits_for` has run."""

    waits_for: str


class NodeOnly(_State, frozen=True, tag="node_only"):
    """Cannot be done in a rehearsal, and why."""

    reason: str


class Conflict(_State, frozen=True, tag="conflict"):
    """Drift that is not applied, because it would change something that is not ours."""

    message: str
    hint: str = ""


State = Ok | Drift | Unknown | NodeOnly | Conflict


def describe(state: State) -> tuple[str, str]:
    """The sign and the sentence of a state, the same in every view."""
    match state:
        case Ok(note):
            return "unchanged", note
        case Drift(summary):
            return "drift", summary
        case Unknown(waits_for):
            return "blocked", f"known after {waits_for}"
        case NodeOnly(reason):
            return "node_only", f"node only: {reason}"
        case Conflict(message, hint):
            return "failed", f"{message} - {hint}" if hint else message


def not_a_folder(on: Reader, path: str) -> Conflict | None:
    """Return the conflict of something else in the place of a folder that is ours alone."""
    if (was := on.entry(path)) is None or was.kind == "dir":
        return None
    leads = f" to {was.target}" if was.kind == "link" else ""
    hint = f"move it away (`mv {on.real(path)} {on.real(path)}.old`), or choose another `prefix:` in the config"
    return Conflict(f"{on.real(path)} is {was.words}{leads}, but sparkinstall needs a folder of its own there", hint)


class Resource(Protocol):
    """A desired state, declared once; `key` names it in plans, logs and the journal."""

    @property
    def key(self) -> str: ...

    def check(self, on: Reader) -> State: ...

    def apply(self, on: System) -> None: ...


@runtime_checkable
class OnNode(Resource, Protocol):
    """A resource that a rehearsal may not be able to apply; the engine asks it in a rehearsal only."""

    def node_only(self, on: Reader) -> str:
        """Return why only a real node can do this; "" if the rehearsal can."""


def state_of(resource: Resource, on: Reader) -> State:
    """Return the state of a resource with its key; NodeOnly if a rehearsal cannot apply it.

    It is drift if one of our records is damaged.
    """
    try:
        return _state(resource, on)
    except RecordDamaged as damage:
        return Drift(f"determine it again: {damage.message}", key=resource.key)


def _state(resource: Resource, on: Reader) -> State:
    if on.rehearsal and isinstance(resource, OnNode) and (reason := resource.node_only(on)):
        return NodeOnly(reason, key=resource.key)
    return replace(resource.check(on), key=resource.key)


def repaired(resource: Resource, on: System, note: str = "") -> tuple[State, str]:
    """Return the state after the damaged records that it depends on are removed, and which was, in words.

    Raises:
        RecordDamaged: a folder is in the place of one.
    """
    try:
        return _state(resource, on), note
    except RecordDamaged as damage:
        if (entry := on.entry(damage.path)) is None or entry.kind == "dir":
            damage.hint = f"move it away, or delete it: `rm -r {on.real(damage.path)}`"
            raise
        on.remove(damage.path)
        return repaired(resource, on, damage.message)
