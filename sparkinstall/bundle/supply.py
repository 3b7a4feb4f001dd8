"""Install from a bundle: it is checked whole, then what this node's steps need goes from it to the cache."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import stacks
from sparkinstall.bundle import checked, contents, git_objects, models
from sparkinstall.core.converge import Supply
from sparkinstall.core.session import Target
from sparkinstall.errors import BadBundle, Storage, storage_errors
from sparkinstall.events import Emit, Progressed, StepEnded, StepStarted, seldom
from sparkinstall.facts.machine import os_release, system_name
from sparkinstall.models.hub import cache_folder
from sparkinstall.node import Node
from sparkinstall.payloads import bundle_archive
from sparkinstall.payloads.bundle_archive import Manifest, Member, OnBytes, Refused
from sparkinstall.probes import Finding, Probe, failed, passed
from sparkinstall.resources.packages import SYSTEM, installed
from sparkinstall.resources.venv import wheelhouse
from sparkinstall.steps.nccl import source
from sparkinstall.system import Reader, processes
from sparkinstall.system.locks import folder_locked
from sparkinstall.wheelhouse import Wheelhouse

NAME = "bundle"
_VARIABLES = {False: "XDG_CACHE_HOME", True: "HF_HUB_CACHE"}


def with_its_stack(target: Target) -> Target:
    """Return a target that names the bundle's stack, if it names none itself and the stack is shipped."""
    if target.bundle is None:
        return target
    path = checked.place(target.bundle, "--bundle")
    stack = checked.manifest_of(path).stack
    given = target.stack is not None or "stack" in target.values()
    return replace(target, bundle=path, stack=target.stack if given or stack not in stacks.names() else stack)


def supply(node: Node, on: Reader, emit: Emit) -> Supply:
    """Check the whole bundle of a node, and return what the run takes from it.

    Raises:
        BadBundle: it is damaged, for another architecture or stack, or of another version.
    """
    path = Path(node.bundle)
    manifest = checked.read(path, _telling(emit))
    with checked.problems(path):
        _require_fit(manifest, node)
    probe = Probe(
        NAME, "the bundle has all that this node needs", partial(_complete, manifest, node), "node",
        "A step would need a network.", to_install=True,
    )  # fmt: skip
    unpacking = models.Unpacking(path, manifest)
    return Supply((probe,), lambda emit: _BringIn(path, manifest, node, on, emit, unpacking).run())


def _require_fit(manifest: Manifest, node: Node) -> None:
    bundle_archive.require_machine(manifest, node.platform)
    if manifest.stack != node.stack.name:
        # A stack that is not shipped is named by its file, which is not in the bundle.
        its = manifest.stack if manifest.stack in stacks.names() else f"its YAML file, that of {manifest.stack}"
        raise Refused(
            f"it has the stack {manifest.stack}, and this node's is {node.stack.name}",
            f"use its stack (`--stack` with {its}), or create a bundle with this node's",
        )


def _complete(manifest: Manifest, node: Node, on: Reader) -> Finding:
    lacking = list(_lacking(manifest, node, on))
    if not lacking:
        return passed(f"{len(manifest.folder('wheels'))} wheels of stack {manifest.stack} for {manifest.platform}")
    older = f"the bundle that it updates (its manifest has the sha256 {manifest.base[:12]}...)"
    hint = f"install {older} first" if manifest.base else "create it again"
    return failed(
        f"it lacks {'; '.join(lacking)}", _package_hint(manifest, node, on) or hint, "all that this node lacks"
    )


def _lacking(manifest: Manifest, node: Node, on: Reader) -> Iterator[str]:
    """Yield in words what neither the bundle nor the cache has."""
    brought = {f"sha256:{each.sha256}" for each in manifest.folder(contents.WHEELS)}
    pins = [pin for pin in node.wheels.locked() if not brought.intersection(pin.hashes)]
    if missing := wheelhouse(node).missing(pins):
        yield f"wheels: {', '.join(pin.requirement for pin in missing)}"
    nccl = source(node)
    is_needed = node.config.nccl.mode == "source" and nccl.kind == "git"
    if is_needed and not nccl.mirror.exists() and contents.nccl_member(nccl.tag) not in _paths(manifest):
        yield f"the source of NCCL {nccl.version}"
    if lacking := models.lacking(manifest):
        yield f"files of the models {', '.join(lacking)}"
    if packages := _missing_packages(manifest, node, on):
        yield f"Debian packages: {', '.join(packages)}"


def _missing_packages(manifest: Manifest, node: Node, on: Reader) -> list[str]:
    """Return the packages that a real node must install and the bundle does not have for its distribution."""
    if node.rehearsal:
        return []
    there, fits = installed(on), _is_for(manifest, on)
    return [
        name for name in contents.debian_names(node) if name not in there and not (fits and manifest.packages.get(name))
    ]


def _is_for(manifest: Manifest, on: Reader) -> bool:
    """Whether the Debian packages of a bundle are for the distribution of this node."""
    return system_name(os_release(on)) == manifest.system


def _package_hint(manifest: Manifest, node: Node, on: Reader) -> str:
    packages = _missing_packages(manifest, node, on)
    if not packages:
        return ""
    where = system_name(os_release(on))
    return (
        f"create the bundle on a machine with {where} ({node.platform}), which adds them; or install them yourself: "
        f"{' '.join(packages)}"
    )


def _paths(manifest: Manifest) -> set[str]:
    return {each.path for each in manifest.members}


def _telling(emit: Emit) -> OnBytes:
    """Return what tells the progress of reading a bundle, and ends it after Ctrl-C."""
    tell = seldom(lambda done, total: emit(Progressed(NAME, done, total, "bytes")))

    def on_bytes(done: int, total: int) -> None:
        processes.refuse_if_stopped()
        tell(done, total)

    return on_bytes


class _BringIn(Struct):
    """Put what a bundle has, and the cache lacks, where the steps look for it."""

    path: Path
    manifest: Manifest
    node: Node
    on: Reader
    emit: Emit
    models: models.Unpacking

    def run(self) -> None:
        started = time.monotonic()
        self.emit(StepStarted(NAME))
        # The packages of an earlier bundle are not those of this one.
        shutil.rmtree(self.node.debian_packages, ignore_errors=True)
        wanted = {each.path: into for each in self.manifest.members if (into := self._place(each))}
        outcome = "changed" if wanted else "unchanged"
        if wanted:
            self.models.require_writable()
            self._require_room([each for each in self.manifest.members if each.path in wanted])
            with storage_errors(f"unpacking {self.path} to {self.node.cache}"):
                self._read(wanted)
        self.emit(StepEnded(NAME, outcome, round(time.monotonic() - started, 3)))

    def _read(self, wanted: "dict[str, _Place]") -> None:
        def take(member: Member) -> AbstractContextManager[BinaryIO] | None:
            place = wanted.get(member.path)
            return place(member) if place else None

        checked.read(self.path, _telling(self.emit), take)
        if self.node.debian_packages.exists():
            # Last: it says that all of them are there.
            (self.node.debian_packages / SYSTEM).write_text(self.manifest.system)
        self.models.finish()

    def _place(self, member: Member) -> "_Place | None":
        folder = member.path.partition("/")[0]
        if folder == contents.WHEELS:
            there = {kept.sha256 for kept in self._house.listed().values()}
            return None if member.sha256 in there else self._wheel
        if folder == contents.DEBS:
            is_for_here = not self.node.rehearsal and _is_for(self.manifest, self.on)
            return self._package if is_for_here else None
        if folder == contents.MODELS:
            return self.models.place(member)
        if repository := contents.repositories(self.node).get(member.path):
            return None if (repository.mirror / "HEAD").exists() else partial(self._mirror, repository)
        return None

    @property
    def _house(self) -> Wheelhouse:
        return wheelhouse(self.node)

    def _require_room(self, wanted: Sequence[Member]) -> None:
        """Raise Storage if a disk has no room for all that goes to it."""
        places = {False: self.node.cache, True: cache_folder()} if self.manifest.models else {False: self.node.cache}
        needed: dict[int, int] = {}
        for is_model, place in places.items():
            place.mkdir(parents=True, exist_ok=True)
            size = sum(each.size for each in wanted if each.path.startswith(f"{contents.MODELS}/") is is_model)
            disk = place.stat().st_dev
            needed[disk] = needed.get(disk, 0) + size
            free = shutil.disk_usage(place).free
            if needed[disk] > free:
                what = f"{place} has no room for the bundle: {needed[disk] >> 20} MiB needed, {free >> 20} MiB free"
                raise Storage(what, hint=f"free some space, or set {_VARIABLES[is_model]} to a folder on a larger disk")

    @contextmanager
    def _wheel(self, member: Member) -> Iterator[BinaryIO]:
        with self._arriving(member) as path:
            with open(path, "wb") as out:
                yield out
            self._house.adopt(path, member.sha256)

    @contextmanager
    def _package(self, member: Member) -> Iterator[BinaryIO]:
        self.node.debian_packages.mkdir(parents=True, exist_ok=True)
        with open(self.node.debian_packages / member.name, "wb") as out:
            yield out

    @contextmanager
    def _mirror(self, repository: contents.Repository, member: Member) -> Iterator[BinaryIO]:
        with self._arriving(member) as path:
            with open(path, "wb") as out:
                yield out
            try:
                with folder_locked(repository.mirror.parent):
                    # Another run may have brought it meanwhile.
                    if not (repository.mirror / "HEAD").exists():
                        git_objects.unpack(path.read_bytes(), repository.mirror, repository.tag, repository.commit)
            except ValueError as error:
                raise BadBundle(
                    f"{member.path} in {self.path} cannot be used: {error}", hint="do not use it"
                ) from error

    @contextmanager
    def _arriving(self, member: Member) -> Iterator[Path]:
        """Yield a path for a file that is not complete yet, deleted at the end wherever that is."""
        folder = self.node.cache / "arriving" / f"{member.sha256[:16]}-{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder / member.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)


_Place = Callable[[Member], AbstractContextManager[BinaryIO]]
