"""The installed files against what their wheels brought: nothing is gone, changed, or put in from another wheel."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from sparkinstall.node import Node, site_packages
from sparkinstall.probes import Finding, failed, passed
from sparkinstall.system import Reader

_MEND = "make it anew: `sparkinstall run environment fp8 --fresh`"
_SHOWN = 4
_PINNED = re.compile(r"^([A-Za-z0-9._-]+) ?(?:==|@)", re.MULTILINE)


def look(node: Node, on: Reader) -> Finding:
    """The sizes of all files that the lock's wheels brought; the hashes of those that were touched since.

    The kernel notes in a file's ctime when anybody touched it, and no program sets that back: what is older than the
    environment's own stamp need not be read.
    """
    site, stamp = site_packages(node, on), _stat(on.real(f"{node.venv}/sparkinstall.json"))
    if site is None or stamp is None:
        return failed("there is no environment", "run `sparkinstall all`")
    made, ours = stamp.st_ctime_ns, _locked(node, on)
    folders = [name for name in on.names(site) if name.endswith(".dist-info") and _package(name) in ours]
    if not ours:
        return failed("it is not known what was installed: installed.lock is gone or empty", _MEND)
    gone = sorted(ours - {_package(name) for name in folders})
    wrong = [
        *(f"{name} is not installed" for name in gone),
        *_anew(on.real(site), folders, made),
        *_changed(on.real(site), folders, made),
    ]
    if not wrong:
        many = f"{len(folders)} packages, as their wheels brought them"
        return passed(many if len(folders) != 1 else "1 package, as its wheel brought it")
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return failed("; ".join(wrong[:_SHOWN]) + more, _MEND, "every file as its wheel brought it")


def _locked(node: Node, on: Reader) -> set[str]:
    """What the lock has put there; packages that somebody added are theirs."""
    lock = (on.read(f"{node.venv}/installed.lock") or b"").decode(errors="replace")
    return {_plain(name) for name in _PINNED.findall(lock)}


def _package(folder: str) -> str:
    return _plain(folder.removesuffix(".dist-info").rpartition("-")[0])


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _anew(site: str, folders: Iterable[str], made: int) -> Iterator[str]:
    for folder in folders:
        record = _stat(f"{site}/{folder}/RECORD")
        if record is None:
            yield f"{folder}/RECORD is gone"
        elif record.st_ctime_ns > made:
            yield f"{_package(folder)} was installed again since"


def _changed(site: str, folders: Iterable[str], made: int) -> Iterator[str]:
    # Some wheels bring the same file, each its own (those of nvidia-cutlass-dsl): whichever came last is right.
    brought: dict[str, list[tuple[str, str]]] = {}
    for folder in folders:
        for name, digest, size in _rows(f"{site}/{folder}/RECORD"):
            brought.setdefault(name, []).append((digest, size))
    for name, forms in brought.items():
        if name not in _patched() and (why := _complaint(f"{site}/{name}", forms, made)):
            yield f"{name} {why}"


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
def _patched() -> frozenset[str]:
    """Files that we change ourselves: whether they are right is for the probe `fp8-path` to say."""
    from sparkinstall.assets import asset
    from sparkinstall.patches import load

    return frozenset(each.target for each in load(Path(asset("patches"))))
