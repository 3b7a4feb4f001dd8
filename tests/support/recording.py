"""A `System` in memory: files in a mapping, programs with given outputs, and a record of all changes."""

from collections.abc import Mapping, Sequence
from typing import Unpack

from sparkinstall.system import Entry, Result, RunOptions, System, Undo, read_only


class RecordingSystem(System):
    """`answers`: the output of programs, by the beginning of their command line; others print nothing.

    `effects`: what a command that begins so changes in `answers`. `changed` lists the changes in order: a word and the
    path, or the command line.
    """

    def __init__(
        self,
        files: Mapping[str, bytes] | None = None,
        answers: Mapping[str, str] | None = None,
        effects: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.files, self.answers, self.effects = dict(files or {}), dict(answers or {}), dict(effects or {})
        self.changed: list[str] = []
        self.warned: list[str] = []
        self.failing: tuple[str, ...] = ()

    rehearsal = False
    sudo: tuple[str, ...] = ()

    def real(self, path: str) -> str:
        return path

    def inside(self, path: str) -> str:
        return self.real(path)

    def entry(self, path: str) -> Entry | None:
        if path in self.files:
            return Entry("file", 0o644, len(self.files[path]), 0, 0, 0)
        return Entry("dir", 0o755, 0, 0, 0, 0) if self.names(path) else None

    def read(self, path: str) -> bytes | None:
        return self.files.get(path)

    def names(self, path: str) -> tuple[str, ...]:
        inside = (each.removeprefix(f"{path}/").split("/")[0] for each in self.files if each.startswith(f"{path}/"))
        return tuple(sorted(set(inside)))

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        del timeout, env, root, stdin
        read_only.require(argv)
        return self._result(argv)

    def _result(self, argv: Sequence[str]) -> Result:
        line = " ".join(argv)
        out = next((text for begins, text in self.answers.items() if line.startswith(begins)), "")
        return Result(tuple(argv), int(line.startswith(self.failing)) if self.failing else 0, out, "")

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        del mode
        self.changed.append(f"write {path}")
        self.files[path] = data

    def link(self, path: str, target: str) -> None:
        self.changed.append(f"link {path} {target}")

    def remove(self, path: str) -> None:
        self.changed.append(f"remove {path}")
        self.files.pop(path, None)

    def make_dir(self, path: str, mode: int = 0o755) -> None:
        del mode
        self.changed.append(f"make_dir {path}")

    def remove_dir(self, path: str) -> bool:
        self.changed.append(f"remove_dir {path}")
        return not self.names(path)

    def claim(self, path: str) -> None:
        self.changed.append(f"claim {path}")

    def switch(self, path: str, folder: str) -> None:
        self.changed.append(f"switch {path} to {folder}")

    def clear(self, path: str) -> None:
        self.changed.append(f"clear {path}")
        self.files = {name: data for name, data in self.files.items() if not name.startswith(f"{path}/")}

    def restore_meta(self, path: str, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
        del mode, uid, gid, mtime_ns
        self.changed.append(f"restore_meta {path}")

    def promise(self, undo: Undo) -> None:
        self.changed.append(f"promise {undo.kind} {undo.subject}")

    def try_run(self, *argv: str, **how: Unpack[RunOptions]) -> Result:
        del how
        self.changed.append(" ".join(argv))
        result = self._result(argv)
        for begins, changed in self.effects.items():
            if self.changed[-1].startswith(begins):
                self.answers.update(changed)
        return result

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def progress(self, done: int, total: int, unit: str) -> None:
        del done, total, unit
