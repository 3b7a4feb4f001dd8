"""`/var/lib/sparkinstall` on the node: journal, lock, logs, and the options of the last `all`."""

import fcntl
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec import Struct, to_builtins

from sparkinstall import config, schema
from sparkinstall.errors import Blocked, Busy, JournalDamaged, Problem, StateDamaged, Storage, storage_errors
from sparkinstall.events import Emit, WaitedFor
from sparkinstall.journal.journal import LEFT_OF_A_JOURNAL, Journal, read_state, unreadable
from sparkinstall.node import Node
from sparkinstall.system import KIND_WORDS, Undo, processes
from sparkinstall.system.local import LocalSystem, replace_file, staged, sync_folder

FOLDER = "/var/lib/sparkinstall"
_PATIENCE = 20.0
_LONGEST_NAME = 4096
# The id of a run: when it began, and its process.
_RUN = re.compile(r"\d{8}-\d{6}-\d+")
# In the order in which they are removed: the journal last.
_CONTENTS = {
    "options.json": "file", "unproven": "file", "logs": "dir", "originals": "dir", "journal.last": "file",
    "journal.jsonl": "file", "lock": "file",
}  # fmt: skip


class Served(Struct, frozen=True, forbid_unknown_fields=True):
    """The settings that a recipe or a model stands for, by name, as `serve` found them: those of the user win.

    `own`: what the user has set for this model on the command line of `serve`.
    """

    name: str
    settings: dict[str, Any]
    own: dict[str, Any] = {}


class Options(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The options of the last `all`, as in options.json; None: not given."""

    config: str | None = None
    settings: dict[str, Any] | None = None
    platform: str | None = None
    full: bool | None = None
    served: Served | None = None


class Holder(Struct, frozen=True):
    """The run that holds the lock, as named in the lock file."""

    pid: int
    verb: str
    run: str
    since: str


class StateFolder:
    """The state of one node; created by `hold()`."""

    def __init__(self, system: LocalSystem) -> None:
        self.system = system

    @cached_property
    def home(self) -> Path:
        """The folder itself, where a link to it leads.

        Raises:
            Blocked: it is no folder, or out of the rehearsal.
        """
        home = Path(os.path.realpath(os.path.dirname(self.system.inside(f"{FOLDER}/journal.jsonl"))))
        if os.path.lexists(home) and not home.is_dir():
            raise Blocked(f"{home} is not a folder, but the journal belongs there", hint=f"move it away: {_away(home)}")
        return home

    @property
    def _node_path(self) -> str:
        """`home` as a path of the node."""
        return "/" + os.path.relpath(self.home, os.path.realpath(self.system.root))

    @property
    def exists(self) -> bool:
        """Whether there is a journal, or what is left of one."""
        try:
            return not {"journal.jsonl", *LEFT_OF_A_JOURNAL}.isdisjoint(os.listdir(self.home))
        except FileNotFoundError:
            return False
        except PermissionError as error:
            raise unreadable(self.home / "journal.jsonl") from error

    @property
    def installed(self) -> bool:
        """Whether anything was set up here, according to the journal."""
        return self.exists and bool(self.journal().records())

    def trouble(self, node: Node) -> Problem | None:
        """Return the problem that stops `all` and `uninstall`: an unreadable or missing journal.

        Raises:
            Blocked: another user set this node up.
        """
        try:
            known = self.journal().records()
        except (JournalDamaged, Storage) as problem:
            return problem
        # Written last, and only by us: an environment with it is complete and ours.
        if known or not self.system.entry(node.venv_stamp):
            return None
        prefix = self.system.real(node.prefix)
        return JournalDamaged(
            f"{prefix} contains an installation, but {self.home}/journal.jsonl is missing",
            cause="without the journal, which records the former state, uninstall can restore nothing",
            hint=f"restore the journal from a backup; without one, move {prefix} away and run `sparkinstall all`: "
            "its changes can be undone again",
        )

    def journal(self, run: str = "") -> Journal:
        return Journal(self.home, run)

    def logs(self, run: str) -> Path:
        """Return the folder of a run's logs (a real path), creating it if necessary."""
        folder = self.home / "logs" / run
        with storage_errors(f"making {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def last_run(self) -> str:
        """The last run that began to change the node; "" if there is none."""
        with storage_errors(f"reading {self.home}/logs", but=FileNotFoundError):
            try:
                return max(filter(_RUN.fullmatch, os.listdir(self.home / "logs")), default="")
            except FileNotFoundError:
                return ""

    def options(self) -> dict[str, Any]:
        """Return the options of the last `all` (stack, platform, ...).

        Raises:
            Blocked, Storage: this user may not read it.
            StateDamaged: it is not what `remember_options` wrote.
        """
        path = self.home / "options.json"
        hint = f"move it away ({_away(path)}), and name the options of your last `all` again (--stack, --role, ...)"
        kept = read_state(path, StateDamaged, hint)
        if kept is None:
            return {}
        try:
            found = schema.read_json(Options, kept, str(path))
        except schema.Malformed as error:
            raise StateDamaged(error.message, hint=hint) from error
        known = [each.name for each in config.settings()]
        served = found.served or Served("", {})
        named = {**(found.settings or {}), **served.settings, **served.own}
        if unknown := [name for name in named if name not in known]:
            raise StateDamaged(f"{path}: unknown setting {schema.show(unknown[0])}", hint=hint)
        return dict(to_builtins(found))

    def remember_options(self, options: Mapping[str, Any]) -> None:
        """Store `options`, unless the file already contains them."""
        if self.options() != dict(options):
            self._keep("options.json", json.dumps(dict(options), sort_keys=True, indent=2) + "\n")

    def unproven(self) -> list[str]:
        """Return the probes that failed in the last verification: files may be up to date and still not work.

        Raises:
            Blocked, Storage: this user may not read it.
            StateDamaged: it is not what `remember_unproven` wrote.
        """
        path = self.home / "unproven"
        hint = f"delete it (`rm -r {path}`), and prove the node again: `sparkinstall verify`"
        kept = read_state(path, StateDamaged, hint)
        names = (kept or b"").decode(errors="replace").split()
        if kept is not None and not (names and all(name.isascii() and name.isprintable() for name in names)):
            raise StateDamaged(f"{path} is not a list of probes", hint=hint)
        return names

    def remember_unproven(self, names: Sequence[str]) -> None:
        """Store which probes failed; no file if none failed. What was there before does not matter."""
        if names:
            self._keep("unproven", "".join(f"{name}\n" for name in names))
            return
        with storage_errors(f"removing {self.home}/unproven"):
            (self.home / "unproven").unlink(missing_ok=True)

    def _keep(self, name: str, text: str) -> None:
        with storage_errors(f"writing {self.home / name}"):
            replace_file(str(self.home / name), text.encode(), 0o600)

    @contextmanager
    def hold(self, verb: str, emit: Emit) -> Iterator[str]:
        """Lock the folder against other runs, creating it if necessary; yield the id of this run.

        Raises:
            Busy: another run holds the node.
            Storage: the folder cannot be created.
        """
        with self._lock(emit) as handle:
            run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"
            _say_who(handle, Holder(os.getpid(), verb, run, time.strftime("%H:%M:%S")))
            yield run
            _say_who(handle, None)

    def require_free(self) -> None:
        """Check that no other run holds the node, before asking the user anything; creates nothing.

        Raises:
            Busy: another run holds the node.
        """
        self._require_sound()
        try:
            handle = open(self.home / "lock")  # noqa: SIM115 - closed below; `hold` reports errors
        except OSError:
            return
        with handle:
            # An empty file means no run; trying the lock anyway could reject a run that just starts.
            holder = _who(handle)
            if holder and not _locked(handle):
                raise _at_work(holder)

    def _lock(self, emit: Emit) -> IO[str]:
        while True:
            with storage_errors(f"making {self.home}"), self._alone():
                self._make()
                self._require_sound()
                handle = open(self.home / "lock", "a+")  # noqa: SIM115 - held as long as the run
            try:
                self._take(handle, emit)
                if _is_at(handle, self.home / "lock"):
                    return handle
            except BaseException:
                handle.close()
                raise
            # An uninstall has just removed the folder: this lock is of no use.
            handle.close()

    def _require_sound(self) -> None:
        """Check that nothing of another kind is in the place of our files: what we write must not go elsewhere.

        Raises:
            StateDamaged: a link, a pipe, a folder, ... is.
        """
        for name, kind in _CONTENTS.items():
            entry, path = self.system.entry(f"{self._node_path}/{name}"), self.home / name
            if entry and entry.kind != kind:
                raise StateDamaged(
                    f"{path} is {entry.words}, but sparkinstall keeps {KIND_WORDS[kind]} there",
                    hint=f"move it away ({_away(path)}), restore what belongs there from a backup, and run again",
                )

    def _take(self, handle: IO[str], emit: Emit) -> None:
        holder = _who(handle)
        if not _locked(handle):
            raise _at_work(holder)
        # A completed run leaves the file empty; a name in it is that of a killed run.
        if holder and processes.end_leftovers(holder.run):
            emit(WaitedFor("the programs of a killed run; they were still running and have been ended"))

    def _make(self) -> None:
        self._sweep()
        if self.exists:
            return
        missing = [p for p in (self.home, *self.home.parents) if not p.exists()]
        if not missing:
            self._begin(self.home, [], {"kind": "dir"})
            return
        top = missing[-1]
        try:
            self._make_at_once(top, missing)
        except PermissionError as error:
            if not self.system.sudo:
                raise Storage(
                    f"{self.home} cannot be created: permission denied",
                    cause=f"you may not write to the folder {top.parent}",
                    hint=f"choose a folder of your own (`--root`), or make this one writable: chmod u+wx {top.parent}",
                ) from error
            self.system.make_dir(self._node_path, 0o700)
            self._begin(self.home, [])

    def _make_at_once(self, top: Path, missing: list[Path]) -> None:
        # Folders and first records appear together by one rename, so that a kill cannot leave half of them.
        waiting = _beside(top, "new")
        inner = waiting / self.home.relative_to(top)
        try:
            inner.mkdir(parents=True)
            inner.chmod(0o700)
            below = [os.path.relpath(path, os.path.realpath(self.system.root)) for path in reversed(missing[1:])]
            self._begin(inner, ["/" + path.removeprefix(".") for path in below])
            waiting.rename(top)
            sync_folder(str(top.parent))
        except (OSError, Problem):
            shutil.rmtree(waiting, ignore_errors=True)
            raise

    def sweep(self) -> None:
        """Remove what a run killed while creating or removing the state has left."""
        with storage_errors(f"reading {self.home}"), self._alone():
            self._sweep()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock out other runs that start at once: each would take the other's unfinished folders for a killed run's."""
        folder = os.open(Path(self.system.root).parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # We hold it only briefly, but other programs may hold it: do not wait forever.
            until = time.monotonic() + _PATIENCE
            while not _locked(folder):
                if time.monotonic() > until:
                    raise Busy(
                        f"another program holds a lock on {Path(self.system.root).parent}", hint="`lslocks` shows it"
                    )
                time.sleep(0.05)
            yield
        finally:
            os.close(folder)

    def _sweep(self) -> None:
        for top in (self.home, *self.home.parents):
            if top == top.parent or not top.is_relative_to(os.path.realpath(self.system.root)):
                break
            for which in ("old", "new"):
                shutil.rmtree(_beside(top, which), ignore_errors=True)

    def _begin(self, home: Path, made: list[str], before: Mapping[str, Any] | None = None) -> None:
        folders = [(path, {"kind": "absent"}) for path in made] + [(self._node_path, before or {"kind": "absent"})]
        Journal(home).begin("state", [Undo("dir", path, was, {"kind": "dir"}) for path, was in folders])

    def remove(self, own: Mapping[str, str]) -> tuple[str, ...]:
        """Remove our files; return the names of others that are in the folder.

        Args:
            own: the kind of what was before `hold` in the place of the folder and its parents (node paths). What was
                absent is removed too, if it is empty otherwise.
        """
        found = own.get(self._node_path) == "dir"
        others = tuple(sorted(name for name in os.listdir(self.home) if name not in _CONTENTS))
        made = [path for path, was in own.items() if was == "absent" and path != self._node_path]
        if found or others:
            self._remove_contents()
            return others
        top = self.home
        for folder in (Path(self.system.real(path)) for path in reversed(made)):
            if set(folder.iterdir()) != {top}:
                break
            top = folder
        try:
            with storage_errors(f"removing {top}", but=PermissionError), self._alone():
                top.rename(_beside(top, "old"))
        except PermissionError:
            self.system.clear(self._node_path)
        shutil.rmtree(_beside(top, "old"), ignore_errors=True)
        return ()

    def _remove_contents(self) -> None:
        with storage_errors(f"emptying {self.home}"), self._alone():
            for path in (self.home / name for name in _CONTENTS):
                staged_file = Path(staged(str(path)))
                staged_file.unlink(missing_ok=True)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


def _away(path: Path) -> str:
    """The command that moves a file or folder away."""
    return f"`mv {shlex.quote(str(path))} {shlex.quote(f'{path}.old')}`"


def _beside(top: Path, which: str) -> Path:
    """Return the temporary folder of a `new` state before it is renamed, or of an `old` one while it is removed."""
    return top.with_name(f".{top.name}.sparkinstall-{which}")


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
    return Busy(f"another sparkinstall is running here{who}", hint="wait until it has ended, then run this again")


def _who(handle: IO[str]) -> Holder | None:
    handle.seek(0)
    try:
        return schema.read_json(Holder, handle.read(_LONGEST_NAME), "lock")
    except ValueError:
        return None


def _say_who(handle: IO[str], who: Holder | None) -> None:
    try:
        # Unbuffered: on a full disk, buffered data would fail again when the file is closed.
        os.ftruncate(handle.fileno(), 0)
        os.write(handle.fileno(), msgspec.json.encode(who) if who else b"{}")
    except OSError:
        pass
