"""The verbs that install one optional part, and undo it."""

from collections.abc import Callable, Mapping
from typing import Any

from sparkinstall.cli.install import dialog_of, opened, shown_checks
from sparkinstall.cli.run_command import CommandResult, Output
from sparkinstall.cli.text_output import console, show_findings
from sparkinstall.cluster.protocol import Applied, Uninstalled
from sparkinstall.core import parts
from sparkinstall.core.converge import Installation
from sparkinstall.core.parts import Withdrawal
from sparkinstall.core.session import Session, Target
from sparkinstall.errors import Exit
from sparkinstall.steps import Step


def install_part(
    target: Target,
    step: Step,
    values: Mapping[str, Any],
    verb: str,
    output: Output,
    yes: bool,
    show: Callable[[Session], None],
) -> CommandResult:
    """Install a part with these settings (None: not given); `show` tells what the user has now, if it is installed."""
    session = opened(parts.switched_on(target, values))
    with shown_checks(output):
        done = parts.install(session, step, verb, dialog_of(session, output, yes))

    def show_all() -> None:
        _show_proof(session, done)
        if not done.problems:
            show(session)

    return CommandResult(_code(done), Applied.of(done), show_all, done.problems)


def withdrawn_part(done: Withdrawal, what: str) -> CommandResult:
    """Return the result of undoing a part. `what`: the part in words."""
    changes = Uninstalled(tuple(done.changes))
    return CommandResult(_code(done), changes, lambda: _show_withdrawal(done, what), done.problems)


def _code(done: Installation | Withdrawal) -> Exit:
    return Exit.FAILED if done.problems else Exit.GOOD


def _show_proof(session: Session, done: Installation) -> None:
    if done.results:
        out = console()
        out.print("[bold]Proof[/]")
        show_findings(done.results, out, root=session.root_option)
        out.print()


def _show_withdrawal(done: Withdrawal, what: str) -> None:
    if not done.found:
        print(f"Nothing to undo: {what} is not installed.")
    elif not done.problems:
        counts = [each.outcome for each in done.changes]
        print(f"✓ Undone: {what}. Restored {counts.count('restored')}, removed {counts.count('removed')}.")
    for each in done.changes:
        if each.outcome == "kept":
            print(f"! kept {each.subject}: {each.note}")
    if done.wanted_by:
        print(f"! {done.wanted_by} still asks for it: remove it there, or the next `all` installs it again.")
