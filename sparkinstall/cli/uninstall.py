"""`sparkinstall uninstall`: restore the former state from the journal."""

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from sparkinstall.assets import user_cache
from sparkinstall.cli import options
from sparkinstall.cli.run_command import CommandResult, Output, confirm, verb
from sparkinstall.cli.text_output import console
from sparkinstall.cluster.protocol import Uninstalled
from sparkinstall.core.session import Target, open_state
from sparkinstall.core.uninstall import Uninstallation
from sparkinstall.core.uninstall import uninstall as uninstall_node
from sparkinstall.errors import BadUsage, Exit
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.undo import Change

_KINDS = {
    "path": "file or link",
    "dir": "folder, if empty",
    "tree": "folder with its contents",
    "model": "model, all files",
}

PurgeCache = Annotated[bool, typer.Option("--purge-cache", help="Remove downloads and wheels in your cache too.")]


@verb("uninstall", "root")
def uninstall(
    target: Target, output: Output, purge_cache: PurgeCache = False, yes: options.Yes = False
) -> CommandResult:
    """Undo everything: restore every file byte for byte, remove every package that was not installed before."""
    state = open_state(target)
    if purge_cache:
        # What cannot be done of it is said before anything is undone.
        user_cache()

    def agree(changes: Sequence[Change]) -> None:
        if not output.json:
            out = console()
            out.print("[bold]To undo[/]")
            for change in changes:
                out.print(f"  {_in_words(change, state)}", markup=False)
        confirm("Undo all of it?", agreed=yes or state.system.rehearsal, default=False)

    done = uninstall_node(state, agree, purge_cache)
    code = Exit.FAILED if done.problems else Exit.GOOD
    return CommandResult(code, Uninstalled(tuple(done.changes)), lambda: _show(state, done, purge_cache), done.problems)


def _in_words(change: Change, state: StateFolder) -> str:
    if change.undo.kind == "packages":
        names = sorted({name for record in change.records for name in record.undo.after["packages"]})
        return f"{'packages':26}{', '.join(names)}"
    return f"{_KINDS.get(change.undo.kind, change.undo.kind):26}{state.system.real(change.undo.subject)}"


def _show(state: StateFolder, done: Uninstallation, purged: bool) -> None:
    if not done.found:
        print(f"Nothing to undo in {state.system.root}: there is no journal in {state.home}.")
        return
    counts = [each.outcome for each in done.changes]
    print(f"Restored {counts.count('restored')}, removed {counts.count('removed')}.")
    for each in done.changes:
        if each.outcome == "kept":
            print(f"! kept {each.subject}: {each.note}")
    if any(each.outcome == "kept" for each in done.changes) and state.exists:
        print(f"Their records stay in {state.home}: `sparkinstall uninstall` again undoes what can then be undone.")
    # Without a home folder there is no cache.
    with suppress(BadUsage):
        if os.path.exists(user_cache()):
            how = "not all of them could be removed" if purged else "--purge-cache removes them"
            print(f"Downloads are kept in {user_cache()} ({how}).")
