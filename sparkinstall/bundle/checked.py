"""Read bundles: what is wrong with one is an error for the user."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparkinstall import __version__
from sparkinstall.errors import BadBundle, BadUsage
from sparkinstall.given import absolute
from sparkinstall.payloads import bundle_archive
from sparkinstall.payloads.bundle_archive import Manifest, OnBytes, Refused, Take, silent, take_nothing


def place(named: str | Path, option: str) -> Path:
    """Return the path of a bundle that must exist.

    Raises:
        BadUsage: there is no such file.
    """
    path = absolute(named, option)
    if not path.exists():
        raise BadUsage(f"there is no bundle {path}", hint="`sparkinstall bundle create` makes one")
    if not path.is_file():
        raise BadUsage(f"{path} is not a regular file", hint="name the bundle itself, or copy it to a disk first")
    return path


def manifest_of(path: Path) -> Manifest:
    """Return the manifest of a bundle, whatever version made it, without reading the rest.

    Raises:
        BadBundle: it is not a bundle, or cannot be read.
    """
    with problems(path):
        return bundle_archive.manifest_of(path)


def read(path: Path, on_bytes: OnBytes = silent, take: Take = take_nothing) -> Manifest:
    """Compare every byte of a bundle with its manifest; `take` as in `bundle_archive.read`.

    Raises:
        BadBundle: it is damaged, or another version of sparkinstall made it.
    """
    with problems(path):
        require_version(bundle_archive.manifest_of(path))
        return bundle_archive.read(path, on_bytes, take)


def require_version(manifest: Manifest) -> None:
    """Refuse a bundle whose tool is not this one: its wheels are those of other locks.

    Raises:
        Refused: it is older or newer.
    """
    theirs, ours = _numbers(manifest.tool), _numbers(__version__)
    if theirs != ours:
        age = "an older" if theirs < ours else "a newer"
        raise Refused(
            f"{age} sparkinstall made it ({manifest.tool}, and this is {__version__})", bundle_archive.OWN_TOOL
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


@contextmanager
def problems(path: Path) -> Iterator[None]:
    """Turn what is wrong with the bundle at `path` into an error."""
    try:
        yield
    except Refused as refused:
        raise BadBundle(f"the bundle {path} cannot be used: {refused.message}", hint=refused.hint) from refused
    except OSError as error:
        # What was read is written elsewhere meanwhile, and an error of that names no file either.
        if error.filename in (None, str(path)) and error.errno not in bundle_archive.OF_WRITING:
            why = error.strerror or str(error)
            raise BadBundle(
                f"the bundle {path} cannot be read: {why}", hint=bundle_archive.reading_hint(error)
            ) from error
        raise
