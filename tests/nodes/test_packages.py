"""A power cut while apt works for us, on a real node: the next run finishes what dpkg had begun.

One node lives through the file; its tests are in order.
"""

import json
import signal
import time
from collections.abc import Iterator

import pytest

from tests.lab.node import FreshNode
from tests.nodes.fresh import CHECKOUT, COMMAND, LEFT_OUT, REPOSITORY, ignoring, install_tool, sparkinstall

pytestmark = [pytest.mark.layer3, pytest.mark.network]

ONLY = ("--only", "packages")
ALL = ("all", *ONLY, "--yes", *ignoring())
CONFIG = f"stack: {CHECKOUT}/tests/lab/stacks/lab-full.yaml\nnccl: {{mode: wheel}}\n"
FINISH = "finish what dpkg was interrupted in"
LOG = "var/log/dpkg.log"


@pytest.fixture(scope="module")
def node() -> Iterator[FreshNode]:
    with FreshNode() as fresh:
        fresh.push(REPOSITORY, CHECKOUT, owner="spark", exclude=LEFT_OUT)
        install_tool(fresh)
        fresh.write("/etc/sparkinstall.yaml", CONFIG)
        yield fresh


@pytest.fixture(scope="module")
def before(node: FreshNode) -> str:
    return packages(node)


def packages(node: FreshNode) -> str:
    """Every package that dpkg knows, with its state."""
    return node.run("dpkg-query", "-W", "-f", "${Package} ${Status}\n").stdout


def cut_power(node: FreshNode, words: tuple[str, ...], moment: str) -> None:
    """Start a verb and pull the plug when dpkg's log says `moment`; then switch the node on again."""
    log = node.root / LOG
    seen = log.stat().st_size if log.exists() else 0
    with node.popen(COMMAND, *words, user="spark", cwd="/home/spark") as run:
        until = time.monotonic() + 1800
        while not (log.exists() and moment in log.read_text(errors="replace")[seen:]):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < until, log.read_text(errors="replace")[seen:]
            time.sleep(0.002)
        node.kill()
        run.send_signal(signal.SIGKILL)
    node.boot()


def is_cut_short(node: FreshNode) -> bool:
    return bool(node.run("dpkg", "--audit").stdout)


def test_nothing_is_finished_on_a_fresh_node(node: FreshNode, before: str) -> None:
    plan = sparkinstall(node, "plan", *ONLY, check=False).stdout
    assert "install python3.13-dev, build-essential, git" in plan and FINISH not in plan
    assert "half" not in before


NO_PROXY_THERE = 'Acquire { Retries 0; http::Proxy "http://127.0.0.1:9"; https::Proxy "http://127.0.0.1:9"; };'
# How it is made, how it is undone, the cause, and the hint.
FAULTS = {
    "full": (
        "mount -t tmpfs -o size=12k tmpfs /var/cache/apt/archives",
        "umount /var/cache/apt/archives",
        "the disk is full",
        "free some space",
    ),
    "sudo": (
        "echo 'spark ALL=(ALL) NOPASSWD: ALL, !/usr/bin/env' > /etc/sudoers.d/zz",
        "rm /etc/sudoers.d/zz",
        "sudo refused it",
        "let this user run `env` with sudo for `apt-get`",
    ),
    "network": (
        f"printf '{NO_PROXY_THERE}' > /etc/apt/apt.conf.d/zz",
        "rm /etc/apt/apt.conf.d/zz",
        "could not reach a server",
        "check this node's network",
    ),
    "read-only": (
        "mount --bind /var/lib/dpkg /var/lib/dpkg && mount -o remount,bind,ro /var/lib/dpkg",
        "umount /var/lib/dpkg",
        "read-only",
        "mount it writable",
    ),
}


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize("fault", FAULTS)
def test_all_with_a_fault_in_apts_way_says_what_it_is(node: FreshNode, fault: str) -> None:
    make, undo, cause, hint = FAULTS[fault]
    node.run("sh", "-c", make)
    (error,) = json.loads(sparkinstall(node, *ALL, "--json", check=False).stdout)["errors"]
    node.run("sh", "-c", undo)
    said = {name: text for name, text in error.items() if name in ("message", "cause", "hint")}
    assert cause in error["cause"] and hint in error["hint"], said
    assert "env" not in error["message"] and "sudo" not in error["message"], said


@pytest.mark.usefixtures("before")
# The last one is of any package: how far the cuts before it let dpkg come depends on the machine.
@pytest.mark.parametrize("moment", ["status half-installed git:", "status unpacked perl:", "status half-configured "])
def test_plan_after_a_power_cut_says_what_is_finished(node: FreshNode, moment: str) -> None:
    for _ in range(5):
        cut_power(node, ALL, moment)
        if is_cut_short(node):
            break
        # dpkg was quicker, perhaps because the cuts before left it little to do. From the start it has more.
        sparkinstall(node, "uninstall", "--yes")
    assert is_cut_short(node), "the power was cut too late"
    assert FINISH in sparkinstall(node, "plan", *ONLY, check=False).stdout
    assert sparkinstall(node, "verify", *ONLY, check=False).returncode == 3


def test_all_after_power_cuts_installs_everything_whole(node: FreshNode) -> None:
    sparkinstall(node, *ALL)
    assert_whole(node)
    assert "git install ok installed" in packages(node)
    assert FINISH not in sparkinstall(node, "plan", *ONLY).stdout
    node.run("git", "--version", user="spark")


def test_uninstall_after_a_power_cut_in_it_removes_the_rest(node: FreshNode, before: str) -> None:
    cut_power(node, ("uninstall", "--yes"), "status half-installed git:")
    sparkinstall(node, "uninstall", "--yes")
    assert_whole(node)
    assert packages(node) == before


def test_uninstall_after_a_power_cut_in_all_removes_what_was_begun(node: FreshNode, before: str) -> None:
    cut_power(node, ALL, "status half-installed git:")
    sparkinstall(node, "uninstall", "--yes")
    assert_whole(node)
    assert packages(node) == before


THEIRS = "/etc/apt/sources.list.d/theirs.list"
WITHOUT_A_RELEASE = "The repository 'file:/srv/theirs ./ Release' does not have a Release file."


def test_all_with_a_source_of_others_that_fails_names_it_where_a_package_is_missing(node: FreshNode) -> None:
    node.run("mkdir", "-p", "/srv/theirs")
    node.write(THEIRS, "deb file:/srv/theirs ./\n")
    run = sparkinstall(node, *ALL, "--json", "--set", "packages.extra=[no-such-package]", check=False)
    (error,) = json.loads(run.stdout)["errors"]
    assert error["message"] == "`apt-get` cannot install the missing packages"
    assert "no-such-package" in error["cause"] and WITHOUT_A_RELEASE in error["cause"]
    assert THEIRS in error["hint"]


def test_all_with_a_source_of_others_that_fails_installs_and_warns(node: FreshNode) -> None:
    run = sparkinstall(node, *ALL, "--set", "packages.extra=[]")
    assert_whole(node)
    assert "git install ok installed" in packages(node)
    assert WITHOUT_A_RELEASE in run.stderr and THEIRS in run.stderr


def assert_whole(node: FreshNode) -> None:
    assert node.run("dpkg", "--audit").stdout == ""
    assert not [each for each in (node.root / "var/lib/dpkg/updates").iterdir() if each.name.isdigit()]
