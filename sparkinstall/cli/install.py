"""Shared by `all`, `run` and `multi-node`: the dialog of a run and the view of its result.

A run that finds nothing to do loads neither rich nor what `--bundle` needs: they are imported when they are used.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from msgspec.structs import replace

from sparkinstall.cli.run_command import CommandResult, Output, confirm
from sparkinstall.cluster.protocol import Applied
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.converge import Dialog, Installation, InstallOptions, Supply, converge, drifted
from sparkinstall.core.engine import StepReport
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.errors import BadConfig, Exit, PreflightFailed
from sparkinstall.events import Emit
from sparkinstall.given import lasts
from sparkinstall.node import Node
from sparkinstall.resources import Drift

if TYPE_CHECKING:
    from rich.console import Console


def install(target: Target, output: Output, options: InstallOptions, yes: bool) -> CommandResult:
    """Converge a node and show the result."""
    session = opened(target)
    with shown_checks(output):
        done = converge(session, options, dialog_of(session, output, yes), supply_of(session, output))
    code = Exit.FAILED if done.problems else Exit.GOOD
    return CommandResult(code, Applied.of(done), lambda: show(session, done, options), done.problems)


def opened(target: Target) -> Session:
    """Return the session of a run that later runs may resume.

    Raises:
        BadConfig: they could not read the config again.
    """
    session = open_session(_of_bundles().with_its_stack(target) if target.bundle else target)
    config = session.options.get("config")
    if config and not lasts(config):
        why = "later runs read the config again, and this one can be read only once"
        raise BadConfig(f"the config {config} is not a regular file", cause=why, hint="save it as a file first")
    return session


@contextmanager
def shown_checks(output: Output) -> Iterator[None]:
    """Leave out of an error what failed in the preflight: text output has shown it."""
    try:
        yield
    except PreflightFailed as problem:
        problem.cause = problem.cause if output.json else ""
        raise


def dialog_of(session: Session, output: Output, yes: bool) -> Dialog:
    """Return the dialog of a run on the terminal, or for JSON."""

    def preflight(results: Sequence[ProbeResult]) -> None:
        if not output.json:
            _text().show_preflight(results, _text().console())

    def agree(reports: Sequence[StepReport]) -> None:
        if not output.json:
            _show_beginning(session, reports, output.verbose)
        # A rehearsal changes only its own folder: no confirmation needed.
        confirm("Go on?", agreed=yes or session.node.rehearsal, default=True)

    return Dialog(preflight, agree, lambda: _watching(output.verbose))


def supply_of(session: Session, output: Output) -> Supply:
    """Return what the bundle of this run has; nothing without one."""
    if not session.node.bundle:
        return Supply()
    with _watching(output.verbose) as emit:
        found: Supply = _of_bundles().supply(session.node, session.system, emit)
    return found


def _of_bundles() -> ModuleType:
    from sparkinstall.bundle import supply

    return supply


def _watching(verbose: bool) -> AbstractContextManager[Emit]:
    from sparkinstall.cli.live_output import watching

    return watching(verbose)


def _text() -> ModuleType:
    from sparkinstall.cli import text_output

    return text_output


def _show_beginning(session: Session, reports: Sequence[StepReport], verbose: bool) -> None:
    out = _text().console()
    out.print(f"[bold]Plan[/]  {session.where}")
    _text().show_plan(reports if verbose else list(map(_without_diffs, reports)), out, verbose, session.root_option)
    out.print()


def _without_diffs(report: StepReport) -> StepReport:
    brief = (replace(each, before="", after="") if isinstance(each, Drift) else each for each in report.checked)
    return replace(report, checked=tuple(brief))


def show(session: Session, done: Installation, options: InstallOptions) -> None:
    """Show what a run did."""
    if not done.applied:
        _show_nothing_done(session, done)
        return
    out = _text().console()
    if done.results:
        out.print("[bold]Proof[/]")
        _text().show_findings(done.results, out, root=session.root_option)
    if not (options.only or options.skip or done.problems):
        out.print("\n[bold]The fixes[/]")
        _text().show_fixes(done.standing, out, session.root_option)
    out.print()
    if not done.problems:
        _show_next(session, out)


def _show_nothing_done(session: Session, done: Installation) -> None:
    if done.problems:
        return
    print(f"✓ {session.where}: everything is up to date; nothing was changed.")
    left = [report.name for report in done.reports if report.outcome == "node_only"]
    if left:
        print(f"  Node only: {', '.join(left)}. `sparkinstall plan{session.root_option}` explains why.")


def _show_next(session: Session, out: "Console") -> None:
    if behind := drifted(session):
        out.print(f"[green bold]✓[/] done. [yellow]Open now:[/] {', '.join(behind)}. Next:")
        out.print(f"    sparkinstall all{session.root_option}", markup=False)
        return
    out.print(f"[green bold]✓[/] {session.where} is done. Next:")
    for line in _next_lines(session):
        out.print(f"    {line}", markup=False, soft_wrap=True)
    out.print(f"    sparkinstall verify{session.root_option}      [dim]verifies again, at any time[/]")
    out.print(f"    sparkinstall uninstall{session.root_option}   [dim]undoes everything[/]")


def on_workers(node: Node, more: str = "") -> list[str]:
    """Return the command that sets up a worker of this head; `more`: further options."""
    token = f"ssh THIS_NODE cat {node.ray_token} | " if node.config.cluster.executor == "ray" else ""
    # Stdin is a pipe, so nobody could answer a question.
    option = " --token-file - --yes" if token else ""
    return [f"{token}sparkinstall multi-node --role worker --head {node.address}{more}{option}"]


def _next_lines(session: Session) -> list[str]:
    node = session.node
    source = f"source {session.system.real(node.env_file)}"
    if node.rehearsal:
        return [source]
    if node.role == "head":
        return [f"{line}   # on the other node" for line in on_workers(node)]
    if node.config.serving.model:
        return [f"curl http://127.0.0.1:{node.config.serving.port}/v1/models"] if node.role == "single" else []
    return [source, "vllm serve MODEL --gpu-memory-utilization 0.85 --max-model-len 32768"] if not node.several else []
