"""`sparkinstall status`: what is installed, since when, and the state of each fix."""

from rich.console import Console

from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.text_output import console, show_fixes
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.core.status import NodeStatus
from sparkinstall.core.status import status as status_of
from sparkinstall.facts.health import summary as summary_of_health
from sparkinstall.facts.life import LifeState, summary

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
    if found.life:
        _show_life(found.life, out)
    if found.health:
        out.print(f"  [dim]{'health':12}[/] ", end="")
        out.print(f"{summary_of_health(found.health)} (ran at {found.health.at})", markup=False)
    out.print("\n[bold]The fixes[/]  [dim]by files; `sparkinstall verify` checks running processes[/]")
    show_fixes(found.fixes, out, session.root_option)


def _show_life(life: LifeState, out: Console) -> None:
    out.print(f"  [dim]{'vllm':12}[/] ", end="")
    out.print(f"{summary(life)} (looked at {life.checked})", markup=False)
    for each in life.wedges:
        place = f"evidence in {each.evidence}" if each.evidence else each.trouble
        done = {"": "", "none": ", not restarted: the budget was used up"}.get(each.action, f", {each.action}")
        out.print(f"  {'':12} {each.at} wedged{done}: {each.why}; {place}", markup=False)
