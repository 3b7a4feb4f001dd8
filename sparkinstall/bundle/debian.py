"""Debian packages in a bundle: those that apt of this machine chooses for a node without any, and their index."""

import platform
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from sparkinstall.downloads import sha256_of
from sparkinstall.errors import storage_errors
from sparkinstall.facts.machine import system_name
from sparkinstall.system import System, failure_of

_UNKNOWN = re.compile(r"Unable to locate package|has no installation candidate|Couldn't find any package")
_CHOSEN = re.compile(r"^Inst (\S+) \((\S+) .*\[(\w+)\]\)", re.MULTILINE)
_FIELD = re.compile(r"^(Package|Version|SHA256): (\S+)", re.MULTILINE)
_HOUR = 3600.0


class Packages(Struct, frozen=True):
    """Debian packages with all that they need. `versions`: of those that were asked for."""

    system: str
    versions: Mapping[str, str]
    files: Mapping[str, Path]
    index: bytes


def download(on: System, names: tuple[str, ...], cache: Path) -> Packages | None:
    """Download the packages, and all that they need, to `cache`; None where this machine's apt does not have them.

    Raises:
        CommandFailed: apt fails for another reason.
        Storage: the cache cannot be written.
    """
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return None
    apt = _own_apt(cache)
    on.run(*apt, "update", timeout=_HOUR)
    chosen = on.try_run(*apt, "-s", "install", *names)
    if not chosen.ok:
        if _UNKNOWN.search(chosen.out):
            return None
        raise failure_of(chosen, "apt cannot choose the Debian packages", log=on.log)
    found = sorted(_CHOSEN.findall(chosen.out))
    _remove_damaged(on, apt, found, cache / "archives")
    on.run(*apt, "--download-only", "install", *names, timeout=_HOUR)
    # Without the epoch, as in Debian's archive: apt would read the %3a of its cache as a colon.
    files = {
        f"{name}_{version.rpartition(':')[2]}_{arch}.deb": cache / "archives" / _cached(name, version, arch)
        for name, version, arch in found
    }
    versions = {name: version for name, version, _ in found if name in names}
    system = system_name(platform.freedesktop_os_release())
    return Packages(system, versions, files, b"".join(_entry(on, name, path) for name, path in files.items()))


def _remove_damaged(on: System, apt: tuple[str, ...], found: list[tuple[str, str, str]], archives: Path) -> None:
    """Remove packages that do not have the hash that apt knows: of what is in its cache it compares only the size."""
    _, _, *settings = apt
    shown = on.run("apt-cache", *settings, "show", *(f"{name}={version}" for name, version, _ in found)).out
    hashes: dict[str, set[str]] = defaultdict(set)
    for entry in map(dict, map(_FIELD.findall, shown.split("\n\n"))):
        hashes[f"{entry.get('Package')}={entry.get('Version')}"].add(entry.get("SHA256", ""))
    for name, version, arch in found:
        path = archives / _cached(name, version, arch)
        with storage_errors(f"reading {path}"):
            if path.exists() and sha256_of(path) not in hashes[f"{name}={version}"]:
                path.unlink()


def _cached(name: str, version: str, arch: str) -> str:
    """Return the name of a package in apt's cache."""
    return f"{name}_{version.replace(':', '%3a')}_{arch}.deb"


def _own_apt(cache: Path) -> tuple[str, ...]:
    """Return apt with lists and archives of its own, to which nothing is installed: a node may lack what is here."""
    with storage_errors(f"writing {cache}"):
        for folder in ("lists/partial", "archives/partial"):
            (cache / folder).mkdir(parents=True, exist_ok=True)
        (cache / "status").write_bytes(b"")
    settings = {
        "Dir::State::status": cache / "status", "Dir::State::lists": cache / "lists", "Dir::Cache": cache,
        "Dir::Cache::archives": cache / "archives", "APT::Install-Recommends": "false", "Debug::NoLocking": "true",
        "APT::Sandbox::User": "root", "Acquire::Languages": "none",
    }  # fmt: skip
    return ("apt-get", "-y", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}")))


def _entry(on: System, name: str, path: Path) -> bytes:
    """Return what apt reads of a package in the index of a folder."""
    fields = on.run("dpkg-deb", "--field", str(path)).out
    return f"{fields}\nFilename: ./{name}\nSize: {path.stat().st_size}\nSHA256: {sha256_of(path)}\n\n".encode()
