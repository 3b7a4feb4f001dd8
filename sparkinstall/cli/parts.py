"""What the verbs of optional parts show: of an installation, and of undoing it."""

from sparkinstall.cli.text_output import console, show_findings
from sparkinstall.core.converge import Installation
from sparkinstall.core.parts import Withdrawal
from sparkinstall.core.session import Session


def show_part(session: Session, done: Installation) -> bool:
    """Show the proof of a part; return whether it is installed."""
    if done.results:
        out = console()
        out.print("[bold]Proof[/]")
        show_findings(done.results, out, root=session.root_option)
        out.print()
    return not done.problems


def show_withdrawal(done: Withdrawal, what: str) -> None:
    """Show what was undone. `what`: the part in words."""
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
