"""sparkinstall installs itself on a node: the same sources there as here, by the same install.sh."""

import hashlib
import io
import os
import platform
import re
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from msgspec import Struct
from uv import find_uv_bin

from sparkinstall.assets import asset, user_cache
from sparkinstall.downloads import sha256_of
from sparkinstall.errors import Problem, storage_errors
from sparkinstall.node import DEBIAN_PACKAGES
from sparkinstall.stacks import canonical
from sparkinstall.system.locks import folder_locked
from sparkinstall.system.workshop import Workshop

_PACKAGE = Path(__file__).resolve().parents[1]
_DIGESTED = ("templates", "patches", "knowledge", "pyproject.toml", "requirements.lock")
_BESIDE = ("install.sh", "README.md", "LICENSE")
UPLOADS = ".local/share/sparkinstall/uploads"
"""Folder below the home on the node for files that settings name: one complete folder per digest."""

_WHOLE = ".whole"
_one_at_a_time = threading.Lock()
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==", re.MULTILINE)
MISSING = 90
"""Exit code of the remote shell where sparkinstall of exactly this version is missing; stdout describes the node."""
PYTHONS = ("3.11", "3.12", "3.13")
"""The versions of Python that install.sh looks for: the tool's own wheels in a bundle are for each."""
LACKING = 91
"""Exit code of the remote shell where an upload is missing."""

# Every command line of `cluster` begins with this. $1 is the digest of the wanted version, or `any`.
_BEGIN = """\
home=${XDG_DATA_HOME:-$HOME/.local/share}/sparkinstall
tool=$home/tool/bin/sparkinstall
made=
[ ! -r "$home/tool/made-from" ] || read -r made rest <"$home/tool/made-from"
[ "$1" = any ] && [ -n "$made" ] && made=any
"""
_RUN = f"""\
if [ "$made" = "$1" ] && [ -x "$tool" ]; then
    for each in $2; do [ -e "$HOME/{UPLOADS}/$each/{_WHOLE}" ] || exit {LACKING}; done
    shift 2
    exec "$tool" "$@"
fi
"""
_TELL = f"""\
for python in python3.13 python3.12 python3.11 python3 ''; do
    [ -n "$python" ] || break
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break
done
version=
[ -z "$python" ] || version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null)
printf '%s %s %s\\n' "$(uname -m)" "${{version:-none}}" "${{glibc##* }}"
exit {MISSING}
"""
# An existing folder is complete: it appears by one rename.
_INTO = f"""\
mkdir -p "${{into%/*}}" && new=$(mktemp -d "$into.XXXXXX") || exit 1
if tar -xf - -C "$new" && [ -e "$new/{_WHOLE}" ]; then
    mv -T "$new" "$into" 2>/dev/null || rm -rf "$new"
else
    rm -rf "$new"
fi
[ -e "$into/{_WHOLE}" ] || exit 1
"""
_INSTALL = """\
for other in "$home"/delivered/*; do
    case $other in "$into" | "$into".*) ;; *) rm -rf "$other" ;; esac
done
cd "$into" || exit 1
if ! sh ./install.sh --tool-only </dev/null >&2; then
    rm -rf "$into"
    rmdir "$home/delivered" "$home" 2>/dev/null
    exit 1
fi
"""

RUN = _BEGIN + _RUN + _TELL
"""Shell script that runs sparkinstall of the digest in $1 with the arguments from $3 on.

It exits with `MISSING` where that version is missing, and with `LACKING` where an upload named in $2 is missing."""

INSTALL = f"{_BEGIN}into=$home/delivered/$1\n{_INTO}{_INSTALL}"
"""Shell script that unpacks sparkinstall from stdin and installs it; $1 is its digest."""

UNPACK = f"into=$HOME/{UPLOADS}/$1\n{_INTO}"
"""Shell script that unpacks an upload from stdin; $1 is its digest."""

UNPACK_DEBIAN = f'into=${{XDG_CACHE_HOME:-$HOME/.cache}}/sparkinstall/{DEBIAN_PACKAGES}; rm -rf "$into"\n{_INTO}'
"""Shell script that unpacks Debian packages from stdin to the node's cache."""


class Place(Struct, frozen=True):
    """What a node without sparkinstall reports of itself. `python` is None where no version is new enough."""

    machine: str
    python: str | None
    glibc: str


def place(out: str) -> Place | None:
    """The place that a remote shell printed before it exited with `MISSING`; None: it printed none."""
    words = (out.strip().splitlines() or [""])[-1].split()
    if len(words) < 2:
        return None
    return Place(words[0], None if words[1] == "none" else words[1], words[2] if len(words) > 2 else "2.17")


@lru_cache(maxsize=1)
def sources() -> dict[str, Path]:
    """Every file that a node needs to install sparkinstall, by its path in the checkout.

    Raises:
        Problem: this installation lacks one.
    """
    try:
        found = dict(_beneath("sparkinstall", _PACKAGE))
        for name in (*_DIGESTED, *_BESIDE):
            found.update(_beneath(name, asset(name)))
    except FileNotFoundError as error:
        raise Problem(
            f"this installation of sparkinstall cannot be copied to other nodes: {error}",
            hint="reinstall it with ./install.sh from a checkout",
        ) from error
    return found


def _beneath(name: str, path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield name, path
        return
    for each in sorted(path.rglob("*")):
        inner = each.relative_to(path)
        # The packaged copies stand inside the package; in the checkout they are beside it.
        if each.is_file() and each.suffix != ".pyc" and inner.parts[0] != "_assets":
            yield f"{name}/{inner}", each


@lru_cache(maxsize=1)
def digest() -> str:
    """The digest of this version, computed like `digest_of_checkout` in install.sh."""
    return digest_of({name: path.read_bytes() for name, path in sources().items() if name not in _BESIDE})


def digest_of(files: Mapping[str, bytes]) -> str:
    """The sha256 of the sorted output of `sha256sum` for the files."""
    lines = sorted(f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode() for name, content in files.items())
    return hashlib.sha256(b"".join(lines)).hexdigest()


def archive(own_packages: Path | None) -> bytes:
    """The sources, and the wheels of the locked requirements, as one tar."""
    wheels = {f"own-packages/{path.name}": path for path in sorted(own_packages.iterdir())} if own_packages else {}
    return packed({name: path.read_bytes() for name, path in {**sources(), **wheels}.items()})


def packed(files: Mapping[str, bytes]) -> bytes:
    """The files as one tar; its last member proves that the tar is complete."""
    packed, now = io.BytesIO(), int(time.time())
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in {**files, _WHOLE: b""}.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(content), 0o644, now
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def own_packages(of: Place) -> Path | None:
    """A folder with the wheels of requirements.lock for such a node; None: they could not be downloaded.

    Damaged ones are downloaded again.

    Raises:
        Storage: the cache cannot be read or written.
    """
    # install.sh keeps those of a bundle in the tool's own environment.
    bundled = Path(sys.prefix, "own-packages")
    if bundled.is_dir() and of.machine == platform.machine() and of.python in PYTHONS:
        return bundled
    lock = sources()["requirements.lock"]
    all_folders = user_cache() / "own-packages"
    folder = all_folders / f"{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}-{of.python}-{of.machine}"
    # Nodes are served in parallel, and most of them need the same wheels; so may another run.
    with _one_at_a_time, folder_locked(all_folders), storage_errors("downloading the tool's own packages"):
        if folder.is_dir() and _has_damage(folder, lock.read_text()):
            shutil.rmtree(folder)
        return folder if folder.is_dir() or _brought(lock, folder, of) else None


def _has_damage(folder: Path, lock: str) -> bool:
    """Whether a wheel of a pinned package does not have a hash of the lock."""
    pinned = set(map(canonical, _PINNED.findall(lock)))
    wheels = [each for each in folder.iterdir() if canonical(each.name.partition("-")[0]) in pinned]
    return any(f"sha256:{sha256_of(each)}" not in lock for each in wheels)


def _brought(lock: Path, folder: Path, of: Place) -> bool:
    """Download the wheels into the folder, which appears when all are there; whether they came."""
    waiting = folder.with_name(f"{folder.name}.{os.getpid()}.new")
    waiting.mkdir(parents=True, exist_ok=True)
    try:
        if _download(lock, waiting, of):
            waiting.rename(folder)
        return folder.is_dir()
    finally:
        shutil.rmtree(waiting, ignore_errors=True)


def _download(lock: Path, into: Path, of: Place) -> bool:
    argv = [*_pip(), "download", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r", str(lock)]
    argv += ["--no-deps", "--only-binary", ":all:", "--python-version", of.python or "", "--dest", str(into)]
    for tag in _tags(of):
        argv += ["--platform", tag]
    return Workshop(into).run(*argv, timeout=600).ok


def _pip() -> list[str]:
    if find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    return [str(find_uv_bin()), "tool", "run", "--quiet", "--python", sys.executable, "pip"]


def _tags(of: Place) -> list[str]:
    """Platform tags of wheels that run on the node, the newest glibc first."""
    version = re.match(r"2\.([0-9]{1,3})", of.glibc)
    minor = int(version[1]) if version else 17
    modern = [f"manylinux_2_{each}_{of.machine}" for each in range(minor, 16, -1)]
    old = ["manylinux2014", "manylinux2010", "manylinux1"]
    return [*modern, *(f"{each}_{of.machine}" for each in old), f"linux_{of.machine}"]
