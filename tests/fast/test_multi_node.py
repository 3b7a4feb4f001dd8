"""A node as one of several: which addresses are allowed, its transport, and the GID of its RDMA devices."""

import json
import subprocess
from pathlib import Path

import pytest

from sparkinstall.config import Layer, build
from sparkinstall.core.checks import look
from sparkinstall.events import silent
from sparkinstall.node import Node
from sparkinstall.probes.preflight import preflight
from sparkinstall.resources import Conflict, Drift, Unknown
from sparkinstall.resources.packages import Packages
from sparkinstall.resources.template import render
from sparkinstall.resources.transport import Transport
from sparkinstall.stacks import load
from sparkinstall.steps.packages import SystemPackages
from sparkinstall.system.local import LocalReader
from tests.support.machine import Machine
from tests.support.rehearsals import in_this_process, output_of, sparkinstall
from tests.support.sysfs import spark

HEAD, WORKER = ("--role", "head"), ("--role", "worker")


def planned(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """`multi-node` with these options, which are checked before any change."""
    return in_this_process("multi-node", "--root", root / "node", "--only", "packages", *args)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((*WORKER, "--head", "10.1.2.3"), "192.168.100.11 is not in the head's subnet 10.1.2.0/24"),
        ((*HEAD, "--head", "10.1.2.3", "--worker", "10.1.2.3"), "two nodes have the address 10.1.2.3"),
        ((*HEAD, "--head", "10.1.2.0", "--worker", "10.1.2.3"), "is the subnet 10.1.2.0/24 itself"),
        ((*HEAD, "--worker", "192.168.100.255"), "192.168.100.255 is the subnet"),
        ((*HEAD, "--head", "192.168.101.10", "--worker", "192.168.101.11"), "both halves of the port"),
        ((*WORKER, "--worker", "192.168.100.11", "--worker", "192.168.100.12"), "it is unknown which of the workers"),
        ((*WORKER, "--worker", "192.168.100.12", "--address", "192.168.100.13"), "is not among the workers"),
        ((*HEAD, "--address", "192.168.100.13"), "this node is the head, but its address 192.168.100.13"),
        ((*HEAD, "--head", "8.8.8.8"), "`cluster.head` must be a private IPv4 address"),
        ((*HEAD, "--head", "127.0.0.10", "--worker", "127.0.0.11"), "`cluster.head` must be a private IPv4 address"),
        ((*HEAD, "--head", "0.0.0.5"), "`cluster.head` must be a private IPv4 address"),
        ((*HEAD, "--head", "spark-1"), "`cluster.head` must be an IPv4 address"),
        ((*HEAD, "--interface", "a b"), "`network.interface` must be an interface name"),
        ((*HEAD, "--set", "network.mtu=99999999"), "`network.mtu` must be a number from 1280 to 9978"),
        ((*HEAD, "--set", "serving.allow=0.0.0.0/0"), "`serving.allow` must be a network, not all addresses"),
        ((*HEAD, "--set", "serving.port=20500"), "`serving.port` is 20500, which is the port of Ray"),
        ((*HEAD, "--set", "cluster.ray_port=29501"), "`cluster.ray_port` is 29501, which is the port of cluster."),
        ((*HEAD, "--set", "serving.arguments=[--api-key=sesame]"), "must not contain a secret"),
        ((*HEAD, "--set", "serving.memory=1.5"), "`serving.memory` must be a number from 0.10 to 0.95"),
    ],
)
def test_multi_node_with_invalid_settings_is_refused(tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    answer = planned(tmp_path, *options)
    assert answer.returncode == 2
    assert sentence in " ".join(output_of(answer).split())
    assert not (tmp_path / "node").exists()


def test_multi_node_with_a_single_step_of_the_role_is_refused(tmp_path: Path) -> None:
    answer = in_this_process("multi-node", *HEAD, "--root", tmp_path / "node", "--only", "env-files")
    assert answer.returncode == 2
    assert "select fp8 too, or omit `--only` and `--skip`" in output_of(answer)


def test_multi_node_that_fails_stores_the_role(tmp_path: Path) -> None:
    root = tmp_path / "node"
    (root / "opt/sparkinstall").mkdir(parents=True)
    (root / "opt/sparkinstall/services").write_text("in the way")
    answer = in_this_process(
        "multi-node",
        *HEAD,
        "--root",
        root,
        "--only",
        "ray",
        "--set",
        "network.mtu=1500",
        "--set",
        "cluster.ray_port=7777",
    )
    assert answer.returncode == 1, output_of(answer)
    kept = json.loads((root / "var/lib/sparkinstall/options.json").read_text())
    assert kept == {"settings": {"cluster.role": "head", "cluster.ray_port": 7777, "network.mtu": 1500}}


def test_multi_node_without_a_role_is_refused() -> None:
    answer = sparkinstall("multi-node")
    assert answer.returncode == 2
    assert "--role" in answer.stderr


def gid_table(sys: Path, device: str, *entries: tuple[int, str, str]) -> None:
    """Write an RDMA device's GID table as the kernel shows it."""
    port = sys / device / "ports/1"
    for index, value, kind in entries:
        for folder, name, text in ((port / "gids", str(index), value), (port / "gid_attrs/types", str(index), kind)):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text + "\n")


LOCAL = "fe80:0000:0000:0000:4cbb:47ff:fe2a:0001"
MAPPED = "0000:0000:0000:0000:0000:ffff:c0a8:640a"
TABLE = ((0, LOCAL, "IB/RoCE v1"), (1, LOCAL, "RoCE v2"), (2, MAPPED, "IB/RoCE v1"), (3, MAPPED, "RoCE v2"))
MOVED = (*TABLE[:3], (5, MAPPED, "RoCE v2"), (10, MAPPED, "RoCE v2"))


@pytest.mark.parametrize(
    ("first", "second", "answer"),
    [
        (TABLE, TABLE, "NCCL_IB_GID_INDEX=3\n"),
        (MOVED, MOVED, "NCCL_IB_GID_INDEX=5\n"),
        (TABLE, MOVED, ""),
        (TABLE, TABLE[:2], ""),
        (TABLE[:3], TABLE[:3], ""),
    ],
)
def test_roce_gid_script_prints_the_common_index(
    tmp_path: Path, first: tuple[tuple[int, str, str], ...], second: tuple[tuple[int, str, str], ...], answer: str
) -> None:
    gid_table(tmp_path / "sys", "rocep1s0f0", *first)
    gid_table(tmp_path / "sys", "roceP2p1s0f0", *second)
    script = tmp_path / "roce-gid"
    script.write_bytes(render("roce-gid.sh.j2", {"stack": "0.18.1"}))
    environment = {"PATH": "/usr/bin:/bin", "SYS": str(tmp_path / "sys"), "NCCL_IB_HCA": "rocep1s0f0,roceP2p1s0f0"}
    run = subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == (answer, "")


def test_roce_gid_script_without_a_device_prints_nothing(tmp_path: Path) -> None:
    script = tmp_path / "roce-gid"
    script.write_bytes(render("roce-gid.sh.j2", {"stack": "0.18.1"}))
    environment = {"PATH": "/usr/bin:/bin", "SYS": str(tmp_path), "NCCL_IB_HCA": "rocep9s0f0"}
    run = subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def head_of_two(**settings: object) -> Node:
    """A head with the defaults and `settings`, with `__` for a dot."""
    values = {"cluster.role": "head", **{name.replace("__", "."): value for name, value in settings.items()}}
    config, _ = build([Layer("the test", values)])
    return Node(config, load(config.stack), "aarch64", "aarch64", False, False, "/home/spark", Path("/nowhere"))


@pytest.mark.parametrize(
    ("asked", "says"), [("auto", "the node itself decides"), ("roce", "the node itself uses RoCE")]
)
def test_transport_in_a_rehearsal_uses_sockets(tmp_path: Path, asked: str, says: str) -> None:
    state = Transport(head_of_two(network__transport=asked)).check(LocalReader(str(tmp_path)))
    assert isinstance(state, Drift)
    assert "sockets" in state.summary
    assert says in state.summary


def test_transport_with_an_unmanaged_network_without_address_conflicts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    spark(tmp_path)
    state = Transport(head_of_two(network__manage=False)).check(Machine(str(tmp_path)))
    assert isinstance(state, Conflict)
    assert "enp1s0f0np0 does not have this node's address 192.168.100.10" in state.message
    assert "network.manage=true" in state.hint
    assert isinstance(Transport(head_of_two()).check(Machine(str(tmp_path))), Unknown)


@pytest.mark.parametrize(("manage", "there"), [(True, True), (False, False)])
def test_packages_include_netplan_only_if_the_network_is_managed(manage: bool, there: bool) -> None:
    (packages,) = SystemPackages().resources(head_of_two(network__manage=manage))
    assert isinstance(packages, Packages)
    assert ("netplan.io" in packages.names) is there
    assert {"iputils-ping", "nftables"} <= set(packages.names)


def test_preflight_cuda_with_the_nccl_of_a_wheel_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("CUDA_HOME", "SSH_CONNECTION"):
        monkeypatch.delenv(variable, raising=False)
    node = head_of_two(nccl__mode="wheel", nccl__cuda_home="/nowhere")
    (cuda,) = [each for each in preflight(node) if each.name == "cuda"]
    assert look([cuda], Machine(str(tmp_path)), silent)[0].verdict == "skip"
