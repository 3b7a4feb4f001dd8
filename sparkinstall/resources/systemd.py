"""systemd unit files, and services started from their current inputs."""

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from sparkinstall.errors import CommandFailed, Problem
from sparkinstall.facts.decisions import as_text, recorded
from sparkinstall.facts.units import journal, show
from sparkinstall.layout import UNIT_FOLDER, unit_path
from sparkinstall.resources import Drift, Ok, State, Unknown
from sparkinstall.resources.template import Template
from sparkinstall.system import Reader, System, Undo, Undone, failure_of, undoes

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
_PROPERTIES = ("LoadState", "UnitFileState", "ActiveState", "NeedDaemonReload")
_RUNNING = ("active", "activating", "reloading")
# Lines that our own scripts print: they state the reason in words.
_OURS = "sparkinstall: "
_TAIL = 12
_STOPPING = 300.0


def word(value: str) -> str:
    """Quote `value` as one argument of an `Exec...=` line: specifiers, variables and quotes stay literal.

    Raises:
        ValueError: it contains a control character, which a unit file cannot represent.
    """
    return value if _PLAIN.fullmatch(value) else f'"{_unquotable(value).replace("$", "$$")}"'


def program(path: str) -> str:
    """Quote `path` as the first word of an `Exec...=` line, in which systemd expands no variables."""
    return path if _PLAIN.fullmatch(path) else f'"{_unquotable(path)}"'


def _unquotable(value: str) -> str:
    return setting(value).replace("\\", "\\\\").replace('"', '\\"')


def setting(value: str) -> str:
    """Escape `value` for a line such as `EnvironmentFile=`, which is literal except for specifiers."""
    if not value.isprintable():
        raise ValueError(f"{value!r} cannot stand in a unit")
    return value.replace("%", "%%")


class UnitFile(Template, frozen=True):
    """A file in /etc/systemd/system that systemd accepts without warning, and has loaded.

    `noted_in`: node path of the render record.
    """

    noted_in: str = ""

    @property
    def name(self) -> str:
        """The unit's name with its suffix."""
        return self.path.rpartition("/")[2]

    @property
    def _record(self) -> str:
        return self.noted_in or super()._record

    def apply(self, on: System) -> None:
        values = self._values(on)
        assert not isinstance(values, Unknown), "the engine applies no Unknown"
        self._refuse_what_systemd_does_not_know(on, self._file(values).content)
        if on.rehearsal:
            super().apply(on)
            return
        promise_units(on, self.name)
        super().apply(on)
        on.run("systemctl", "daemon-reload", root=True)

    def _refuse_what_systemd_does_not_know(self, on: Reader, content: bytes) -> None:
        complaints = complaints_of_systemd(on, self.name, content)
        if complaints:
            raise Problem(
                f"systemd does not accept {self.path}; the old one stays",
                cause="; ".join(complaints),
                hint="check its settings (`sparkinstall settings show`); if they are correct, report this",
                output=complaints,
            )


def complaints_of_systemd(on: Reader, name: str, content: bytes) -> list[str]:
    """Return the messages of `systemd-analyze verify` about a new unit file; [] without systemd.

    It exits with 0 for an unknown key, so only the messages count. Messages about other units are ignored.
    """
    with tempfile.TemporaryDirectory(prefix="sparkinstall-units-") as scratch:
        unit = Path(scratch, name)
        unit.write_bytes(content)
        # The trailing colon adds systemd's own folders.
        env = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_UNIT_PATH": f"{scratch}:{on.real(UNIT_FOLDER)}:"}
        answer = on.ask("systemd-analyze", "verify", "--man=no", str(unit), env=env)
    if answer.code == 127:
        return []
    lines = [line.replace(f"{scratch}/", "") for line in answer.err.splitlines() if name in line]
    # A rehearsal installs only some of the programs.
    return [line for line in lines if not (on.rehearsal and "is not executable" in line)]


class Cause(Struct, frozen=True):
    """A known reason why a service does not start: a message in its log, its meaning, and what to do."""

    pattern: str
    why: str
    hint: str


class Service(Struct, frozen=True):
    """A service that is enabled, runs, and was started from its current inputs.

    `inputs` returns the files (node paths) that it depends on; `noted_in` stores their digests at the last start. So
    a changed input is drift, and the service is restarted. Of `secrets` only time and size are stored: their content is
    not to be recorded, and root alone reads it.
    """

    name: str
    inputs: Callable[[Reader], Iterable[str]]
    noted_in: str
    causes: tuple[Cause, ...] = ()
    secrets: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"service:{self.name}"

    def node_only(self, on: Reader) -> str:
        del on
        return f"starting {self.name} with systemd"

    def check(self, on: Reader) -> State:
        wrong = list(self._wrong(on))
        return Drift(f"start {self.name}: {', '.join(wrong)}") if wrong else Ok("enabled, running")

    def _wrong(self, on: Reader) -> Iterable[str]:
        now = show(on, self.name, *_PROPERTIES)
        if now["LoadState"] != "loaded":
            yield "it is new"
            return
        if now["ActiveState"] != "active":
            yield f"it is {now['ActiveState'] or 'unknown'}"
        if now["UnitFileState"] != "enabled":
            yield "it would not start at boot"
        if now["NeedDaemonReload"] == "yes":
            yield "systemd has not reloaded its file"
        then, today = recorded(on, self.noted_in, dict[str, str]) or {}, self._digests(on)
        if changed := sorted(path for path in {*then, *today} if then.get(path) != today.get(path)):
            names = ", ".join(changed)
            yield f"changed since its last start: {names}" if then else "it was not started by sparkinstall"

    def _digests(self, on: Reader) -> dict[str, str]:
        digests = {path: hashlib.sha256(on.read(path) or b"").hexdigest() for path in self.inputs(on)}
        entries = ((path, on.entry(path)) for path in self.secrets)
        return digests | {path: f"{each.mtime_ns} {each.size}" for path, each in entries if each}

    def apply(self, on: System) -> None:
        on.promise(Undo("service", self.name, _standing(on, self.name), {"enabled": True, "active": True}))
        inputs, began = self._digests(on), int(time.time())
        on.run("systemctl", "daemon-reload", root=True)
        on.run("systemctl", "enable", self.name, root=True)
        # systemd also counts earlier starts, and after too many refuses to start the unit until they are reset.
        if show(on, self.name, "ActiveState")["ActiveState"] != "inactive":
            on.run("systemctl", "reset-failed", self.name, root=True)
        try:
            # The unit's own TimeoutStartSec bounds this.
            on.run("systemctl", "restart", self.name, root=True)
        except CommandFailed as failure:
            raise self._explained(on, failure, began) from failure
        on.write(self.noted_in, as_text(inputs).encode())

    def _explained(self, on: Reader, failure: CommandFailed, began: int) -> Problem:
        said = journal(on, "-u", self.name, "-o", "cat", "-n", "400", f"--since=@{began - 1}")
        lines = [line for line in said.splitlines() if line.strip()]
        why, hint = self.cause_in(lines)
        read = f"read its log with `journalctl -u {self.name} -n 200`, fix the cause, then run again"
        return Problem(
            f"{self.name} does not start",
            cause=why or failure.cause,
            hint=hint or (failure.hint if failure.kind else read),
            log=failure.log,
            output=lines[-_TAIL:] or failure.output,
        )

    def cause_in(self, lines: list[str]) -> tuple[str, str]:
        """Return why it did not start, if known, and what to do."""
        told = [line.removeprefix(_OURS) for line in lines if line.startswith(_OURS)]
        for cause in self.causes:
            if any(re.search(cause.pattern, line) for line in lines):
                return (told[-1] if told else cause.why), cause.hint
        return (told[-1] if told else ""), ""


def promise_units(on: System, name: str) -> None:
    """Promise that systemd forgets what we write of a unit, and that one of others runs again as it did.

    Raises:
        Problem: systemd does not answer.
    """
    on.promise(Undo("units", name, _standing(on, name), {}))


def _standing(on: Reader, name: str) -> dict[str, Any]:
    """Return whether a unit is enabled and runs.

    Raises:
        Problem: systemd does not answer, which says nothing about the unit.
    """
    now = show(on, name, *_PROPERTIES)
    if not now["ActiveState"]:
        raise Problem(f"systemd does not answer about {name}", hint=f"see `systemctl status {name}`, then run again")
    return {"enabled": now["UnitFileState"] == "enabled", "active": now["ActiveState"] in _RUNNING}


def stop_for_now(on: System, name: str) -> None:
    """Stop a service and keep it from starting at boot; its unit stays.

    Raises:
        CommandFailed: systemctl refuses.
    """
    on.promise(Undo("service", name, _standing(on, name), {"enabled": False, "active": False}))
    _systemctl(on, "disable", "--now", name)
    if show(on, name, "ActiveState")["ActiveState"] == "failed":
        _systemctl(on, "reset-failed", name)


@undoes("service")
def stop(records: Sequence[Undo], on: System) -> Undone:
    """Stop and disable a service.

    Raises:
        CommandFailed: systemctl refuses.
    """
    name = records[0].subject
    was = _standing(on, name)
    if was["active"]:
        _systemctl(on, "stop", name)
    if was["enabled"]:
        _systemctl(on, "disable", name)
    if show(on, name, "ActiveState")["ActiveState"] == "failed":
        _systemctl(on, "reset-failed", name)
    if (now := _standing(on, name))["active"] or now["enabled"]:
        raise Problem(f"{name} is still {'running' if now['active'] else 'enabled'}", hint=f"`systemctl status {name}`")
    return Undone(name, "removed" if was["active"] or was["enabled"] else "nothing", "stopped and disabled")


@undoes("units", after=unit_path)
def reload(records: Sequence[Undo], on: System) -> Undone:
    """Reload systemd after our file was removed; restart a service that ran from a foreign unit.

    Raises:
        CommandFailed: systemctl refuses.
    """
    name, before = records[0].subject, records[0].before
    _systemctl(on, "daemon-reload")
    if before.get("enabled"):
        _systemctl(on, "enable", name)
    if before.get("active"):
        _systemctl(on, "start", name)
    now = _standing(on, name)
    if missing := [each for each in ("enabled", "active") if before.get(each) and not now[each]]:
        raise Problem(f"the former {name} is not {' and '.join(missing)}", hint=f"`systemctl status {name}`")
    return Undone(name, "restored" if before.get("enabled") or before.get("active") else "nothing")


def _systemctl(on: System, *words: str) -> None:
    answer = on.try_run("systemctl", *words, timeout=_STOPPING, root=True)
    if not answer.ok:
        hint = "see `systemctl status`, then run the same command again"
        raise failure_of(answer, f"`systemctl {' '.join(words)}` failed", hint=hint, log=on.log)
