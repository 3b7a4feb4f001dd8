"""Undo everything that sparkinstall did on a node, from the journal."""

import shutil
import sys
from collections.abc import Callable, Sequence

from msgspec import Struct

# Undo functions are registered beside their resources, which importing the steps imports.
import sparkinstall.core.catalogue  # noqa: F401
from sparkinstall.assets import user_cache
from sparkinstall.errors import Problem
from sparkinstall.journal import undo
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.undo import Change
from sparkinstall.system import Undone


class Uninstallation(Struct, frozen=True):
    """Result of `uninstall`. `found`: there was a journal."""

    found: bool
    changes: Sequence[Undone] = ()

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(
            Problem(
                f"{each.subject} could not be undone: {each.note}",
                hint="fix that, then run `sparkinstall uninstall` again",
            )
            for each in self.changes
            if each.outcome == "failed"
        )


def uninstall(state: StateFolder, agree: Callable[[Sequence[Change]], None], purge_cache: bool) -> Uninstallation:
    """Undo every change of the journal, the last one first.

    Args:
        agree: is given the changes before anything is undone; raises if they are to stay.
        purge_cache: remove downloads in the user's cache too.

    Raises:
        Busy: another run holds the lock.
        JournalDamaged: nothing was undone.
    """
    state.sweep()
    if not state.exists:
        return Uninstallation(found=False)
    state.require_free()
    agree(undo.changes(state.journal().records()))
    if sys.stdin.isatty():
        state.system.ask_for_sudo()
    undone = undo.undo_all(state)
    if purge_cache:
        shutil.rmtree(user_cache(), ignore_errors=True)
    return Uninstallation(True, undone)
