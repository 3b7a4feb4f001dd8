"""Two fresh Debian nodes that see only each other: a bundle made outside installs the head, and the head the worker.

The head begins without any network but its loopback. The tests run in order; what nodes with a network do too has its
tests in the other files.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import cache
from tests.lab.cabling import LAN, PORT_0
from tests.lab.fleet import Fleet, FleetNode
from tests.lab.node import Bind
from tests.nodes.fresh import (
    CHECKOUT,
    COMMAND,
    CPU_STACK,
    NOT_COMPARED,
    beside_the_wheels,
    fresh_node,
    ignoring,
    let_pytorch_find_cuda,
    sparkinstall,
)
from tests.support.bundles import HERE

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.layer4, pytest.mark.network]

BUNDLES, BUNDLE = "/srv/bundles", "/srv/bundles/spark.tar"
# Building NCCL from a file takes minutes and no network: another file's test.
SETTINGS = f"stack: {CPU_STACK}\nnccl: {{mode: wheel}}\n"
INSTALLER = "/home/spark/sparkinstall/install.sh"
INSTALL = (INSTALLER, "--bundle", BUNDLE, "--yes", *ignoring())
NAMES = ("spark-1", "spark-2")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the bundle is, for the machine that makes it and for the head."""
    with cache.temporary("bundles") as made:
        made.chmod(0o777)
        yield made


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, object]:
    """A bundle, made on a machine with a network and the nodes' distribution."""
    with fresh_node("offline", Bind(folder, BUNDLES, read_only=False), on_cpu=True) as outside:
        outside.run("./install.sh", "--tool-only", user="spark", cwd=CHECKOUT, timeout=1200)
        outside.write("/home/spark/config.yaml", SETTINGS, user="spark")
        options = ("--config", "/home/spark/config.yaml", "--platform", HERE, "--nodes", "2", "--output", BUNDLE)
        made = sparkinstall(outside, "bundle", "create", *options, "--json")
    return dict(json.loads(made.stdout)["data"])


@pytest.fixture(scope="module")
def pair(folder: Path, manifest: dict[str, object]) -> Iterator[Fleet]:
    """Nodes without a way out; the head has the bundle, and the user's key for both."""
    del manifest
    bundle = Bind(folder, BUNDLES)
    with Fleet(2, bind=lambda index: [*beside_the_wheels(), *([] if index else [bundle])], internet=False) as fleet:
        head = fleet.nodes[0]
        for node in fleet.nodes:
            node.run("apt-get", "--yes", "purge", "python3.13-venv")
            let_pytorch_find_cuda(node)
        head.write("/etc/sparkinstall.yaml", SETTINGS)
        for path in (f"/home/spark/.ssh/{name}" for name in ("id_ed25519", "config", "known_hosts")):
            head.write(path, fleet.terminal.read(path), mode="0600", user="spark")
        yield fleet


@pytest.fixture(scope="module")
def before(pair: Fleet) -> list[dict[str, str]]:
    """Both nodes before anything was done to them, the tool itself apart."""
    head = pair.nodes[0]
    pair.unplug(head, LAN, *PORT_0)
    head.run("tar", "-xf", BUNDLE, "sparkinstall", user="spark", cwd="/home/spark")
    head.run(INSTALLER, "--bundle", BUNDLE, "--tool-only", user="spark", timeout=1200)
    return [_tree(node) for node in pair.nodes]


def _tree(node: FleetNode) -> dict[str, str]:
    return node.tree_digest("/", exclude=NOT_COMPARED)


def _cluster(head: FleetNode, *words: str) -> list[dict[str, Any]]:
    """Run `cluster` at the head: what it replies of each node."""
    answer = sparkinstall(head, "cluster", *words, "--yes", "--json", check=False)
    reply = json.loads(answer.stdout)
    assert answer.returncode == 0, (reply["errors"], answer.stderr[-3000:])
    return list(reply["data"]["nodes"])


# --- one node, with a loopback only


def test_bundle_has_the_packages_of_the_nodes_distribution(manifest: dict[str, object]) -> None:
    packages, files = manifest["packages"], manifest["files"]
    assert isinstance(packages, dict) and isinstance(files, dict)
    assert {"python3.13-dev", "build-essential", "git", "nftables"} <= packages.keys() and all(packages.values())
    assert manifest["system"] == "debian 13" and files["debs"] > 20 and files["wheels"] > 150


@pytest.mark.usefixtures("before")
def test_disk_that_is_full_is_one_error(pair: Fleet) -> None:
    head = pair.nodes[0]
    _until_alone(head)
    head.run("mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", "/opt")
    try:
        failed = head.run(*INSTALL, "--json", user="spark", timeout=2400, check=False)
    finally:
        head.run("umount", "/opt")
    (error,) = json.loads(failed.stdout)["errors"]
    assert failed.returncode == 1 and "the disk is full" in error["message"] + error["cause"], error
    assert "free some space" in error["hint"] and "Traceback" not in failed.stderr


def _until_alone(node: FleetNode) -> None:
    """Wait until networkd has noticed that the plugs were pulled."""
    until = time.monotonic() + 300
    while any(node.run("ip", *words).stdout for words in (("route",), ("-6", "route", "show", "default"))):
        assert time.monotonic() < until
        time.sleep(0.2)
    assert node.run("getent", "hosts", "deb.debian.org", check=False).returncode != 0


def test_install_from_the_bundle_continues_with_more_room_and_is_proven(pair: Fleet) -> None:
    head = pair.nodes[0]
    done = json.loads(head.run(*INSTALL, "--json", user="spark", timeout=2400).stdout)
    _require_passed(done["data"]["probes"], "wheel-gate", "fp8-path", "wheel-files", "imports")
    again = json.loads(sparkinstall(head, "all", "--yes", "--json").stdout)
    assert again["data"]["changed"] is False


def test_debian_packages_of_the_bundle_are_whole(pair: Fleet) -> None:
    head = pair.nodes[0]
    status = head.run("dpkg-query", "-W", "-f", "${Status} ${Package}\n", "python3.13-dev", "build-essential", "git")
    assert status.stdout.count("install ok installed") == 3
    # They work: all that they need came with them.
    head.run("sh", "-euc", "echo '#include <Python.h>' | gcc -xc -c $(python3.13-config --includes) -o /dev/null -")
    head.run("git", "--version")


def _require_passed(probes: list[dict[str, Any]], *names: str) -> None:
    verdicts = {each["name"]: each["verdict"] for each in probes}
    assert {name: verdicts[name] for name in names} == dict.fromkeys(names, "pass")


# --- the other one, which sees the head only


def test_cluster_from_the_head_sets_up_a_node_that_has_nothing(pair: Fleet) -> None:
    head, worker = pair.nodes
    pair.plug(head, LAN, *PORT_0)
    _until_reached(head, worker)
    assert "default" not in worker.run("ip", "route").stdout
    nodes = [{each["phase"]: each["data"] for each in node["phases"]} for node in _cluster(head, *NAMES, *ignoring())]
    assert nodes[1]["copy"]["files"] > 150 and "warning" not in nodes[1]["copy"]
    for phases in nodes:
        _require_passed(phases["verify"]["probes"], "wheel-gate", "imports", "peers", "ray-nodes")
    assert worker.run("python3", "-c", "import ensurepip", check=False).returncode != 0, "and was not needed"


def _until_reached(head: FleetNode, worker: FleetNode) -> None:
    until = time.monotonic() + 300
    while head.run("ping", "-c", "1", "-W", "1", worker.address, check=False).returncode:
        assert time.monotonic() < until
        time.sleep(0.2)


def test_plan_of_both_finds_nothing_to_do(pair: Fleet) -> None:
    nodes = _cluster(pair.nodes[0], "plan", *NAMES)
    assert {step["outcome"] for node in nodes for step in node["steps"]} == {"unchanged"}


def test_uninstall_restores_every_byte_of_both(pair: Fleet, before: list[dict[str, str]]) -> None:
    head = pair.nodes[0]
    _cluster(head, "uninstall", *NAMES)
    for node, former in zip(pair.nodes, before, strict=True):
        after = _tree(node)
        assert {path for path in former | after if former.get(path) != after.get(path)} == set()
    head.run(INSTALLER, "--remove", user="spark")
    assert head.run("test", "-e", COMMAND, check=False).returncode != 0
