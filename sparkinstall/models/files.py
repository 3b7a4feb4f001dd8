"""Parts of a model's files, in a folder of this machine."""

import json
import os
import stat
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from sparkinstall import schema
from sparkinstall.models import ModelError

LARGEST_JSON = 64 << 20
CONFIG = "config.json"


class Part(Struct, frozen=True):
    """Some bytes of a file, and the size of the whole file."""

    data: bytes
    size: int


class Files(Protocol):
    """The files of a model. `place` names them in messages; `workers`: how many may be read at once."""

    place: str
    workers: int

    @property
    def revision(self) -> str:
        """The commit, "" in a folder that does not tell it."""

    def names(self) -> tuple[str, ...]:
        """Return the sorted names of the files that are not in a folder below."""

    def part(self, name: str, at: int, length: int) -> Part:
        """Return up to `length` bytes of a file from `at` on.

        Raises:
            ModelError, NotDownloaded: it cannot be read.
        """


class LocalFiles:
    """The files of a model in a folder."""

    workers = 1

    def __init__(self, folder: Path, revision: str = "") -> None:
        self.folder, self.place, self._revision = folder, str(folder), revision

    @property
    def revision(self) -> str:
        return self._revision

    def names(self) -> tuple[str, ...]:
        try:
            return tuple(sorted(each.name for each in os.scandir(self.folder) if each.is_file()))
        except NotADirectoryError as error:
            raise ModelError(
                f"{self.place} is a file, not the folder of a model", hint="name the folder with its config.json"
            ) from error
        except FileNotFoundError as error:
            raise ModelError(f"there is no folder {self.place}", hint="name the folder with config.json") from error
        except OSError as error:
            raise ModelError(f"{self.place} cannot be read: {error.strerror}", hint="name a readable folder") from error

    def part(self, name: str, at: int, length: int) -> Part:
        try:
            # Not even a pipe in place of a file makes it wait.
            handle = os.open(self.folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found = os.fstat(handle)
                if not stat.S_ISREG(found.st_mode):
                    raise ModelError(f"{self.place}/{name} is not a file", hint="restore the file of the model")
                return Part(os.pread(handle, length, at), found.st_size)
            finally:
                os.close(handle)
        except OSError as error:
            raise ModelError(
                f"{self.place}/{name} cannot be read: {error.strerror}", hint="restore the file, or its permissions"
            ) from error


def read_object(files: Files, name: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ModelError: it is too large or no JSON object.
    """
    found = files.part(name, 0, LARGEST_JSON)
    if found.size > LARGEST_JSON:
        raise ModelError(f"{name} is larger than {LARGEST_JSON >> 20} MiB", hint="restore the model's own file")
    try:
        value = json.loads(found.data)
    except (ValueError, RecursionError) as error:
        why = str(error) or type(error).__name__
        raise ModelError(f"{name} of {files.place} is not JSON: {why}", hint="restore the model's own file") from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{name} of {files.place} is not a JSON object but {schema.show(value)}",
            hint="restore the model's own file",
        )
    return value
