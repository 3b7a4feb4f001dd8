"""Debian packages: install only missing ones, finish what was interrupted, and remove only those that we installed."""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from msgspec import Struct

from sparkinstall.causes import cause_of
from sparkinstall.errors import Problem, storage_errors
from sparkinstall.facts import apt_sources
from sparkinstall.facts.machine import os_release, system_name
from sparkinstall.resources import Drift, Ok, State
from sparkinstall.system import Reader, Result, System, Undo, Undone, failure_of, undoes

STATUS = "/var/lib/dpkg/status"
UPDATES = "/var/lib/dpkg/updates"
"""Where dpkg keeps what is not yet in its status file; empty unless it works or was interrupted."""

INDEX, SYSTEM = "Packages", "system"
"""Files in a folder of packages: apt's index of them, and the distribution that they are for."""

_NAME = re.compile(r"^Package: (\S+)$", re.MULTILINE)
_FIELD = re.compile(r"^(Package|Status|Provides): (.+)$", re.MULTILINE)
_SIMULATED = re.compile(r"^(Inst|Remv|Purg) (\S+)", re.MULTILINE)
# Nobody can answer a question: a changed configuration file stays as it is.
_QUIETLY = ("env", "DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_SUSPEND=1")
_DPKG = (*_QUIETLY, "dpkg", "--force-confold")
# Wait for dpkg's lock: on a fresh node unattended-upgrades often holds it for minutes.
_APT = (
    *_QUIETLY, "apt-get", "-y", "-o", "DPkg::Lock::Timeout=600", "-o", "APT::Install-Recommends=false",
    "-o", "Dpkg::Options::=--force-confold",
)  # fmt: skip
# Never let apt remove conflicting packages: that is the user's decision.
_INSTALL = ("--no-remove", "install")
_FIX = ("--no-remove", "-f", "install")
# Otherwise dpkg does not remove a package whose unpacking was interrupted.
_PURGE = ("-o", "Dpkg::Options::=--force-remove-reinstreq", "purge")
# Kinds of causes that a single source may have; with any other nothing can be installed.
_OF_A_SOURCE = ("network", "certificate", "server", "damaged", "key", "permission")
# Below apt's own folder, where it creates it; root writes there.
_LISTS = "/var/lib/apt/sparkinstall"
_WORKERS = ("dpkg", "apt-get", "apt", "aptitude")
_PATIENCE = 300.0


def installed(on: Reader) -> set[str]:
    """Return the names of whole packages, and the names that they provide."""
    names = set()
    for package in _packages(on):
        if re.fullmatch(r"\S+ ok installed", package["Status"]):
            provided = (part.split() for part in package.get("Provides", "").split(","))
            names |= {package["Package"], *(words[0] for words in provided if words)}
    return names


def _packages(on: Reader) -> Iterator[dict[str, str]]:
    """The fields of each package in dpkg's status file."""
    for stanza in (on.read(STATUS) or b"").decode(errors="replace").split("\n\n"):
        fields = dict(_FIELD.findall(stanza))
        if {"Package", "Status"} <= fields.keys():
            yield fields


def _present(on: Reader, without: Sequence[str] = ("not-installed", "config-files")) -> set[str]:
    """Return the names of packages that are whole or in part on the disk."""
    return {each["Package"] for each in _packages(on) if each["Status"].split()[-1] not in without}


def _unfinished(on: Reader) -> bool:
    """Return whether dpkg is at work or was interrupted; apt refuses to work then.

    A package of others that is merely not configured is no sign of it: its own script may have failed.
    """
    pending = (each["Status"].endswith(" triggers-pending") for each in _packages(on))
    return any(name.isdigit() for name in on.names(UPDATES)) or any(pending)


def _at_work(on: Reader) -> bool:
    """Return whether dpkg or apt runs now, for whomever: then nothing was interrupted."""
    names = ((on.read(f"/proc/{pid}/comm") or b"").decode().strip() for pid in on.names("/proc") if pid.isdigit())
    return any(name in _WORKERS for name in names)


class Packages(Struct, frozen=True):
    """The Debian packages `names` are installed, and dpkg has finished its work.

    `source`: a folder (a real path), from which apt takes the missing ones if it has all of them. Its own sources count
    where it does not, and where what is installed is too new for the packages of that folder.
    """

    key: ClassVar[str] = "packages"
    names: tuple[str, ...]
    source: str = ""

    def node_only(self, on: Reader) -> str:
        del on
        return f"installing the missing packages of {', '.join(self.names)} with apt"

    def check(self, on: Reader) -> State:
        missing, half = self._missing(on), self._half(on)
        todo, unfinished = list[str](), _unfinished(on)
        working = bool(half or unfinished) and _at_work(on)
        if half or (unfinished and not working):
            what = "wait for apt, which is at work" if working else "finish what dpkg was interrupted in"
            todo.append(f"{what} ({', '.join(half)})" if half else what)
        if new := [name for name in missing if name not in half]:
            todo.append(f"install {', '.join(new)}")
        if not todo:
            return Ok(f"{len(self.names)} packages")
        return Drift(
            ", ".join(todo),
            before="".join(f"{name}\n" for name in self.names if name not in missing),
            after="".join(f"{name}\n" for name in self.names),
        )

    def _missing(self, on: Reader) -> list[str]:
        whole = installed(on)
        return [name for name in self.names if name not in whole]

    def _half(self, on: Reader) -> list[str]:
        present = _present(on)
        return [name for name in self._missing(on) if name in present]

    def apply(self, on: System) -> None:
        begun = bool(self._half(on)) or _unfinished(on)
        if begun:
            _configure(on)
        if not self._missing(on):
            return
        apt, updated = self._offered(on) or (_APT, _updated(on, _APT))
        if begun:
            _install(on, apt, updated, *_FIX)
        if missing := self._missing(on):
            _install(on, apt, updated, *_INSTALL, *missing)
        if complaint := apt_sources.complaint(updated):
            hint = apt_sources.hint(on, complaint)
            on.warn(f"`apt-get update` failed for a source that was not needed: {complaint}. To be rid of it, {hint}")

    def _offered(self, on: System) -> tuple[Sequence[str], Result] | None:
        """Return apt for which `source` replaces its own sources, and what its update answered; None: it is no help."""
        missing = self._missing(on)
        if not self.source or not set(missing) <= _packages_in(Path(self.source), on):
            return None
        listing = Path(self.source, "sources.list")
        with storage_errors(f"writing {listing}"):
            listing.write_text(f"deb [trusted=yes] file:{quote(self.source)} ./\n")
        places = {"Etc::sourcelist": str(listing), "Etc::sourceparts": "/dev/null", "State::lists": _LISTS}
        apt = (*_APT, *(word for name, path in places.items() for word in ("-o", f"Dir::{name}={path}")))
        updated = _updated(on, apt)
        return (apt, updated) if on.ask(*apt, "-s", *_INSTALL, *missing, timeout=120).ok else None


def _packages_in(folder: Path, on: Reader) -> set[str]:
    """Return the names of the packages in a folder, if they are for this distribution."""
    try:
        if (folder / SYSTEM).read_text() != system_name(os_release(on)):
            return set()
        return set(_NAME.findall((folder / INDEX).read_text()))
    except OSError:
        return set()


def _configure(on: System) -> None:
    """Let dpkg finish what it was interrupted in.

    It cannot configure a package without those that it needs; apt brings them later.

    Raises:
        CommandFailed: dpkg could not even take up its work.
    """
    answer = _patiently(on, *_DPKG, "--configure", "-a")
    if _unfinished(on):
        raise failure_of(answer, "`dpkg` could not finish what it was interrupted in", log=on.log, places=[UPDATES])


def _patiently(on: System, *argv: str) -> Result:
    """Run a program, waiting for a lock that apt and dpkg themselves do not wait for."""
    until = time.monotonic() + _PATIENCE
    while not (answer := on.try_run(*argv, root=True)).ok:
        cause = cause_of(answer.argv, answer.code, answer.out)
        if not cause or cause.kind != "busy" or time.monotonic() > until:
            break
        time.sleep(5)
    return answer


def _updated(on: System, apt: Sequence[str]) -> Result:
    """Update apt's lists. A source of others may fail: that matters only if a package cannot be installed.

    Raises:
        CommandFailed: it failed for another reason, such as a full disk.
    """
    answer = _patiently(on, *apt, "update")
    cause = cause_of(answer.argv, answer.code, answer.out)
    if not answer.ok and cause and cause.kind not in _OF_A_SOURCE:
        raise failure_of(answer, log=on.log)
    return answer


def _install(on: System, apt: Sequence[str], updated: Result, *words: str) -> None:
    """Run `apt-get` with `words`; journal first what it would install, with dependencies but without upgrades, which
    are not ours."""
    simulated = on.ask(*apt, "-s", *words, timeout=120)
    if not simulated.ok:
        raise _failure(on, simulated, updated, "`apt-get` cannot install the missing packages")
    present = _present(on)
    planned = [name for verb, name in _SIMULATED.findall(simulated.out) if verb == "Inst" and name not in present]
    on.promise(Undo("packages", "apt", {}, {"packages": planned}))
    installed = on.try_run(*apt, *words, root=True)
    if not installed.ok:
        raise _failure(on, installed, updated, "`apt-get` could not install the missing packages")


def _failure(on: System, failed: Result, updated: Result, message: str) -> Problem:
    """Return the error of an installation, with what had gone wrong when apt's lists were updated."""
    hint = "fix apt's sources (`sudo apt-get update` shows what is wrong), then run again"
    failure = failure_of(failed, message, hint=hint, log=on.log)
    if failure.kind and failure.kind not in _OF_A_SOURCE:
        return failure
    failure.cause = failure.cause or " ".join(failure.output[-1:])
    stale, complaint = cause_of(updated.argv, 100, updated.out), apt_sources.complaint(updated)
    if stale and stale.kind == "network":
        failure.cause, failure.hint = f"{failure.cause}; when its lists were updated, {stale.why}", stale.hint
    elif complaint:
        failure.cause = f"{failure.cause}; `apt-get update` had failed: {complaint}"
        failure.hint = f"{apt_sources.hint(on, complaint)}, then run again"
    return failure


@undoes("packages")
def purge(records: Sequence[Undo], on: System) -> Undone:
    """Purge the packages of `records` that are still there, whole or in part, and that nothing else needs.

    Raises:
        CommandFailed: apt refuses.
        Problem: dpkg's status file is not there, or empty.
    """
    if not any(_packages(on)):
        hint = "restore it (dpkg keeps copies in /var/backups), then run the same command again"
        raise Problem(f"it is unknown which packages are installed: {STATUS} names none", hint=hint)
    names = {name for undo in records for name in undo.after["packages"]}
    if _unfinished(on) or names & _present(on) - installed(on):
        _configure(on)
    ours = sorted(names & _present(on, without=("not-installed",)))
    needed = _needed_by_others(on, ours)
    left = removable = [name for name in ours if name not in needed]
    # A package whose removal was interrupted is removed first, and purged the next time.
    for _ in range(2):
        if left:
            answer = on.try_run(*_APT, *_PURGE, *left, root=True, timeout=1800)
            known = _present(on, without=("not-installed",))
            left = [name for name in left if name in known]
    if left:
        raise failure_of(answer, f"apt could not remove {', '.join(left)}", log=on.log)
    if needed:
        return Undone(records[0].subject, "kept", f"others need them: {', '.join(needed)}")
    return Undone(records[0].subject, "removed" if removable else "nothing", ", ".join(removable))


def _needed_by_others(on: Reader, ours: list[str]) -> list[str]:
    """Return those of `ours` whose removal would remove another package."""
    needed: list[str] = []
    while True:
        candidates = [name for name in ours if name not in needed]
        if not candidates:
            return needed
        simulated = on.ask(*_APT, "-s", "purge", *candidates, timeout=120)
        if not simulated.ok:
            raise failure_of(simulated, "apt cannot tell what else removing the packages would remove")
        removed = {name for verb, name in _SIMULATED.findall(simulated.out) if verb != "Inst"}
        others = {name.split(":")[0] for name in removed} - set(ours)
        if not others:
            return needed
        needed += _dependencies(on, others, candidates) or candidates


def _dependencies(on: Reader, of: set[str], among: list[str]) -> list[str]:
    answer = on.ask(
        "apt-cache", "depends", "--recurse", "--installed", "--no-recommends", "--no-suggests", *of, timeout=120
    )
    lines = {line.strip().rpartition(" ")[2] for line in answer.out.splitlines()}
    return [name for name in among if name in lines]
