"""A Spark's architecture: an arm64 Debian under qemu, with packages installed from outside."""

from __future__ import annotations

import inspect
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import uv

from tests.lab import cache, commands, overlay, rootfs
from tests.lab.commands import Completed

PACKAGES = (
    *("base-files", "base-passwd", "python3", "iproute2", "netplan.io", "ca-certificates"),
    *("dash", "bash", "coreutils", "libc-bin", "tar", "sed", "grep", "findutils"),
)
PYTHON = "3.13"  # trixie's
# For a processor with pointer authentication qemu computes every signature: five times slower.
PROCESSOR = "cortex-a76"
PLATFORM = "aarch64-manylinux_2_39"
SITE = "opt/site"

BINFMT = Path("/proc/sys/fs/binfmt_misc")
HANDLER = "qemu-aarch64"
FORMATS = Path("/usr/lib/binfmt.d")


class Arm64:
    """An arm64 tree, whose programs run in their own mount and pid namespace."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def install(self, *requirements: str, timeout: float = 1800) -> None:
        """Install requirements, or wheels by their paths, for aarch64; `python3 -m` finds their modules."""
        where = ["--target", str(self.root / SITE), "--python", sys.executable]
        what = ["--python-version", PYTHON, "--python-platform", PLATFORM, "--only-binary", ":all:"]
        commands.run(uv.find_uv_bin(), "pip", "install", "--quiet", *where, *what, *requirements, timeout=timeout)

    def run(
        self, *argv: str, env: Mapping[str, str] | None = None, timeout: float = 900, check: bool = True
    ) -> Completed:
        """Run a command of the tree as root and wait; CommandFailedError if it fails and `check` is set."""
        return commands.run(*self.command(*argv, env=env or {}), timeout=timeout, check=check)

    def command(self, *argv: str, env: Mapping[str, str], cwd: str = "/") -> list[str]:
        """The command of this machine that runs `argv` in the tree."""
        settings = {"PATH": f"/{SITE}/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        settings |= {"QEMU_CPU": PROCESSOR, "PYTHONPATH": f"/{SITE}"} | dict(env)
        clean = ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in settings.items())]
        alone = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", f"--root={self.root}", f"--wd={cwd}"]
        return ["unshare", *alone, "--", *clean, *argv]


@contextmanager
def chroot() -> Iterator[Arm64]:
    """A new copy of the arm64 tree, which is built once (half a minute); `install` changes only the copy."""
    register()
    copy = overlay.Overlay(cache.kept("arm64", [*_command(), inspect.getsource(_build)], _build))
    try:
        yield Arm64(copy.root)
    finally:
        copy.remove()


def register() -> None:
    """Make the kernel run aarch64 programs through qemu until a restart, unless it already does."""
    if platform.machine() == "aarch64":
        return
    # The kernel refuses a second handler of the same name.
    with cache.locked(cache.folder() / "binfmt.lock"):
        _register()


def _register() -> None:
    if not (BINFMT / "register").exists():
        commands.run("mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT))
    if _registered():
        return
    if shutil.which("update-binfmts"):
        commands.run("update-binfmts", "--enable", HANDLER, check=False)
    # Newer qemu packages need systemd-binfmt for this, which a container does not have.
    if not _registered() and (described := FORMATS / f"{HANDLER}.conf").exists():
        (BINFMT / "register").write_bytes(described.read_bytes().strip())
    if not _registered():
        raise OSError(f"the kernel did not accept the handler {HANDLER}")


def _registered() -> bool:
    handler = BINFMT / HANDLER
    return handler.exists() and handler.read_text().startswith("enabled")


def _command() -> list[str]:
    return rootfs.debootstrap("trixie", "--arch=arm64", "--variant=extract", f"--include={','.join(PACKAGES)}")


def _build(tree: Path) -> None:
    rootfs.make(_command(), tree)
    tree.chmod(0o755)
    # Packages are unpacked, not configured: files of their scripts that programs need.
    for name in ("passwd", "group"):
        shutil.copy(tree / f"usr/share/base-passwd/{name}.master", tree / "etc" / name)
    # Not every file of the library compiles: some are there to test that. (30 s that each session would pay.)
    Arm64(tree).run("python3", "-m", "compileall", "-q", "/usr/lib/python3", f"/usr/lib/python{PYTHON}", check=False)
