"""`sparkinstall verify`: is everything in the desired state, and does it work? Text, JSON and JUnit output."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparkinstall.cli import junit as report
from sparkinstall.cli import options
from sparkinstall.cli.live_output import asking
from sparkinstall.cli.run_command import NODE, CommandResult, Output, verb
from sparkinstall.cli.text_output import console, show_fixes, show_plan, show_proof
from sparkinstall.cluster.protocol import Verified
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.core.verify import Verification, VerifyOptions
from sparkinstall.core.verify import verify as verify_node
from sparkinstall.errors import Exit, Problem


@verb("verify", *NODE, reads_only=True)
def verify(
    target: Target,
    output: Output,
    level: options.HowFar = None,
    only: options.Names = None,
    skip: options.NotNames = None,
    measure: options.Measure = False,
    strict: options.Strict = False,
    junit: options.Junit = None,
) -> CommandResult:
    """Check everything, and probe running processes; exit 3 on drift or failure."""
    with _reported(junit, strict, target.root_option):
        chosen = VerifyOptions(tuple(only or ()), tuple(skip or ()), options.known_level(level), measure, strict)
        session = open_session(target)
        with asking(output.json) as emit:
            found = verify_node(session, chosen, emit)
        if junit:
            cases = [*report.of_checks(found.reports), *report.of_probes(found.results)]
            report.write(junit, cases, strict, session.root_option)
        data = Verified.of(found, session) if output.json else Verified()
        code = Exit.DRIFT if found.wrong else Exit.GOOD
        return CommandResult(code, data, lambda: _show(session, found, output.verbose))


@contextmanager
def _reported(path: Path | None, strict: bool, root: str) -> Iterator[None]:
    """Write a problem that prevents all checks to the report too."""
    if path is None:
        yield
        return
    report.begin(path)
    try:
        yield
    except Problem as problem:
        report.write(path, report.of_problem(problem), strict, root)
        raise


def _show(session: Session, found: Verification, verbose: bool) -> None:
    out = console()
    if found.reports:
        out.print(f"[bold]Checks[/]  {session.where}")
        show_plan(found.reports, out, verbose, session.root_option)
        out.print()
    if found.results:
        out.print("[bold]Proof[/]")
        show_proof(found.results, out, session.root_option, verbose)
        out.print()
    if found.standing:
        out.print("[bold]The fixes[/]")
        show_fixes(found.standing, out, session.root_option)
        out.print()
    out.print(_conclusion(found, session.root_option))


def _conclusion(found: Verification, root: str) -> str:
    if found.drifted or found.failed:
        return f"[red bold]✗[/] {'drift' if found.drifted else 'failure'} found; {_way_out(found, root)}"
    if found.wrong:
        return f"[red bold]✗[/] skipped, and --strict was given: {', '.join(found.skipped)}"
    warned = sum(each.verdict == "warn" for each in found.results)
    notes = [f"{warned} warning{'s' if warned > 1 else ''}"] if warned else []
    notes += [f"{len(found.skipped)} skipped"] if found.skipped else []
    well = "everything that was checked is ok" if found.skipped else "everything is ok"
    return f"[green bold]✓[/] {well}" + (f" ({'; '.join(notes)})" if notes else "")


def _way_out(found: Verification, root: str) -> str:
    """Return what to do: run the steps, or follow the hints of the probes."""
    if found.drifted:
        return f"`sparkinstall all{root}` fixes it or explains why it cannot"
    what = ", ".join(each.name for each in found.failed)
    return f"see the → hints above for {what}"
