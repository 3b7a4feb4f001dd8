"""Several nodes that serve one model: what each of them does, and tells the terminal that orders it."""

from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import schema
from sparkinstall.core import serve as use
from sparkinstall.core.readiness import NotReady
from sparkinstall.core.serve_checks import most_memory
from sparkinstall.core.serve_settings import Named, Order, found, overridden, require_decided, spread
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.errors import BadUsage
from sparkinstall.facts.units import show
from sparkinstall.journal.state_dir import Served
from sparkinstall.layout import VLLM_UNIT
from sparkinstall.node import Node
from sparkinstall.recipes import Change
from sparkinstall.services import VLLM

_Message = TypeVar("_Message", bound=Struct)
_RUNNING = ("active", "activating", "reloading")
_PROPERTIES = ("ActiveState", "SubState", "InvocationID", "NRestarts", "Result", "ExecMainStatus")


class Prepared(Struct, frozen=True):
    """What a node tells before it serves with others.

    `memory`: the largest share of its memory that vLLM may take; None: unknown. `before`: what a failure restores.
    `order` and `changes`: of the head only.
    """

    memory: float | None
    before: use.Before
    order: Order | None = None
    changes: tuple[Change, ...] = ()


class UnitState(Struct, frozen=True):
    """The service that computes on a node, as systemd has it."""

    unit: str
    active: str
    sub: str
    invocation: str
    restarts: str
    how: str

    def require_alive(self, first: "UnitState") -> None:
        """Check that it is still the same run.

        Raises:
            NotReady: it has ended.
        """
        same = (self.invocation, self.restarts) == (first.invocation, first.restarts)
        if not (same and self.active in _RUNNING and self.sub != "auto-restart"):
            raise NotReady(f"{self.unit} has ended before the head answered", cause=f"systemd says of it: {self.how}")


def understood(kind: type[_Message], text: str) -> _Message:
    """Read what the terminal has sent.

    Raises:
        BadUsage: it is no such message.
    """
    try:
        return schema.read_json(kind, text, "the order of the terminal")
    except schema.Malformed as error:
        raise BadUsage(error.message, hint="run the same version of sparkinstall at the terminal and here") from error


def prepared(target: Target, named: Named | None) -> Prepared:
    """Tell what this node has for serving with others; the head, which is given a name, also finds what it means.

    Raises:
        as `serve_settings.wanted` and `require_decided`.
    """
    # Whatever will be served, these are the options that a failure restores.
    session = open_session(replace(target, served=Served("", {})))
    before = use.before_serving(session, within_all=True)
    memory = most_memory(session.node, session.system)
    if named is None:
        return Prepared(memory, before)
    what = spread(found(named), session)
    session = open_session(replace(target, served=what.served))
    require_decided(session, what.served)
    changes = (*what.changes, *overridden(session, what.served))
    return Prepared(memory, before, Order(what.served, what.model, what.recipe, what.options), changes)


def unit_of(node: Node) -> str:
    """Return the service that computes on a node: on a worker with Ray that is Ray."""
    return VLLM_UNIT if VLLM.wanted(node) or not node.with_ray else node.ray_unit


def state(session: Session) -> UnitState:
    """Tell how the service that computes here stands: vLLM, or Ray that starts it."""
    unit = unit_of(session.node)
    now = show(session.system, unit, *_PROPERTIES)
    how = f"{now['Result']}, status {now['ExecMainStatus']}" if now["Result"] != "success" else now["ActiveState"]
    return UnitState(unit, now["ActiveState"], now["SubState"], now["InvocationID"], now["NRestarts"], how)
