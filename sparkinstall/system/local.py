"""This machine, or a folder of it that represents a node in a rehearsal."""

import errno
import os
import shutil
import stat
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Unpack

from sparkinstall.errors import Blocked, Interrupted, NeedsRoot, storage_errors, storage_problem
from sparkinstall.own_files import read_regular, too_large
from sparkinstall.system import Entry, Result, RunOptions, System, Undo, failure_of, processes, read_only

_KINDS: Mapping[int, Any] = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}
_LONG = 1800.0
_LINES_KEPT = 2000
_LARGEST = 64 << 20
"""Bytes. No file of a node that is read whole is larger: settings, records, sources, tables of the kernel."""
# Seconds; sudo's password cache lasts 15 minutes or less.
_SUDO_LASTS = 60.0
# Never write through an existing link: remove the old file and create the new one exclusively.
_PLACE = """set -eC; umask 077; rm -f "$1"; trap 'rm -f "$1"' EXIT
cat "$4" > "$1"; chmod "$3" "$1"; mv -fT "$1" "$2"
"""


def staged(path: str) -> str:
    """Return the temporary file beside a target. Its name is fixed, so that a killed run leaves at most one, which
    the next write or the uninstall removes."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name}.sparkinstall-new"


class LocalReader:
    """A `Reader` of the machine (root "/") or of a rehearsal below the folder `root`."""

    def __init__(self, root: str = "/") -> None:
        self.root = root.rstrip("/") or "/"

    @property
    def rehearsal(self) -> bool:
        return self.root != "/"

    @property
    def sudo(self) -> tuple[str, ...]:
        return () if self.rehearsal or os.geteuid() == 0 else ("sudo", "-n")

    def ask_for_sudo(self) -> None:
        """Let sudo ask for its password once, on a terminal, if it needs one."""
        if self.sudo and not self.ask(*self.sudo, "true").ok:
            processes.with_terminal("sudo", "-v")

    @contextmanager
    def sudo_kept(self) -> Iterator[None]:
        """Renew sudo's cached password while the work lasts: a build takes longer than the cache."""
        if not self.sudo:
            yield
            return
        ended = threading.Event()
        keeper = threading.Thread(target=self._keep_sudo, args=(ended,), daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()

    def _keep_sudo(self, ended: threading.Event) -> None:
        with suppress(Interrupted):
            while not ended.wait(_SUDO_LASTS):
                self.ask(*self.sudo, "-v")

    def real(self, path: str) -> str:
        return path if not self.rehearsal else self.root + path.rstrip("/")

    def inside(self, path: str) -> str:
        """Return the real path of `path`, for a writer; its last part may be a link.

        Raises:
            Blocked: in a rehearsal, a link above it leads out of the rehearsal's folder.
        """
        real = self.real(path)
        folder, root = (os.path.realpath(each) for each in (os.path.dirname(real), self.root))
        if self.rehearsal and folder != root and not folder.startswith(root + "/") and real != self.root:
            raise Blocked(
                f"{os.path.dirname(real)} leads out of the rehearsal, to {folder}",
                hint="move that link away, or rehearse in another folder",
            )
        return real

    def entry(self, path: str) -> Entry | None:
        try:
            found = os.lstat(self.real(path))
            target = os.readlink(self.real(path)) if stat.S_ISLNK(found.st_mode) else ""
        except (FileNotFoundError, NotADirectoryError):
            return None
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "other")
        mode = stat.S_IMODE(found.st_mode)
        return Entry(kind, mode, found.st_size, found.st_mtime_ns, found.st_uid, found.st_gid, target)

    def read(self, path: str) -> bytes | None:
        try:
            return read_regular(self.real(path), _LARGEST)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except PermissionError as error:
            return self._read_as_root(path, error)

    def _read_as_root(self, path: str, error: PermissionError) -> bytes | None:
        if not self.sudo:
            raise error
        argv = (*self.sudo, "head", "-c", str(_LARGEST + 1), path)
        code, out, said = processes.answer(argv, {**os.environ, "LC_ALL": "C.UTF-8"}, 30)
        if code != 0:
            answer, hint = Result(argv, code, "", said.decode(errors="replace")), f"see what `sudo cat {path}` says"
            raise failure_of(answer, f"only root can read {path}", hint=hint, error=NeedsRoot) from error
        if len(out) > _LARGEST:
            raise too_large(path, _LARGEST)
        return out

    def names(self, path: str) -> tuple[str, ...]:
        try:
            return tuple(sorted(os.listdir(self.real(path))))
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        read_only.require(argv)
        chosen = env if env is not None else {**os.environ, "LC_ALL": "C.UTF-8"}
        full = (*self.sudo, *argv) if root else argv
        code, out, err = processes.answer(full, chosen, timeout, stdin.encode())
        return Result(full, code, out.decode(errors="replace"), err.decode(errors="replace"))


class LocalSystem(LocalReader, System):
    """A `System` that changes the machine, or a rehearsal's folder, without a journal (see journal/system.py).

    It uses sudo where this user may not write.
    """

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        with storage_errors(f"writing {self.real(path)}"):
            try:
                replace_file(self.inside(path), data, mode)
            except PermissionError:
                with _temporary(data) as content:
                    place = ("sh", "-c", _PLACE, "sh", staged(path), path, f"{mode:o}", content)
                    self._escalate(f"writing {path}", path, *place)

    def link(self, path: str, target: str) -> None:
        waiting = self.inside(staged(path))
        with self._or_as_root(f"linking {self.real(path)}", "ln", "-sfnT", target, path):
            Path(waiting).unlink(missing_ok=True)
            os.symlink(target, waiting)
            os.replace(waiting, self.real(path))

    def make_dir(self, path: str, mode: int = 0o755) -> None:
        """Create a folder in an existing parent; do nothing if it exists."""
        by_root = ("install", "-d", "-m", f"{mode:o}", "-o", str(os.getuid()), "-g", str(os.getgid()), path)
        with self._or_as_root(f"creating the folder {self.real(path)}", *by_root), suppress(FileExistsError):
            os.mkdir(self.inside(path), mode)
            os.chmod(self.real(path), mode)

    def remove(self, path: str) -> None:
        if self.entry(staged(path)) is not None:
            self.remove(staged(path))
        with self._or_as_root(f"removing {self.real(path)}", "rm", "-f", path):
            Path(self.inside(path)).unlink(missing_ok=True)

    def remove_dir(self, path: str) -> bool:
        if self.entry(path) is None:
            return True
        if self.names(path):
            return False
        with self._or_as_root(f"removing {self.real(path)}", "rmdir", path):
            os.rmdir(self.inside(path))
        return True

    def claim(self, path: str) -> None:
        self.make_dir(path)

    def switch(self, path: str, folder: str) -> None:
        if (was := self.entry(path)) and was.kind == "dir":
            former = f"{folder}.former"
            self.clear(former)
            with self._or_as_root(f"moving {self.real(path)}", "mv", "-T", path, former):
                os.rename(self.inside(path), self.inside(former))
        self.link(path, os.path.relpath(folder, os.path.dirname(path)))

    def clear(self, path: str) -> None:
        by_root = ("rm", "-rf", "--one-file-system", path)
        with self._or_as_root(f"removing {self.real(path)}", *by_root), suppress(FileNotFoundError):
            shutil.rmtree(self.inside(path))

    @contextmanager
    def _or_as_root(self, doing: str, *argv: str) -> Iterator[None]:
        """Do what the context does; if this user may not, run `argv` as root instead."""
        with storage_errors(doing):
            try:
                yield
            except PermissionError:
                self._escalate(doing, argv[-1], *argv)

    def restore_meta(self, path: str, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
        real = self.inside(path)
        try:
            os.chmod(real, mode)
            if os.lstat(real).st_uid != uid or os.lstat(real).st_gid != gid:
                os.chown(real, uid, gid)
            os.utime(real, ns=(mtime_ns, mtime_ns))
        except PermissionError:
            time = f"@{mtime_ns // 10**9}.{mtime_ns % 10**9:09d}"
            for argv in (("chmod", f"{mode:o}"), ("chown", "-h", f"{uid}:{gid}"), ("touch", "-d", time)):
                self._escalate(f"restoring mode, owner and time of {path}", path, *argv, path)

    def promise(self, undo: Undo) -> None:
        """Do nothing: this System has no journal."""

    def try_run(self, *argv: str, **how: Unpack[RunOptions]) -> Result:
        full = (*self.sudo, *argv) if how.get("root") else argv
        lines: deque[str] = deque(maxlen=_LINES_KEPT)
        watch = how.get("watch")

        def keep(line: str) -> None:
            lines.append(line)
            if watch:
                watch(line)

        whole = {**os.environ, "LC_ALL": "C.UTF-8", **how.get("env", {})}
        code = processes.stream(full, whole, keep, how.get("timeout"))
        return Result(full, code, "\n".join(lines), "")

    def warn(self, text: str) -> None:
        """Do nothing: nobody watches."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Do nothing: nobody watches."""

    def _escalate(self, doing: str, path: str, *argv: str) -> None:
        """Run `argv`, which changes `path`, as root; `doing` names that for an error."""
        if not self.sudo:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        answer = self.try_run(*argv, root=True, timeout=_LONG)
        if not answer.ok:
            failure = failure_of(answer, f"{doing} failed", places=(os.path.dirname(path),))
            if number := {"full": errno.ENOSPC, "read-only": errno.EROFS}.get(failure.kind or ""):
                raise storage_problem(OSError(number, "", path), doing)
            raise failure


@contextmanager
def _temporary(data: bytes) -> Iterator[str]:
    """A temporary file with `data`, for a program of another user."""
    with ExitStack() as stack:
        with storage_errors(f"writing a temporary file in {tempfile.gettempdir()}"):
            file = stack.enter_context(tempfile.NamedTemporaryFile())
            file.write(data)
            file.flush()
        yield file.name


def replace_file(target: str, data: bytes, mode: int) -> None:
    """Replace the content of the file `target` (a real path) atomically and durably."""
    waiting = staged(target)
    Path(waiting).unlink(missing_ok=True)
    handle = os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            os.fchmod(out.fileno(), mode)
            out.flush()
            os.fsync(out.fileno())
        os.replace(waiting, target)
        sync_folder(os.path.dirname(target))
    except BaseException:
        Path(waiting).unlink(missing_ok=True)
        raise


def sync_folder(real: str) -> None:
    """Sync the folder of a name that was just created or replaced."""
    folder = os.open(real, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
