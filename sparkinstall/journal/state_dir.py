"""`/var/lib/sparkinstall` on the node: the journal, its lock, the logs, and what `all` was asked for."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec import Struct, to_builtins

from sparkinstall import schema
from sparkinstall.errors import Busy, JournalDamaged, Problem, Storage, storage_errors
from sparkinstall.events import Emit, WaitedFor
from sparkinstall.journal.journal import Journal, unreadable
from sparkinstall.node import Node
from sparkinstall.system import Undo, processes
from sparkinstall.system.local import LocalSystem, replace_file, sync_folder

FOLDER = "/var/lib/sparkinstall"
_PATIENCE = 20.0


class Options(Struct, frozen=True, omit_defaults=True):
    """What the last `all` was asked for on its command line, as options.json keeps it; None: it was not said."""

    config: str | None = None
    settings: dict[str, Any] | None = None
    platform: str | None = None
    full: bool | None = None


class Holder(Struct, frozen=True):
    """The run that holds the node, as the lock file names it."""

    pid: int
    verb: str
    run: str
    since: str


class StateFolder:
    """The state of one node; nothing is made before `hold()`."""

    def __init__(self, system: LocalSystem) -> None:
        self.system = system
        self.home = Path(system.real(FOLDER))

    @property
    def exists(self) -> bool:
        """Whether there is a journal, be it empty."""
        try:
            os.stat(self.home / "journal.jsonl")
        except (FileNotFoundError, NotADirectoryError):
            return False
        except PermissionError as error:
            raise self._unreadable("journal.jsonl") from error
        return True

    @property
    def installed(self) -> bool:
        """Whether anything was ever set up here, as far as the journal knows."""
        return self.exists and bool(self.journal().records())

    def trouble(self, node: Node) -> Problem | None:
        """What stops `all` and `uninstall`: a journal that cannot be read, or is gone.

        Raises:
            Blocked: another user set this node up.
        """
        try:
            known = self.journal().records()
        except (JournalDamaged, Storage) as problem:
            return problem
        # Written last, and by nobody else: an environment that has it is whole and ours.
        made = not known and self.system.entry(node.venv_stamp)
        return self._lost(node) if made else None

    def _lost(self, node: Node) -> JournalDamaged:
        prefix = self.system.real(node.prefix)
        return JournalDamaged(
            f"what sparkinstall has made is in {prefix}, but {self.home}/journal.jsonl is gone or empty",
            cause="without the journal, which records what was there before, uninstall can restore nothing",
            hint=f"put the journal back from a backup; without one, move {prefix} away and run `sparkinstall all`: "
            "what it changes from then on can be undone",
        )

    def journal(self, run: str = "") -> Journal:
        return Journal(self.home, run)

    def logs(self, run: str) -> Path:
        """The folder of a run's logs, made if need be; a real path."""
        folder = self.home / "logs" / run
        with storage_errors(f"making {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def options(self) -> dict[str, Any]:
        """What the last `all` was asked for on its command line (stack, platform, ...).

        Raises:
            Blocked, Storage: this user may not read it.
        """
        try:
            kept = (self.home / "options.json").read_bytes()
            return dict(to_builtins(schema.read_json(Options, kept, "options.json")))
        except PermissionError as error:
            raise self._unreadable("options.json") from error
        except (OSError, ValueError):
            return {}

    def remember_options(self, options: Mapping[str, Any]) -> None:
        """Keep `options`, without touching a file that already says so."""
        if self.options() != dict(options):
            self._keep("options.json", json.dumps(dict(options), sort_keys=True, indent=2) + "\n")

    def unproven(self) -> list[str]:
        """The probes that failed when the node was last proven; what is as it was made may still not work."""
        try:
            return (self.home / "unproven").read_text().split()
        except OSError:
            return []

    def remember_unproven(self, names: Sequence[str]) -> None:
        """Keep which probes failed, without touching a file that already says so."""
        if self.unproven() != list(names):
            self._keep("unproven", "".join(f"{name}\n" for name in names))

    def _keep(self, name: str, text: str) -> None:
        with storage_errors(f"writing {self.home / name}"):
            replace_file(str(self.home / name), text.encode(), 0o600)

    def _unreadable(self, name: str) -> Problem:
        return unreadable(self.home / name)

    @contextmanager
    def hold(self, verb: str, emit: Emit) -> Iterator[str]:
        """Make the folder if need be and keep every other run out; gives the id of this run.

        Raises:
            Busy: another run holds the node.
            Storage: the folder cannot be made.
        """
        with self._lock(emit) as handle:
            run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"
            _say_who(handle, Holder(os.getpid(), verb, run, time.strftime("%H:%M:%S")))
            yield run
            _say_who(handle, None)

    def require_free(self) -> None:
        """Look whether another run is at work, before this one asks anybody anything; nothing is made or kept.

        Raises:
            Busy: another run holds the node.
        """
        try:
            handle = open(self.home / "lock")  # noqa: SIM115 - closed below, and what keeps it shut `hold` will tell
        except OSError:
            return
        with handle:
            # Without a name in it nobody is at work: to try it all the same could turn away a run that just begins.
            holder = _who(handle)
            if holder and not _locked(handle):
                raise _at_work(holder)

    def _lock(self, emit: Emit) -> IO[str]:
        while True:
            with storage_errors(f"making {self.home}"), self._alone():
                self._make()
                handle = open(self.home / "lock", "a+")  # noqa: SIM115 - held as long as the run
            try:
                self._take(handle, emit)
                if _is_at(handle, self.home / "lock"):
                    return handle
            except BaseException:
                handle.close()
                raise
            # An uninstall that was ending took the folder away under this lock: it guards nothing.
            handle.close()

    def _take(self, handle: IO[str], emit: Emit) -> None:
        holder = _who(handle)
        if not _locked(handle):
            raise _at_work(holder)
        # A run that ended well leaves the file empty; a name in it is that of a killed one.
        if holder and processes.end_leftovers(holder.run):
            emit(WaitedFor("the programs of a killed run; they were still running and have been ended"))

    def _make(self) -> None:
        self._sweep()
        if self.exists:
            return
        missing = [p for p in (self.home, *self.home.parents) if not p.exists()]
        if not missing:
            self._begin(self.home, [])
            return
        top = missing[-1]
        try:
            self._make_at_once(top, missing)
        except PermissionError as error:
            if not self.system.sudo:
                raise self._not_ours(top.parent) from error
            self.system.make_dir(FOLDER, 0o700)
            self._begin(self.home, [])

    def _not_ours(self, folder: Path) -> Storage:
        """Where sudo is not asked, as in a rehearsal, nobody can make a folder in one that is not theirs."""
        return Storage(
            f"{self.home} cannot be made: permission denied",
            cause=f"you may not write to the folder {folder}",
            hint=f"choose a folder of your own (`--root`), or make this one yours to write to: chmod u+wx {folder}",
        )

    def _make_at_once(self, top: Path, missing: list[Path]) -> None:
        # Folders and first records appear together by one rename: no kill can leave half of them.
        waiting = staged_folder(top)
        inner = waiting / self.home.relative_to(top)
        try:
            inner.mkdir(parents=True)
            inner.chmod(0o700)
            self._begin(inner, [self._node_path(p) for p in reversed(missing[1:])])
            waiting.rename(top)
            sync_folder(str(top.parent))
        except (OSError, Problem):
            shutil.rmtree(waiting, ignore_errors=True)
            raise

    def sweep(self) -> None:
        """Remove what a killed run left of a state that was being made or removed."""
        with storage_errors(f"looking at {self.home}"), self._alone():
            self._sweep()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two runs that begin at once would take each other's half-made folders for a killed run's."""
        folder = os.open(Path(self.system.root).parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Held for moments by us, but anybody may hold it: after a while it is not waited for.
            until = time.monotonic() + _PATIENCE
            while not _locked(folder):
                if time.monotonic() > until:
                    raise Busy(f"somebody holds a lock on {Path(self.system.root).parent}", hint="`lslocks` shows who")
                time.sleep(0.05)
            yield
        finally:
            os.close(folder)

    def _sweep(self) -> None:
        for top in (self.home, *self.home.parents):
            if top == top.parent or not top.is_relative_to(self.system.root):
                break
            shutil.rmtree(leftover(top), ignore_errors=True)
            shutil.rmtree(staged_folder(top), ignore_errors=True)

    def _node_path(self, real: Path) -> str:
        return "/" + str(real.relative_to(self.system.root)).removeprefix(".")

    def _begin(self, home: Path, made: list[str]) -> None:
        journal = Journal(home)
        journal.path.touch(mode=0o600)
        for path in made:
            journal.add("state", Undo("dir", path, {"kind": "absent"}, {"kind": "dir"}))

    def remove(self, made: list[str]) -> None:
        """Remove the folder and those of its parents that `hold` had made and that hold nothing else, at once."""
        top = self.home
        for folder in (Path(self.system.real(path)) for path in reversed(made)):
            if set(folder.iterdir()) != {top}:
                break
            top = folder
        try:
            with storage_errors(f"removing {top}", but=PermissionError), self._alone():
                top.rename(leftover(top))
        except PermissionError:
            self.system.clear(FOLDER)
        shutil.rmtree(leftover(top), ignore_errors=True)


def staged_folder(top: Path) -> Path:
    """Where the first state waits before it appears by one rename."""
    return top.with_name(f".{top.name}.sparkinstall-new")


def leftover(top: Path) -> Path:
    """What a killed uninstall may have left of the state."""
    return top.with_name(f".{top.name}.sparkinstall-old")


def _is_at(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _locked(handle: IO[str] | int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _at_work(holder: Holder | None) -> Busy:
    who = f" (`{holder.verb}`, pid {holder.pid}, since {holder.since})" if holder else ""
    return Busy(
        f"another sparkinstall is at work here{who}",
        hint="wait until it has ended, then run this again",
    )


def _who(handle: IO[str]) -> Holder | None:
    handle.seek(0)
    try:
        return schema.read_json(Holder, handle.read(), "lock")
    except ValueError:
        return None


def _say_who(handle: IO[str], who: Holder | None) -> None:
    try:
        # Past Python's buffer: on a full disk it would be written once more when the file is closed, and fail there.
        os.ftruncate(handle.fileno(), 0)
        os.write(handle.fileno(), msgspec.json.encode(who) if who else b"{}")
    except OSError:
        pass
