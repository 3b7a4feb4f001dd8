"""The models in the hub's cache, in the layout of the hub's own client: blobs by hash, snapshots of links, refs."""

import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from sparkinstall.downloads import Known
from sparkinstall.errors import Storage, storage_errors
from sparkinstall.models import listing
from sparkinstall.models.listing import HubFile, Listing
from sparkinstall.own_files import read_regular
from sparkinstall.system.local import replace_file
from sparkinstall.system.locks import folder_locked, is_folder_locked

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PREFIX = "models--"
_ARRIVING = ".incomplete"
_SMALL = 1 << 16
_SHA256 = 64


class Revision(Struct, frozen=True):
    """A snapshot of a model: its commit, the branches and tags that it is known by, its size in bytes and its files.

    `complete`: null if the cache has no list of the model's files. `missing`: paths that are not there.
    """

    commit: str
    refs: Sequence[str]
    size: int
    files: int
    complete: bool | None
    missing: Sequence[str]


class ModelFolder(Struct, frozen=True):
    """The folder of one model in a cache."""

    cache: Path
    model: str

    @property
    def path(self) -> Path:
        return self.cache / (_PREFIX + self.model.replace("/", "--"))

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    @property
    def locks(self) -> Path:
        """Where the hub's own client locks the files that it downloads."""
        return self.cache / ".locks" / self.path.name

    def snapshot(self, commit: str) -> Path:
        return self.path / "snapshots" / commit

    def _tree(self, commit: str) -> Path:
        return self.path / "trees" / f"{commit}.json"

    @contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Keep other runs from changing this model; wait for one that does, after telling so."""
        if is_folder_locked(self.locks):
            on_wait()
        with folder_locked(self.locks):
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep other runs from changing this model, but not from reading it."""
        with folder_locked(self.locks, fcntl.LOCK_SH):
            yield

    # --- reading

    def exists(self) -> bool:
        return self.path.is_dir()

    def listing(self, commit: str) -> Listing | None:
        """Return the files that the model has at a commit, if a list of them is here."""
        try:
            files = listing.files_of_tree(read_regular(self._tree(commit), listing.LARGEST_ANSWER))
        except OSError:
            return None
        return None if files is None else Listing(self.model, commit, files)

    def linked(self, commit: str) -> Listing | None:
        """Return the files of a snapshot by its links; None: one leads to no blob that is named after its hash."""
        files = []
        for path in sorted(_walked(top := self.snapshot(commit))):
            name, size = Path(os.path.realpath(path)).name, _size_of(path)
            if not path.is_symlink() or not _BLOB.fullmatch(name) or size is None:
                return None
            large = len(name) == _SHA256
            files.append(HubFile(str(path.relative_to(top)), size, "" if large else name, name if large else ""))
        return Listing(self.model, commit, tuple(files)) if files else None

    def is_whole(self, file: HubFile) -> bool:
        """Return whether the blob of a file is there, by its size."""
        return _size_of(self.blobs / file.digest) == file.size

    def known(self, file: HubFile) -> Known:
        """Return what its download must be; parts and locks have the names that the hub's own client gives them."""
        return Known(
            file.size,
            file.digest,
            listing.hasher(file.digest, file.size),
            self.blobs / f"{file.digest}{_ARRIVING}",
            self.locks / f"{file.digest}.lock",
        )

    def arrived(self, file: HubFile) -> int:
        """Return how many bytes of a file an earlier run has received."""
        return min(_size_of(self.blobs / f"{file.digest}{_ARRIVING}") or 0, file.size)

    def revisions(self) -> list[Revision]:
        """Return each snapshot, and each one that was begun."""
        trees = {path.stem for path in _entries(self.path / "trees") if path.suffix == ".json"}
        commits = {path.name for path in _entries(self.path / "snapshots")} | trees
        refs = self._refs()
        return [self._revision(each, refs.get(each, [])) for each in sorted(commits) if _COMMIT.fullmatch(each)]

    def _revision(self, commit: str, refs: Sequence[str]) -> Revision:
        listed, there = self.listing(commit), self._files(commit)
        if listed:
            missing = [file.path for file in listed.files if there.get(file.path) != file.size]
            size = sum({file.digest: file.size for file in listed.files}.values())
            return Revision(commit, refs, size, len(listed.files), not missing, missing)
        missing = sorted({path for path, size in there.items() if size is None} | self._unlisted(commit, there))
        size = sum(size or 0 for size in there.values())
        return Revision(commit, refs, size, len(there), False if missing else None, missing)

    def _files(self, commit: str) -> dict[str, int | None]:
        """Return the sizes of a snapshot's files by their paths; None: its link leads nowhere."""
        top = self.snapshot(commit)
        return {str(path.relative_to(top)): _size_of(path) for path in _walked(top)}

    def _unlisted(self, commit: str, there: Mapping[str, int | None]) -> set[str]:
        """Return the files of weights that an index of the snapshot names, but that are not in it."""
        wanted: set[str] = set()
        for path in there:
            if path.endswith(".index.json") and "/" not in path:
                wanted |= _named_by_index(self.snapshot(commit) / path)
        return {path for path in wanted if path not in there}

    def _refs(self) -> dict[str, list[str]]:
        top = self.path / "refs"
        found: dict[str, list[str]] = {}
        for path in sorted(_walked(top)):
            try:
                commit = read_regular(path, _SMALL).decode(errors="replace").strip()
            except OSError:
                continue
            found.setdefault(commit, []).append(str(path.relative_to(top)))
        return found

    def all_blobs(self) -> list[Path]:
        """Return the blobs whose name is the hash of their content."""
        return sorted(path for path in _entries(self.blobs) if _BLOB.fullmatch(path.name) and path.is_file())

    def unchecked(self) -> list[str]:
        """Return what is among the blobs under another name, but for parts."""
        others = (path for path in _entries(self.blobs) if not _BLOB.fullmatch(path.name))
        return sorted(path.name for path in others if not path.name.endswith((_ARRIVING, ".lock")))

    def users(self, blob: Path) -> list[str]:
        """Return the paths in snapshots that a blob is the content of."""
        top, real = self.path / "snapshots", os.path.realpath(blob)
        found = (path for path in _walked(top) if path.is_symlink() and os.path.realpath(path) == real)
        return sorted({str(Path(*path.relative_to(top).parts[1:])) for path in found})

    def bytes(self) -> int:
        """Return what the model takes on the disk."""
        return sum(_own_size_of(path) for path in _walked(self.path))

    def arriving(self) -> int:
        """Return how many bytes are in parts of files."""
        return sum(_size_of(path) or 0 for path in _entries(self.blobs) if path.name.endswith(_ARRIVING))

    # --- changing

    def begin(self, listed: Listing) -> None:
        """Create the folders, and record which files the model has: so it is known what a killed run has not brought.

        Raises:
            Storage: it cannot be written.
        """
        tree = self._tree(listed.commit)
        with storage_errors(f"writing below {self.path}"):
            for folder in (self.blobs, self.path / "snapshots", tree.parent):
                folder.mkdir(parents=True, exist_ok=True)
            # Of a snapshot that an older client made, git's names of large files are not known.
            if all(file.blob_id for file in listed.files):
                replace_file(
                    str(tree), json.dumps(msgspec.to_builtins(listing.tree_of(listed)), indent=1).encode(), 0o644
                )

    def drop_if_empty(self) -> None:
        """Remove the folder if nothing of the model has come."""
        if not any(_entries(self.blobs)) and not any(_entries(self.path / "snapshots")):
            with storage_errors(f"removing {self.path}"):
                shutil.rmtree(self.path, ignore_errors=True)

    def finish(self, listed: Listing, refs: Iterable[str]) -> None:
        """Link all files into the snapshot, then let the branches and tags mean it. All blobs are there.

        Raises:
            Storage: it cannot be written.
        """
        snapshot = self.snapshot(listed.commit)
        # A snapshot is begun elsewhere, so that it appears as a whole; one that others began is completed.
        place = snapshot if snapshot.is_dir() else self.path / "trees" / f"{listed.commit}.new"
        with storage_errors(f"writing below {self.path}"):
            if place != snapshot and place.exists():
                shutil.rmtree(place)
            place.mkdir(parents=True, exist_ok=True)
            for file in listed.files:
                _link(place, file)
            if place != snapshot:
                place.rename(snapshot)
            for name in refs:
                if name == listed.commit:
                    continue
                ref = self.path / "refs" / name
                ref.parent.mkdir(parents=True, exist_ok=True)
                replace_file(str(ref), listed.commit.encode(), 0o644)

    def remove(self) -> None:
        """Remove the model: first what makes it look complete, so that a killed run leaves no half of it.

        Raises:
            Storage: it cannot be removed.
        """
        with storage_errors(f"removing {self.path}"):
            for name in ("refs", "snapshots"):
                if (self.path / name).is_dir() and not (self.path / name).is_symlink():
                    shutil.rmtree(self.path / name)
            shutil.rmtree(self.path)


def folders(cache: Path) -> list[ModelFolder]:
    """Return the models in a cache.

    Raises:
        Storage: it cannot be read.
    """
    with storage_errors(f"reading {cache}", but=FileNotFoundError):
        try:
            names = sorted(path.name for path in cache.iterdir() if path.name.startswith(_PREFIX) and path.is_dir())
        except FileNotFoundError:
            return []
    return [ModelFolder(cache, name.removeprefix(_PREFIX).replace("--", "/")) for name in names]


def _link(place: Path, file: HubFile) -> None:
    """Link a file of a snapshot to its blob, unless it already is."""
    path = place / file.path
    _require_folders(place, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    target = "../" * (2 + file.path.count("/")) + f"blobs/{file.digest}"
    if path.is_symlink() and os.readlink(path) == target:
        return
    waiting = path.with_name(f".{file.digest}.new")
    waiting.unlink(missing_ok=True)
    waiting.symlink_to(target)
    waiting.replace(path)


def _require_folders(place: Path, path: Path) -> None:
    for folder in path.relative_to(place).parents:
        if (place / folder).is_symlink():
            raise Storage(f"{place / folder} is a link, but a folder of the model", hint="remove it")


def _named_by_index(path: Path) -> set[str]:
    try:
        content = json.loads(read_regular(path, listing.LARGEST_ANSWER))
        return {name for name in content["weight_map"].values() if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _size_of(path: Path) -> int | None:
    """Return the size of a regular file, also behind a link; None: there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _own_size_of(path: Path) -> int:
    """Return the size of a file, 0 of a link, and of a part that a download has just renamed."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0
    return 0 if stat.S_ISLNK(found.st_mode) else found.st_size


def _entries(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return ()


def _walked(top: Path) -> Iterator[Path]:
    """All files and links below a folder; no link is followed."""
    for folder, names, files in os.walk(top):
        yield from (Path(folder, name) for name in files)
        yield from (path for path in (Path(folder, name) for name in names) if path.is_symlink())
