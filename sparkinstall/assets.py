"""Where files are that are no code: `templates/`, `patches/`, `knowledge/`, and what is kept from run to run."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def asset(name: str) -> Path:
    """The folder or file `name`, e.g. ``asset("patches")``.

    An editable install has no packaged copy, so the checkout around the package is looked at second.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for candidate in (_PACKAGE / "_assets" / name, _PACKAGE.parent / name):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"sparkinstall's own {name!r} is missing: install the tool again")


def user_cache() -> Path:
    """Downloads and wheels, kept over runs so that a second one needs no network."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "sparkinstall"
