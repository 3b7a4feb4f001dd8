"""The rollback timer: a systemd timer that restores the former state unless the run confirms the change in time.

It belongs to systemd, so it survives a killed tool or ssh session. After a reboot, which people try with an
unreachable machine, a unit rolls back at boot.
"""

from collections.abc import Sequence

from sparkinstall.errors import Blocked, Problem
from sparkinstall.resources.template import render
from sparkinstall.system import Reader, System, Undo, failure_of
from sparkinstall.system.local import staged

HOME = "/var/lib/sparkinstall-rollback"
"""Exists while a rollback is pending. Owned by root, because root runs what is in it."""

_TEMPLATE = "rollback.sh.j2"
_PLACES = {"home": HOME, "units": "/etc/systemd/system", "lock": "/run/sparkinstall-rollback.lock"}
_UNIT = "sparkinstall-rollback-"
_NAMES = ("network", "firewall")
"""The timers that there may be."""
_OWN = {"rollback.sh", "rollback.sh.new", *(f"{name}{state}" for name in _NAMES for state in ("", ".new", ".gone"))}
_BOOT_UNIT = f"{_PLACES['units']}/sparkinstall-rollback.service"
_MARK = b"# Created by sparkinstall"
_FIRED = 9


class RolledBack(Problem):
    """The confirmation came too late: the rollback timer has run."""

    code = "rolled-back"


def armed(on: Reader, name: str | None = None) -> bool:
    """Return whether the timer `name`, or any, waits for a confirmation."""
    return bool(_waiting(on) if name is None else on.entry(f"{HOME}/{name}"))


def _waiting(on: Reader) -> tuple[str, ...]:
    return tuple(name for name in on.names(HOME) if name in _NAMES)


def arm(on: System, name: str, undo: Undo, restore_script: str, seconds: int, keep: Sequence[str] = ()) -> None:
    """In `seconds`, restore the files `keep` to their current state and run `restore_script`, unless disarmed.

    If a timer of that name is still pending, restart it with its own files and script: it has the former state, while
    the current one may be that of a killed run.

    Args:
        undo: the change that the timer guards; its undo function drops the timer, so it is in the journal first.
        restore_script: lines for /bin/sh, run by root.
        keep: absolute paths; a path that does not exist now is removed.

    Raises:
        Problem: the timer could not be started, or its place is taken; nothing was changed.
    """
    _refuse_foreign(on)
    for path in keep:
        if "|" in path or not path.isprintable():
            raise Problem(f"{path!a} could not be restored by a script", hint="rename that file, using letters only")
    on.promise(undo)
    lines = [f"{path}|{staged(path)}" for path in keep]
    answer = on.try_run(*_words("arm", _program(), name, str(seconds), restore_script, *lines), root=True)
    if not answer.ok:
        what, places = "the rollback timer could not be started; nothing was changed", _PLACES.values()
        raise failure_of(answer, what, log=on.log, places=places, error=Problem)


def _refuse_foreign(on: Reader) -> None:
    """Raise Blocked if another program's folder or unit has our name."""
    home, unit = on.entry(HOME), on.entry(_BOOT_UNIT)
    taken = HOME if home and (home.kind != "dir" or not _OWN.issuperset(on.names(HOME))) else ""
    if unit and (unit.kind != "file" or not (on.read(_BOOT_UNIT) or b"").startswith(_MARK)):
        taken = _BOOT_UNIT
    if taken:
        raise Blocked(
            f"{taken} is not sparkinstall's, but the rollback timer needs its place; nothing was changed",
            hint="move it away, then run the same command again",
        )


def disarm(on: System, name: str) -> None:
    """Confirm `name`: the change stays.

    Raises:
        RolledBack: too late, the rollback timer has run.
        Problem: the timer could not be stopped.
    """
    answer = on.try_run(*_words("confirm", name), root=True)
    if answer.code == _FIRED:
        raise RolledBack(
            f"the {name} change was not confirmed in time: its rollback timer has run",
            hint="raise `network.rollback_seconds` in the config, then run the same command: it shows what is live",
        )
    if not answer.ok:
        what = f"the rollback timer of the {name} could not be stopped"
        raise failure_of(answer, what, log=on.log, places=_PLACES.values(), error=Problem)


def drop(on: System, name: str) -> None:
    """Cancel the pending rollback `name` and remove its files.

    Raises:
        RolledBack: too late, the rollback timer has run.
        Problem: the timer could not be stopped.
    """
    if armed(on, name):
        disarm(on, name)
    elif on.entry(HOME) or on.entry(f"/run/systemd/transient/{_UNIT}{name}.timer"):
        on.try_run(*_words("forget", name), root=True)


def confirm(on: System) -> tuple[str, ...]:
    """Confirm all pending changes; return their names (empty if none was pending, or it was too late).

    Raises:
        RolledBack: a timer was faster.
    """
    names = _waiting(on)
    for name in names:
        disarm(on, name)
    return names


def fire(on: System, name: str) -> bool:
    """Roll back now; return whether it was done. systemd does it, so it continues even if the run is killed."""
    on.try_run("systemctl", "start", f"{_UNIT}{name}.service", timeout=120, root=True)
    # Only a removed folder counts, not systemd's answer: the timer may have been faster.
    return not armed(on, name)


def _words(*words: str) -> tuple[str, ...]:
    return ("sh", "-c", _program(), "rollback.sh", *words)


def _program() -> str:
    return render(_TEMPLATE, _PLACES).decode()
