"""The tree of every new node: Debian trixie with systemd, netplan and two users, built once."""

from __future__ import annotations

import shlex
from pathlib import Path

from tests.lab import cache, machine
from tests.lab.commands import run

PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "udev", "netplan.io", "iproute2", "iputils-ping", "ca-certificates"),
    *("python3", "python3-venv", "kmod", "procps", "openssh-server", "sudo"),
    *("nftables", "iputils-arping", "iperf3", "ethtool"),
    # It keeps what a compiler made, for tests that build NCCL.
    "ccache",
    # Libraries of vLLM's build for the CPU.
    *("libnuma1", "libtcmalloc-minimal4"),
)

# Timers that take apt's lock at any time, and a /tmp in memory, which a Spark does not have.
MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "man-db.timer", "fstrim.timer", "tmp.mount")

SHAPE = f"""
set -eu
cd "$1"
chroot . useradd --create-home --shell /bin/bash spark
chroot . useradd --create-home --shell /bin/bash plain
printf 'spark ALL=(ALL) NOPASSWD: ALL\\n' > etc/sudoers.d/spark
chmod 0440 etc/sudoers.d/spark
for unit in {shlex.join(MASKED)}; do ln -sf /dev/null "etc/systemd/system/$unit"; done
chroot . update-ca-certificates
rm -f etc/hostname etc/resolv.conf etc/machine-id
"""


def trixie() -> Path:
    """The original tree: the lower side of overlays, never written to. About a minute the first time."""
    return cache.kept("rootfs", _recipe(), _build)


def debootstrap(suite: str, *options: str) -> list[str]:
    """mmdebstrap's command line without the target: this machine's mirror and apt settings, and `options`."""
    mirror = machine.debian_mirror()
    sources = [f"deb {mirror} {suite} main"] if mirror else []
    settings = [f"--aptopt={line}" for line in machine.apt_options()]
    return ["mmdebstrap", "--quiet", "--mode=root", *settings, *options, suite, "{target}", *sources]


def make(command: list[str], target: Path) -> None:
    """Run a `debootstrap` command for a target."""
    run(*(str(target) if word == "{target}" else word for word in command), timeout=1200)


def _command() -> list[str]:
    upload = [f"--customize-hook=copy-in {path} {machine.CA_FOLDER}" for path in map(str, machine.certificates())]
    shape = f"--customize-hook={SHAPE}"
    return debootstrap("trixie", "--variant=minbase", f"--include={','.join(PACKAGES)}", *upload, shape)


def _recipe() -> list[str]:
    # Certificates by content: a new one changes the recipe.
    return [*_command(), *(path.read_text(errors="replace") for path in machine.certificates())]


def _build(tree: Path) -> None:
    make(_command(), tree)
    tree.chmod(0o755)
