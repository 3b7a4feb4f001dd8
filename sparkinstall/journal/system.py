"""A `System` that journals every change before making it. Steps get no other."""

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

from msgspec.structs import replace

from sparkinstall.errors import Blocked
from sparkinstall.events import Emit, LineRead, Progressed, Warned
from sparkinstall.journal.journal import Journal, fingerprint
from sparkinstall.redaction import redact
from sparkinstall.system import Entry, Result, RunOptions, System, Undo, processes

_LARGEST_ORIGINAL = 64 << 20


class JournaledSystem(System):
    """Wraps `raw`: records each change of `step` in `journal` first; sends output of programs to `log` and `emit`."""

    def __init__(self, raw: System, journal: Journal, step: str, log: Path, emit: Emit) -> None:
        self._raw, self._journal, self._step, self._log, self._emit = raw, journal, step, log, emit

    @property
    def rehearsal(self) -> bool:
        return self._raw.rehearsal

    @property
    def log(self) -> str:
        return str(self._log)

    @property
    def sudo(self) -> tuple[str, ...]:
        return self._raw.sudo

    def real(self, path: str) -> str:
        return self._raw.real(path)

    def inside(self, path: str) -> str:
        return self._raw.inside(path)

    def entry(self, path: str) -> Entry | None:
        return self._raw.entry(path)

    def read(self, path: str) -> bytes | None:
        return self._raw.read(path)

    def names(self, path: str) -> tuple[str, ...]:
        return self._raw.names(path)

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        return self._raw.ask(*argv, timeout=timeout, env=env, root=root, stdin=stdin)

    def promise(self, undo: Undo) -> None:
        self._journal.add(self._step, undo)

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        after = {"kind": "file", "sha256": hashlib.sha256(data).hexdigest(), "mode": mode}
        self._make_parents(path)
        self._record_path(path, after)
        self._raw.write(path, data, mode)

    def remove(self, path: str) -> None:
        if self.entry(path) is not None:
            self._record_path(path, {"kind": "absent"})
            self._raw.remove(path)

    def link(self, path: str, target: str) -> None:
        self._make_parents(path)
        self._record_path(path, {"kind": "link", "target": target})
        self._raw.link(path, target)

    def _record_path(self, path: str, after: Mapping[str, Any]) -> None:
        # A claimed folder is removed as a whole, so its files need no originals.
        if not self._is_claimed(path):
            self.promise(Undo("path", path, self._remember(path), after))

    def _remember(self, path: str) -> dict[str, Any]:
        was = self.entry(path)
        if was and was.kind == "file" and was.size > _LARGEST_ORIGINAL:
            raise Blocked(
                f"{self.real(path)} has {was.size} bytes; an original of more than {_LARGEST_ORIGINAL} is not kept",
                hint="move it away, then run the same command again",
            )
        now = fingerprint(self, path)
        # Our own content is not an original: the first record of the path has that.
        if was is None or was.kind == "link" or now in self._left_at(path):
            return now
        if was.kind != "file":
            raise Blocked(
                f"{self.real(path)} is {was.words}, but sparkinstall needs a file there",
                hint="move it away, then run again",
            )
        sha256 = self._journal.keep(self.read(path) or b"")
        return {**now, "sha256": sha256, "uid": was.uid, "gid": was.gid, "mtime_ns": was.mtime_ns}

    def _left_at(self, path: str) -> list[Mapping[str, Any]]:
        undos = (record.undo for record in self._journal.records())
        return [undo.after for undo in undos if undo.kind == "path" and undo.subject == path]

    def make_dir(self, path: str, mode: int = 0o755) -> None:
        if self.entry(path) is None:
            self._make_parents(path)
            if not self._is_claimed(path):
                self.promise(Undo("dir", path, {"kind": "absent"}, {"kind": "dir"}))
            self._raw.make_dir(path, mode)

    def _make_parents(self, path: str) -> None:
        self.inside(path)
        parent = str(PurePosixPath(path).parent)
        if parent != path and self.entry(parent) is None:
            self.make_dir(parent)

    def claim(self, path: str) -> None:
        if not self._is_claimed(path):
            before = self._room_for_tree(path)
            self._make_parents(path)
            self.promise(Undo("tree", path, before, {"kind": "dir"}))
        elif (was := self.entry(path)) and was.kind != "dir":
            raise Blocked(
                f"{self.real(path)} is {was.words}; sparkinstall made a folder there",
                hint="move it away, then run again",
            )
        self._make_parents(path)
        self._raw.make_dir(path, 0o755)

    def switch(self, path: str, folder: str) -> None:
        if not self._is_claimed(path):
            before = self._room_for_tree(path)
            self._make_parents(path)
            self.promise(Undo("tree", path, before, {"kind": "dir"}))
        self._raw.switch(path, folder)

    def _room_for_tree(self, path: str) -> dict[str, Any]:
        """Return what is in the place of a claimed folder: nothing, or an empty folder to restore later."""
        was = self.entry(path)
        if was is None:
            return {"kind": "absent"}
        if was.kind != "dir" or self.names(path):
            raise Blocked(
                f"{self.real(path)} exists and is not sparkinstall's",
                hint="move it away, or choose another folder with `prefix:` in the config",
            )
        return {"kind": "dir", "mode": was.mode, "uid": was.uid, "gid": was.gid, "mtime_ns": was.mtime_ns}

    def _is_claimed(self, path: str) -> bool:
        trees = [subject for kind, subject in self._subjects() if kind == "tree"]
        return any(path == tree or path.startswith(tree + "/") for tree in trees)

    def _subjects(self) -> list[tuple[str, str]]:
        return [(record.undo.kind, record.undo.subject) for record in self._journal.records()]

    def clear(self, path: str) -> None:
        if not self._is_claimed(path):
            raise Blocked(f"{self.real(path)} is not sparkinstall's to remove")
        self._raw.clear(path)

    def remove_dir(self, path: str) -> bool:
        if not self._is_claimed(path) and ("dir", path) not in self._subjects():
            raise Blocked(f"{self.real(path)} is not sparkinstall's to remove")
        return self._raw.remove_dir(path)

    def restore_meta(self, path: str, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
        if not self._is_claimed(path):
            before = self._remember(path)
            self.promise(Undo("path", path, before, {**before, "mode": mode}))
        self._raw.restore_meta(path, mode, uid, gid, mtime_ns)

    def try_run(self, *argv: str, **how: Unpack[RunOptions]) -> Result:
        """Run the program with `raw`; send its output to the log and to the observer of the run too."""
        watch = how.get("watch")
        with open(self._log, "a", encoding="utf-8", errors="replace") as log:

            def keep(line: str) -> None:
                shown = redact(line)
                log.write(shown + "\n")
                log.flush()
                self._emit(LineRead(self._step, shown))
                if watch:
                    watch(shown)

            full = (*self.sudo, *argv) if how.get("root") else argv
            log.write(redact(f"$ {' '.join(full)}") + "\n")
            how["env"] = {**how.get("env", {}), processes.RUN_MARK: self._journal.run}
            how["watch"] = keep
            result = self._raw.try_run(*argv, **how)
        return replace(result, out="\n".join(map(redact, result.out.split("\n"))))

    def warn(self, text: str) -> None:
        self._emit(Warned(self._step, redact(text)))

    def progress(self, done: int, total: int, unit: str) -> None:
        self._emit(Progressed(self._step, done, total, unit))
