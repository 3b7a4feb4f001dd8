"""An arm64 Debian under qemu-user in which the CUDA compiler, and the C++ compiler that it calls, are x86_64 programs.

Everything else in it is emulated: Python, uv, apt, make. The compilers produce code for aarch64; emulated, they would
take ten times as long. So would the two programs that NCCL's makefiles start for every header, bash and realpath, and
Python where it only compiles bytecode. All of them, with their own libraries, are those of the same Debian, in /native.
"""

import inspect
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from uv import find_uv_bin

from tests.lab import arm64, cache, commands, machine, overlay, rootfs
from tests.support import cuda_toolkit

PACKAGES = ("python3", "python3-venv", "iproute2", "make", "procps")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
NATIVE = "native"
NATIVE_PACKAGES = ("g++-aarch64-linux-gnu", "bash", "coreutils", f"python{arm64.PYTHON}")
NATIVE_PROGRAMS = {
    "gcc": "aarch64-linux-gnu-gcc",
    "g++": "aarch64-linux-gnu-g++",
    "bash": "bash",
    "realpath": "realpath",
}
COMPILERS = f"/{NATIVE}/compilers"
CUDA = "usr/local/cuda"
# What of the CUDA toolkit runs; headers and libraries are those for aarch64.
PROGRAMS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm")


class Emulated(arm64.Arm64):
    """A tree with the whole of Debian's package management, on this machine's network."""

    def stream(self, *argv: str, env: Mapping[str, str], cwd: str = "/") -> Iterator[str]:
        """Run a command of the tree as root and yield its lines; CommandFailedError if it fails."""
        with subprocess.Popen(
            self.command(*argv, env=env, cwd=cwd),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        ) as process:  # fmt: skip
            assert process.stdout
            yield from process.stdout
        if process.returncode:
            raise commands.CommandFailedError(process.returncode, list(argv))

    def compile_bytecode(self, folder: str) -> None:
        """Write the bytecode of all modules below `folder`, which emulated imports would do in half an hour."""
        home = f"/{NATIVE}/usr"
        argv = (f"{home}/bin/python{arm64.PYTHON}", "-m", "compileall", "-qq", "-j", "0", folder)
        # Wheels have files for other versions of Python too.
        self.run(*argv, env={"PYTHONHOME": home}, timeout=3600, check=False)


@contextmanager
def debian() -> Iterator[Emulated]:
    """A new copy of the tree, which is built once (three minutes, 1 GB)."""
    arm64.register()
    copy = overlay.Overlay(cache.kept("emulated", [*_guest(), *_compilers(), inspect.getsource(_build)], _build))
    try:
        shutil.copy("/etc/resolv.conf", copy.root / "etc/resolv.conf")
        _share_index(copy.root)
        yield Emulated(copy.root)
    finally:
        copy.remove()


def _share_index(root: Path) -> None:
    """Copy this machine's certificates and what its settings of the package clients name."""
    for path in (CERTIFICATES, *machine.named_paths()):
        target = root / str(path).lstrip("/")
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def _guest() -> list[str]:
    options = ("--arch=arm64", "--variant=minbase", f"--include={','.join(PACKAGES)}")
    return rootfs.debootstrap("trixie", *options)


def _compilers() -> list[str]:
    return rootfs.debootstrap("trixie", "--arch=amd64", "--variant=extract", f"--include={','.join(NATIVE_PACKAGES)}")


def _build(tree: Path) -> None:
    rootfs.make(["env", f"QEMU_CPU={arm64.PROCESSOR}", *_guest()], tree)
    rootfs.make(_compilers(), tree / NATIVE)
    # Where an x86_64 program looks for its loader and libraries, and the linker's scripts for those of aarch64.
    (tree / "lib64").symlink_to(f"{NATIVE}/usr/lib64")
    (tree / "usr/lib/x86_64-linux-gnu").symlink_to(f"/{NATIVE}/usr/lib/x86_64-linux-gnu")
    (tree / "usr/aarch64-linux-gnu").symlink_to(f"/{NATIVE}/usr/aarch64-linux-gnu")
    (tree / COMPILERS.lstrip("/")).mkdir()
    for name, program in NATIVE_PROGRAMS.items():
        (tree / COMPILERS.lstrip("/") / name).symlink_to(f"/{NATIVE}/usr/bin/{program}")
    _cuda(tree / CUDA)


def _cuda(home: Path) -> None:
    """The CUDA compiler of x86_64 with the headers and libraries of aarch64, from the Python index."""
    ours, theirs = home / "x86_64", home / "aarch64"
    runs = [each for each in cuda_toolkit.PACKAGES if each.partition("==")[0] in PROGRAMS]
    fetch = (find_uv_bin(), "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:")
    for_arm = ("--python-platform", arm64.PLATFORM, "--python-version", arm64.PYTHON)
    commands.run(*fetch, "--target", str(ours), *runs, timeout=cuda_toolkit.INSTALL_SECONDS)
    rest = [each for each in cuda_toolkit.PACKAGES if each not in runs and "cuobjdump" not in each]
    commands.run(*fetch, *for_arm, "--target", str(theirs), *rest, timeout=cuda_toolkit.INSTALL_SECONDS)
    for packages in (ours, theirs):
        shutil.copytree(packages / "nvidia/cu13", home, dirs_exist_ok=True)
        shutil.rmtree(packages)
    cuda_toolkit.link_like_a_toolkit(home)
