"""The journal: one line of JSON per change, appended and synced before the change is made.

A record has the state `before` and `after` the change, so no second record confirms it: undo compares the current
state with both.
"""

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins

from sparkinstall import schema
from sparkinstall.errors import Blocked, JournalDamaged, Problem, Storage, storage_problem
from sparkinstall.system import Reader, Undo
from sparkinstall.system.local import replace_file

VERSION = 1


class Record(Struct, frozen=True):
    """One change. `n` defines the order (clocks may jump); `at` is informational."""

    n: int
    at: str
    run: str
    step: str
    undo: Undo


class Journal:
    """`journal.jsonl` and the originals beside it, in the folder `home` (a real path)."""

    def __init__(self, home: Path, run: str = "") -> None:
        self.home, self.run = home, run
        self.path = home / "journal.jsonl"
        self._guard = threading.Lock()
        self._known: list[Record] | None = None

    def records(self) -> list[Record]:
        """Return all records in order, without an incomplete last line of a killed run.

        Raises:
            JournalDamaged: any other line cannot be read.
            Blocked, Storage: the file belongs to another user, or cannot be read.
        """
        if self._known is None:
            self._known = list(self._read())
        return list(self._known)

    def _read(self) -> Iterator[Record]:
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        except PermissionError as error:
            raise unreadable(self.path) from error
        except OSError as error:
            problem = storage_problem(error, f"reading the journal {self.path}")
            problem.hint = problem.hint or "it must be a regular file: check the path, and restore the journal"
            raise problem from error
        # A line without a newline is incomplete: its change has not begun.
        for number, line in enumerate(lines[:-1], start=1):
            yield self._parse(number, line)

    def _parse(self, number: int, line: bytes) -> Record:
        try:
            raw = json.loads(line)
            if raw["v"] != VERSION:
                raise JournalDamaged(
                    f"{self.path} line {number} was written by another version of sparkinstall (format {raw['v']})",
                    hint="use the version that wrote it, or a newer one",
                )
            # Otherwise a value of the wrong type would fail in the middle of an uninstall.
            return schema.read(Record, raw, "the line")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            why = f": {error.complaint}" if isinstance(error, schema.Malformed) else ""
            raise JournalDamaged(
                f"{self.path} line {number} cannot be read{why}",
                cause="another program changed the file, or the disk failed",
                hint=f"back up {self.home}, repair or delete that line, and run again; nothing was changed",
            ) from error

    def add(self, step: str, undo: Undo) -> None:
        """Append a record and sync it to disk, before the change itself."""
        with self._guard:
            known = self.records()
            # Not their count: an uninstall that kept something leaves gaps.
            last = known[-1].n if known else 0
            record = Record(last + 1, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), self.run, step, undo)
            try:
                self._append(json.dumps({"v": VERSION, **to_builtins(record)}, sort_keys=True).encode() + b"\n")
            except OSError as error:
                raise storage_problem(error, f"writing the journal {self.path}") from error
            self._known = [*known, record]

    def _append(self, line: bytes) -> None:
        with open(self.path, "ab", buffering=0) as out:
            data = self.path.read_bytes()
            end = data.rfind(b"\n") + 1
            out.truncate(end)
            try:
                if out.write(line) != len(line):
                    raise OSError(28, "No space left on device", str(self.path))
                os.fsync(out.fileno())
            except OSError:
                out.truncate(end)
                raise

    def keep(self, original: bytes) -> str:
        """Store an original under its sha256, and return that."""
        name = hashlib.sha256(original).hexdigest()
        path = self.home / "originals" / name
        if path.exists() and path.stat().st_size == len(original):
            return name
        try:
            with self._guard:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                replace_file(str(path), original, 0o600)
        except OSError as error:
            raise storage_problem(error, f"keeping the original in {self.home}") from error
        return name

    def original(self, sha256: str) -> bytes:
        """Return a stored original.

        Raises:
            JournalDamaged: it is missing or damaged.
        """
        path = self.home / "originals" / sha256
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise JournalDamaged(
                f"the original {path} is missing or damaged",
                hint="restore it from a backup, or delete its record from the journal",
            )
        return data

    def rewrite(self, records: list[Record]) -> None:
        """Keep only `records`: those that an uninstall could not undo."""
        ordered = sorted(records, key=lambda record: record.n)
        lines = [json.dumps({"v": VERSION, **to_builtins(record)}, sort_keys=True) for record in ordered]
        try:
            replace_file(str(self.path), "".join(line + "\n" for line in lines).encode(), 0o600)
        except OSError as error:
            raise storage_problem(error, f"writing the journal {self.path}") from error
        self._known = ordered


def fingerprint(on: Reader, path: str) -> dict[str, Any]:
    """Return the state of `path` for the journal."""
    entry = on.entry(path)
    if entry is None:
        return {"kind": "absent"}
    if entry.kind == "link":
        return {"kind": "link", "target": entry.target}
    if entry.kind == "file":
        return {"kind": "file", "sha256": hashlib.sha256(on.read(path) or b"").hexdigest(), "mode": entry.mode}
    return {"kind": entry.kind}


def unreadable(path: Path) -> Problem:
    """Return why this user may not read a file of the state: another owner, or a wrong mode."""
    place, mode = path.parent, 0o000
    try:
        for place in (path.parent, path):
            found = place.stat()
            mode = stat.S_IMODE(found.st_mode)
            if found.st_uid != os.geteuid():
                return Blocked(
                    f"{place} belongs to the user with id {found.st_uid}, who set this node up",
                    hint="run sparkinstall as that user",
                )
    except PermissionError:
        # The folder itself cannot be read, so its mode is wrong.
        place, mode = path.parent, stat.S_IMODE(path.parent.stat().st_mode)
    rights = "u+rwx" if place == path.parent else "u+rw"
    return Storage(f"{place} cannot be read (mode {mode:03o})", hint=f"chmod {rights} {place}")
