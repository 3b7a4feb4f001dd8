"""`sparkinstall support-bundle`: one masked archive for an issue. Nothing is sent anywhere."""

import time
from pathlib import Path
from typing import Annotated

from msgspec import Struct
from rich.table import Table
from rich.text import Text

from sparkinstall.cli import options, output_file
from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.text_output import console
from sparkinstall.core.session import Target, open_state
from sparkinstall.core.verify import VerifyOptions
from sparkinstall.errors import Problem
from sparkinstall.support import bundle, identity
from sparkinstall.support.mask import Mask
from sparkinstall.support.results import results

Archive = Annotated[
    Path | None,
    options.output("--output", "-o", metavar="FILE", help="The archive, a .tar.gz; default: in the current folder."),
]
_LARGEST = 25_000_000
_ENDING = ".tar.gz"


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
    named = archive or Path(time.strftime("sparkinstall-support-%Y%m%d-%H%M%S.tar.gz"))
    path = output_file.choose(named, _ENDING, agreed=yes)
    on = open_state(target).system
    mask = Mask(identity.known(on))
    found = results(target, chosen, on)
    made = bundle.gather(found.node, on, mask, found.members, found.missing)
    size = write_bundle(path, made.packed())
    members = tuple(PackedMember(each.name, len(each.data)) for each in made.members)
    packed = Packed(str(path), size, members, made.missing, made.masked)
    return CommandResult(data=packed, show=lambda: _show(packed))


def write_bundle(path: Path, data: bytes) -> int:
    if len(data) > _LARGEST:
        raise Problem(f"the archive would have {len(data) / 1e6:.0f} MB, too much for an issue", hint="report this")
    output_file.write(path, _ENDING, data, 0o600)
    return len(data)


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
