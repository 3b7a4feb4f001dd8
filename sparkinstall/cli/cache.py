"""`sparkinstall cache`: list, verify and prune the user's cache."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.filesize import decimal

from sparkinstall.cli import options
from sparkinstall.cli.run_command import CommandResult, Output, confirm, verb
from sparkinstall.cli.text_output import console, headed
from sparkinstall.core import cache
from sparkinstall.core.session import Target, open_session
from sparkinstall.errors import Exit

app = typer.Typer(
    add_completion=False, help="List, verify or prune the downloads and builds in your cache.", no_args_is_help=True
)

_KINDS: dict[cache.Kind, str] = {
    "wheel": "wheels", "source": "NCCL sources", "build": "NCCL builds", "incomplete": "incomplete downloads",
    "index": "pages of the package index", "python": "Python", "tool": "sparkinstall's own packages",
    "tests": "nccl-tests", "debian": "Debian packages for bundles", "plan": "plans of KV caches",
    "former": "left by earlier versions", "other": "other",
}  # fmt: skip

All = Annotated[bool, typer.Option("--all", help="Remove everything, needed or not.")]


@app.command("list")
@verb("cache list", "root", "config", reads_only=True)
def list_(target: Target, output: Output) -> CommandResult:
    """List what is in your cache, and which stacks need it."""
    found = cache.listed(open_session(target))
    return CommandResult(data=found, show=lambda: _show(found, output.verbose))


def _show(found: cache.CacheList, verbose: bool) -> None:
    out = console()
    out.print(f"{found.folder}: {decimal(found.size)}", markup=False)
    if found.entries:
        out.print(_by_kind(found.entries))
    if verbose:
        out.print(_each(found.entries))
    if needless := [each for each in found.entries if each.is_needless]:
        size = decimal(sum(each.size for each in needless))
        out.print(f"Nothing needs {len(needless)} of these ({size}): `sparkinstall cache prune` removes them.")


def _by_kind(entries: Sequence[cache.Entry]) -> object:
    table = headed("", "number", "size", "needed by")
    for kind, title in _KINDS.items():
        if some := [each for each in entries if each.kind == kind]:
            needed = sorted({name for each in some for name in each.needed_by})
            table.add_row(title, str(len(some)), decimal(sum(each.size for each in some)), ", ".join(needed))
    return table


def _each(entries: Sequence[cache.Entry]) -> object:
    table = headed("path", "size", "needed by")
    for each in entries:
        table.add_row(each.path, decimal(each.size), ", ".join(each.needed_by))
    return table


@app.command()
@verb("cache verify", "root", "config")
def verify(target: Target, output: Output) -> CommandResult:
    """Read all wheels and NCCL builds, and remove those that are damaged; exit 3 if there were any."""
    del output
    found = cache.verify(open_session(target))
    return CommandResult(Exit.DRIFT if found.damaged else Exit.GOOD, found, lambda: _show_verified(found))


def _show_verified(found: cache.CacheVerified) -> None:
    for path in found.damaged:
        print(f"✗ {path} was damaged and is removed: the next run that needs it downloads or builds it again")
    print(f"{found.checked} files and builds read, {len(found.damaged)} damaged.")


@app.command()
@verb("cache prune", "root", "config")
def prune(target: Target, output: Output, everything: All = False, yes: options.Yes = False) -> CommandResult:
    """Remove what no shipped stack and no environment of this node needs, and incomplete downloads."""

    def agree(going: Sequence[cache.Entry]) -> None:
        if not output.json:
            console().print(_each(going))
        size = decimal(sum(each.size for each in going))
        confirm(f"Remove these {size}?", agreed=yes, default=False)

    done = cache.prune(open_session(target), agree, everything)
    return CommandResult(data=done, show=lambda: _show_pruned(done))


def _show_pruned(done: cache.CachePruned) -> None:
    if done.removed:
        print(f"Removed {len(done.removed)} files and folders: {decimal(done.freed)}.")
    else:
        print("Nothing to remove.")
