"""Undo everything that the journal holds."""

# The undo functions stand beside the resources; importing the steps registers all of them.
import sparkinstall.core.catalogue  # noqa: F401
from sparkinstall.events import Emit, silent
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.undo import undo_all
from sparkinstall.system import Undone


def uninstall(state: StateFolder, emit: Emit = silent) -> list[Undone]:
    """Undo every change of the journal, last first; see `journal.undo.undo_all`."""
    return undo_all(state, emit)
