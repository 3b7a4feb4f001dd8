"""`sparkinstall bundle`: one file with which a node without a network is set up."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from msgspec import Struct
from msgspec.structs import replace
from rich.filesize import decimal
from rich.text import Text

from sparkinstall import stacks
from sparkinstall.bundle import checked, models
from sparkinstall.bundle.changes import Change, Changes, changes
from sparkinstall.bundle.create import Order, create, require_locked
from sparkinstall.cli import options, output_file
from sparkinstall.cli.live_output import watching
from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.text_output import console, headed
from sparkinstall.core.session import Target, described
from sparkinstall.errors import BadUsage
from sparkinstall.events import Progressed
from sparkinstall.node import Node
from sparkinstall.payloads.bundle_archive import Manifest

app = typer.Typer(
    add_completion=False,
    help="Make and check one file with which a node without a network is set up.",
    no_args_is_help=True,
)

_SPARK = "aarch64"

Nodes = Annotated[
    int, options.choice(min=1, metavar="NUMBER", help="For how many nodes: 2 and more also get nccl-tests.")
]
Since = Annotated[
    Path | None,
    options.bundle(metavar="OLD", help="Leave out wheels and sources that this older bundle has."),
]
Models = Annotated[
    list[str] | None,
    options.choice(
        "--model", metavar="MODEL", help="Add a model of the hub, ORG/NAME or ORG/NAME@REVISION (may repeat)."
    ),
]
File = Annotated[
    Path | None,
    options.output(
        "--output", "-o", metavar="FILE", readable=False, help="The bundle, a .tar; default: in the current folder."
    ),
]
argument = partial(typer.Argument, readable=False)
Path_ = Annotated[Path, argument(metavar="FILE", help="The bundle.")]


class Described(Struct, frozen=True):
    """A bundle: its path, size in bytes, and what it is for. `files`: how many, by folder.

    `packages`: the Debian packages that a node needs, with their versions; "" if they are not in the bundle.
    `models`: of the hub, as ORG/NAME@COMMIT.
    """

    path: str
    bytes: int
    sparkinstall: str
    stack: str
    platform: str
    python: str
    nodes: int
    files: dict[str, int]
    packages: dict[str, str]
    system: str
    models: tuple[str, ...]
    updates: bool
    manifest: str

    @classmethod
    def of(cls, path: Path, manifest: Manifest) -> "Described":
        files = Counter(each.path.partition("/")[0] for each in manifest.members)
        return cls(
            str(path), manifest.size, manifest.tool, manifest.stack, manifest.platform, manifest.python, manifest.nodes,
            dict(files), dict(manifest.packages), manifest.system, manifest.models, bool(manifest.base),
            manifest.digest,
        )  # fmt: skip


@app.command("create")
@verb("bundle create", "config", "stack", "set_", "platform")
def create_(
    target: Target,
    output: Output,
    nodes: Nodes = 1,
    since: Since = None,
    model: Models = None,
    file: File = None,
    yes: options.Yes = False,
) -> CommandResult:
    """Download all that a node needs into one file, on any Linux machine with a network."""
    node = described(replace(target, platform=target.platform or _SPARK))
    require_locked(node)
    models.require_names(wanted := tuple(model or ()))
    older = _older(since, node) if since else None
    place = output_file.choose(file or Path(f"sparkinstall-{node.stack.name}-{node.platform}.tar"), ".tar", agreed=yes)
    with watching(output.verbose) as emit:
        manifest = create(Order(node, nodes, older, wanted), place, emit)
    made = Described.of(place, manifest)
    return CommandResult(data=made, show=lambda: _show_made(made))


@app.command()
@verb("bundle verify", reads_only=True)
def verify(_: Target, output: Output, file: Path_) -> CommandResult:
    """Read a bundle and compare every byte with its manifest."""
    path = checked.place(file, "FILE")
    with watching(output.verbose) as emit:
        manifest = checked.read(path, lambda done, of: emit(Progressed("bundle", done, of, "bytes")))
    found = Described.of(path, manifest)
    return CommandResult(data=found, show=lambda: _show(found, "is whole"))


@app.command()
@verb("bundle diff", reads_only=True)
def diff(
    _: Target,
    output: Output,
    old: Annotated[Path, argument(metavar="OLD", help="A bundle.")],
    new: Annotated[Path, argument(metavar="NEW", help="Another one.")],
) -> CommandResult:
    """Show which packages and files differ between two bundles; reads only their manifests."""
    del output
    before, after = (checked.manifest_of(checked.place(each, "the bundle")) for each in (old, new))
    found = changes(before, after)
    return CommandResult(data=found, show=lambda: _show_changes(found, before, after))


def _older(since: Path, node: Node) -> Manifest:
    older = checked.manifest_of(checked.place(since, "--since"))
    if older.platform != node.platform:
        raise BadUsage(
            f"{since} is for {older.platform}, and the new bundle for {node.platform}: no node can install both",
            hint=f"name an older bundle for {node.platform}, or leave out --since",
        )
    return older


def _show_made(made: Described) -> None:
    _show(made, "is written")
    out = console()
    is_shipped = made.stack in stacks.names()
    more, option = ("", "") if is_shipped else (f", with the files of stack {made.stack}", " --stack FILE.yaml")
    out.print(f"Carry it to the node{more}, and there:", markup=False, soft_wrap=True)
    name = Path(made.path).name
    line = f"tar -xf {quote(name)} sparkinstall && ./sparkinstall/install.sh --bundle {quote(name)}{option}"
    out.print(f"    {line}", markup=False, soft_wrap=True)


def _show(found: Described, what: str) -> None:
    out = console()
    out.print(Text.assemble(("✓ ", "green bold"), f"{found.path} {what}: {decimal(found.bytes)}"), soft_wrap=True)
    for line in _about(found):
        out.print(f"  {line}", markup=False, soft_wrap=True)


def _about(found: Described) -> Iterator[str]:
    yield f"stack {found.stack} for {found.platform}, Python {found.python}, sparkinstall {found.sparkinstall}"
    yield f"sha256 of its manifest: {found.manifest}"
    if found.updates:
        yield "An update: it needs what the bundle before it has brought to the node."
    missing = sorted(name for name, version in found.packages.items() if not version)
    if missing:
        yield f"The node must have these Debian packages: {', '.join(missing)}"
    elif found.packages:
        yield f"With the Debian packages of {found.system}."
    for name, _, commit in (each.partition("@") for each in found.models):
        yield f"With the model {name} at {commit[:12]}."


def _show_changes(found: Changes, before: Manifest, after: Manifest) -> None:
    out = console()
    for word, bundle in (("before", before), ("after", after)):
        line = f"{word}: stack {bundle.stack} for {bundle.platform}, sparkinstall {bundle.tool}"
        out.print(f"{line}, an update" if bundle.base else line, markup=False, soft_wrap=True)
    if not found.changes:
        out.print("The two bundles have the same content.")
        return
    table = headed("folder", "name", "before", "after", "size")
    for each in found.changes:
        table.add_row(each.folder, each.name, each.before or "-", each.after or "-", _sizes(each))
    out.print(table)
    out.print(f"New in the second: {decimal(found.bytes_new)}.")


def _sizes(change: Change) -> str:
    sizes = (decimal(size) if size else "-" for size in (change.bytes_before, change.bytes_after))
    return " -> ".join(sizes)
