"""`sparkinstall support-bundle`: one masked archive for an issue. Nothing is sent anywhere."""

import errno
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import Struct

from sparkinstall.cli import options
from sparkinstall.cli.run_command import Answer, answer, confirm
from sparkinstall.cli.verify import Choice, HowFar, known_level
from sparkinstall.core.session import Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparkinstall.core.session import Session
    from sparkinstall.errors import Storage
    from sparkinstall.node import Node
    from sparkinstall.support.bundle import Bundle
    from sparkinstall.system.local import LocalSystem

Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="The archive, a .tar.gz; made here without it.", rich_help_panel="Output"
    ),
]
_LARGEST = 25_000_000


class Told(Struct, frozen=True):
    """What the other verbs say, by the member that it becomes, and what they could not say."""

    parts: dict[str, Any]
    missing: tuple[str, ...]


def support_bundle(
    output: Output = None,
    root: options.Root = None,
    config: options.ConfigFile = None,
    level: HowFar = None,
    yes: options.Yes = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Pack facts, journal, logs and a `verify` into one archive for an issue, masked; nothing is sent."""
    asked = Target(root, config, verbose=verbose)
    body = lambda: _support_bundle(asked, output, Choice(level=known_level(level)), yes, json)  # noqa: E731
    answer("support-bundle", body, root=root, json=json, verbose=verbose)


def _support_bundle(asked: Target, output: Path | None, choice: Choice, yes: bool, json: bool) -> Answer:
    from sparkinstall.core.session import open_state
    from sparkinstall.support import bundle, identity
    from sparkinstall.support.mask import Mask

    path = _place(output, yes)
    on = open_state(asked).system
    mask = Mask(identity.known(on))
    node, told = _told(asked, choice, on, json)
    made = bundle.gather(node, on, mask, told.parts, told.missing)
    size = write_bundle(path, made.packed())
    return Answer(data=_data(path, size, made), show=lambda: _show(path, size, made))


def _place(output: Path | None, yes: bool) -> Path:
    """Where the archive goes; asked for before the work begins.

    Raises:
        BadUsage: it cannot be a file there, or it is one already.
        Storage: the folder is not this user's to write to.
    """
    from sparkinstall.errors import BadUsage

    path = (output or Path(time.strftime("sparkinstall-support-%Y%m%d-%H%M%S.tar.gz"))).expanduser().absolute()
    if not path.parent.is_dir():
        raise BadUsage(f"there is no folder {path.parent}", hint=f"make it first: mkdir -p {path.parent}")
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise BadUsage(f"{path} is no file", hint="name the archive itself: `--output FILE.tar.gz`")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _unwritable(path, PermissionError(errno.EACCES, "Permission denied"))
    if path.exists() or path.is_symlink():
        if not (yes or sys.stdin.isatty()):
            way_out = "add `--yes` to replace it, or name another file: `--output FILE.tar.gz`"
            raise BadUsage(f"{path} is there already", hint=way_out)
        confirm(f"{path} is there already. Replace it?", agreed=yes, default=False)
    return path


def _told(asked: Target, choice: Choice, on: "LocalSystem", json: bool) -> "tuple[Node, Told]":
    """The node, and what verbs say of it; one whose settings cannot be used is taken for one without any."""
    from sparkinstall.cli.json_output import problem_data
    from sparkinstall.core.session import open_session
    from sparkinstall.errors import Problem

    missing: list[str] = []
    try:
        session = open_session(asked)
    except Problem as problem:
        node = _unset(on)
        parts = {"settings.json": {"error": problem_data(problem)}}
        missing.append(f"settings: {problem.message}")
    else:
        node = session.node
        missing += _of_journal(session)
        parts = {
            "settings.json": _said(lambda: _settings(session), "settings", missing),
            "verify.json": _said(lambda: _verify(session, choice, json), "verify", missing),
        }
    parts["preflight.json"] = _said(lambda: _preflight(node, on), "preflight", missing)
    return node, Told(parts, tuple(missing))


def _of_journal(session: "Session") -> list[str]:
    """What is wrong with the journal; as far as it can be read it is in the archive all the same."""
    from sparkinstall.errors import Problem

    try:
        problem = session.state.trouble(session.node)
    except Problem as refused:
        problem = refused
    return [f"journal: {problem.message}"] if problem else []


def _said(ask: "Callable[[], Any]", what: str, missing: list[str]) -> Any:
    from sparkinstall.cli.json_output import problem_data
    from sparkinstall.errors import Problem

    try:
        return ask()
    except Problem as problem:
        missing.append(f"{what}: {problem.message}")
        return {"error": problem_data(problem)}
    except Exception as error:  # a bug of ours is a good reason for this archive, not for there being none
        import traceback

        missing.append(f"{what}: {type(error).__name__}: {error}")
        return {"traceback": traceback.format_exc().splitlines()}


def _settings(session: "Session") -> dict[str, Any]:
    from sparkinstall.cli.settings import rows

    return rows(session)


def _preflight(node: "Node", on: "LocalSystem") -> list[dict[str, Any]]:
    """The checks before an installation, and the machine itself: where nothing is set up, there is nothing else."""
    from sparkinstall.cli.json_output import finding_data
    from sparkinstall.core import checks
    from sparkinstall.events import silent
    from sparkinstall.probes.preflight import preflight

    probes = [*preflight(node), *checks.of_no_step(node)]
    found = checks.look((each for each in probes if not each.load), on, silent)
    return [finding_data(each.probe, each.finding, each.seconds) for each in found]


def _verify(session: "Session", choice: Choice, json: bool) -> dict[str, Any]:
    from sparkinstall.cli.verify import data, looked_through

    return data(session, looked_through(session, choice, json))


def _unset(on: "LocalSystem") -> "Node":
    """The node as it would be with no settings."""
    import platform

    from sparkinstall import stacks
    from sparkinstall.assets import user_cache
    from sparkinstall.config import Config
    from sparkinstall.node import Node

    machine = platform.machine()
    return Node(
        config=Config(), stack=stacks.load(stacks.DEFAULT), platform=machine, machine=machine,
        rehearsal=on.rehearsal, full=False, home=str(Path.home()), cache=user_cache(),
    )  # fmt: skip


def write_bundle(path: Path, data: bytes) -> int:
    from sparkinstall.errors import Problem
    from sparkinstall.system.local import replace_file

    if len(data) > _LARGEST:
        raise Problem(f"the archive would have {len(data) / 1e6:.0f} MB, too much for an issue", hint="report this")
    try:
        replace_file(str(path), data, 0o600)
    except OSError as error:
        raise _unwritable(path, error) from error
    return len(data)


def _unwritable(path: Path, error: OSError) -> "Storage":
    from sparkinstall.errors import storage_problem

    # Without the name in it: that is the one under which the archive waits until it is whole.
    problem = storage_problem(OSError(error.errno, error.strerror), f"writing {path}")
    problem.hint = "name a place that you can write to: `--output FILE.tar.gz`"
    return problem


def _data(path: Path, size: int, made: "Bundle") -> dict[str, Any]:
    members = [{"name": each.name, "bytes": len(each.data)} for each in made.members]
    return {
        "path": str(path), "bytes": size, "members": members, "missing": list(made.missing), "masked": made.masked,
    }  # fmt: skip


def _show(path: Path, size: int, made: "Bundle") -> None:
    from rich.table import Table
    from rich.text import Text

    from sparkinstall.cli.text_output import console

    out = console()
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for member in made.members:
        table.add_row(Text(f"  {member.name}"), Text(f"{len(member.data) / 1024:,.1f} KiB", style="dim"))
    out.print(table)
    for each in made.missing:
        out.print(Text.assemble(("  ! ", "yellow"), f"not in it: {each}"))
    out.print(f"\n[green bold]✓[/] {path} ({size / 1024:,.0f} KiB)", soft_wrap=True)
    out.print("Nothing was sent anywhere. Look it over, then attach it to your issue.")
    if made.masked:
        out.print(Text(f"masked: {made.masked}", style="dim"))
