"""An optional part of a node, one step that settings switch on: installed and undone alone, by its own verb."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.core import catalogue
from sparkinstall.core.converge import Dialog, Installation, InstallOptions, converge
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.errors import Problem
from sparkinstall.events import silent
from sparkinstall.journal import undo
from sparkinstall.steps import Step
from sparkinstall.system import Undone

# What any change of a node needs; the other checks are about vLLM.
_CHECKS = ("sudo", "clock", "prefix")


class Withdrawal(Struct, frozen=True):
    """Result of undoing a part. `found`: there was one. `wanted_by`: where it is still asked for, so that `all` would
    bring it back."""

    found: bool
    changes: Sequence[Undone] = ()
    wanted_by: str = ""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What could not be undone."""
        return tuple(
            Problem(f"{each.subject} could not be undone: {each.note}", hint="fix that, then run this again")
            for each in self.changes
            if each.outcome == "failed"
        )


def switched_on(target: Target, values: Mapping[str, Any]) -> Target:
    """Return the target with these settings; None: not given."""
    given = tuple(f"{name}={_text(value)}" for name, value in values.items() if value is not None)
    return replace(target, settings=(*target.settings, *given))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def install(session: Session, step: Step, verb: str, dialog: Dialog) -> Installation:
    """Bring one step into the desired state, and remember its settings for `all`.

    Raises:
        Problem: as `converge`.
    """
    return converge(session, InstallOptions(only=(step.name,), verb=verb, checks=_CHECKS), dialog)


def withdraw(target: Target, step: Step, names: Sequence[str], verb: str, agree: Callable[[], None]) -> Withdrawal:
    """Undo all changes of one step, and forget the settings `names`.

    Args:
        agree: called before anything is undone, if there is something to undo; what it raises ends this.

    Raises:
        Busy, JournalDamaged: nothing was undone.
    """
    session = open_session(target)
    state = session.state
    state.sweep()
    if not any(record.step == step.name for record in state.journal().records()):
        return Withdrawal(found=False, wanted_by=_wanted_by(session, step, names))
    state.require_free()
    agree()
    with state.hold(verb, silent):
        options = state.options()
        settings = {name: value for name, value in options.get("settings", {}).items() if name not in names}
        options.pop("settings", None)
        # First: a run after a kill in between must not bring back what is half undone.
        state.remember_options({**options, **({"settings": settings} if settings else {})})
        changes = undo.undo_step(state, step.name)
    return Withdrawal(True, changes, _wanted_by(open_session(target), step, names))


def _wanted_by(session: Session, step: Step, names: Sequence[str]) -> str:
    return session.sources[names[0]] if step in catalogue.of(session.node) else ""
