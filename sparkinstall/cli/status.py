"""`sparkinstall status`: what is here, since when, and how the fixes stand."""

from sparkinstall.cli import options
from sparkinstall.cli.run_command import Answer, answer
from sparkinstall.core.session import Target


def status(
    root: options.Root = None,
    config: options.ConfigFile = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what is installed and how the fixes stand (starts nothing; `verify` proves)."""
    answer("status", lambda: _status(Target(root, config, verbose=verbose)), root=root, json=json, verbose=verbose)


def _status(asked: Target) -> Answer:
    from sparkinstall.cluster.protocol import FixMessage, Status, StepMessage
    from sparkinstall.core import catalogue, fixes
    from sparkinstall.core.session import looked_at, open_session

    session = open_session(asked)
    if problem := session.state.trouble(session.node):
        raise problem
    records = session.state.journal().records()
    reports = looked_at(session, catalogue.of(session.node))
    standing = fixes.stand(session.node, reports, {})
    found = Status(
        installed=bool(records),
        stack=session.node.stack.name,
        platform=session.node.platform,
        prefix=session.system.real(session.node.prefix),
        since=records[0].at if records else None,
        last_change=records[-1].at if records else None,
        journal=str(session.state.home / "journal.jsonl"),
        steps=tuple(map(StepMessage.of, reports)),
        fixes=tuple(map(FixMessage.of, standing)),
    )

    def show() -> None:
        from sparkinstall.cli.text_output import console, show_fixes

        out = console()
        if not records:
            out.print(
                f"Nothing of sparkinstall is in {session.system.root}. "
                f"`sparkinstall plan{session.root_option}` shows what would be done."
            )
            return
        for name in ("stack", "platform", "prefix", "since", "last_change", "journal"):
            out.print(f"  [dim]{name.replace('_', ' '):12}[/] {getattr(found, name)}")
        out.print("\n[bold]The fixes[/]  [dim]by files; `sparkinstall verify` checks running processes[/]")
        show_fixes(standing, out, session.root_option)

    return Answer(data=found, show=show)
