"""The tool itself, brought to a node: the same sources there as here, installed by the same script."""

import hashlib
import io
import os
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

from sparkinstall.assets import asset, user_cache
from sparkinstall.errors import Problem
from sparkinstall.system.local import LocalReader

_PACKAGE = Path(__file__).resolve().parents[1]
_DIGESTED = ("templates", "patches", "knowledge", "pyproject.toml", "requirements.lock")
_BESIDE = ("install.sh", "README.md", "LICENSE")
CARRIED = ".local/share/sparkinstall/carried"
"""Below the home of the user on the node: what settings name; a folder in it by the name of a digest is whole."""

_WHOLE = ".whole"
_one_at_a_time = threading.Lock()
MISSING = 90
"""The remote shell's exit code where there is no tool of this very version; its stdout then says what is there."""
LACKING = 91
"""The remote shell's exit code where the files that settings name were not carried yet."""

# Every command line of `cluster` begins with it. $1 is the digest of the tool that is wanted, or `any`.
_BEGIN = """\
home=${XDG_DATA_HOME:-$HOME/.local/share}/sparkinstall
tool=$home/tool/bin/sparkinstall
made=
[ ! -r "$home/tool/made-from" ] || read -r made rest <"$home/tool/made-from"
[ "$1" = any ] && [ -n "$made" ] && made=any
"""
_RUN = f"""\
if [ "$made" = "$1" ] && [ -x "$tool" ]; then
    for each in $2; do [ -e "$HOME/{CARRIED}/$each/{_WHOLE}" ] || exit {LACKING}; done
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
# A folder that is there is whole: it appears by one rename.
_INTO = f"""\
mkdir -p "${{into%/*}}" && new=$(mktemp -d "$into.XXXXXX") || exit 1
if tar -xf - -C "$new" && [ -e "$new/{_WHOLE}" ]; then
    mv -T "$new" "$into" 2>/dev/null || rm -rf "$new"
else
    rm -rf "$new"
fi
[ -e "$into/{_WHOLE}" ] || exit 1
"""
_UNPACK = f"""\
into=$home/delivered/$1
{_INTO}"""
_INSTALL = """\
for other in "$home"/delivered/*; do
    case $other in "$into" | "$into".*) ;; *) rm -rf "$other" ;; esac
done
if [ -d "$into/wheelhouse" ]; then
    PIP_NO_INDEX=1 PIP_FIND_LINKS="$into/wheelhouse" PIP_CONFIG_FILE=/dev/null
    export PIP_NO_INDEX PIP_FIND_LINKS PIP_CONFIG_FILE
fi
sh "$into/install.sh" --tool-only </dev/null >&2
"""


class Place(Struct, frozen=True):
    """What a node said of itself when it had no tool of ours: `python` is None where there is none new enough."""

    machine: str
    python: str | None
    glibc: str


def place(said: str) -> Place | None:
    """The answer of a remote shell that ended with `MISSING`."""
    words = (said.strip().splitlines() or [""])[-1].split()
    if len(words) < 2:
        return None
    return Place(words[0], None if words[1] == "none" else words[1], words[2] if len(words) > 2 else "2.17")


def run_line() -> str:
    """The shell's script that runs the tool of the digest in $1 with the words from $3 on.

    It ends with `MISSING` where there is none, and with `LACKING` where one of the digests in $2 was not carried.
    """
    return _BEGIN + _RUN + _TELL


def unpack_line() -> str:
    """The shell's script that takes the tool from stdin and installs it; $1 is its digest."""
    return _BEGIN + _UNPACK + _INSTALL


def unpack_carried_line() -> str:
    """The shell's script that takes what was carried from stdin; $1 is its digest."""
    return f"into=$HOME/{CARRIED}/$1\n{_INTO}"


@lru_cache(maxsize=1)
def sources() -> dict[str, Path]:
    """Every file that a node needs to make the tool, by its path in the checkout.

    Raises:
        Problem: this installation does not carry them.
    """
    try:
        found = dict(_beneath("sparkinstall", _PACKAGE))
        for name in (*_DIGESTED, *_BESIDE):
            found.update(_beneath(name, asset(name)))
    except FileNotFoundError as error:
        raise Problem(
            f"this installation of sparkinstall cannot be brought to other nodes: {error}",
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
    """The tool's digest, as `digest_of_checkout` of install.sh makes it."""
    return digest_of({name: path.read_bytes() for name, path in sources().items() if name not in _BESIDE})


def digest_of(files: Mapping[str, bytes]) -> str:
    """The sha256 of what `sha256sum` says of the files, sorted."""
    lines = sorted(f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode() for name, content in files.items())
    return hashlib.sha256(b"".join(lines)).hexdigest()


def archive(wheelhouse: Path | None) -> bytes:
    """The sources, and the wheels that the tool needs, as one tar."""
    wheels = {f"wheelhouse/{path.name}": path for path in sorted(wheelhouse.iterdir())} if wheelhouse else {}
    return packed({name: path.read_bytes() for name, path in {**sources(), **wheels}.items()})


def packed(files: Mapping[str, bytes]) -> bytes:
    """The files as one tar; its last member shows that nothing was cut off."""
    packed, now = io.BytesIO(), int(time.time())
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in {**files, _WHOLE: b""}.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(content), 0o644, now
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def wheelhouse(of: Place) -> Path | None:
    """A folder with the wheels of the tool's lock for such a node, kept in the cache; None: they cannot be had here."""
    lock = sources()["requirements.lock"]
    key = hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    folder = user_cache() / "wheelhouse" / f"{key}-{of.python}-{of.machine}"
    # Nodes are served side by side, and most of them want the same wheels.
    with _one_at_a_time:
        if folder.is_dir():
            return folder
        waiting = folder.with_name(f"{folder.name}.{os.getpid()}.new")
        waiting.mkdir(parents=True, exist_ok=True)
        try:
            if not _download(lock, waiting, of):
                return None
            waiting.rename(folder)
        finally:
            shutil.rmtree(waiting, ignore_errors=True)
    return folder


def _download(lock: Path, into: Path, of: Place) -> bool:
    argv = [*_pip(), "download", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r", str(lock)]
    argv += ["--no-deps", "--only-binary", ":all:", "--python-version", of.python or "", "--dest", str(into)]
    for tag in _tags(of):
        argv += ["--platform", tag]
    return LocalReader().ask(*argv, timeout=600).ok


def _pip() -> list[str]:
    if find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    from uv import find_uv_bin

    return [str(find_uv_bin()), "tool", "run", "--quiet", "--python", sys.executable, "pip"]


def _tags(of: Place) -> list[str]:
    """The wheels' names for the platform, the newest glibc first."""
    said = re.match(r"2\.([0-9]{1,3})", of.glibc)
    minor = int(said[1]) if said else 17
    modern = [f"manylinux_2_{each}_{of.machine}" for each in range(minor, 16, -1)]
    old = ["manylinux2014", "manylinux2010", "manylinux1"]
    return [*modern, *(f"{each}_{of.machine}" for each in old), f"linux_{of.machine}"]
