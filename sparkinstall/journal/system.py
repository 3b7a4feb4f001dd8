"""A `System` that journals every touch before it is made. Steps never see any other."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sparkinstall.errors import Blocked, CommandFailed
from sparkinstall.events import Emit, LineRead, Progressed
from sparkinstall.journal.journal import Journal
from sparkinstall.redaction import redact
from sparkinstall.system import Entry, Result, Undo, processes
from sparkinstall.system.local import LocalSystem

_TAIL = 12
_NO_SPACE = "No space left on device"


class JournaledSystem:
    """`raw`, with each touch of `step` in `journal` first; output of programs to `log` and `emit`."""

    def __init__(self, raw: LocalSystem, journal: Journal, step: str, log: Path, emit: Emit) -> None:
        self._raw, self._journal, self._step, self._log, self._emit = raw, journal, step, log, emit

    @property
    def rehearsal(self) -> bool:
        return self._raw.rehearsal

    def real(self, path: str) -> str:
        return self._raw.real(path)

    def entry(self, path: str) -> Entry | None:
        return self._raw.entry(path)

    def read(self, path: str) -> bytes | None:
        return self._raw.read(path)

    def names(self, path: str) -> tuple[str, ...]:
        return self._raw.names(path)

    def ask(self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False) -> Result:
        return self._raw.ask(*argv, timeout=timeout, env=env, root=root)

    def promise(self, undo: Undo) -> None:
        self._journal.add(self._step, undo)

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._make_parents(path)
        if self._is_claimed(path):
            # The folder around it goes as a whole: there is no original of a single file to keep.
            self._raw.place(path, data, mode)
            return
        after = {"kind": "file", "sha256": hashlib.sha256(data).hexdigest(), "mode": mode}
        self.promise(Undo("path", path, self._remember(path), after))
        self._raw.place(path, data, mode)

    def remove(self, path: str) -> None:
        if self.entry(path) is None:
            return
        if not self._is_claimed(path):
            self.promise(Undo("path", path, self._remember(path), {"kind": "absent"}))
        self._raw.unlink(path)

    def link(self, path: str, target: str) -> None:
        self._make_parents(path)
        if self._is_claimed(path):
            self._raw.place_link(path, target)
            return
        self.promise(Undo("path", path, self._remember(path), {"kind": "link", "target": target}))
        self._raw.place_link(path, target)

    def _remember(self, path: str) -> dict[str, Any]:
        was = self.entry(path)
        if was is None:
            return {"kind": "absent"}
        if was.kind == "link":
            return {"kind": "link", "target": was.target}
        if was.kind != "file":
            raise Blocked(
                f"{self.real(path)} is a {was.kind}, where sparkinstall needs a file of its own",
                hint="move it away, then run again",
            )
        content = self.read(path) or b""
        own = {"kind": "file", "sha256": hashlib.sha256(content).hexdigest(), "mode": was.mode}
        if own in self._left_at(path):
            # What we left there ourselves is no original: the first record of the path has that.
            return own
        sha256 = self._journal.keep(content)
        meta = {"mode": was.mode, "uid": was.uid, "gid": was.gid, "mtime_ns": was.mtime_ns}
        return {"kind": "file", "sha256": sha256, **meta}

    def _left_at(self, path: str) -> list[Mapping[str, Any]]:
        undos = (record.undo for record in self._journal.records())
        return [undo.after for undo in undos if undo.kind == "path" and undo.subject == path]

    def make_dir(self, path: str, mode: int = 0o755) -> None:
        if self.entry(path) is None:
            self._make_parents(path)
            if self._is_claimed(path):
                self._raw.make_one_dir(path, mode)
                return
            self.promise(Undo("dir", path, {"kind": "absent"}, {"kind": "dir"}))
            self._raw.make_one_dir(path, mode)

    def _make_parents(self, path: str) -> None:
        parent = str(PurePosixPath(path).parent)
        self._refuse_to_leave(parent)
        if parent != path and self.entry(parent) is None:
            self.make_dir(parent)

    def _refuse_to_leave(self, folder: str) -> None:
        """A link in a rehearsal's folder must not lead to the machine around it."""
        if self.rehearsal and not Path(self.real(folder)).resolve().is_relative_to(Path(self._raw.root).resolve()):
            raise Blocked(
                f"{self.real(folder)} leads out of the rehearsal, to {Path(self.real(folder)).resolve()}",
                hint="move that link away, or rehearse in another folder",
            )

    def claim(self, path: str) -> None:
        if not self._is_claimed(path):
            before = self._room_for_tree(path)
            self._make_parents(path)
            self.promise(Undo("tree", path, before, {"kind": "dir"}))
        self._make_parents(path)
        self._raw.make_one_dir(path, 0o755)

    def _room_for_tree(self, path: str) -> dict[str, Any]:
        """What is where a claimed folder will be: nothing, or an empty folder that is made again one day."""
        was = self.entry(path)
        if was is None:
            return {"kind": "absent"}
        if was.kind != "dir" or self.names(path):
            raise Blocked(
                f"{self.real(path)} is already there and is not sparkinstall's",
                hint="move it away, or choose another place with `prefix:` in the config",
            )
        return {"kind": "dir", "mode": was.mode, "uid": was.uid, "gid": was.gid, "mtime_ns": was.mtime_ns}

    def _is_claimed(self, path: str) -> bool:
        trees = [r.undo.subject for r in self._journal.records() if r.undo.kind == "tree"]
        return any(path == tree or path.startswith(tree + "/") for tree in trees)

    def clear(self, path: str) -> None:
        if not self._is_claimed(path):
            raise Blocked(f"{self.real(path)} is not sparkinstall's to remove")
        self._raw.remove_tree(path)

    def run(
        self,
        *argv: str,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        root: bool = False,
        watch: Callable[[str], None] = lambda _: None,
    ) -> Result:
        full = (*self._raw.sudo, *argv) if root else argv
        output: deque[str] = deque(maxlen=2000)
        with open(self._log, "a", encoding="utf-8", errors="replace") as log:

            def keep(line: str) -> None:
                shown = redact(line)
                output.append(shown)
                log.write(shown + "\n")
                log.flush()
                self._emit(LineRead(self._step, shown))
                watch(shown)

            log.write(redact(f"$ {' '.join(full)}") + "\n")
            code = processes.stream(full, self._environment(env), keep, cwd=cwd)
        result = Result(full, code, "\n".join(output), "")
        if not result.ok:
            raise self._failure(result)
        return result

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        mark = {processes.RUN_MARK: self._journal.run}
        return {**os.environ, "LC_ALL": "C.UTF-8", **(more or {}), **mark}

    def _failure(self, result: Result) -> CommandFailed:
        lines = [line for line in result.out.splitlines() if line.strip()]
        why, hint = "", "read the log, fix the cause, and run the same command again: it continues from here"
        if _NO_SPACE in result.out:
            why, hint = "the disk is full", "free some space, then run the same command again: it goes on"
        program = next(part for part in result.argv if part not in ("sudo", "-n"))
        return CommandFailed(
            f"`{PurePosixPath(program).name}` ended with code {result.code}",
            cause=why,
            hint=hint,
            log=str(self._log),
            output=lines[-_TAIL:],
        )

    def progress(self, done: int, total: int, unit: str) -> None:
        self._emit(Progressed(self._step, done, total, unit))
