"""`sparkinstall uninstall`: everything back as it was, from the journal."""

import sys
from typing import TYPE_CHECKING

import typer

from sparkinstall.cli import options
from sparkinstall.cli.run_command import Answer, answer, confirm
from sparkinstall.cluster.protocol import Uninstalled
from sparkinstall.core.session import Target

if TYPE_CHECKING:
    from sparkinstall.journal.state_dir import StateFolder
    from sparkinstall.journal.undo import Change
    from sparkinstall.system import Undone


def uninstall(
    root: options.Root = None,
    purge_cache: bool = typer.Option(False, "--purge-cache", help="Remove downloads and wheels in your cache too."),
    yes: options.Yes = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Undo everything: every file byte for byte, every package that was not there before."""
    answer("uninstall", lambda: _uninstall(root, purge_cache, yes, json), root=root, json=json, verbose=verbose)


def _uninstall(root: options.Root, purge_cache: bool, yes: bool, json: bool) -> Answer:
    from sparkinstall.core.session import open_state
    from sparkinstall.core.uninstall import uninstall as core_uninstall
    from sparkinstall.journal import undo as undoing

    state = open_state(Target(root))
    state.sweep()
    if not state.exists:
        return Answer(data=Uninstalled(), show=lambda: print(_nothing(state)))
    state.require_free()
    changes = undoing.changes(state.journal().records())
    if not json:
        _show_plan([_in_words(touch, state) for touch in changes])
    confirm("Take all of it back?", agreed=yes or state.system.rehearsal, default=False)
    if sys.stdin.isatty():
        state.system.ask_for_sudo()
    taken = core_uninstall(state)
    if purge_cache:
        _purge_cache()
    return _answer(taken, purge_cache)


def _nothing(state: "StateFolder") -> str:
    return f"Nothing of sparkinstall is in {state.system.root}: there is no journal in {state.home}."


_KINDS = {"path": "file or link", "dir": "folder, if empty", "tree": "folder, with all in it"}


def _in_words(touch: "Change", state: "StateFolder") -> str:
    if touch.undo.kind == "packages":
        names = sorted({name for record in touch.records for name in record.undo.after["packages"]})
        return f"{'packages':24}{', '.join(names)}"
    return f"{_KINDS.get(touch.undo.kind, touch.undo.kind):24}{state.system.real(touch.undo.subject)}"


def _show_plan(lines: list[str]) -> None:
    from sparkinstall.cli.text_output import console

    out = console()
    out.print("[bold]To undo[/]")
    for line in lines:
        out.print(f"  {line}", markup=False)


def _purge_cache() -> None:
    import shutil

    from sparkinstall.assets import user_cache

    shutil.rmtree(user_cache(), ignore_errors=True)


def _answer(taken: "list[Undone]", purged: bool) -> Answer:
    from sparkinstall.assets import user_cache
    from sparkinstall.errors import Exit, Problem

    problems = tuple(
        Problem(
            f"{each.subject} could not be undone: {each.note}",
            hint="fix that, then run `sparkinstall uninstall` again",
        )
        for each in taken
        if each.outcome == "failed"
    )

    def show() -> None:
        counts = [each.outcome for each in taken]
        print(f"Restored {counts.count('restored')}, removed {counts.count('removed')}.")
        for each in taken:
            if each.outcome == "kept":
                print(f"! kept {each.subject}: {each.note}")
        if not purged and user_cache().exists():
            print(f"Downloads are kept in {user_cache()} (--purge-cache removes them).")

    code = Exit.FAILED if problems else Exit.GOOD
    return Answer(code, Uninstalled(tuple(taken)), show, problems)
