"""The installed files against what their wheels brought: nothing is gone, changed, or put in from another wheel."""

import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from msgspec import Struct

from sparkinstall.assets import asset
from sparkinstall.node import Node, site_packages
from sparkinstall.stacks import canonical
from sparkinstall.system import Reader

_PINNED = re.compile(r"^([A-Za-z0-9._-]+) ?(?:==|@)", re.MULTILINE)

# The hash and the size of a file as its wheel has it, by the file's path; several where several wheels bring it.
Forms = dict[str, list[tuple[str, str]]]


class Comparison(Struct, frozen=True):
    """What the installed files are to what their wheels brought.

    `locked`: whether the lock is known; `packages`: how many of it are there. `wrong`: what is wrong, in words;
    `since_installed`: what differs from the wheel's own list of files, and did so when it was installed.
    """

    locked: bool
    packages: int
    wrong: tuple[str, ...]
    since_installed: tuple[str, ...]


def compare(node: Node, on: Reader) -> Comparison | None:
    """The sizes of all files that the lock's wheels brought; the hashes of those that were touched since.

    The kernel notes in a file's ctime when anybody touched it, and no program sets that back: what is older than the
    environment's own stamp need not be read. None where there is no environment.
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
    """Rows, as RECORD has them, of the files that a new environment has in another size than their wheels say.

    uv has compared each wheel with its hash, so most likely RECORD is wrong. No rows, no text.
    """
    import csv
    import io

    if (site := site_packages(node, on)) is None:
        return ""
    here, text = on.real(site), io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for name in _unlike(here, _brought(here, _folders(on, site, _locked(node, on))), time.time_ns()):
        if found := _stat(path := f"{here}/{name}"):
            rows.writerow((name, _sha256(path), found.st_size))
    return text.getvalue()


def _locked(node: Node, on: Reader) -> set[str]:
    """What the lock has put there; packages that somebody added are theirs."""
    lock = (on.read(node.installed_lock) or b"").decode(errors="replace")
    return {canonical(name) for name in _PINNED.findall(lock)}


def _folders(on: Reader, site: str, ours: set[str]) -> list[str]:
    """Where the metadata of the locked packages is."""
    return [name for name in on.names(site) if name.endswith(".dist-info") and _package(name) in ours]


def _package(folder: str) -> str:
    return canonical(folder.removesuffix(".dist-info").rpartition("-")[0])


def _packages(site: str, folders: Iterable[str], ours: set[str], made: int) -> Iterator[str]:
    """What is wrong with whole packages."""
    for name in sorted(ours - {_package(folder) for folder in folders}):
        yield f"{name} is not installed"
    for folder in folders:
        record = _stat(f"{site}/{folder}/RECORD")
        if record is None:
            yield f"{folder}/RECORD is gone"
        elif record.st_ctime_ns > made:
            yield f"{_package(folder)} was installed again since"


def _unlike(site: str, brought: Forms, made: int) -> dict[str, str]:
    """Why a file is not as any wheel brought it, for each that is not."""
    ours = patched_files()
    return {
        name: why
        for name, forms in brought.items()
        if name not in ours and (why := _complaint(f"{site}/{name}", forms, made))
    }


def _brought(site: str, folders: Sequence[str]) -> Forms:
    """What the wheels of these packages have, by their own word, and by ours where that is known to be wrong."""
    # Some wheels bring the same file, each its own (those of nvidia-cutlass-dsl): whichever came last is right.
    brought = _forms(*(f"{site}/{folder}/RECORD" for folder in folders))
    for name, forms in _forms(*map(_known, folders)).items():
        # Ours has the files of the wheels for every architecture.
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
    """Path, hash and size of each file; without those that have none, such as RECORD itself."""
    # Imported late, as below: a run with nothing to do asks no such probe.
    import csv

    if _stat(record) is None:
        return
    with open(record, newline="") as rows:
        for row in csv.reader(rows):
            if len(row) == 3 and row[1] and row[2]:
                yield row[0], row[1], row[2]


def _complaint(path: str, forms: Sequence[tuple[str, str]], made: int) -> str:
    """Why a file is none of the forms (hash, size) in which wheels bring it."""
    found = _stat(path)
    if found is None:
        return "is gone"
    hashes = [digest for digest, size in forms if int(size) == found.st_size]
    if not hashes:
        return f"has {found.st_size} bytes instead of {forms[0][1]}"
    if found.st_ctime_ns > made and _sha256(path) not in hashes:
        return "was changed"
    return ""


def _sha256(path: str) -> str:
    """As RECORD writes it: URL-safe base64 without its padding."""
    import base64

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
    """Files that we change ourselves: whether they are right is for the probe `fp8-path` to say."""
    from sparkinstall.patches import load

    return frozenset(each.target for each in load(Path(asset("patches"))))
