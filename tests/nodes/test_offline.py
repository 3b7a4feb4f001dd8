"""A fresh Debian node without any network but its loopback: a bundle made outside, install, verify, uninstall.

The tests of this file run in order on one node. What a node with a network does too has its tests in the other files.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import cache, commands
from tests.lab.node import Bind, FreshNode
from tests.nodes.fresh import CHECKOUT, COMMAND, NOT_COMPARED, REPOSITORY, fresh_node, ignoring, sparkinstall
from tests.support.bundles import HERE

pytestmark = [pytest.mark.layer3, pytest.mark.layer4, pytest.mark.network]

BUNDLES, BUNDLE = "/srv/bundles", "/srv/bundles/spark.tar"
STACKS = "tests/lab/stacks"
# Building NCCL from a file takes minutes and no network: another file's test.
SETTINGS = f"stack: {{home}}/{STACKS}/lab-full.yaml\nnccl: {{{{mode: wheel}}}}\n"
INSTALLER = "/home/spark/sparkinstall/install.sh"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the bundle is, for both nodes."""
    with tempfile.TemporaryDirectory(dir=cache.folder(), prefix="bundles-") as made:
        Path(made).chmod(0o777)
        yield Path(made)


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, object]:
    """A bundle, made on a machine with a network and the node's distribution."""
    with fresh_node(Bind(folder, BUNDLES, read_only=False)) as outside:
        outside.run("./install.sh", "--tool-only", user="spark", cwd=CHECKOUT, timeout=300)
        outside.write("/home/spark/config.yaml", SETTINGS.format(home=CHECKOUT), user="spark")
        options = ("--config", "/home/spark/config.yaml", "--platform", HERE, "--output", BUNDLE)
        made = sparkinstall(outside, "bundle", "create", *options, "--json")
    return dict(json.loads(made.stdout)["data"])


@pytest.fixture(scope="module")
def node(folder: Path, manifest: dict[str, object]) -> Iterator[FreshNode]:
    del manifest
    name = f"offline-{os.getpid()}"
    commands.run("ip", "netns", "add", name)
    try:
        with FreshNode(netns=name, bind=[Bind(folder, BUNDLES)]) as fresh:
            fresh.push(REPOSITORY / STACKS, f"/home/spark/{STACKS}", owner="spark")
            fresh.write("/etc/sparkinstall.yaml", SETTINGS.format(home="/home/spark"))
            yield fresh
    finally:
        commands.run("ip", "netns", "delete", name)


@pytest.fixture(scope="module")
def before(node: FreshNode) -> dict[str, str]:
    """The node before anything was done to it, the tool itself apart."""
    node.run("tar", "-xf", BUNDLE, "sparkinstall", user="spark", cwd="/home/spark")
    node.run(INSTALLER, "--bundle", BUNDLE, "--tool-only", user="spark", timeout=300)
    return node.tree_digest("/", exclude=NOT_COMPARED)


def test_node_has_no_network(node: FreshNode) -> None:
    assert node.run("ip", "route").stdout == ""
    assert node.run("ip", "-6", "route", "show", "default").stdout == ""
    assert node.run("getent", "hosts", "deb.debian.org", check=False).returncode != 0


def test_bundle_has_the_packages_of_the_nodes_distribution(manifest: dict[str, object]) -> None:
    packages, files = manifest["packages"], manifest["files"]
    assert isinstance(packages, dict) and isinstance(files, dict)
    assert {"python3.13-dev", "build-essential", "git"} <= packages.keys() and all(packages.values())
    assert manifest["system"] == "debian 13" and files["debs"] > 20 and files["wheels"] > 150


def test_plan_says_that_nothing_is_lacking(node: FreshNode, before: dict[str, str]) -> None:
    planned = json.loads(sparkinstall(node, "plan", "--bundle", BUNDLE, "--json").stdout)
    checks = {each["name"]: each["verdict"] for each in planned["data"]["preflight"]}
    assert checks["bundle"] == "pass" and planned["data"]["drift"] is True
    assert node.tree_digest("/", exclude=NOT_COMPARED) == before


def test_install_from_the_bundle_is_whole(node: FreshNode) -> None:
    done = node.run(INSTALLER, "--bundle", BUNDLE, "--yes", *ignoring(), user="spark", timeout=2400)
    assert "is done" in done.stdout
    status = node.run("dpkg-query", "-W", "-f", "${Status} ${Package}\n", "python3.13-dev", "build-essential", "git")
    assert status.stdout.count("install ok installed") == 3
    # They work: all that they need came with them.
    node.run("sh", "-euc", "echo '#include <Python.h>' | gcc -xc -c $(python3.13-config --includes) -o /dev/null -")
    node.run("git", "--version")


def test_verify_passes(node: FreshNode) -> None:
    answer = json.loads(sparkinstall(node, "verify", "--json").stdout)
    verdicts = {probe["name"]: probe["verdict"] for probe in answer["data"]["probes"]}
    wanted = ("wheel-gate", "fp8-path", "wheel-files", "imports")
    assert {name: verdicts[name] for name in wanted} == dict.fromkeys(wanted, "pass")


def test_all_again_changes_nothing(node: FreshNode) -> None:
    for more in (("--bundle", BUNDLE), ()):
        answer = json.loads(sparkinstall(node, "all", "--yes", "--json", *more).stdout)
        assert answer["data"]["changed"] is False


def test_uninstall_restores_every_byte(node: FreshNode, before: dict[str, str]) -> None:
    sparkinstall(node, "uninstall", "--yes", timeout=600)
    after = node.tree_digest("/", exclude=NOT_COMPARED)
    assert {path for path in before | after if before.get(path) != after.get(path)} == set()
    node.run(INSTALLER, "--remove", user="spark")
    assert node.run("test", "-e", COMMAND, check=False).returncode != 0
