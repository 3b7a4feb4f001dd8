"""Temporary copies of a tree: an overlayfs whose upper folder is removed with it, even after a crash.

The upper folder is on a disk of its own, in a file, where this machine can mount one. Nodes write and remove tens of
thousands of files. An ext4 without a journal looks at each inode that was just removed to create a file, and one with
`discard` waits for the device with each file that it removes: minutes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from tests.lab import cache as kept_trees
from tests.lab.commands import run

PREFIX = "sparkinstall-lab-"
# Sparse, and more than nodes write.
DISK_BYTES = 64 << 30
# Nothing on it outlives the run, or a crash.
DISK_OPTIONS = "loop,nodiscard,noatime,nobarrier,data=writeback,commit=600"


class Overlay:
    """A writable copy of `lower` at `root`. The processes in its control groups end with it.

    Its folder is locked while this process lives; an unlocked folder is that of a crashed run, and the next overlay
    removes it. The lock is on the folder itself: a file in it would go before the folder, and be created again by who
    looks meanwhile.
    """

    def __init__(self, lower: Path) -> None:
        with kept_trees.locked(kept_trees.folder() / "overlays.lock"):
            sweep()
            self.place = workspace() / f"{PREFIX}{secrets.token_hex(4)}"
            self.place.mkdir(mode=0o700)
            self._lock = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.root = self.place / "root"
        self.cgroups = [mount / self.place.name for mount in cgroup_mounts()]
        for folder in self.cgroups:
            folder.mkdir()
        _mount(lower, self.place)

    def remove(self) -> None:
        """End its processes, unmount it, remove it."""
        destroy(self.place)
        os.close(self._lock)


def workspace() -> Path:
    """The first folder that can be the upper side of an overlay; OSError with the reason if none."""
    found, reason = _workspace()
    if found is None:
        raise OSError(reason)
    return found


@cache
def _workspace() -> tuple[Path | None, str]:
    # In a container the home and temporary folders are often overlays; memory is not.
    reason = "no folder"
    for folder in _candidates():
        refusal = _refusal(folder)
        if refusal is None:
            return folder, ""
        reason = f"no overlayfs: {refusal}"
    return None, reason


def _candidates() -> list[Path]:
    return [kept_trees.folder(), Path(tempfile.gettempdir()), Path("/dev/shm")]


def _refusal(folder: Path) -> str | None:
    with tempfile.TemporaryDirectory(dir=folder, prefix="overlay-probe-") as name:
        probe = Path(name)
        (probe / "lower").mkdir()
        try:
            _mount(probe / "lower", probe)
        except Exception as error:
            return str(error).splitlines()[-1]
        finally:
            _unmount(probe)
    return None


def _mount(lower: Path, place: Path) -> None:
    disk, root = _disk(place), place / "root"
    for folder in (disk / "upper", disk / "work", root):
        folder.mkdir()
        # "/" of a node is its upper folder, which must not depend on the umask of the tests.
        folder.chmod(0o755)
    sides = f"lowerdir={lower},upperdir={disk / 'upper'},workdir={disk / 'work'}"
    # volatile: no syncs to the disk. dpkg syncs every file, and nothing here outlives the run.
    run("mount", "-t", "overlay", "overlay", "-o", f"{sides},xino=on,volatile", str(root))


def _disk(place: Path) -> Path:
    """A folder in `place` on a disk of its own; `place` itself where none can be mounted."""
    file, disk = place / "disk.img", place / "disk"
    disk.mkdir()
    try:
        with file.open("wb") as made:
            made.truncate(DISK_BYTES)
        run("mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", "-m", "0", str(file))
        run("mount", "-o", DISK_OPTIONS, str(file), str(disk))
    except (OSError, subprocess.CalledProcessError):
        file.unlink(missing_ok=True)
        disk.rmdir()
        return place
    return disk


def _unmount(place: Path) -> None:
    root, disk = place / "root", place / "disk"
    if root.is_mount():
        run("umount", str(root))
    if disk.is_mount():
        # What is removed need not be written.
        run("find", str(disk), "-mindepth", "1", "-delete")
        run("umount", str(disk))


def cgroup_mounts() -> list[Path]:
    """Where systemd's control groups can be created: the unified hierarchy, and the named one."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [
        Path(where)
        for _, where, kind, options, *_ in mounts
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(","))
    ]


def sweep() -> None:
    """Remove the overlays of crashed test runs. The caller holds the lock of all overlays."""
    for folder in _candidates():
        for place in folder.glob(f"{PREFIX}*"):
            if (lock := kept_trees.abandoned(place)) is not None:
                destroy(place)
                os.close(lock)


def destroy(place: Path) -> None:
    """End all processes of the overlay's control groups, unmount, remove; OSError if a process does not end."""
    groups = [mount / place.name for mount in cgroup_mounts()]
    _end_all(groups)
    _unmount(place)
    # This machine's files may be mounted below: never remove them.
    run("rm", "-rf", "--one-file-system", str(place), timeout=300)
    for group in groups:
        _remove_group(group)


def _end_all(groups: list[Path], patience: float = 300) -> None:
    deadline = time.monotonic() + patience
    while pids := {pid for group in groups for pid in _members(group)}:
        if time.monotonic() > deadline:
            raise OSError(f"processes of {groups[0].name} do not end: {sorted(pids)}")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _members(group: Path) -> set[int]:
    found: set[int] = set()
    # Groups go while they are listed: walk passes over one that is gone, rglob does not.
    for folder, _, _ in os.walk(group):
        # 0 is a process of a namespace that is invisible from here.
        with suppress(OSError):
            found.update(int(pid) for pid in Path(folder, "cgroup.procs").read_text().split() if pid != "0")
    return found


def _remove_group(group: Path, patience: float = 300) -> None:
    """Remove a control group without processes; OSError if it is busy for so many seconds."""
    deadline = time.monotonic() + patience
    for folder, _, _ in os.walk(group, topdown=False):
        while not _is_removed(folder):
            if time.monotonic() > deadline:
                raise OSError(f"the control group {folder} is busy")
            time.sleep(0.02)


def _is_removed(group: str) -> bool:
    try:
        os.rmdir(group)
    except OSError as error:
        # A process that ends is not listed any more while its memory is freed, and leaves its group only then.
        if error.errno != errno.EBUSY:
            raise
        return False
    return True
