"""Compare installed files with their wheels: missing, changed, or overwritten by another wheel."""

import base64
import csv
import hashlib
import io
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from msgspec import Struct

from sparkinstall.assets import asset
from sparkinstall.errors import StateDamaged
from sparkinstall.node import Node, site_packages
from sparkinstall.own_files import read_regular
from sparkinstall.patches import load
from sparkinstall.stacks import canonical
from sparkinstall.system import Reader

_PINNED = re.compile(r"^([A-Za-z0-9._-]+) ?(?:==|@)", re.MULTILINE)

# (hash, size) of a file by its path; several if several wheels contain it.
Forms = dict[str, list[tuple[str, str]]]


class Comparison(Struct, frozen=True):
    """Result of comparing installed files with their wheels.

    `locked`: whether the lock is known; `packages`: how many of its packages are installed. `wrong`: differences;
    `since_installed`: differences from RECORD that existed at installation.
    """

    locked: bool
    packages: int
    wrong: tuple[str, ...]
    since_installed: tuple[str, ...]


def compare(node: Node, on: Reader) -> Comparison | None:
    """Compare the sizes of all files of the lock's wheels, and the hashes of those changed since installation.

    No program can set a file's ctime, so files older than the environment's stamp need not be read. None if there is no
    environment.
    """
    site, stamp = site_packages(node, on), _stat(on.real(node.venv_stamp))
    if site is None or stamp is None:
        return None
    ours, here, made = _locked(node, on), on.real(site), stamp.st_ctime_ns
    folders = _folders(on, site, ours)
    unlike = _unlike(here, _brought(here, folders), made)
    at_first = _forms(on.real(node.wheel_exceptions))
    odd = [name for name in unlike if name in at_first and not _complaint(f"{here}/{name}", at_first[name], made)]
    wrong = [
        *_packages(here, folders, ours, made),
        *(f"{name} {why}" for name, why in unlike.items() if name not in odd),
    ]
    return Comparison(bool(ours), len(folders), tuple(wrong), tuple(f"{name} {unlike[name]}" for name in odd))


def unlike_their_records(node: Node, on: Reader) -> str:
    """Return rows in RECORD format for files of a new environment whose size differs from RECORD; "" if none.

    uv has verified the hash of each wheel, so RECORD itself is wrong.
    """
    if (site := site_packages(node, on)) is None:
        return ""
    here, text = on.real(site), io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for name in _unlike(here, _brought(here, _folders(on, site, _locked(node, on))), time.time_ns()):
        if found := _stat(path := f"{here}/{name}"):
            rows.writerow((name, _sha256(path), found.st_size))
    return text.getvalue()


def _locked(node: Node, on: Reader) -> set[str]:
    """Return the names of the locked packages; packages that the user added are not checked."""
    lock = (on.read(node.installed_lock) or b"").decode(errors="replace")
    return {canonical(name) for name in _PINNED.findall(lock)}


def _folders(on: Reader, site: str, ours: set[str]) -> list[str]:
    """Return the .dist-info folders of the locked packages."""
    return [name for name in on.names(site) if name.endswith(".dist-info") and _package(name) in ours]


def _package(folder: str) -> str:
    return canonical(folder.removesuffix(".dist-info").rpartition("-")[0])


def _packages(site: str, folders: Iterable[str], ours: set[str], made: int) -> Iterator[str]:
    """Yield problems of whole packages."""
    for name in sorted(ours - {_package(folder) for folder in folders}):
        yield f"{name} is not installed"
    for folder in folders:
        record = _stat(f"{site}/{folder}/RECORD")
        if record is None:
            yield f"{folder}/RECORD is missing"
        elif record.st_ctime_ns > made:
            yield f"{_package(folder)} was reinstalled since"


def _unlike(site: str, brought: Forms, made: int) -> dict[str, str]:
    """Return the files that match no wheel, with the reason."""
    ours = patched_files()
    return {
        name: why
        for name, forms in brought.items()
        if name not in ours and (why := _complaint(f"{site}/{name}", forms, made))
    }


def _brought(site: str, folders: Sequence[str]) -> Forms:
    """Return the files of these packages by RECORD, and by our records for wheels whose RECORD is wrong."""
    # Some wheels contain different versions of the same file (nvidia-cutlass-dsl): any of them is right.
    brought = _forms(*(f"{site}/{folder}/RECORD" for folder in folders))
    for name, forms in _forms(*map(_known, folders)).items():
        # Our records cover the wheels of every architecture.
        if name in brought:
            brought[name] += forms
    return brought


def _known(folder: str) -> str:
    version = folder.removesuffix(".dist-info").rpartition("-")[2]
    return str(asset("knowledge") / "records" / f"{_package(folder)}-{version}.csv")


def _forms(*records: str) -> Forms:
    found: Forms = {}
    for name, digest, size in (row for record in records for row in _rows(record)):
        found.setdefault(name, []).append((digest, size))
    return found


def _rows(record: str) -> Iterator[tuple[str, str, str]]:
    """Yield path, hash and size of each file that has them; RECORD itself has none."""
    try:
        for row in csv.reader(io.StringIO(read_regular(record).decode(), newline="")):
            if len(row) == 3 and row[1] and row[2]:
                yield row[0], row[1], str(int(row[2]))
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError, csv.Error) as error:
        hint = "reinstall: `sparkinstall run environment --force`"
        raise StateDamaged(f"{record} cannot be read: {getattr(error, 'strerror', error)}", hint=hint) from error


def _complaint(path: str, forms: Sequence[tuple[str, str]], made: int) -> str:
    """Return why a file matches none of the forms (hash, size), or ""."""
    found = _stat(path)
    if found is None:
        return "is missing"
    hashes = [digest for digest, size in forms if int(size) == found.st_size]
    if not hashes:
        return f"has {found.st_size} bytes instead of {forms[0][1]}"
    if found.st_ctime_ns > made and _sha256(path) not in hashes:
        return "was changed"
    return ""


def _sha256(path: str) -> str:
    """Return the hash as in RECORD: URL-safe base64 without padding."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").digest()
    return "sha256=" + base64.urlsafe_b64encode(found).rstrip(b"=").decode()


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


@lru_cache(maxsize=1)
def patched_files() -> frozenset[str]:
    """Return the files that we patch; the probe `fp8-path` checks them."""
    return frozenset(each.target for each in load(Path(asset("patches"))))
