"""Debian packages: install only missing ones, and remove only those that we installed."""

import re
import time
from collections.abc import Iterable, Sequence
from typing import ClassVar

from msgspec import Struct

from sparkinstall.errors import CommandFailed
from sparkinstall.resources import Drift, Ok, State
from sparkinstall.system import Reader, System, Undo, Undone, undoes

STATUS = "/var/lib/dpkg/status"
_INSTALLED = re.compile(
    r"^Package: (\S+)\n(?:(?:Essential|Protected|Important): .*\n)*Status: \S+ ok installed$", re.MULTILINE
)
_PROVIDES = re.compile(r"^Provides: (.+)$", re.MULTILINE)
_SIMULATED = re.compile(r"^(Inst|Remv|Purg) (\S+)", re.MULTILINE)
# Wait for dpkg's lock: on a fresh node unattended-upgrades often holds it for minutes.
_APT = (
    "env", "DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_SUSPEND=1", "apt-get", "-y",
    "-o", "DPkg::Lock::Timeout=600", "-o", "APT::Install-Recommends=false",
)  # fmt: skip
# Never let apt remove conflicting packages: that is the user's decision.
_INSTALL = ("--no-remove", "install")
_LISTS_HELD = "Could not get lock"
_PATIENCE = 300.0


def installed(on: Reader) -> set[str]:
    """Return the names of installed packages, and the names that they provide."""
    status = (on.read(STATUS) or b"").decode(errors="replace")
    names = set(_INSTALLED.findall(status))
    for line in _PROVIDES.findall(status):
        names |= {part.split()[0] for part in line.split(",") if part.strip()}
    return names


class Packages(Struct, frozen=True):
    """The Debian packages `names` are installed."""

    key: ClassVar[str] = "packages"
    names: tuple[str, ...]

    def node_only(self, on: Reader) -> str:
        del on
        return f"installing the missing packages of {', '.join(self.names)} with apt"

    def check(self, on: Reader) -> State:
        missing = self._missing(on)
        if not missing:
            return Ok(f"{len(self.names)} packages")
        return Drift(
            f"install {', '.join(missing)}",
            before="".join(f"{name}\n" for name in self.names if name not in missing),
            after="".join(f"{name}\n" for name in self.names),
        )

    def _missing(self, on: Reader) -> list[str]:
        there = installed(on)
        return [name for name in self.names if name not in there]

    def apply(self, on: System) -> None:
        missing = self._missing(on)
        self._update(on)
        planned = self._planned(on, missing)
        on.promise(Undo("packages", "apt", {}, {"packages": planned}))
        on.run(*_APT, *_INSTALL, *missing, root=True)

    def _update(self, on: System) -> None:
        """Update the lists, waiting for their lock: a fresh node holds it for minutes, and apt does not wait."""
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                on.run(*_APT, "update", root=True)
                return
            except CommandFailed as failure:
                if time.monotonic() > until or not any(_LISTS_HELD in line for line in failure.output):
                    raise
                time.sleep(5)

    def _planned(self, on: System, missing: Iterable[str]) -> list[str]:
        """Return what apt would install, with dependencies but without upgrades, which are not ours."""
        simulated = on.ask(*_APT, "-s", *_INSTALL, *missing, timeout=120)
        if not simulated.ok:
            raise CommandFailed(
                "apt cannot install the missing packages",
                cause=simulated.err.strip() or simulated.out.strip()[-300:],
                hint="fix apt's sources (`sudo apt-get update` shows what is wrong), then run again",
            )
        there = installed(on)
        names = [name for verb, name in _SIMULATED.findall(simulated.out) if verb == "Inst"]
        return [name for name in names if name not in there]


@undoes("packages")
def purge(records: Sequence[Undo], on: System) -> Undone:
    """Purge the packages of `records` that are still installed and that nothing else needs.

    Raises:
        CommandFailed: apt refuses.
    """
    ours = sorted({name for undo in records for name in undo.after["packages"]} & installed(on))
    needed = _needed_by_others(on, ours)
    removable = [name for name in ours if name not in needed]
    if removable:
        answer = on.try_run(*_APT, "purge", *removable, root=True, timeout=1800)
        if not answer.ok:
            raise CommandFailed(
                "apt could not remove the packages",
                cause=answer.out.strip()[-300:],
                hint="run `sudo dpkg --configure -a`, then the same command again",
            )
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
            raise CommandFailed(
                "apt cannot tell what else removing the packages would remove", cause=simulated.err.strip()
            )
        removed = {name for verb, name in _SIMULATED.findall(simulated.out) if verb != "Inst"}
        others = {name.split(":")[0] for name in removed} - set(ours)
        if not others:
            return needed
        needed += _dependencies(on, others, candidates) or candidates


def _dependencies(on: Reader, of: Iterable[str], among: list[str]) -> list[str]:
    answer = on.ask(
        "apt-cache", "depends", "--recurse", "--installed", "--no-recommends", "--no-suggests", *of, timeout=120
    )
    lines = {line.strip().rpartition(" ")[2] for line in answer.out.splitlines()}
    return [name for name in among if name in lines]
