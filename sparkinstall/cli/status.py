"""`sparkinstall status`: what is installed, since when, and the state of each fix."""

from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.text_output import console, show_fixes
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.core.status import NodeStatus
from sparkinstall.core.status import status as status_of

_SHOWN = ("stack", "platform", "prefix", "since", "last_change", "journal")


@verb("status", "root", "config", reads_only=True)
def status(target: Target, output: Output) -> CommandResult:
    """Show what is installed and the state of each fix (reads only files; `verify` runs probes)."""
    del output
    session = open_session(target)
    found = status_of(session)
    return CommandResult(data=found, show=lambda: _show(session, found))


def _show(session: Session, found: NodeStatus) -> None:
    out = console()
    if not found.installed:
        out.print(
            f"sparkinstall has set nothing up in {session.system.root}. "
            f"`sparkinstall plan{session.root_option}` shows what would be done."
        )
        return
    for name in _SHOWN:
        out.print(f"  [dim]{name.replace('_', ' '):12}[/] {getattr(found, name)}")
    out.print("\n[bold]The fixes[/]  [dim]by files; `sparkinstall verify` checks running processes[/]")
    show_fixes(found.fixes, out, session.root_option)
