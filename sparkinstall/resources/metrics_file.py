"""The file that a unit writes for node_exporter, and the folder that the exporter reads."""

from collections.abc import Sequence

from msgspec import Struct

from sparkinstall.facts.changes import is_ours
from sparkinstall.facts.health import MARK
from sparkinstall.facts.units import journal
from sparkinstall.resources import Conflict, Drift, Ok, State, not_a_folder
from sparkinstall.system import Reader, System, Undo, Undone, failure_of, undoes


class MetricsFolder(Struct, frozen=True):
    """A folder in which `unit` may put the file `path`, which is removed when this is undone."""

    path: str
    unit: str

    @property
    def folder(self) -> str:
        """The folder itself."""
        return self.path.rpartition("/")[0]

    @property
    def key(self) -> str:
        return f"folder:{self.folder}"

    def check(self, on: Reader) -> State:
        if (entry := on.entry(self.path)) and (entry.kind != "file" or not _is_ours(on, self.path)):
            hint = "move it away, or set `health.folder` to another folder (`health --install --folder FOLDER`)"
            return Conflict(f"{on.real(self.path)} is there, and not of sparkinstall", hint)
        if stop := not_a_folder(on, self.folder):
            return stop
        if on.entry(self.folder) is None:
            return Drift(f"create the folder {self.folder}")
        return Ok() if is_ours(on, self.path) else Drift(f"note that {self.path} is written by a unit")

    def apply(self, on: System) -> None:
        on.make_dir(self.folder)
        on.promise(Undo("metrics", self.path, {"kind": "absent"}, {"unit": self.unit}))


class FirstMetrics(Struct, frozen=True):
    """The file `path` that the oneshot `unit` writes is there: from now on a timer starts the unit."""

    path: str
    unit: str

    @property
    def key(self) -> str:
        return f"file:{self.path}"

    def node_only(self, on: Reader) -> str:
        del on
        return f"running {self.unit} with systemd"

    def check(self, on: Reader) -> State:
        return Ok("written") if _is_ours(on, self.path) else Drift(f"run {self.unit} for the first time")

    def apply(self, on: System) -> None:
        answer = on.try_run("systemctl", "start", self.unit, root=True)
        if not answer.ok:
            said = journal(on, "-u", self.unit, "-o", "cat", "-n", "20").splitlines()
            failure = failure_of(answer, f"{self.unit} has failed", log=on.log)
            failure.cause = next((line for line in reversed(said) if line.startswith("sparkinstall: ")), failure.cause)
            failure.hint = f"`journalctl -u {self.unit}` has what it said; fix that, then run again"
            failure.output = tuple(said)
            raise failure


def _is_ours(on: Reader, path: str) -> bool:
    return (on.read(path) or b"").startswith(MARK.encode())


def remove_metrics(on: System, path: str) -> bool:
    """Remove the file if a unit of ours has written it, and what a killed one has left; return whether it was there."""
    was = on.entry(path) is not None and _is_ours(on, path)
    names = [path] if was else []
    if on.entry(f"{path}.new") is not None:
        names.append(f"{path}.new")
    if names:
        # Not `remove`, which would keep the last state as an original to restore.
        on.run("rm", "-f", "--", *(on.real(name) for name in names), root=True)
    return was


@undoes("metrics")
def remove(records: Sequence[Undo], on: System) -> Undone:
    """Remove what a unit has written for node_exporter.

    Raises:
        CommandFailed: it cannot be removed.
    """
    path, was = records[0].subject, remove_metrics(on, records[0].subject)
    if not on.rehearsal:
        # Else systemd lists a unit that is gone, if its last run has failed.
        on.try_run("systemctl", "reset-failed", records[0].after["unit"], root=True)
    return Undone(path, "removed" if was else "nothing")
