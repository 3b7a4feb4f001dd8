"""Locate data files (`templates/`, `patches/`, `knowledge/`) and the user's cache."""

import os
from pathlib import Path

from sparkinstall.given import home

_PACKAGE = Path(__file__).resolve().parent


def asset(name: str) -> Path:
    """Return the path of the data folder or file `name`, e.g. ``asset("patches")``.

    An editable install has no packaged copy, so the checkout around the package is the fallback.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for candidate in (_PACKAGE / "_assets" / name, _PACKAGE.parent / name):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"sparkinstall's data {name!r} is missing: reinstall the tool")


def user_cache() -> Path:
    """Return the folder of downloads and wheels, kept between runs so that later ones need no network.

    Raises:
        BadUsage: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return Path(base if base.startswith("/") else home() / ".cache") / "sparkinstall"
