"""`sparkinstall support-bundle`: one masked archive for an issue. Nothing is sent anywhere."""

import errno
import os
import time
from pathlib import Path
from typing import Annotated

from msgspec import Struct
from rich.table import Table
from rich.text import Text

from sparkinstall.cli import options
from sparkinstall.cli.run_command import CommandResult, Output, agree_to_replace, verb
from sparkinstall.cli.text_output import console
from sparkinstall.core.session import Target, open_state
from sparkinstall.core.verify import VerifyOptions
from sparkinstall.errors import BadUsage, Problem, Storage, storage_problem
from sparkinstall.given import absolute
from sparkinstall.support import bundle, identity
from sparkinstall.support.mask import Mask
from sparkinstall.support.results import results
from sparkinstall.system.local import replace_file

Archive = Annotated[
    Path | None,
    options.output("--output", "-o", metavar="FILE", help="The archive, a .tar.gz; default: in the current folder."),
]
_LARGEST = 25_000_000


class PackedMember(Struct, frozen=True):
    """Name and size of a file in the archive."""

    name: str
    bytes: int


class Packed(Struct, frozen=True):
    """The archive that was written; `missing` and `masked` as in `Bundle`."""

    path: str
    bytes: int
    members: tuple[PackedMember, ...]
    missing: tuple[str, ...]
    masked: str


@verb("support-bundle", "root", "config", reads_only=True)
def support_bundle(
    target: Target, output: Output, archive: Archive = None, level: options.HowFar = None, yes: options.Yes = False
) -> CommandResult:
    """Pack facts, journal, logs and a `verify` into one archive for an issue, masked; nothing is sent."""
    del output
    chosen = VerifyOptions(level=options.known_level(level))
    path = _place(archive, yes)
    on = open_state(target).system
    mask = Mask(identity.known(on))
    found = results(target, chosen, on)
    made = bundle.gather(found.node, on, mask, found.members, found.missing)
    size = write_bundle(path, made.packed())
    members = tuple(PackedMember(each.name, len(each.data)) for each in made.members)
    packed = Packed(str(path), size, members, made.missing, made.masked)
    return CommandResult(data=packed, show=lambda: _show(packed))


def _place(output: Path | None, yes: bool) -> Path:
    """Return the path of the archive, after confirmation, before the work begins.

    Raises:
        BadUsage: the path cannot be a file, or exists.
        Storage: this user may not write to the folder.
    """
    path = absolute(output or time.strftime("sparkinstall-support-%Y%m%d-%H%M%S.tar.gz"), "--output")
    if not path.parent.is_dir():
        raise BadUsage(f"there is no folder {path.parent}", hint=f"create it first: mkdir -p {path.parent}")
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise BadUsage(f"{path} is not a file", hint="name the archive itself: `--output FILE.tar.gz`")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _unwritable(path, PermissionError(errno.EACCES, "Permission denied"))
    agree_to_replace(path, ".tar.gz", agreed=yes)
    return path


def write_bundle(path: Path, data: bytes) -> int:
    if len(data) > _LARGEST:
        raise Problem(f"the archive would have {len(data) / 1e6:.0f} MB, too much for an issue", hint="report this")
    try:
        replace_file(str(path), data, 0o600)
    except OSError as error:
        raise _unwritable(path, error) from error
    return len(data)


def _unwritable(path: Path, error: OSError) -> Storage:
    # Without the error's file name: it is that of the temporary file.
    hint = "choose a folder that you can write to: `--output FILE.tar.gz`"
    return storage_problem(OSError(error.errno, error.strerror), f"writing {path}", hint)


def _show(packed: Packed) -> None:
    out = console()
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for member in packed.members:
        table.add_row(Text(f"  {member.name}"), Text(f"{member.bytes / 1024:,.1f} KiB", style="dim"))
    out.print(table)
    for each in packed.missing:
        out.print(Text.assemble(("  ! ", "yellow"), f"missing: {each}"))
    out.print(f"\n[green bold]✓[/] {packed.path} ({packed.bytes / 1024:,.0f} KiB)", soft_wrap=True)
    out.print("Nothing was sent anywhere. Review the archive, then attach it to your issue.")
    if packed.masked:
        out.print(Text(f"masked: {packed.masked}", style="dim"))
