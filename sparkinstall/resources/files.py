"""Files and links."""

from msgspec import Struct

from sparkinstall.resources import Conflict, Drift, Ok, State, not_a_folder
from sparkinstall.system import Reader, System


class File(Struct, frozen=True):
    """A file with this content and mode."""

    path: str
    content: bytes
    mode: int = 0o644

    @property
    def key(self) -> str:
        return f"file:{self.path}"

    def check(self, on: Reader) -> State:
        entry, now = on.entry(self.path), on.read(self.path)
        if entry and entry.kind == "file" and now == self.content and entry.mode == self.mode:
            return Ok()
        if now == self.content and entry:
            return Drift(
                f"set the mode of {self.path} to {self.mode:o}", f"mode {entry.mode:o}\n", f"mode {self.mode:o}\n"
            )
        verb = "write" if now is None else "change"
        return Drift(
            f"{verb} {self.path}", (now or b"").decode(errors="replace"), self.content.decode(errors="replace")
        )

    def apply(self, on: System) -> None:
        on.write(self.path, self.content, self.mode)


class OwnFolder(Struct, frozen=True):
    """A folder that is ours with all that a service will write to it: uninstall removes it with its contents."""

    path: str

    @property
    def key(self) -> str:
        return f"folder:{self.path}"

    def check(self, on: Reader) -> State:
        if stop := not_a_folder(on, self.path):
            return stop
        return Ok() if on.entry(self.path) else Drift(f"create the folder {self.path}")

    def apply(self, on: System) -> None:
        on.claim(self.path)


class Link(Struct, frozen=True):
    """A convenience symbolic link; anything else at its path is left alone."""

    path: str
    target: str

    @property
    def key(self) -> str:
        return f"link:{self.path}"

    def check(self, on: Reader) -> State:
        entry = on.entry(self.path)
        if entry is None:
            return Drift(f"link {on.real(self.path)} to {on.real(self.target)}", "", f"-> {on.real(self.target)}\n")
        if entry.kind == "link" and entry.target == on.real(self.target):
            return Ok()
        was = f"a link to {entry.target}" if entry.kind == "link" else entry.words
        return Conflict(
            f"{on.real(self.path)} is {was} already",
            hint="move it away, or set `environment.link: null` in the config (or --set environment.link=null)",
        )

    def apply(self, on: System) -> None:
        on.link(self.path, on.real(self.target))
