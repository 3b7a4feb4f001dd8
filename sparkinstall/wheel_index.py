"""Where the package index has the wheels of a lock: uv answers, with the indexes that it is configured for."""

import base64
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from msgspec import Struct, toml
from uv import find_uv_bin

from sparkinstall.errors import CommandFailed
from sparkinstall.given import home
from sparkinstall.stacks import Pin, canonical
from sparkinstall.system import System

WHEEL_NAME = re.compile(r"[\w.]+-[\w.+!]+(?:-[\w.]+){3,4}\.whl", re.ASCII)
"""The name of a wheel's file: package, version, perhaps a build, and what it is compatible with."""

_LOGIN = re.compile(r"://([^\s/@:\"']*:[^\s/@\"']+)@([^\s/\"'?#]+)")
_GLIBC = re.compile(r"manylinux_2_(\d+)_")
_OLD_GLIBC = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}


class RemoteWheel(Struct, frozen=True):
    """A wheel that can be downloaded. `size` in bytes, 0: unknown. `sha256`: "" if no lock knows it yet."""

    url: str
    sha256: str
    size: int = 0

    @property
    def name(self) -> str:
        """The file's name. Raises CommandFailed if the URL does not end in that of a wheel."""
        found = unquote(urlsplit(self.url).path.rpartition("/")[2])
        if not WHEEL_NAME.fullmatch(found):
            raise CommandFailed(f"{self.url} is not the address of a wheel", hint="check the package index")
        return found


@lru_cache(maxsize=1)
def uv() -> str:
    """Return the path of the uv installed with sparkinstall."""
    return str(find_uv_bin())


def uv_platform(platform: str) -> str:
    """Return uv's platform name for a node of DGX OS 7 (glibc 2.39)."""
    return f"{platform}-manylinux_2_39"


def for_platform(platform: str, python: str) -> tuple[str, ...]:
    """Return uv's options to choose wheels of a platform and a Python ("3.12") that need not be here."""
    return "--python-platform", uv_platform(platform), "--python-version", python


def uv_env(cache: Path) -> dict[str, str]:
    """Return the variables for uv. `cache`: the user's cache, in which uv keeps the pages of the index."""
    return {
        "UV_CACHE_DIR": str(cache / "index"),
        "UV_PYTHON_INSTALL_DIR": str(cache / "python"),
        "UV_NO_PROGRESS": "1",
        "UV_SYSTEM_CERTS": "1",
        "VIRTUAL_ENV": "",
    }


def locate(on: System, pins: Sequence[Pin], target: Sequence[str], cache: Path) -> dict[Pin, RemoteWheel]:
    """Return the best wheel of each pin among those whose hash the pin has; a pin with an URL names its wheel.

    Args:
        target: uv's options that choose wheels, such as `for_platform` returns, or ("--python", PATH).

    Raises:
        CommandFailed: the index cannot be reached, or has no such wheel.
    """
    ordinary = [pin for pin in pins if not pin.url]
    listed = _listed(on, ordinary, target, cache) if ordinary else {}
    return {pin: _named(pin) if pin.url else _best(pin, listed.get(pin.name, ()), on.log) for pin in pins}


def _named(pin: Pin) -> RemoteWheel:
    return RemoteWheel(pin.url or "", pin.hashes[0].removeprefix("sha256:"))


def _listed(on: System, pins: Iterable[Pin], target: Sequence[str], cache: Path) -> dict[str, list[RemoteWheel]]:
    """Return the compatible wheels of each package. A pylock.toml has no others, and their URLs."""
    # Nothing is built, so any Python can ask for the wheels of another.
    python = () if "--python" in target else ("--python", sys.executable)
    argv = [uv(), "pip", "compile", "--quiet", "--color", "never", "--no-deps", "--only-binary", ":all:", "--no-header"]
    with tempfile.TemporaryDirectory() as scratch:
        wanted, found = Path(scratch, "wanted.in"), Path(scratch, "pylock.toml")
        wanted.write_text("".join(f"{pin.requirement}\n" for pin in pins))
        run_uv(on, [*argv, *python, *target, "-o", str(found), str(wanted)], uv_env(cache))
        packages = toml.decode(found.read_bytes())["packages"]
    return {canonical(each["name"]): [_remote(wheel) for wheel in each.get("wheels", ())] for each in packages}


def _remote(wheel: Mapping[str, Any]) -> RemoteWheel:
    url = wheel.get("url") or Path(wheel["path"]).absolute().as_uri()
    return RemoteWheel(url, wheel["hashes"]["sha256"], wheel.get("size", 0))


def run_uv(on: System, argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Run uv; without a network, answer from what it has in its cache.

    Raises:
        CommandFailed: as of the first attempt.
    """
    try:
        on.run(*argv, env=env)
    except CommandFailed as failure:
        without = failure.kind in ("network", "certificate", "server")
        if not (without and on.try_run(*argv, "--offline", env=env).ok):
            raise


def _best(pin: Pin, wheels: Iterable[RemoteWheel], log: str) -> RemoteWheel:
    locked = [each for each in wheels if f"sha256:{each.sha256}" in pin.hashes]
    if not locked:
        raise wrong_hash(f"the index has no wheel of {pin.requirement} with a hash of the lock", log)
    return max(locked, key=lambda each: rank(each.name))


def wrong_hash(message: str, log: str) -> CommandFailed:
    """Return the error of a wheel that is not the locked one."""
    cause = "a wheel does not have the hash in the lock: it is damaged, or not the locked file"
    hint = "it was not installed; run again, and if the error remains, stop and report it"
    failure = CommandFailed(message, cause=cause, hint=hint, log=log)
    failure.kind = "damaged"
    return failure


def rank(name: str) -> tuple[bool, bool, int, int]:
    """Return a key of a wheel's file name: among compatible wheels, uv's choice has the largest.

    It is the closest to the Python and its glibc.
    """
    python, abi, platform = name.removesuffix(".whl").rsplit("-", 3)[1:]
    versions = [int(digits) for digits in re.findall(r"cp(\d+)", python)]
    glibc = [int(minor) for minor in _GLIBC.findall(platform)]
    glibc += [minor for old, minor in _OLD_GLIBC.items() if old in platform]
    return abi not in ("none", "abi3"), abi != "none", max(versions, default=0), max(glibc, default=0)


def logins() -> dict[str, str]:
    """Return the Authorization header for each host whose login stands in a URL of uv's configuration.

    uv's answers have URLs without it.
    """
    texts = [value for name, value in os.environ.items() if name.startswith("UV_") and "://" in value]
    files = (os.environ.get("UV_CONFIG_FILE"), _user_settings(), "/etc/uv/uv.toml")
    texts += [Path(file).read_text(errors="replace") for file in files if file and Path(file).is_file()]
    found = (match for text in texts for match in _LOGIN.findall(text))
    return {host: "Basic " + base64.b64encode(unquote(login).encode()).decode() for login, host in found}


def _user_settings() -> str:
    base = os.environ.get("XDG_CONFIG_HOME") or home() / ".config"
    return f"{base}/uv/uv.toml"
