"""Create a bundle: everything is downloaded to the cache, so that a second attempt continues, then written in order."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct, field

from sparkinstall import __version__
from sparkinstall.bundle import contents, debian, git_objects, models, part
from sparkinstall.cluster import bootstrap
from sparkinstall.core.models import Dialog
from sparkinstall.downloads import sha256_of
from sparkinstall.errors import BadBundle, BadConfig, CommandFailed, storage_errors
from sparkinstall.events import Emit, Progressed, StepEnded, StepStarted, Warned
from sparkinstall.node import Node
from sparkinstall.payloads import bundle_archive
from sparkinstall.payloads.bundle_archive import Content, Manifest, Member, Refused
from sparkinstall.probes import nccl_tests
from sparkinstall.resources.packages import INDEX
from sparkinstall.resources.venv import wheelhouse
from sparkinstall.steps.nccl import source
from sparkinstall.system.local import LocalSystem
from sparkinstall.system.locks import cache_in_use, folder_locked
from sparkinstall.wheel_index import for_platform

_GLIBC = "2.39"


class Order(Struct, frozen=True):
    """What a bundle is to have. `since`: the manifest of an older one, whose files are left out.

    `models`: of the hub, as ORG/NAME or ORG/NAME@REVISION.
    """

    node: Node
    nodes: int = 1
    since: Manifest | None = None
    models: tuple[str, ...] = ()


class Packed(Struct):
    """The contents of a bundle by their paths, and the sha256 of those that are known.

    `kept`: files that an older bundle has.
    """

    files: dict[str, Content] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    kept: list[Member] = field(default_factory=list)
    packages: Mapping[str, str] = field(default_factory=dict)
    system: str = ""
    models: list[str] = field(default_factory=list)


def require_locked(node: Node) -> None:
    """Refuse a stack some of whose hashes are recorded only at the first install.

    Raises:
        BadConfig: its lock does not have all of them.
    """
    if not node.wheels.complete:
        raise BadConfig(
            f"stack {node.stack.name} has no hash of {', '.join(node.wheels.unhashed) or 'its packages'} for "
            f"{node.platform}, and a bundle has only wheels whose hash is known in advance",
            hint="choose another (`sparkinstall stacks` lists them), or give one of your own a lock (docs/offline.md)",
        )


def create(order: Order, to: Path, emit: Emit) -> Manifest:
    """Download what is missing, and write the bundle; `to` appears when it is whole.

    Raises:
        CommandFailed, Blocked: something cannot be downloaded, or is not what the locks say.
        BadBundle: a wheel in the cache is damaged.
        Busy, BadUsage, Storage: as in `part.begun`.
    """
    packed = Packed()
    parts: Sequence[tuple[str, Callable[[Order, Packed, _Part], None]]] = (
        ("tool", _tool), ("nccl", _nccl), ("packages", _packages), ("wheels", _wheels), ("models", _models),
    )  # fmt: skip
    # Begun first, and wheels and models last: what cannot be written or reached is found before the largest download.
    with part.begun(to) as out, cache_in_use(order.node.cache):
        for name, bring in parts if order.models else parts[:-1]:
            with _shown(name, emit) as on:
                bring(order, packed, on)
        with _shown("archive", emit) as on:
            manifest = _manifest(order, packed)
            _write(manifest, packed, to, out, on)
    return manifest


class _Part(LocalSystem):
    """This machine while one part of a bundle is brought: only caches are written."""

    def __init__(self, name: str, emit: Emit) -> None:
        super().__init__()
        self._name, self._emit = name, emit

    def warn(self, text: str) -> None:
        self._emit(Warned(self._name, text))

    def progress(self, done: int, total: int, unit: str) -> None:
        self._emit(Progressed(self._name, done, total, unit))


@contextmanager
def _shown(name: str, emit: Emit) -> Iterator[_Part]:
    started = time.monotonic()
    emit(StepStarted(name))
    yield _Part(name, emit)
    emit(StepEnded(name, "changed", round(time.monotonic() - started, 3)))


# --- the parts


def _tool(order: Order, packed: Packed, _: _Part) -> None:
    """The sources of this tool, and the wheels that it needs itself, with uv."""
    packed.files |= {f"{contents.TOOL}/{name}": path for name, path in bootstrap.sources().items()}
    for python in bootstrap.PYTHONS:
        wheels = _own_packages(bootstrap.Place(order.node.platform, python, _GLIBC))
        packed.files |= {f"{contents.TOOL_WHEELS}/{each.name}": each for each in wheels}


def _own_packages(place: bootstrap.Place) -> list[Path]:
    """Return the wheels that the tool needs itself.

    Raises:
        CommandFailed: they cannot be downloaded.
        Storage: the cache cannot be read or written.
    """
    if folder := bootstrap.own_packages(place):
        return list(folder.iterdir())
    raise CommandFailed(
        "the tool's own packages could not be downloaded",
        hint="check the network and run the same command again; finished downloads are kept",
    )


def _wheels(order: Order, packed: Packed, on: _Part) -> None:
    node, house = order.node, wheelhouse(order.node)
    older = {f"sha256:{each.sha256}": each for each in order.since.everything} if order.since else {}
    pins = node.wheels.locked()
    new = [pin for pin in pins if not older.keys() & set(pin.hashes)]
    packed.kept += [older[digest] for pin in pins for digest in pin.hashes if digest in older]
    house.fill(on, new, for_platform(node.platform, node.stack.python))
    hashes = {name: kept.sha256 for name, kept in house.listed().items()}
    for path in house.found(new).values():
        packed.files[f"{contents.WHEELS}/{path.name}"] = path
        packed.known[f"{contents.WHEELS}/{path.name}"] = hashes[path.name]


def _nccl(order: Order, packed: Packed, on: _Part) -> None:
    nccl = source(order.node)
    if order.node.config.nccl.mode == "source" and nccl.kind == "git":
        packed.files[contents.nccl_member(nccl.tag)] = git_objects.packed(nccl.mirrored(on))
    if order.nodes > 1:
        try:
            mirror = nccl_tests.mirrored(nccl_tests.workshop(order.node))
        except nccl_tests.NotBuilt as why:
            on.warn(f"{why}; without it only NCCL's bandwidth cannot be measured on the nodes")
            return
        packed.files[contents.nccl_tests_member()] = git_objects.packed(mirror)


def _packages(order: Order, packed: Packed, on: _Part) -> None:
    node = contents.of_several(order.node) if order.nodes > 1 else order.node
    names = contents.debian_names(node)
    packed.packages = dict.fromkeys(names, "")
    found = None
    if node.platform == node.machine:
        # apt itself would let two runs spoil each other's lists.
        with folder_locked(node.cache / "apt"):
            found = debian.download(on, names, node.cache / "apt")
    if found is None:
        return
    packed.packages, packed.system = {**packed.packages, **found.versions}, found.system
    packed.files |= {f"{contents.DEBS}/{name}": path for name, path in found.files.items()}
    packed.files[f"{contents.DEBS}/{INDEX}"] = found.index


def _models(order: Order, packed: Packed, on: _Part) -> None:
    for word in order.models:
        snapshot = models.brought(word, Dialog(lambda done, total: on.progress(done, total, "bytes"), on.warn))
        packed.files |= models.members(snapshot)
        packed.known |= models.known_hashes(snapshot)
        packed.models.append(snapshot.name)


# --- the archive


def _manifest(order: Order, packed: Packed) -> Manifest:
    older = {each.sha256 for each in order.since.everything} if order.since else set()
    files = [
        Member(path, *_size_and_hash(content, packed.known.get(path))) for path, content in sorted(packed.files.items())
    ]
    # The tool is always whole, so that install.sh works; what it brings is taken from the cache.
    spared = (f"{contents.NCCL}/", f"{contents.MODELS}/")
    kept = [each for each in files if each.sha256 in older and each.path.startswith(spared)]
    return Manifest(
        tool=__version__,
        stack=order.node.stack.name,
        platform=order.node.platform,
        python=order.node.stack.python,
        nodes=order.nodes,
        members=tuple(each for each in files if each not in kept),
        packages=packed.packages,
        system=packed.system,
        base=order.since.digest if order.since else "",
        kept=tuple(sorted([*packed.kept, *kept], key=lambda each: each.path)),
        models=tuple(sorted(packed.models)),
    )


def _size_and_hash(content: Content, known: str | None) -> tuple[int, str]:
    if isinstance(content, bytes):
        return len(content), bundle_archive.sha256(content)
    with storage_errors(f"reading {content}"):
        return content.stat().st_size, known or sha256_of(content)


def _write(manifest: Manifest, packed: Packed, to: Path, out: BinaryIO, on: _Part) -> None:
    try:
        with storage_errors(f"writing {to}"):
            bundle_archive.write(out, manifest, packed.files, lambda done, of: on.progress(done, of, "bytes"))
    except Refused as refused:
        raise BadBundle(f"{to} cannot be written: {refused.message}", hint=refused.hint) from refused
