"""Two cables: between two nodes one is used; on more nodes without a switch they are a ring, which is not supported."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from sparkinstall import config
from sparkinstall.cluster import agent
from sparkinstall.config import Layer
from sparkinstall.core.session import Session
from sparkinstall.facts import ip, qsfp
from sparkinstall.facts.qsfp import LinkProblem, Port
from sparkinstall.node import Node
from sparkinstall.probes import link
from sparkinstall.probes.preflight import preflight
from sparkinstall.stacks import DEFAULT, load
from sparkinstall.system import Reader
from tests.support.machine import Machine
from tests.support.sysfs import Sysfs, spark

HALVES = {0: ("enp1s0f0np0", "enP2p1s0f0np0"), 1: ("enp1s0f1np1", "enP2p1s0f1np1")}
NAMES = (*HALVES[0], *HALVES[1])


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture(autouse=True)
def no_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)


def reader(node: Sysfs) -> Machine:
    return Machine(str(node.root))


def of_a_cluster(role: str, workers: int, interface: str | None = None) -> Node:
    """A node of a head and so many workers; the worker is the first one."""
    addresses = tuple(f"192.168.100.{11 + n}" for n in range(workers))
    values = {"cluster.role": role, "cluster.workers": addresses, "network.interface": interface}
    values |= {"cluster.address": addresses[0]} if role == "worker" else {}
    chosen, _ = config.build([Layer("test", values)])
    return Node(chosen, load(DEFAULT), "aarch64", "aarch64", False, False, "/home/spark", Path("/nowhere"))


@pytest.fixture
def two_cables(tmp_path: Path) -> Sysfs:
    node = spark(tmp_path, cable=0)
    for name in HALVES[1]:
        (tmp_path / f"sys/class/net/{name}/carrier").write_text("1\n")
    return node


@pytest.mark.parametrize("ask", [qsfp.used_port, qsfp.port_to_look_at])
@pytest.mark.parametrize("workers", [2, 3, 7])
@pytest.mark.parametrize("role", ["head", "worker"])
def test_port_with_two_cables_and_more_than_two_nodes_is_refused_as_a_ring(
    two_cables: Sysfs, ask: Callable[[Reader, Node], Port], workers: int, role: str
) -> None:
    node = of_a_cluster(role, workers)
    with pytest.raises(LinkProblem) as raised:
        ask(reader(two_cables), node)
    problem = raised.value
    assert f"the cluster has {workers + 1} nodes: a ring without a switch is not supported" in problem.message
    assert problem.cause == (
        "port 0: enp1s0f0np0 + enP2p1s0f0np0, carrier, 200000 Mb/s; "
        "port 1: enp1s0f1np1 + enP2p1s0f1np1, carrier, 200000 Mb/s"
    )
    for word in ("to a switch", "--interface enp1s0f0np0", "NCCL 2.30 update 1", "NCCL_IB_SUBNET_AWARE_ROUTING=1"):
        assert word in problem.hint


@pytest.mark.parametrize("name", NAMES)
def test_used_port_with_two_cables_to_a_switch_is_the_named_one(two_cables: Sysfs, name: str) -> None:
    assert name in qsfp.used_port(reader(two_cables), of_a_cluster("head", 2, name)).names


@pytest.mark.parametrize("role", ["head", "worker"])
def test_used_port_with_two_cables_between_two_nodes_is_the_first(two_cables: Sysfs, role: str) -> None:
    assert qsfp.used_port(reader(two_cables), of_a_cluster(role, 1)).number == 0


@pytest.mark.parametrize(
    ("live", "number"),
    [
        ({}, 0),
        ({"enp1s0f0np0": ("192.168.100.10/24",)}, 0),
        ({"enp1s0f1np1": ("192.168.100.10/24",)}, 1),
        ({"enP2p1s0f1np1": ("10.0.0.1/24", "192.168.100.10/24")}, 1),
        ({"enp1s0f1np1": ("192.168.100.11/24",), "enP7s7": ("192.168.100.10/24",)}, 0),
        ({"enp1s0f1np1": ("192.168.100.100/24",)}, 0),
    ],
)
def test_used_port_with_a_second_cable_stays_the_one_with_the_address(
    two_cables: Sysfs, monkeypatch: pytest.MonkeyPatch, live: dict[str, tuple[str, ...]], number: int
) -> None:
    monkeypatch.setattr(qsfp, "addresses", lambda _: live)
    assert qsfp.used_port(reader(two_cables), of_a_cluster("head", 1)).number == number


@pytest.mark.parametrize(("name", "other"), [(None, 1), ("enp1s0f0np0", 1), ("enP2p1s0f1np1", 0)])
def test_unused_cable_names_the_other_port(two_cables: Sysfs, name: str | None, other: int) -> None:
    node = of_a_cluster("head", 1, name)
    assert qsfp.unused_cable(reader(two_cables), node).startswith(f"port {other} has a cable too, which stays unused")
    assert "unplug the other" in qsfp.if_crossed(reader(two_cables), node)
    (check,) = [each for each in preflight(node) if each.name == "qsfp"]
    assert f"port {other} has a cable too" in check.look(reader(two_cables)).found


def test_unused_cable_of_one_cable_is_none(tmp_path: Path) -> None:
    node = spark(tmp_path, cable=1)
    assert (
        qsfp.unused_cable(reader(node), of_a_cluster("head", 1))
        == qsfp.if_crossed(reader(node), of_a_cluster("head", 1))
        == ""
    )


def test_unused_cable_to_the_lan_is_none(two_cables: Sysfs) -> None:
    """The other port has the default route: it is no second cable between the nodes."""
    two_cables.default_route("enp1s0f1np1")
    for workers in (1, 2):
        node = of_a_cluster("head", workers)
        assert qsfp.used_port(reader(two_cables), node).number == 0
        assert qsfp.unused_cable(reader(two_cables), node) == ""


@pytest.mark.parametrize("crossed", [True, False])
def test_node_that_does_not_answer_may_have_crossed_cables(
    two_cables: Sysfs, monkeypatch: pytest.MonkeyPatch, crossed: bool
) -> None:
    for name in HALVES[1]:
        (two_cables.root / f"sys/class/net/{name}/carrier").write_text(f"{int(crossed)}\n")
    for module in (agent, link):
        monkeypatch.setattr(module, "pings", lambda *_, **__: False)
    monkeypatch.setattr(agent, "_TRIES", 1)
    node, on = of_a_cluster("head", 1), reader(two_cables)
    session = cast(Session, SimpleNamespace(node=node, system=on))
    reply = agent.reach(session, ["192.168.100.11"])
    monkeypatch.setattr(ip, "live", lambda _: {})
    (peers,) = [each for each in link.probes(node) if each.name == "peers"]
    hints = [*(problem.hint for problem in reply.problems), peers.look(on).hint]
    assert reply.code == 1 and len(hints) == 2
    assert all(("of two cables" in hint and "--interface" in hint) is crossed for hint in hints)
