"""`sparkinstall models`: pull models from the hub into its cache; sync, list, verify or remove them."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import asdict
from rich.filesize import decimal
from rich.status import Status
from rich.text import Text

from sparkinstall.cli import options
from sparkinstall.cli.live_output import Pace
from sparkinstall.cli.model_nodes import Others, asked, synced
from sparkinstall.cli.run_command import CommandResult, Output, confirm, verb
from sparkinstall.cli.text_output import console, headed, show_line, shown
from sparkinstall.core import models as use
from sparkinstall.core.model_cache import Revision
from sparkinstall.core.session import Target
from sparkinstall.errors import Exit

app = typer.Typer(
    add_completion=False,
    help="Pull models from the hub into its cache; copy them to other nodes; list, verify or remove them.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name on the hub, ORG/NAME.")]
AnyModel = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="A model's name on the hub; default: all.", show_default=False)
]
ToPull = Annotated[
    str, typer.Argument(metavar="MODEL|RECIPE", help="The model's name on the hub, ORG/NAME, or a shipped recipe's.")
]
At = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REVISION",
        help="A branch, a tag or a commit; default: that of the recipe, or main.",
        show_default=False,
    ),
]


@app.command()
@verb("models pull")
def pull(_: Target, output: Output, model: ToPull, revision: At = None) -> CommandResult:
    """Download a model, or those of a recipe, into the hub's cache; resume within a file, and check each hash."""
    del output
    with _dialog(model) as dialog:
        done = use.pull_named(model, revision, dialog)
    return CommandResult(data=done, show=lambda: _show_pulled(done))


def _show_pulled(done: use.Pulled) -> None:
    print(f"✓ {done.model} ({done.revision} is {done.commit[:12]}): {done.files} files, {decimal(done.size)}, complete")
    print(f"  {done.path}")
    if not done.fetched_files:
        print("  All files were there; nothing was downloaded.")
    if done.draft:
        _show_pulled(done.draft)


@app.command()
@verb("models sync")
def sync(
    target: Target,
    output: Output,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]... [NODE]...",
            help="Models, ORG/NAME (default: all that are complete), then nodes as you write them after `ssh` "
            "(default: the workers, if this is the head).",
            show_default=False,
        ),
    ] = None,
) -> CommandResult:
    """Copy models from this machine's cache to those of other nodes over the link; only what they lack, resumable."""
    return synced(words or (), target, output)


@app.command("list")
@verb("models list", reads_only=True)
def list_(
    target: Target,
    output: Output,
    nodes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NODE]...",
            help="Nodes to ask, as you write them after `ssh`; default: the workers, if this is the head.",
            show_default=False,
        ),
    ] = None,
) -> CommandResult:
    """List the models in the hub's cache: revision, size, whether all files are there, and on which nodes too."""
    found, others = use.listed(), asked(nodes or (), target, output)
    data = {**asdict(found), "nodes": others.whole, "silent": others.silent}
    return CommandResult(others.code, data, lambda: _show_list(found, others, output.verbose), others.problems)


def _show_list(found: use.ModelList, others: Others, verbose: bool) -> None:
    out = console()
    show_line(f"{found.folder}: {decimal(found.size)}", out)
    if not found.models:
        show_line("There are no models. `sparkinstall models pull MODEL` brings one.", out)
    rows = [(model, each) for model in found.models for each in model.revisions]
    if rows:
        table = headed("model", "revision", "size", "files", "", *(["complete on"] if others.whole else []))
        for model, each in rows:
            size, count = decimal(each.size), str(each.files)
            there = [others.having(f"{model.id}@{each.commit}")] if others.whole else []
            table.add_row(*map(Text, (model.id, _named(each), size, count, _completeness(each), *there)))
        out.print(table)
    for host, why in () if others.problems else others.silent.items():
        show_line(shown(f"! {host} was not asked: {why}"), out)
    if verbose:
        for model, each in rows:
            for path in each.missing:
                out.print(shown(f"{model.id} {each.commit[:12]}: {path} is missing"), markup=False, soft_wrap=True)
    elif any(each.missing for _, each in rows):
        out.print("`-v` names the missing files; `sparkinstall models pull MODEL` downloads them.")


def _named(each: Revision) -> str:
    return shown(f"{each.commit[:12]} ({', '.join(each.refs)})" if each.refs else each.commit[:12])


def _completeness(each: Revision) -> str:
    """Say whether a revision is complete."""
    if each.complete is None:
        return "not known: there is no list of its files"
    return "complete" if each.complete else f"{len(each.missing)} missing"


@app.command()
@verb("models verify")
def verify(_: Target, output: Output, model: AnyModel = None) -> CommandResult:
    """Read all files of models and compare their hashes; remove damaged ones; exit 3 if any is damaged or missing."""
    with _dialog(model or "models") as dialog:
        found = use.verify(model, dialog)
    code = Exit.DRIFT if found.damaged or found.incomplete else Exit.GOOD
    return CommandResult(code, found, lambda: _show_verified(found, output.verbose))


def _show_verified(found: use.ModelsVerified, verbose: bool) -> None:
    for damaged in found.damaged:
        files = ", ".join(damaged.files) or damaged.blob
        print(shown(f"✗ {damaged.model}: {files} was damaged and is removed"))
    for each in found.incomplete:
        print(shown(f"✗ {each.model} {each.commit[:12]}: {_some(each.missing, verbose)} missing"))
    for name in found.unknown:
        print(shown(f"! {name}: there is no list of its files, so one may be missing"))
    for name in found.unchecked:
        print(shown(f"! {name}: its name is no hash, so it was not checked"))
    print(f"{found.checked} files read ({decimal(found.size)}), {len(found.damaged)} damaged.")
    if again := sorted({each.model for each in found.damaged} | {each.model for each in found.incomplete}):
        print("To download what is missing: " + ", ".join(f"`sparkinstall models pull {each}`" for each in again))


def _some(paths: Sequence[str], verbose: bool) -> str:
    first = paths if verbose else paths[:3]
    more = f" and {len(paths) - len(first)} more" if len(first) < len(paths) else ""
    return ", ".join(first) + more + (" is" if len(paths) == 1 else " are")


@app.command()
@verb("models remove")
def remove(_: Target, output: Output, model: Model, yes: options.Yes = False) -> CommandResult:
    """Remove a model from the hub's cache, with all its revisions."""

    def agree(found: use.ListedModel, path: Path) -> None:
        if not output.json:
            revisions = ", ".join(map(_named, found.revisions))
            print(f"{path}: {decimal(found.size)}{f', revision {revisions}' if revisions else ''}")
        confirm(f"Remove {model}?", agreed=yes, default=False)

    with _dialog(model) as dialog:
        done = use.remove(model, agree, dialog)
    return CommandResult(data=done, show=lambda: print(f"Removed {done.model}: {decimal(done.freed)}."))


@contextmanager
def _dialog(name: str) -> Iterator[use.Dialog]:
    """Yield a dialog on stderr: one line that changes on a terminal, else one for each tenth."""
    if not sys.stderr.isatty():
        yield use.Dialog(_Progress(name, None).take, _say)
        return
    out = console(stderr=True)
    # It begins to turn with the first byte: not while a question is asked.
    status = out.status("", spinner="dots")
    try:
        yield use.Dialog(_Progress(name, status).take, lambda text: out.print(shown(text), markup=False))
    finally:
        status.stop()


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), shown(text), file=sys.stderr, flush=True)


class _Progress:
    """Bytes, speed and time left of a download or of reading."""

    def __init__(self, name: str, status: Status | None) -> None:
        self._name, self._status, self._pace = name, status, Pace()
        self._tenth = -1
        self._guard = threading.Lock()

    def take(self, done: int, total: int) -> None:
        """Show that `done` bytes of `total` have come."""
        with self._guard:
            text = f"{self._name}: {self._pace.words(done, total)}"
            if self._status:
                self._status.start()
                self._status.update(Text(text))
            elif total and 10 * done // total != self._tenth:
                self._tenth = 10 * done // total
                _say(text)
