"""`/var/lib/sparkinstall` on the node: the journal, its lock, the logs, and what `all` was asked for."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sparkinstall.errors import Busy, storage_problem
from sparkinstall.events import Emit, WaitedFor
from sparkinstall.plans.journal import Journal
from sparkinstall.system import Undo, processes
from sparkinstall.system.local import LocalSystem

FOLDER = "/var/lib/sparkinstall"


class StateFolder:
    """The state of one node; nothing is made before `hold()`."""

    def __init__(self, system: LocalSystem) -> None:
        self.system = system
        self.home = Path(system.real(FOLDER))

    @property
    def exists(self) -> bool:
        return (self.home / "journal.jsonl").exists()

    def journal(self, run: str = "") -> Journal:
        return Journal(self.home, run)

    def logs(self, run: str) -> Path:
        """The folder of a run's logs, made if need be; a real path."""
        folder = self.home / "logs" / run
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def options(self) -> dict[str, Any]:
        """What the last `all` was asked for on its command line (stack, platform, ...)."""
        try:
            found = json.loads((self.home / "options.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def remember_options(self, options: Mapping[str, Any]) -> None:
        """Keep `options`, without touching a file that already says so."""
        if self.options() != dict(options):
            waiting = self.home / "options.new"
            waiting.write_text(json.dumps(dict(options), sort_keys=True, indent=2) + "\n")
            waiting.replace(self.home / "options.json")

    @contextmanager
    def hold(self, verb: str, emit: Emit) -> Iterator[str]:
        """Make the folder if need be and keep every other run out; gives the id of this run.

        Raises:
            Busy: another run holds the node.
            Storage: the folder cannot be made.
        """
        try:
            self._make()
            handle = open(self.home / "lock", "a+")  # noqa: SIM115 - held as long as the run
        except OSError as error:
            raise storage_problem(error, f"making {self.home}") from error
        with handle:
            self._take(handle, emit)
            run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"
            _say_who(handle, {"pid": os.getpid(), "verb": verb, "run": run, "since": time.strftime("%H:%M:%S")})
            yield run
            _say_who(handle, {})

    def _take(self, handle: IO[str], emit: Emit) -> None:
        holder = _who(handle)
        if not _locked(handle):
            raise Busy(
                f"another sparkinstall is at work here (`{holder.get('verb', '?')}`, "
                f"pid {holder.get('pid', '?')}, since {holder.get('since', '?')})",
                mend="wait until it has ended, then run this again",
            )
        # A run that ended well leaves the file empty; a name in it is that of a killed one.
        if holder.get("run") and processes.end_leftovers(str(holder["run"])):
            emit(WaitedFor("the programs of a killed run; they were still running and have been ended"))

    def _make(self) -> None:
        self.sweep()
        if self.exists:
            return
        missing = [p for p in (self.home, *self.home.parents) if not p.exists()]
        if not missing:
            self._begin(self.home, [])
            return
        top = missing[-1]
        try:
            self._make_at_once(top, missing)
        except PermissionError:
            self.system.make_one_dir(FOLDER, 0o700)
            self._begin(self.home, [])

    def _make_at_once(self, top: Path, missing: list[Path]) -> None:
        # Folders and first records appear together by one rename: no kill can leave half of them.
        waiting = staged_folder(top)
        shutil.rmtree(waiting, ignore_errors=True)
        inner = waiting / self.home.relative_to(top)
        inner.mkdir(parents=True)
        inner.chmod(0o700)
        self._begin(inner, [self._node_path(p) for p in reversed(missing[1:])])
        waiting.rename(top)

    def sweep(self) -> None:
        """Remove what a killed run left of a state that was being made or removed."""
        for top in (self.home, *self.home.parents):
            if top == top.parent or not top.is_relative_to(self.system.root):
                break
            shutil.rmtree(leftover(top), ignore_errors=True)

    def _node_path(self, real: Path) -> str:
        return "/" + str(real.relative_to(self.system.root)).removeprefix(".")

    def _begin(self, home: Path, made: list[str]) -> None:
        journal = Journal(home)
        journal.path.touch(mode=0o600)
        for path in made:
            journal.add("state", Undo("dir", path, {"kind": "absent"}, {"kind": "dir"}))

    def remove(self, made: list[str]) -> None:
        """Remove the folder and those of its parents that `hold` had made, at once."""
        top = Path(self.system.real(made[0])) if made else self.home
        if any(self._others_in(Path(self.system.real(path))) for path in made):
            top = self.home
        try:
            top.rename(leftover(top))
            shutil.rmtree(leftover(top))
        except PermissionError:
            self.system.remove_tree(FOLDER)

    def _others_in(self, folder: Path) -> bool:
        ours = {self.home, *self.home.parents}
        return any(child not in ours for child in folder.iterdir())


def staged_folder(top: Path) -> Path:
    """Where the first state waits before it appears by one rename."""
    return top.with_name(f".{top.name}.sparkinstall-new")


def leftover(top: Path) -> Path:
    """What a killed uninstall may have left of the state."""
    return top.with_name(f".{top.name}.sparkinstall-old")


def _locked(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _who(handle: IO[str]) -> dict[str, Any]:
    handle.seek(0)
    try:
        found = json.loads(handle.read() or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _say_who(handle: IO[str], who: dict[str, Any]) -> None:
    try:
        handle.truncate(0)
        handle.write(json.dumps(who))
        handle.flush()
    except OSError:
        pass
