"""`sparkinstall serve`: from a recipe or a model to a server that answers."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated

import click
import typer
from msgspec import UNSET, UnsetType
from msgspec.structs import asdict, replace
from typer.core import TyperGroup

from sparkinstall import stacks
from sparkinstall.cli import edge, options
from sparkinstall.cli.install import dialog_of, on_workers, opened, show, shown_checks, supply_of
from sparkinstall.cli.live_output import duration
from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.text_output import console, show_line, show_rows, shown
from sparkinstall.cluster import agent
from sparkinstall.cluster.protocol import Applied
from sparkinstall.cluster.serving import Restored, UnitLog
from sparkinstall.core import serve as use
from sparkinstall.core import serve_together as use_together
from sparkinstall.core.converge import Installation, InstallOptions, converge
from sparkinstall.core.readiness import LIMIT, LIMIT_OF_SEVERAL
from sparkinstall.core.serve_checks import within_memory
from sparkinstall.core.serve_record import Serving
from sparkinstall.core.serve_settings import REMOTE_CODE, Named, Order, Wanted, overridden, spread, wanted
from sparkinstall.core.serve_together import Prepared, UnitState, understood
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.diagnose import judge, sources
from sparkinstall.diagnose.index import index_of
from sparkinstall.diagnose.sightings import Place
from sparkinstall.diagnose.signatures import load
from sparkinstall.errors import BadUsage, Exit, Problem
from sparkinstall.facts.decisions import installed_stack
from sparkinstall.layout import VLLM_UNIT
from sparkinstall.probes import Probe
from sparkinstall.redaction import redact

_LINES = 4
_LONGEST_LOG = 4 << 20


class _Group(TyperGroup):
    """A name that is no verb is that of a recipe or a model, and means `serve start`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        verb_or_help = not args or args[0] in self.commands or args[0] in ("-h", "--help")
        return super().parse_args(ctx, args if verb_or_help else ["start", *args])


app = typer.Typer(
    add_completion=False,
    cls=_Group,
    help="Serve a recipe or a model until it answers: `serve RECIPE|MODEL`; then status, logs, stop, restart, wait.",
    no_args_is_help=True,
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|MODEL", help="A recipe, its file, a model's folder, or ORG/NAME.", show_default=False
    ),
]
Id = Annotated[str | None, typer.Option("--id", metavar="ID", help="Which recipe of a file with several.")]
Trust = Annotated[bool, typer.Option(REMOTE_CODE, help="Agree that a recipe runs code from the model's repository.")]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="SECONDS",
        help=f"How long to wait for the first answer ({LIMIT}; on several nodes {LIMIT_OF_SEVERAL}).",
        min=1,
        max=86400,
    ),
]


@app.command()
@verb("serve start", "config", "set_", "root")
def start(
    target: Target,
    output: Output,
    name: Name,
    id_: Id = None,
    trust_remote_code: Trust = False,
    limit: Limit = None,
    ignore: options.Ignore = None,
    yes: options.Yes = False,
) -> CommandResult:
    """Start vLLM with a recipe or a model, and wait for a streamed answer. `start` may be left out."""
    session = open_session(target)
    use.require_installed(session, name)
    found = within_memory(wanted(name, id_, trusts=trust_remote_code), session.node, session.system)
    target = replace(target, served=found.served)
    session = open_session(target)
    _show_changes(session, found, output)
    with shown_checks(output):
        done = use.serve(session, target, found, _options(session, ignore, limit), _dialog(session, output, yes))
    return CommandResult(data=done, show=lambda: show_answering(done))


class Installed(Applied, frozen=True):
    """Reply of `all --serve`: what was installed, and what is served, if it came so far."""

    serving: use.Answering | UnsetType = UNSET


def install_and_serve(target: Target, output: Output, chosen: InstallOptions, name: str, yes: bool) -> CommandResult:
    """Set up this node, then serve: `all --serve NAME`, and `multi-node --serve NAME` on each of several."""
    session = open_session(target)
    several = chosen.verb == "multi-node"
    use.require_a_node(session) if several else use.require_one_node(session, name)
    found = within_memory(spread(wanted(name), session), session.node, session.system)
    target = replace(target, served=found.served)
    session = opened(target)
    _show_changes(session, found, output)
    dialog, before = _dialog(session, output, yes), use.before_serving(session, within_all=True)
    checks, supply = use.require_possible(session, found, dialog.say), supply_of(session, output)
    with shown_checks(output):
        done = converge(session, chosen, dialog.install, replace(supply, checks=(*supply.checks, *checks.checks)))
    if any(report.outcome in ("failed", "blocked") for report in done.reports):
        return CommandResult(Exit.FAILED, Applied.of(done), lambda: show(session, done, chosen), done.problems)
    if session.node.role == "worker":
        code = Exit.FAILED if done.problems else Exit.GOOD
        return CommandResult(code, Applied.of(done), lambda: _show_worker(session, done, chosen), done.problems)
    if several and not output.json:
        _say_what_waits(session, name)
    answering = use.after_install(session, target, found, before, done, dialog)
    data = Installed(**asdict(Applied.of(done)), serving=answering)

    def tell() -> None:
        show(session, done, chosen)
        show_answering(answering)

    return CommandResult(Exit.FAILED if done.problems else Exit.GOOD, data, tell, done.problems)


def _show_worker(session: Session, done: Installation, chosen: InstallOptions) -> None:
    show(session, done, chosen)
    head = session.node.config.cluster.head
    print(f"✓ This worker computes for the head, {head}, whose `--serve` ends when the model has answered.")


def _say_what_waits(session: Session, name: str) -> None:
    """Say what the head waits for: without all workers vLLM does not even begin to load."""
    node = session.node
    count = len(node.members) - 1
    who = "the worker" if count == 1 else f"{count} workers"
    out = console(stderr=True)
    out.print(f"vLLM on this head waits for {who} before it loads the model, for up to {duration(LIMIT_OF_SEVERAL)}.")
    out.print(
        "On the other node, if it is not set up yet:" if count == 1 else "On each of them, if it is not set up yet:"
    )
    for line in on_workers(node, f" --serve {shlex.quote(name)}"):
        out.print(f"    {line}", markup=False, soft_wrap=True)


# --- what `cluster --serve` runs on each node


def ordered(target: Target, order: str) -> Target:
    """Return the target that serves what the terminal has ordered."""
    return replace(target, served=understood(Order, order).served)


def checks_of(session: Session, order: str) -> Sequence[Probe]:
    """Return the checks of what the terminal has ordered."""
    supply = use.require_possible(session, understood(Order, order).here(), lambda text: agent.tell(text))
    return supply.checks


def prepared(target: Target) -> Prepared:
    """Tell what this node has for serving with others."""
    given = sys.stdin.read()
    return use_together.prepared(target, understood(Named, given) if given else None)


def unit_state(session: Session) -> UnitState:
    """Tell how the service that computes here stands."""
    return use_together.state(session)


def unit_log(session: Session) -> UnitLog:
    """Return the end of the log of vLLM's last start."""
    try:
        pieces = sources.unit_log(use_together.unit_of(session.node)).pieces()
        return UnitLog(redact(b"".join(pieces)[-_LONGEST_LOG:].decode(errors="replace")))
    except Problem:
        return UnitLog()


def restored(target: Target) -> Restored:
    """Restore what was served before, which is on stdin."""
    before = understood(use.Before, sys.stdin.read())
    return Restored(use.restore(open_session(target), target, before))


@app.command()
@verb("serve restart", "root")
def restart(
    target: Target, output: Output, limit: Limit = None, ignore: options.Ignore = None, yes: options.Yes = False
) -> CommandResult:
    """Start vLLM again with the settings that it has, and wait for a streamed answer."""
    session = open_session(target)
    with shown_checks(output):
        done = use.restart(session, target, _options(session, ignore, limit), _dialog(session, output, yes))
    return CommandResult(data=done, show=lambda: show_answering(done))


@app.command()
@verb("serve wait", "root")
def wait(target: Target, output: Output, limit: Limit = None) -> CommandResult:
    """Wait until vLLM answers that was started by systemd or `cluster`, and record what runs."""
    session = open_session(target)
    done = use.wait(session, _options(session, None, limit), _dialog(session, output, yes=True))
    return CommandResult(data=done, show=lambda: show_answering(done))


@app.command()
@verb("serve stop", "root")
def stop(target: Target, output: Output) -> CommandResult:
    """Stop vLLM; it does not start at boot either, and its settings stay."""
    del output
    use.stop(open_session(target))
    return CommandResult(show=_show_stopped)


def _show_stopped() -> None:
    print("✓ vLLM is stopped, and does not start at boot. `sparkinstall serve restart` starts it again.")


@app.command()
@verb("serve status", "root", reads_only=True)
def status(target: Target, output: Output) -> CommandResult:
    """Show what is served, and the record of its start; exit 3 if it does not run."""
    session = open_session(target)
    found = use.status(session)
    code = Exit.GOOD if found.active == "active" else Exit.DRIFT
    return CommandResult(code, found, lambda: _show_status(found, output.verbose))


@app.command()
@verb("serve logs", reads_only=True)
def logs(
    target: Target,
    output: Output,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing new lines, until Ctrl-C.")] = False,
) -> CommandResult:
    """Print the log of vLLM since its last start."""
    del target
    if output.json:
        raise BadUsage("a log is no JSON", hint="omit --json; `sparkinstall diagnose --unit vllm --json` explains it")
    try:
        log = sources.unit_log(VLLM_UNIT, follow)
    except BadUsage as error:
        hint = "`sparkinstall serve RECIPE|MODEL` makes it; what a former one has written: `journalctl -u vllm`"
        raise BadUsage(f"there is no service {VLLM_UNIT} on this node", hint=hint) from error
    text = ""
    try:
        for text in whole_lines(log.pieces()):
            sys.stdout.write(redact(text))
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not follow:
            raise
    if not text:
        console(stderr=True).print("The journal has no line of vLLM.")
    return CommandResult()


def whole_lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines that each piece of a log ends: a secret or a character that is cut in two is not recognised."""
    held = b""
    for piece in pieces:
        begun, newline, rest = piece.rpartition(b"\n")
        if newline:
            yield (held + begun + newline).decode(errors="replace")
            held = b""
        held += rest
    yield held.decode(errors="replace")


def _options(session: Session, ignore: Sequence[str] | None, limit: int | None) -> use.ServeOptions:
    usual = LIMIT_OF_SEVERAL if session.node.several else LIMIT
    return use.ServeOptions(tuple(ignore or ()), limit or usual)


def _dialog(session: Session, output: Output, yes: bool) -> use.ServeDialog:
    def say(text: str) -> None:
        if not output.json:
            print(text, file=sys.stderr, flush=True)

    return use.ServeDialog(dialog_of(session, output, yes), lambda: explained(session), edge.uninterrupted, say)


def explained(session: Session) -> use.Explained:
    """Say what the log of vLLM's last start shows, as `diagnose` does."""
    name = installed_stack(session.system, session.node.venv_stamp)
    release = stacks.load(name).vllm if name in stacks.names() else ""
    try:
        found = judge.judge([judge.read(sources.unit_log(VLLM_UNIT), index_of(load(release=release)))])
    except Problem:
        return use.Explained()
    return told(found, lambda place: place.text)


def told(found: judge.Diagnosis, line: Callable[[Place], str]) -> use.Explained:
    """Return the cause that logs show; `line`: how one of their lines is shown."""
    if found.causes:
        cause = found.causes[0]
        return use.Explained(f"{cause.title}: {cause.why}", cause.hint, [line(each) for each in cause.lines[:1]])
    # A consequence alone says no more than that vLLM has ended.
    return use.Explained(lines=[line(each) for each in found.telling[:_LINES]])


# --- text


def show_answering(done: use.Answering) -> None:
    """Show how to use what is served."""
    serving = done.serving
    ready = f"in {duration(serving.seconds)}, first token after {serving.first_token:.2f} s" if done.changed else ""
    print(f"✓ {serving.model} answers{' ' + ready if ready else ''}.")
    print(f"  URL    {serving.url}")
    print(f"  model  {serving.model}")
    print("  ask    sparkinstall ask 'What is a GB10?'")
    print(f"\n{curl(serving)}")


def _show_changes(session: Session, found: Wanted, output: Output) -> None:
    """Show what will not be as the recipe has it, before the user is asked."""
    if output.json:
        return
    for each in (*found.changes, *overridden(session, found.served)):
        show_line(shown(f"{each.done}: {each.what} ({each.why})"), console(), "dim")


def curl(serving: Serving) -> str:
    """Return one line for a shell that asks the model something; the key comes through a pipe, not as an argument."""
    model = serving.model.replace("\\", "\\\\").replace('"', '\\"')
    if serving.chat:
        path, body = "chat/completions", '"messages": [{"role": "user", "content": "What is a GB10?"}]'
    else:
        path, body = "completions", '"prompt": "A GB10 is", "max_tokens": 64'
    data = shlex.quote(f'{{"model": "{model}", {body}}}')
    asking = f"{serving.url}/{path} -H 'Content-Type: application/json' -d {data}"
    if not serving.key_file:
        return f"curl {asking}"
    return f"sudo sed 's/^/Authorization: Bearer /' {shlex.quote(serving.key_file)} | curl -H @- {asking}"


def _show_status(found: use.ServeStatus, verbose: bool) -> None:
    if found.model is None:
        print("No model is served on this node. `sparkinstall serve RECIPE|MODEL` serves one.")
        return
    show_rows(((name, shown(text)) for name, text in _rows(found, verbose)), console(), 12)


def _rows(found: use.ServeStatus, verbose: bool) -> Iterator[tuple[str, str]]:
    serving = found.serving
    yield "model", str(found.model) + (f" (recipe {found.recipe})" if found.recipe else "")
    again = f", started again by systemd {found.starts} times" if found.starts else ""
    gave_up = "; systemd has given up: `sparkinstall diagnose --unit vllm`" if found.active == "failed" else ""
    yield "service", f"{VLLM_UNIT} is {found.active}{again}{gave_up}"
    if serving is None:
        yield "record", "none: no start was waited for; `sparkinstall serve restart` does"
        return
    if not found.current:
        yield "record", f"of an earlier start, {serving.started}"
    yield "URL", serving.url
    yield "since", serving.started
    yield "ready", f"{duration(serving.seconds)}: {_phases(serving)}"
    yield "first token", f"{serving.first_token:.2f} s"
    yield "versions", ", ".join(f"{name} {version}" for name, version in serving.versions.items())
    yield "system", f"kernel {serving.kernel}" + (f", driver {serving.driver}" if serving.driver else "")
    if serving.clocks:
        yield "clocks", ", ".join(f"{name} {value}" for name, value in serving.clocks.items())
    yield (
        "memory",
        f"{serving.memory.available / (1 << 20):.1f} of {serving.memory.total / (1 << 20):.1f} GiB available",
    )
    if serving.server:
        yield "command", shlex.join(serving.server.argv)
    process = serving.engine or serving.server
    if verbose and process:
        for name, value in sorted(process.env.items()):
            yield "variable", f"{name}={value}"


def _phases(serving: Serving) -> str:
    return ", ".join(f"{phase.name} {duration(phase.seconds)}" for phase in serving.phases if phase.seconds >= 0.1)
