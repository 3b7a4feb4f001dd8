"""A record of a watch: the samples as they were taken, one a line, so that it can be shown again."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
from msgspec import Struct

from sparkinstall.errors import BadUsage, storage_problem
from sparkinstall.measure.samples import Sample

VERSION = 1
_LONGEST_LINE = 1 << 20
# Seconds of the epoch: the year 9999.
_LATEST = 253_402_300_000


class _Head(Struct, frozen=True):
    """The first line."""

    sparkinstall_watch: int = VERSION


class Record:
    """A new file of samples. Each is written at once, so that a run may end anywhere."""

    def __init__(self, path: Path) -> None:
        """Create the file.

        Raises:
            BadUsage: there is one already.
            Storage: it cannot be written.
        """
        self._path = path
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError as error:
            raise BadUsage(f"{path} already exists", hint="name another file") from error
        except OSError as error:
            raise storage_problem(error, f"writing {path}", "name a file in a folder that you can write to") from error
        self._file: IO[bytes] = os.fdopen(handle, "wb", buffering=0)
        self._write(_Head())

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, sample: Sample) -> None:
        """Write a sample.

        Raises:
            Storage: it cannot be written.
        """
        self._write(sample)

    def _write(self, line: Struct) -> None:
        try:
            self._file.write(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            hint = "free some space, and name another file; what was written can be shown: `--replay FILE`"
            raise storage_problem(error, f"writing {self._path}", hint) from error


def recorded(path: Path) -> Iterator[Sample]:
    """Yield the samples of a record. A last line that is cut, as after a crash, ends it.

    Raises:
        BadUsage: it is no record, has no sample, or a line of it cannot be read.
    """
    try:
        with path.open("rb") as file:
            _require_record(path, file.readline(_LONGEST_LINE))
            empty = True
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 2):
                if not line.endswith(b"\n"):
                    break
                yield _sample(path, number, line)
                empty = False
    except OSError as error:
        raise BadUsage(f"{path} cannot be read: {error.strerror or error}", hint="name a file of --record") from error
    if empty:
        raise BadUsage(f"{path} has no sample", hint="record again")


def _require_record(path: Path, line: bytes) -> None:
    try:
        version = msgspec.json.decode(line, type=_Head).sparkinstall_watch if b"sparkinstall_watch" in line else None
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        version = None
    if version != VERSION:
        what = (
            f"a record of version {version}, and this sparkinstall reads version {VERSION}" if version else "no record"
        )
        raise BadUsage(f"{path} is {what}", hint="name a file of `sparkinstall watch --record FILE`")


def _sample(path: Path, number: int, line: bytes) -> Sample:
    try:
        return _sound(msgspec.json.decode(line, type=Sample))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadUsage(f"line {number} of {path} is no sample: {error}", hint="remove it, or record again") from error


def _sound(sample: Sample) -> Sample:
    """Return a sample that can be shown.

    Raises:
        ValueError: its time is none of a clock, or a bucket's bound is no number.
    """
    if not 0 <= sample.at < _LATEST:
        raise ValueError("its time is none of a clock")
    for buckets in sample.told.histograms.values():
        if any(math.isnan(float(bound)) for bound in buckets):
            raise ValueError("a bucket has no bound")
    return sample
