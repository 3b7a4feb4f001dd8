"""A fresh node: Debian trixie in an overlay, booted with systemd as PID 1, removed without a trace at the end.

On this machine's network it has the internet and may not change the network. In a network namespace (`netns=`) it may,
and has systemd-networkd and udev, so that `netplan apply` is real.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self, cast

from tests.lab import commands, machine, overlay, rootfs, tree
from tests.lab.commands import Completed, Process

PATHS = {"root": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
USER_PATH = "/usr/local/bin:/usr/bin:/bin"

# On this machine's network: no service that configures it or listens on its ports.
MASKED_ON_HOST_NETWORK = (
    *("systemd-networkd.service", "systemd-networkd.socket", "systemd-networkd-wait-online.service"),
    *("systemd-resolved.service", "systemd-timesyncd.service", "networking.service"),
    *("ssh.service", "ssh.socket", "sshd.service", "systemd-udev-trigger.service"),
)
# A trigger would replay the events of this machine's real devices.
MASKED_IN_NAMESPACE = ("systemd-udev-trigger.service", "systemd-networkd-wait-online.service")
# udev refuses to start with a read-only /sys, and networkd waits for udev.
UDEV_UNITS = ("systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket")

# nspawn with --keep-unit runs its payload in /payload of its own control group: two nodes would share it, and one's
# `systemctl stop` could kill the other's service. So each starts in its own group.
IN_OWN_GROUP = 'n=$1; shift; while [ "$n" -gt 0 ]; do echo $$ > "$1/cgroup.procs"; shift; n=$((n-1)); done; exec "$@"'

# Seconds that a busy machine with several nodes does not need.
BOOT_LIMIT = 600.0
OFF_LIMIT = 300.0
RESTART_ASKED = 133  # nspawn's exit status after a reboot with --keep-unit


class NodeError(AssertionError):
    """A node did not boot or did not stop; the message ends with its console."""


class Bind(NamedTuple):
    """A file or folder of this machine that a node sees."""

    host: Path
    node: str
    read_only: bool = True


class FreshNode:
    """A node from power-on to removal, as a context manager.

    `run` and `popen` start commands in it as `root`, `spark` (sudo without a password) or `plain` (no sudo).
    """

    def __init__(self, *, netns: str | None = None, bind: Sequence[Bind] = (), hostname: str | None = None) -> None:
        self.netns = netns
        self._hostname = hostname
        self._asked_binds = list(bind)
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.leader = 0
        self.state = "off"
        self.boot_seconds = 0.0

    def __enter__(self) -> Self:
        self._overlay = overlay.Overlay(rootfs.trixie())
        self.root = self._overlay.root
        self.name = self._hostname or self._machine
        try:
            self._binds = [*_index_binds(self.root), *self._asked_binds]
            _prepare(self.root, self.name, self.netns)
            self.write_files()
            self.boot()
        except BaseException:
            self._scrap()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scrap()

    def write_files(self) -> None:
        """Write further files of a kind of node below `root`; called before the first boot."""

    def boot(self) -> None:
        """Power on, and wait for systemd's state `running` or `degraded` (see `state`)."""
        started = time.monotonic()
        with self._console.open("ab") as console:
            argv = ["/bin/sh", "-c", IN_OWN_GROUP, "sh", *self._groups(), *self._nspawn_command()]
            self._nspawn = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env=_nspawn_environment(),
                start_new_session=True,
            )
        self._wait_until_up(started + BOOT_LIMIT)
        self.boot_seconds = time.monotonic() - started

    def kill(self) -> None:
        """Pull the plug: all processes die at once, the disk stays. `boot` switches it on again."""
        if self.leader:
            with suppress(ProcessLookupError):
                os.kill(self.leader, signal.SIGKILL)
        self._wait_until_off(OFF_LIMIT)

    def reboot(self, timeout: float = OFF_LIMIT) -> None:
        """Reboot with `systemctl reboot`."""
        self.run("systemctl", "reboot", check=False)
        status = self._wait_until_off(timeout)
        if status != RESTART_ASKED:
            raise NodeError(self._with_console(f"{self.name} ended with {status} instead of a reboot"))
        self.boot()

    def run(
        self,
        *argv: str,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        input: str | None = None,  # noqa: A002 - subprocess.run's name for it
        cwd: str | None = None,
        timeout: float = 300,
        check: bool = True,
    ) -> Completed:
        """Run a command and wait; CommandFailedError if it fails and `check` is set."""
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        process = self.popen(*argv, user=user, env=env, cwd=cwd, stdin=stdin)
        return commands.finish(process, argv, input, timeout, check, lambda: self.signal(process, signal.SIGKILL))

    def popen(
        self,
        *argv: str,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        **popen: Any,
    ) -> Process:
        """Start a command in its own session; the rest are Popen's arguments. End it with `signal`."""
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        entered = self._entering(argv, user, env or {}, cwd)
        return cast(Process, subprocess.Popen(entered, **{**given, **popen}))

    def signal(self, process: Process, number: int) -> None:
        """Send a signal to a process of `popen` and its process group, as a terminal would."""
        # The Popen is nsenter, outside the node; the command is its only child, and leads its own group.
        while process.poll() is None:
            if (leads := _children(process.pid)) and _leads_a_group(leads[0]):
                # It may just have ended by itself.
                with suppress(ProcessLookupError):
                    os.killpg(leads[0], number)
                return
            time.sleep(0.005)

    def push(self, source: Path, target: str, *, owner: str = "root", exclude: Sequence[str] = ()) -> None:
        """Copy a file or folder of this machine to `target`, without the names in `exclude`."""

        def adopt(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
            member.uname = member.gname = owner
            return None if set(Path(member.name).parts) & set(exclude) else member

        argv = ("tar", "-x", "-C", "/", "--keep-directory-symlink")
        process = self.popen(*argv, stdin=subprocess.PIPE, text=False, errors=None)
        pipe = cast(IO[bytes], process.stdin)
        # A tar that stops early prints the cause.
        with suppress(BrokenPipeError), pipe, tarfile.open(fileobj=pipe, mode="w|") as archive:
            archive.add(source, arcname=target.lstrip("/"), filter=adopt)
        process.stdin = None
        commands.finish(process, argv, None, 600, True, lambda: self.signal(process, signal.SIGKILL))

    def read(self, path: str) -> str:
        """A text file of the node."""
        return self.run("cat", "--", path).stdout

    def write(self, path: str, text: str, *, mode: str = "0644", user: str = "root") -> None:
        """Write a text file into the node; its folder must exist."""
        script = 'cat > "$1" && chmod "$2" "$1"'
        self.run("sh", "-c", script, "sh", path, mode, user=user, input=text)

    def tree_digest(self, *paths: str, exclude: Sequence[str] = (), times: bool = False) -> dict[str, str]:
        """`tree.tree_digest`, run in the node."""
        asked = json.dumps({"paths": paths, "exclude": list(exclude), "times": times})
        program = Path(tree.__file__).read_text()
        answer = self.run("/usr/bin/python3", "-I", "-", asked, input=program, timeout=600)
        return cast(dict[str, str], json.loads(answer.stdout))

    @property
    def _machine(self) -> str:
        # nspawn requires a unique name on this machine, whatever the node's hostname.
        return f"spark-{self._overlay.place.name[-8:]}"

    @property
    def _console(self) -> Path:
        return self._overlay.place / "console.log"

    def _groups(self) -> list[str]:
        return [str(len(self._overlay.cgroups)), *map(str, self._overlay.cgroups)]

    def _nspawn_command(self) -> list[str]:
        joined = ["nsenter", f"--net=/run/netns/{self.netns}"] if self.netns else []
        allowed = ["--capability=CAP_NET_ADMIN"] if self.netns else ["--drop-capability=CAP_NET_ADMIN"]
        mounts = [
            f"--bind{'-ro' if bind.read_only else ''}={_escaped(str(bind.host))}:{_escaped(bind.node)}"
            for bind in self._binds
        ]
        untouched = ["--link-journal=no", "--resolv-conf=off", "--timezone=off"]
        named = ["--register=no", "--keep-unit", f"--machine={self._machine}", "-D", str(self.root)]
        return [
            *joined,
            "systemd-nspawn",
            "-q",
            *named,
            *untouched,
            *allowed,
            *mounts,
            "-b",
            "--console=passive",
        ]

    def _wait_until_up(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self._nspawn is None or self._nspawn.poll() is not None:
                raise NodeError(self._with_console(f"{self.name} ended while it booted"))
            self.leader = _leader(self._nspawn.pid)
            if self.leader:
                asked = self.run("systemctl", "is-system-running", "--wait", check=False, timeout=BOOT_LIMIT)
                self.state = asked.stdout.strip()
                if self.state in {"running", "degraded"}:
                    return
            time.sleep(0.02)
        raise NodeError(self._with_console(f"{self.name} did not boot in {BOOT_LIMIT:g} s: {self.state}"))

    def _wait_until_off(self, timeout: float) -> int | None:
        self.leader, self.state = 0, "off"
        if self._nspawn is None:
            return None
        try:
            return self._nspawn.wait(timeout)
        except subprocess.TimeoutExpired:
            raise NodeError(self._with_console(f"{self.name} is not off after {timeout:g} s")) from None

    def _scrap(self) -> None:
        self._overlay.remove()
        if self._nspawn is not None:
            self._nspawn.wait(OFF_LIMIT)
        self.leader, self.state = 0, "off"

    def command(self, *argv: str, user: str = "root") -> list[str]:
        """Return a command line of this machine that runs `argv` on the node, while that runs."""
        return self._entering(argv, user, {}, None)

    def _entering(self, argv: Sequence[str], user: str, env: Mapping[str, str], cwd: str | None) -> list[str]:
        home = "/root" if user == "root" else f"/home/{user}"
        settings = {**_login(user, home), **machine.environment(), **env}
        # nsenter keeps all of this process's rights; PID 1's are fewer (no CAP_NET_ADMIN, for one).
        become = ["setpriv", f"--bounding-set={_surplus(self.leader)}", "--inh-caps=-all"]
        whose = [f"--reuid={user}", f"--regid={user}", "--init-groups"]
        clean = ["env", "-i", "-C", cwd or home, *(f"{name}={value}" for name, value in settings.items())]
        return ["nsenter", "-t", str(self.leader), "--all", "--", "setsid", *become, *whose, *clean, *argv]

    def _with_console(self, message: str) -> str:
        lines = self._console.read_text(errors="replace").splitlines()[-commands.SHOWN_LINES :]
        return "\n".join([message, *lines])


def _prepare(root: Path, name: str, netns: str | None) -> None:
    etc = root / "etc"
    (etc / "hostname").write_text(f"{name}\n")
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost\n")
    # Without one, systemd treats the boot as the first one and enables every unit.
    (etc / "machine-id").write_text(f"{uuid.uuid4().hex}\n")
    if machine.PIP_CONF.is_file():
        shutil.copy(machine.PIP_CONF, etc / "pip.conf")
    if netns is None:
        shutil.copy("/etc/resolv.conf", etc / "resolv.conf")
        _mask(etc, MASKED_ON_HOST_NETWORK)
    else:
        _mask(etc, MASKED_IN_NAMESPACE)
        _wake_udev(etc)


def _mask(etc: Path, units: Sequence[str]) -> None:
    for unit in units:
        link = etc / "systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")


def _wake_udev(etc: Path) -> None:
    for unit in UDEV_UNITS:
        folder = etc / "systemd/system" / f"{unit}.d"
        folder.mkdir()
        (folder / "lab.conf").write_text("[Unit]\nConditionPathIsReadWrite=\n")
    wanted = etc / "systemd/system/multi-user.target.wants/systemd-networkd.service"
    wanted.unlink(missing_ok=True)
    wanted.symlink_to("/usr/lib/systemd/system/systemd-networkd.service")


def _index_binds(root: Path) -> list[Bind]:
    """Folders of wheels and certificates that this machine's settings name and the node does not have."""
    paths = dict.fromkeys(machine.named_paths())
    return [Bind(path, str(path)) for path in paths if not (root / str(path).lstrip("/")).exists()]


def _nspawn_environment() -> dict[str, str]:
    # A Spark's /tmp is on its disk, and a build needs more than nspawn's tenth of the memory.
    wanted = {"UNIFIED_CGROUP_HIERARCHY": "1", "SYSTEMD_NSPAWN_TMPFS_TMP": "0"}
    return {"PATH": PATHS["root"], **wanted}


def _login(user: str, home: str) -> dict[str, str]:
    path = PATHS.get(user, USER_PATH)
    return {
        "HOME": home,
        "USER": user,
        "LOGNAME": user,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "PATH": path,
    }


def _leader(nspawn: int) -> int:
    """The node's PID 1 once it is systemd; 0 before, while it is a copy of nspawn, on this machine's root."""
    for pid in _children(nspawn):
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            if status.startswith("Name:\tsystemd\n") and f"\nNSpid:\t{pid}\t1\n" in status:
                return pid
    return 0


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _leads_a_group(pid: int) -> bool:
    with suppress(ProcessLookupError):
        return os.getpgid(pid) == pid
    return False


def _surplus(leader: int) -> str:
    """setpriv's options to drop the capabilities that this process has and a node's PID 1 does not."""
    surplus = _bounding_set(os.getpid()) & ~_bounding_set(leader)
    return ",".join(f"-cap_{bit}" for bit in range(surplus.bit_length()) if surplus >> bit & 1) or "+all"


def _bounding_set(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            return int(line.split()[1], 16)
    raise NodeError(f"no CapBnd of {pid}")


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:")
