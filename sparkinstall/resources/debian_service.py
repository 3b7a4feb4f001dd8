"""A service of a Debian package, configured before the package is there, which starts it: so it never runs otherwise.

What others have installed is left alone.
"""

from collections.abc import Sequence

from msgspec import Struct

from sparkinstall.facts.changes import is_ours
from sparkinstall.layout import drop_in_path
from sparkinstall.resources import Conflict, Drift, Ok, State
from sparkinstall.resources.packages import installed
from sparkinstall.resources.systemd import Service, promise_units
from sparkinstall.resources.template import Template
from sparkinstall.system import Reader, System, Undo, Undone, undoes

_PASSWD = "/etc/passwd"


def is_others(on: Reader, package: str) -> bool:
    """Return whether the package is installed, and not by us."""
    return package in installed(on) and on.entry(drop_in_path(f"{package}.service")) is None


class NoOther(Struct, frozen=True):
    """No program of others does what the package's service is for; `port`: where it would listen."""

    package: str
    port: int
    hint: str

    @property
    def key(self) -> str:
        return f"others:{self.package}"

    def check(self, on: Reader) -> State:
        if is_others(on, self.package):
            return Conflict(f"the package {self.package} is installed already, and not by sparkinstall", self.hint)
        if on.entry(drop_in_path(f"{self.package}.service")) is None and not on.rehearsal:
            rows = (line.split() for line in on.ask("ss", "-Hltnp").out.splitlines())
            if any(len(row) > 3 and row[3].rpartition(":")[2] == str(self.port) for row in rows):
                return Conflict(f"port {self.port} is in use by another program", self.hint)
        return Ok()

    def apply(self, on: System) -> None:
        """Do nothing: it is Ok, or a conflict."""


class DropIn(Template, frozen=True):
    """Our file in the drop-in folder of `unit`, which may not be there yet. `noted_in`: path of the render record.

    `optional`: nothing is done where the package is installed and not ours.
    """

    unit: str = ""
    noted_in: str = ""
    optional: bool = False

    @property
    def _record(self) -> str:
        return self.noted_in

    def check(self, on: Reader) -> State:
        if self.optional and is_others(on, self.unit.removesuffix(".service")):
            return Ok("installed already, and left as it is")
        return super().check(on)

    def apply(self, on: System) -> None:
        if self.optional and is_others(on, self.unit.removesuffix(".service")):
            return
        if on.rehearsal:
            super().apply(on)
            return
        promise_units(on, self.unit)
        super().apply(on)
        on.run("systemctl", "daemon-reload", root=True)


class PackageUser(Struct, frozen=True):
    """The system user that the package makes and does not remove: noted, so that it is removed with the package."""

    name: str

    @property
    def key(self) -> str:
        return f"user:{self.name}"

    def node_only(self, on: Reader) -> str:
        del on
        return f"noting the user {self.name}, whom a package makes"

    def check(self, on: Reader) -> State:
        known = is_ours(on, self.key) or _exists(on, self.name)
        return Ok() if known else Drift(f"note that a package creates the user {self.name}")

    def apply(self, on: System) -> None:
        if not is_ours(on, self.key) and not _exists(on, self.name):
            on.promise(Undo("user", self.key, {"kind": "absent"}, {"name": self.name}))


def _exists(on: Reader, name: str) -> bool:
    return any(line.startswith(f"{name}:".encode()) for line in (on.read(_PASSWD) or b"").splitlines())


@undoes("user")
def remove_user(records: Sequence[Undo], on: System) -> Undone:
    """Remove the user and the group of its name.

    Raises:
        CommandFailed: it cannot be removed, such as one that still runs a program.
    """
    name = records[0].after["name"]
    if not _exists(on, name):
        return Undone(records[0].subject, "nothing")
    on.run("userdel", name, root=True)
    return Undone(records[0].subject, "removed")


class OwnService(Service, frozen=True):
    """The service, unless others have installed its package: then it is left as it is."""

    def check(self, on: Reader) -> State:
        if is_others(on, self.name.removesuffix(".service")):
            return Ok("installed already, and left as it is")
        return super().check(on)

    def apply(self, on: System) -> None:
        if not is_others(on, self.name.removesuffix(".service")):
            super().apply(on)
