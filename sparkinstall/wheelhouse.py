"""The wheelhouse: a plain folder of wheels, filled by downloads and used by every install.

`index.json` beside the wheels has the sha256 of each, with the size and time that the file had when it was hashed: a
wheel that still has both needs not be read again before it is installed, where uv compares its hash.
"""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Struct, field

from sparkinstall import schema
from sparkinstall.downloads import NotDownloaded, fetch, in_parallel, kept_when_interrupted, sha256_of
from sparkinstall.errors import CommandFailed, Storage, storage_errors
from sparkinstall.events import seldom
from sparkinstall.own_files import read_regular
from sparkinstall.stacks import Pin
from sparkinstall.system import System, processes
from sparkinstall.system.local import replace_file
from sparkinstall.system.locks import wait_for_lock
from sparkinstall.wheel_index import WHEEL_NAME, RemoteWheel, locate, logins, rank, wrong_hash

_PAUSES = (0.5, 3.0)


class Kept(Struct, frozen=True):
    """What the index knows of a wheel: its hash, and the size and time of the file that was hashed."""

    sha256: str
    size: int
    mtime_ns: int


class Wheelhouse(Struct, frozen=True):
    """The wheels in `folder`, a real path."""

    folder: Path

    @property
    def arriving(self) -> Path:
        """The folder of downloads that are not complete."""
        return self.folder / "arriving"

    def found(self, pins: Iterable[Pin]) -> dict[Pin, Path]:
        """Return the wheel of each pin that is there."""
        names = {f"sha256:{kept.sha256}": name for name, kept in self.listed().items()}
        of = {pin: [names[digest] for digest in pin.hashes if digest in names] for pin in pins}
        return {pin: self.folder / max(some, key=rank) for pin, some in of.items() if some}

    def missing(self, pins: Iterable[Pin]) -> list[Pin]:
        """Return the pins without a wheel, in their order."""
        pins = list(pins)
        found = self.found(pins)
        return [pin for pin in pins if pin not in found]

    def listed(self) -> dict[str, Kept]:
        """Return the wheels that are there and unchanged, by their files' names."""
        return {name: kept for name, kept in self._index().items() if _is_unchanged(self.folder / name, kept)}

    def refresh(self) -> list[str]:
        """Hash the wheels that the index does not know, such as those that a user put there. Returns their names.

        Raises:
            Storage: a wheel cannot be read, or the index not be written.
        """
        with self._changing("reading the wheels"):
            known = self.listed()
            wheels = [each for each in sorted(self.folder.glob("*.whl")) if WHEEL_NAME.fullmatch(each.name)]
            new = [each for each in wheels if each.name not in known and each.is_file()]
            if new:
                self._write(known | {each.name: _kept(each, sha256_of(each)) for each in new})
        return [each.name for each in new]

    def adopt(self, file: Path, sha256: str) -> Path:
        """Move a wheel with this hash in; one of the same name is replaced. Returns where it is.

        Raises:
            Storage: it cannot be moved.
        """
        place = self.folder / file.name
        with self._changing(f"moving {file} to {self.folder}"):
            _move(file, place)
            self._write(self.listed() | {place.name: _kept(place, sha256)})
        return place

    def drop(self, names: Iterable[str]) -> None:
        """Remove wheels.

        Raises:
            Storage: one cannot be removed.
        """
        with self._changing("removing wheels"):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            self._write(self.listed())

    def damaged(self) -> list[str]:
        """Read all wheels, and return the names of those that do not have their hash any more."""
        with storage_errors("reading the wheels"):
            return [name for name, kept in self._index().items() if _hash(self.folder / name) not in (kept.sha256, "")]

    def fill(self, on: System, pins: Sequence[Pin], target: Sequence[str]) -> None:
        """Download the wheels that are missing. No network is needed if none is.

        Args:
            target: as in `wheel_index.locate`.

        Raises:
            CommandFailed: a wheel cannot be found or downloaded, or is not the locked one.
            Storage: the folder cannot be written.
        """
        if not self.missing(pins):
            return
        with self.filling():
            # Another run may have brought them meanwhile, or the user.
            self.refresh()
            if missing := self.missing(pins):
                self._download(locate(on, missing, target, self.folder.parent).values(), _from_the_index(on))

    def bring(self, on: System, url: str) -> Path:
        """Return the wheel at `url`, whose hash nobody knows; download it if none of its name is there."""
        wheel = RemoteWheel(url, "")
        with self.filling():
            self.refresh()
            if wheel.name not in self.listed():
                self._download([wheel], _from_the_index(on))
        return self.folder / wheel.name

    def download(self, wheels: Iterable[RemoteWheel], how: "Downloads") -> None:
        """Download these wheels.

        Raises:
            CommandFailed: one cannot be downloaded, or does not have its hash.
            Storage: the folder cannot be written.
        """
        with self.filling():
            self._download(wheels, how)

    def _download(self, wheels: Iterable[RemoteWheel], how: "Downloads") -> None:
        wheels = list(wheels)
        self._require_room(sum(wheel.size for wheel in wheels))
        _Downloading(self, how).bring(wheels)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Keep other runs from downloading."""
        with self._alone(".filling.lock"):
            yield

    def _index(self) -> Mapping[str, Kept]:
        """Return the index; one that cannot be read counts as empty, and is written again by `refresh`."""
        try:
            found = schema.read_json(dict[str, Kept], read_regular(self.folder / "index.json"), "index.json")
        except (OSError, schema.Malformed):
            return {}
        return {name: kept for name, kept in found.items() if WHEEL_NAME.fullmatch(name)}

    def _write(self, index: Mapping[str, Kept]) -> None:
        content = msgspec.json.format(msgspec.json.encode(dict(sorted(index.items()))), indent=1)
        replace_file(str(self.folder / "index.json"), content + b"\n", 0o644)

    @contextmanager
    def _changing(self, doing: str) -> Iterator[None]:
        with storage_errors(doing), self._alone(".index.lock"):
            yield

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Wait until no other run is in this context."""
        with storage_errors(f"locking {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            wait_for_lock(lock)
            yield
        finally:
            os.close(lock)

    def _require_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        arrived = sum(each.stat().st_size for each in self.arriving.rglob("*") if each.is_file())
        if needed - arrived > free:
            what = f"not enough space in {self.folder}: {needed >> 20} MiB needed, {free >> 20} MiB free"
            raise Storage(what, hint="free some space, or set XDG_CACHE_HOME to a folder on a larger disk")


class Downloads(Struct, frozen=True):
    """How to download.

    Args:
        on_bytes: called with (bytes so far, total bytes).
        logins: the Authorization header by host and port.
        fingerprint: as in `fetch`.
        log: the path of the log that an error names.
    """

    on_bytes: Callable[[int, int], None]
    logins: Mapping[str, str]
    fingerprint: str = ""
    log: str = ""


def _from_the_index(on: System) -> Downloads:
    return Downloads(seldom(lambda done, total: on.progress(done, total, "bytes")), logins(), log=on.log)


class _Downloading(Struct):
    """Some downloads into a wheelhouse, with their progress as one."""

    house: Wheelhouse
    how: Downloads
    _sizes: dict[str, int] = field(default_factory=dict)
    _done: dict[str, int] = field(default_factory=dict)
    _failed: bool = False
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def bring(self, wheels: Iterable[RemoteWheel]) -> None:
        """Download, a few at once; the first failure ends all."""
        ordered = sorted(wheels, key=lambda wheel: wheel.size, reverse=True)
        self._sizes = {wheel.name: wheel.size for wheel in ordered}
        with kept_when_interrupted():
            in_parallel(self._one, ordered, self._stop, processes.refuse_if_stopped)

    def _stop(self) -> None:
        self._failed = True

    def _one(self, wheel: RemoteWheel) -> None:
        # By its hash: another file of the same name may be arriving too.
        part = self.house.arriving / (wheel.sha256 or "unknown") / wheel.name
        address = urlsplit(wheel.url)
        if address.scheme == "file":
            self._copy(Path(unquote(address.path)), part)
        else:
            self._fetch(wheel.url, part, self.how.logins.get(address.netloc))
        found = sha256_of(part)
        if is_right := wheel.sha256 in (found, ""):
            self.house.adopt(part, found)
        with storage_errors(f"removing {part.parent}"):
            shutil.rmtree(part.parent)
        if not is_right:
            message = f"{wheel.url} is not the locked wheel: expected sha256 {wheel.sha256}, found {found}"
            raise wrong_hash(message, self.how.log)
        self._tell(wheel.name, self._sizes[wheel.name], 0)

    def _copy(self, source: Path, to: Path) -> None:
        with storage_errors(f"copying {source} to {to.parent}"):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to)

    def _fetch(self, url: str, to: Path, authorization: str | None) -> None:
        def tell(done: int, total: int) -> None:
            self._tell(to.name, done, total)

        for pause in (*_PAUSES, None):
            try:
                fetch(url, to, tell, authorization=authorization, fingerprint=self.how.fingerprint)
                return
            except NotDownloaded as failure:
                failure.log = self.how.log
                if pause is None or not failure.again or self._failed:
                    raise
                time.sleep(pause)

    def _tell(self, name: str, done: int, total: int) -> None:
        processes.refuse_if_stopped()
        if self._failed:
            raise CommandFailed("another download failed")
        with self._guard:
            self._done[name] = done
            self._sizes[name] = self._sizes[name] or total
            self.how.on_bytes(sum(self._done.values()), sum(self._sizes.values()))


def _move(file: Path, to: Path) -> None:
    try:
        file.replace(to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # On another disk. What is copied half has no name of a wheel.
        shutil.copyfile(file, part := to.with_suffix(".part"))
        part.replace(to)
        file.unlink()


def _kept(path: Path, sha256: str) -> Kept:
    found = path.stat()
    return Kept(sha256, found.st_size, found.st_mtime_ns)


def _is_unchanged(path: Path, kept: Kept) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (kept.size, kept.mtime_ns)


def _hash(path: Path) -> str:
    """Return the sha256 of a file; "" if it is gone."""
    try:
        return sha256_of(path)
    except FileNotFoundError:
        return ""
