"""The unit that locks the GPU's clock, with a real systemd. A program in the place of nvidia-smi notes its arguments.

One node lives through the file; its tests are in order.
"""

from collections.abc import Iterator

import pytest

from sparkinstall.layout import CLOCK_LOCK_UNIT, unit_path
from tests.lab.node import FreshNode
from tests.nodes.fresh import CHECKOUT, REPOSITORY, ignoring, sparkinstall

pytestmark = [pytest.mark.layer3, pytest.mark.network]

NOTES = "/var/lib/nvidia-smi"
# The query gets the line of a busy GPU, as long as the clock is locked: 2190 MHz, else 2418.
NVIDIA_SMI = f"""\
#!/bin/sh
case "$1" in
-lgc) touch {NOTES}/locked && echo "$@" >> {NOTES}/said ;;
-rgc) rm -f {NOTES}/locked && echo "$@" >> {NOTES}/said ;;
*) [ -e {NOTES}/locked ] && mhz=2190 || mhz=2418; echo "NVIDIA GB10, 12.1, 580.178.04, 96, $mhz, 40.00" ;;
esac
"""
ALL = ("all", "--only", "clock-lock", "--yes", *ignoring(), "--ignore", "cuda", "--ignore", "python")


@pytest.fixture(scope="module")
def node() -> Iterator[FreshNode]:
    with FreshNode() as fresh:
        leave_out = [".git", ".venv", ".mypy_cache", ".ruff_cache", ".hypothesis", "__pycache__", "tests"]
        fresh.push(REPOSITORY, CHECKOUT, owner="spark", exclude=leave_out)
        fresh.run("./install.sh", "--tool-only", user="spark", cwd=CHECKOUT, timeout=1200)
        fresh.run("mkdir", NOTES)
        fresh.write("/usr/bin/nvidia-smi", NVIDIA_SMI)
        fresh.run("chmod", "755", "/usr/bin/nvidia-smi")
        yield fresh


def said(node: FreshNode) -> list[str]:
    """What nvidia-smi was told since the last call."""
    lines = node.run("cat", f"{NOTES}/said").stdout.splitlines()
    node.run("truncate", "-s", "0", f"{NOTES}/said")
    return lines


def test_clock_lock_is_applied_and_proven(node: FreshNode) -> None:
    run = sparkinstall(node, *ALL, "--set", "gpu.max_clock=2200")
    assert said(node) == ["-lgc 300,2200"]
    assert "2190 MHz, 96 % busy" in run.stdout
    assert "2 steps" not in sparkinstall(node, "plan", "--only", "clock-lock").stdout
    assert node.run("systemctl", "is-active", CLOCK_LOCK_UNIT).stdout == "active\n"


def test_clock_lock_of_another_limit_is_set_by_a_restart(node: FreshNode) -> None:
    sparkinstall(node, *ALL, "--set", "gpu.max_clock=2000", check=False)
    assert said(node) == ["-rgc", "-lgc 300,2000"]


def test_clock_lock_is_set_again_at_boot(node: FreshNode) -> None:
    node.reboot()
    assert said(node)[-1] == "-lgc 300,2000"


def test_clock_that_another_program_unlocked_fails_verify(node: FreshNode) -> None:
    node.run("nvidia-smi", "-rgc")
    run = sparkinstall(node, "verify", "--only", "clock-lock", check=False)
    assert run.returncode == 3
    assert "2418 MHz, 96 % busy: the clock is not locked" in run.stdout
    said(node)


def test_uninstall_resets_the_clock_and_removes_the_unit(node: FreshNode) -> None:
    sparkinstall(node, "uninstall", "--yes")
    assert said(node) == ["-rgc"]
    assert not (node.root / unit_path(CLOCK_LOCK_UNIT)[1:]).exists()
    assert "not-found" in node.run("systemctl", "show", "-p", "LoadState", CLOCK_LOCK_UNIT).stdout
