"""The journal: one line of JSON per change, appended and synced before the change is made.

A record has the state `before` and `after` the change, so no second record confirms it: undo compares the current
state with both. A record has a checksum, and `journal.last` the number of the last one: a journal that was cut or
changed is recognized.
"""

import hashlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins

from sparkinstall import schema
from sparkinstall.errors import Blocked, JournalDamaged, Problem, Storage, storage_problem
from sparkinstall.own_files import read_regular
from sparkinstall.system import Reader, Undo
from sparkinstall.system.local import replace_file

VERSION = 1
_NUMBER = re.compile(rb" *\d{1,12}\n")
_LARGEST = 64 << 20
LEFT_OF_A_JOURNAL = ("journal.last", "originals", "options.json")
"""What is in the folder only if there was a journal."""


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
        # Steps of one phase run at the same time and share the journal. Reentrant: `add` reads the records.
        self._guard = threading.RLock()
        self._known: list[Record] | None = None

    def records(self) -> list[Record]:
        """Return all records in order, without an incomplete last line of a killed run.

        Raises:
            JournalDamaged: any other line cannot be read.
            Blocked, Storage: the file belongs to another user, or cannot be read.
        """
        with self._guard:
            if self._known is None:
                self._known = list(self._read())
            return list(self._known)

    def _read(self) -> Iterator[Record]:
        # Before the lines: a run that adds one meanwhile writes its number last.
        noted = self._noted()
        content = read_state(self.path, JournalDamaged, "put a copy of the journal there, from a backup")
        if content is None:
            if left := [name for name in LEFT_OF_A_JOURNAL if os.path.lexists(self.home / name)]:
                raise self._lost(f"{self.path} is missing, but {self.home} contains {', '.join(left)}")
            return
        # A line without a newline is incomplete: its change has not begun.
        lines = content.split(b"\n")[:-1]
        if not lines:
            raise self._lost(f"{self.path} has not one complete line; it is created with its first")
        last = 0
        for number, line in enumerate(lines, start=1):
            record = self._parse(number, line)
            last = record.n
            yield record
        # Read again: an uninstall that shortens the journal meanwhile writes the number first.
        if noted is not None and noted > last and (noted := self._noted()) is not None and noted > last:
            raise self._lost(
                f"{self.path} was cut: its last line has the number {last}, but {noted} was written",
                f"; or delete {self.home / 'journal.last'}, to undo what the lines that are left say",
            )

    def _noted(self) -> int | None:
        """Return the number of the last record that was written; None if an older version wrote the journal."""
        path = self.home / "journal.last"
        noted = read_state(path, JournalDamaged, f"delete it (`rm -r {path}`): the journal is then taken as it is")
        if noted is None:
            return None
        if not _NUMBER.fullmatch(noted):
            raise JournalDamaged(
                f"{path} is not the number of a line",
                cause="another program changed the file, or the disk failed",
                hint=f"delete it (`rm {path}`): the journal is then taken as it is",
            )
        return int(noted)

    def _lost(self, message: str, otherwise: str = "") -> JournalDamaged:
        return JournalDamaged(
            message,
            cause="uninstall restores only what the journal records",
            hint=f"restore the journal from a backup{otherwise}. The first content of changed files is in "
            f"{self.home}/originals; if nothing is installed here, remove {self.home}",
        )

    def _parse(self, number: int, line: bytes) -> Record:
        try:
            raw = json.loads(line)
            if raw["v"] != VERSION:
                raise JournalDamaged(
                    f"{self.path} line {number} was written by another version of sparkinstall (format {raw['v']})",
                    hint="use the version that wrote it, or a newer one",
                )
            if raw.pop("sum", None) not in (None, _sum(json.dumps(raw, sort_keys=True))):
                raise ValueError("not what was written")
            # Otherwise a value of the wrong type would fail in the middle of an uninstall.
            return schema.read(Record, raw, "the line")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f": {error.complaint}" if isinstance(error, schema.Malformed) else ""
            raise JournalDamaged(
                f"{self.path} line {number} cannot be read{why}",
                cause="another program changed the file, or the disk failed",
                hint=f"back up {self.home}, repair that line (without `sum`) or delete it, and run again; "
                "nothing was changed",
            ) from error

    def add(self, step: str, undo: Undo) -> None:
        """Append a record and sync it to disk, before the change itself."""
        with self._guard:
            known = self.records()
            # Not their count: an uninstall that kept something leaves gaps.
            last = known[-1].n if known else 0
            record = Record(last + 1, _now(), self.run, step, undo)
            try:
                self._append(_line(record))
                self._known = [*known, record]
                self._note_last(record.n)
            except OSError as error:
                raise storage_problem(error, f"writing the journal {self.path}") from error

    def _append(self, line: bytes) -> None:
        with open(self.path, "ab", buffering=0) as out:
            data = read_regular(self.path)
            end = data.rfind(b"\n") + 1
            out.truncate(end)
            try:
                if out.write(line) != len(line):
                    raise OSError(28, "No space left on device", str(self.path))
                os.fsync(out.fileno())
            except OSError:
                out.truncate(end)
                raise

    def _note_last(self, number: int) -> None:
        text, path = b"%12d\n" % number, self.home / "journal.last"
        if not path.exists():
            replace_file(str(path), text, 0o600)
            return
        # Overwritten in place: one block, which a power cut leaves old or new.
        with open(path, "rb+", buffering=0) as out:
            out.write(text)

    def keep(self, original: bytes) -> str:
        """Store an original under its sha256, and return that."""
        name = hashlib.sha256(original).hexdigest()
        path = self.home / "originals" / name
        if self._content(name) == original:
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
        data = self._content(sha256)
        if data is None:
            raise JournalDamaged(
                f"the original {self.home}/originals/{sha256} is missing or damaged",
                hint="restore it from a backup, or delete its record from the journal",
            )
        return data

    def _content(self, sha256: str) -> bytes | None:
        try:
            data = read_regular(self.home / "originals" / sha256, follow=False)
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == sha256 else None

    def begin(self, step: str, undos: Sequence[Undo]) -> None:
        """Create the journal with its first records, at once: it is never empty."""
        self.rewrite([Record(n, _now(), self.run, step, undo) for n, undo in enumerate(undos, start=1)])

    def rewrite(self, records: list[Record]) -> None:
        """Keep only `records`: those that an uninstall could not undo."""
        ordered = sorted(records, key=lambda record: record.n)
        try:
            # This number first: it is never larger than that of the last line.
            replace_file(str(self.home / "journal.last"), b"%12d\n" % ordered[-1].n, 0o600)
            replace_file(str(self.path), b"".join(map(_line, ordered)), 0o600)
        except OSError as error:
            raise storage_problem(error, f"writing the journal {self.path}") from error
        self._known = ordered


def _line(record: Record) -> bytes:
    text = json.dumps({"v": VERSION, **to_builtins(record)}, sort_keys=True)
    return f'{text[:-1]}, "sum": "{_sum(text)}"}}\n'.encode()


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


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


def read_state(path: Path, kind: type[Problem], hint: str) -> bytes | None:
    """Return the content of a file of the state; None only if there is none.

    Raises:
        Blocked, Storage: this user may not read it.
        kind: it is not a file of ours, with `hint`.
    """
    try:
        return read_regular(path, _LARGEST, follow=False)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise unreadable(path) from error
    except OSError as error:
        raise kind(f"{path} cannot be read: {error.strerror}", hint=hint) from error


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
