"""Which QSFP port has the cable, its halves and RDMA devices, and which interfaces must not be changed.

tests/support/sysfs.py builds the trees and names their sources: nothing was recorded on a GB10. What a real kernel
shows of virtual interfaces is in tests/nodes/test_link_facts.py.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparkinstall import config
from sparkinstall.config import Config, Layer
from sparkinstall.facts import ip, qsfp
from sparkinstall.facts.qsfp import LinkProblem, Port
from sparkinstall.node import Node
from sparkinstall.stacks import load
from sparkinstall.system.local import LocalReader
from tests.support.machine import Machine
from tests.support.sysfs import V1, V2, Sysfs, mapped, spark

HALVES = {
    0: (("enp1s0f0np0", "rocep1s0f0"), ("enP2p1s0f0np0", "roceP2p1s0f0")),
    1: (("enp1s0f1np1", "rocep1s0f1"), ("enP2p1s0f1np1", "roceP2p1s0f1")),
}
fuzzed = settings(max_examples=60, deadline=None)


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture(autouse=True)
def no_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)


def reader(node: Sysfs) -> Machine:
    return Machine(str(node.root))


def configured(interface: str | None = None) -> Node:
    """A node whose config names `interface`."""
    layers = [Layer("test", {"network.interface": interface})] if interface else []
    chosen: Config = config.build(layers)[0]
    return Node(chosen, load("0.18.1"), "aarch64", "aarch64", False, False, "/home/spark", Path("/home/spark/.cache"))


def halves(port: Port) -> tuple[tuple[str, str], ...]:
    return tuple((each.name, each.hca) for each in port.twins)


def refusal(node: Sysfs, interface: str | None = None) -> LinkProblem:
    with pytest.raises(LinkProblem) as raised:
        qsfp.used_port(reader(node), configured(interface))
    return raised.value


# --- ports and their halves


@pytest.mark.parametrize("cable", [0, 1])
def test_used_port_is_the_one_with_the_cable(tmp_path: Path, cable: int) -> None:
    found = qsfp.used_port(reader(spark(tmp_path, cable)), configured())
    assert halves(found) == HALVES[cable]
    assert (found.number, found.carrier) == (cable, True)
    assert {(each.port, each.carrier, each.mtu, each.speed) for each in found.twins} == {(cable, True, 1500, 200000)}


def test_ports_of_a_spark_are_listed_by_number(tmp_path: Path) -> None:
    node = spark(tmp_path)
    (tmp_path / "sys/class/net/bonding_masters").write_text("\n")
    found = qsfp.ports(reader(node))
    assert [(each.number, halves(each)) for each in found] == [(0, HALVES[0]), (1, HALVES[1])]
    assert [each.carrier for each in found] == [True, False]


@pytest.mark.parametrize(
    "name",
    ["enP7s7", "wlP9s9", "enp1s0f0np1", "enp1s0f0", "ens1f0np0", "enp1s0f0np0.100", "enp1s0f0np00", "enp1s0f0v0",
     "eth0", "xenp1s0f0np0", "enp1s0f٠np٠"],
)  # fmt: skip
def test_ports_with_other_interface_names_are_empty(tmp_path: Path, name: str) -> None:
    node = Sysfs(tmp_path)
    node.card(name, carrier=True)
    assert qsfp.ports(reader(node)) == ()


@pytest.mark.parametrize(("driver", "counts"), [("mlx5_core", True), ("ixgbe", False), ("mlx5_core.sf", False)])
def test_ports_with_another_driver_are_empty(tmp_path: Path, driver: str, counts: bool) -> None:
    node = Sysfs(tmp_path)
    node.card("enp1s0f0np0", driver)
    assert bool(qsfp.ports(reader(node))) is counts


def test_used_port_without_a_device_follows_from_the_name(tmp_path: Path) -> None:
    node = Sysfs(tmp_path)
    node.virtual("enp1s0f0np0")
    assert halves(qsfp.used_port(reader(node), configured())) == (("enp1s0f0np0", ""),)


def test_ports_with_interfaces_down_have_an_unknown_carrier(tmp_path: Path) -> None:
    node = Sysfs(tmp_path)
    node.card("enp1s0f0np0", carrier=None)
    with pytest.raises(OSError):  # as in a real kernel
        reader(node).read("/sys/class/net/enp1s0f0np0/carrier")
    (port,) = qsfp.ports(reader(node))
    assert (port.carrier, port.twins[0].carrier, port.twins[0].speed) == (None, None, 0)
    node.card("enP2p1s0f0np0", carrier=False)
    assert qsfp.ports(reader(node))[0].carrier is False


def test_used_port_with_a_carrier_on_one_half_is_found(tmp_path: Path) -> None:
    node = Sysfs(tmp_path)
    node.card("enp1s0f0np0", carrier=None)
    node.card("enP2p1s0f0np0", carrier=True)
    node.card("enp1s0f1np1", carrier=False)
    assert qsfp.used_port(reader(node), configured()).number == 0


def test_twins_are_sorted_by_pci_domain(tmp_path: Path) -> None:
    node = Sysfs(tmp_path)
    for name in ("enP10p1s0f0np0", "enP2p1s0f0np0"):
        node.card(name)
    assert [each.name for each in qsfp.ports(reader(node))[0].twins] == ["enP2p1s0f0np0", "enP10p1s0f0np0"]


# --- RDMA devices, by the kernel's own links


def test_rdma_devices_with_any_name_are_found(tmp_path: Path) -> None:
    node = Sysfs(tmp_path)
    for name, hca in (("enp1s0f0np0", "mlx5_3"), ("enP2p1s0f0np0", "mlx5_0")):
        node.card(name, carrier=True)
        node.hca(hca, name)
    # A device on the first half's card, with the name that the naming rule gives to the second half's.
    node.card("enp1s0f1np1")
    node.hca("roceP2p1s0f0", "enp1s0f1np1")
    assert halves(qsfp.ports(reader(node))[0]) == (("enp1s0f0np0", "mlx5_3"), ("enP2p1s0f0np0", "mlx5_0"))


def test_used_port_without_rdma_has_no_rdma_devices(tmp_path: Path) -> None:
    node = spark(tmp_path)
    shutil.rmtree(tmp_path / "sys/class/infiniband")
    assert halves(qsfp.used_port(reader(node), configured())) == (("enp1s0f0np0", ""), ("enP2p1s0f0np0", ""))


def test_used_port_with_sriov_representors_ignores_them(tmp_path: Path) -> None:
    """SR-IOV in switchdev mode: the representors of the functions are listed with the port."""
    node = spark(tmp_path)
    for each in ("enp1s0f0npf0vf0", "enp1s0f0npf0vf1"):
        (tmp_path / "sys/class/net/enp1s0f0np0/device/net" / each).mkdir()
    assert halves(qsfp.used_port(reader(node), configured())) == HALVES[0]


def test_rdma_device_of_several_on_one_card_is_the_one_that_names_the_interface(tmp_path: Path) -> None:
    node = Sysfs(tmp_path)
    node.card("enp1s0f0np0", carrier=True)
    node.hca("mlx5_0", "enp1s0f0np0")
    node.gids("mlx5_0", "enp1s0f0npf0vf0", mapped("192.0.2.9"))
    node.hca("mlx5_1", "enp1s0f0np0")
    node.gids("mlx5_1", "enp1s0f0np0", mapped("192.0.2.1"))
    assert halves(qsfp.ports(reader(node))[0]) == (("enp1s0f0np0", "mlx5_1"),)


def test_rdma_device_below_another_card_is_found_by_its_gid_table(tmp_path: Path) -> None:
    """As with a bond: one device for both cards."""
    node = Sysfs(tmp_path)
    node.card("enp1s0f0np0")
    node.card("enp1s0f1np1", carrier=True)
    node.hca("mlx5_bond_0", "enp1s0f1np1", below="enp1s0f0np0")
    node.gids("mlx5_bond_0", "enp1s0f1np1", mapped("192.0.2.1"))
    assert [halves(each) for each in qsfp.ports(reader(node))] == [
        (("enp1s0f0np0", "mlx5_bond_0"),),
        (("enp1s0f1np1", "mlx5_bond_0"),),
    ]


# --- interfaces that must not be changed


def test_management_includes_default_routes(tmp_path: Path) -> None:
    node = spark(tmp_path)
    node.default_route6("wlP9s9")
    assert qsfp.management(reader(node)) == {"enP7s7": "has the default route", "wlP9s9": "has the default route"}


def test_management_includes_wifi_without_a_route(tmp_path: Path) -> None:
    assert qsfp.management(reader(spark(tmp_path)))["wlP9s9"] == "is Wi-Fi"


def test_management_ignores_unreachable_routes(tmp_path: Path) -> None:
    node = Sysfs(tmp_path)
    node.default_route("enp1s0f0np0", flags=0x201)
    node.default_route("enp1s0f1np1", flags=0x2)
    node.default_route6("lo", flags=0x200200)
    assert qsfp.management(reader(node)) == {}


def test_management_includes_the_interfaces_below(tmp_path: Path) -> None:
    node = spark(tmp_path, cable=None)
    for name in ("br0", "bond0", "bond0.7"):
        node.virtual(name)
    node.above("bond0", "enp1s0f0np0", "enP2p1s0f0np0", master=True)
    node.above("bond0.7", "bond0")
    node.above("br0", "bond0.7", master=True)
    node.default_route("br0")
    found = qsfp.management(reader(node))
    assert set(found) == {"enP7s7", "wlP9s9", "br0", "bond0.7", "bond0", "enp1s0f0np0", "enP2p1s0f0np0"}
    assert found["bond0"] == "carries bond0.7, which carries br0, which has the default route"


def test_management_includes_the_bridge_above(tmp_path: Path) -> None:
    node = spark(tmp_path)
    node.virtual("br0")
    node.above("br0", "enP7s7", "enp1s0f1np1", master=True)
    found = qsfp.management(reader(node))
    assert found["br0"] == "is made of enP7s7, which has the default route"
    assert "enp1s0f1np1" in found and "enp1s0f0np0" not in found


def test_management_excludes_a_qsfp_port_with_a_vlan(tmp_path: Path) -> None:
    node = spark(tmp_path)
    node.virtual("enp1s0f0np0.7")
    node.above("enp1s0f0np0.7", "enp1s0f0np0")
    assert set(qsfp.management(reader(node))) == {"enP7s7", "wlP9s9"}


@pytest.mark.skipif(shutil.which("ip") is None, reason="this machine has no iproute2")
def test_management_includes_the_interface_of_this_ssh_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On this machine's loopback, read with its `ip`."""
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 50000 127.0.0.1 22")
    assert qsfp.management(LocalReader())["lo"] == "carries this ssh session"
    assert qsfp.management(LocalReader(str(tmp_path))) == {}, "a rehearsal is not the machine the session is on"
    for without in ("", "127.0.0.1", "127.0.0.1 1 203.0.113.200 22"):
        monkeypatch.setenv("SSH_CONNECTION", without)
        assert "lo" not in qsfp.management(LocalReader())


def session_over(monkeypatch: pytest.MonkeyPatch, interface: str) -> None:
    """An ssh session that came in over `interface`."""
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.9 50000 192.0.2.1 22")
    live = ip.Live(interface, 1500, True, True, ("192.0.2.1/24",), (), ("192.0.2.1",))
    monkeypatch.setattr(ip, "live_or_complaint", lambda _: {interface: live})


@pytest.mark.parametrize("named", [None, "enP2p1s0f0np0"])
def test_used_port_with_this_ssh_session_is_refused_and_can_be_inspected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str | None
) -> None:
    node = spark(tmp_path)
    session_over(monkeypatch, "enp1s0f0np0")
    assert "carries this ssh session" in refusal(node, named).cause
    assert halves(qsfp.port_to_look_at(reader(node), configured(named))) == HALVES[0]


def test_port_to_look_at_with_the_default_route_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    node = spark(tmp_path)
    node.default_route("enp1s0f0np0")
    session_over(monkeypatch, "enp1s0f0np0")
    with pytest.raises(LinkProblem, match=r"must not be changed"):
        qsfp.port_to_look_at(reader(node), configured("enp1s0f0np0"))


def test_session_under_sudo_is_found() -> None:
    """sudo removes SSH_CONNECTION from the environment; the shell that started it still has it."""
    ask = "from sparkinstall.facts import ip, qsfp; print(*qsfp.session())"
    through = ["env", "-u", "SSH_CONNECTION", "SUDO_USER=spark", sys.executable, "-c", ask]
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *through]
    env = {**os.environ, "SSH_CONNECTION": "192.0.2.9 50000 192.0.2.1 22"}
    run = subprocess.run(shell, env=env, capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.split() == ["192.0.2.9", "50000", "192.0.2.1", "22"]


@pytest.mark.skipif(shutil.which("ip") is None, reason="this machine has no iproute2")
def test_addresses_follow_ip(tmp_path: Path) -> None:
    assert "127.0.0.1/8" in qsfp.addresses(LocalReader())["lo"]
    assert qsfp.addresses(LocalReader(str(tmp_path))) == {}


def test_management_and_addresses_without_ip_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.9 50000 192.0.2.1 22")
    for ask in (qsfp.management, qsfp.addresses):
        with pytest.raises(LinkProblem, match="ip -j addr") as raised:
            ask(LocalReader())
        assert "iproute2" in raised.value.hint


# --- the port that is used, and refused choices


def test_used_port_named_by_either_half_is_that_port(tmp_path: Path) -> None:
    node = Sysfs(tmp_path)
    for name in (name for port in HALVES.values() for name, _ in port):
        node.card(name, carrier=True)
    for number, port in HALVES.items():
        assert [qsfp.used_port(reader(node), configured(name)).number for name, _ in port] == [number, number]


@pytest.mark.parametrize(("carrier", "words"), [(False, "no carrier"), (None, "carrier unknown")])
def test_used_port_without_a_cable_is_refused_with_both_ports(tmp_path: Path, carrier: bool | None, words: str) -> None:
    node = Sysfs(tmp_path)
    for name in (name for port in HALVES.values() for name, _ in port):
        node.card(name, carrier=carrier)
    problem = refusal(node)
    assert "no QSFP port" in problem.message and problem.cause.count(words) == 2
    assert "ip link set enp1s0f0np0 up" in problem.hint and "--interface" in problem.hint


@pytest.mark.parametrize("carrier", [True, False, None])
def test_used_port_with_a_single_port_ignores_the_carrier(tmp_path: Path, carrier: bool | None) -> None:
    node = Sysfs(tmp_path)
    for name, _ in HALVES[1]:
        node.card(name, carrier=carrier)
    assert qsfp.used_port(reader(node), configured()).number == 1


def test_used_port_without_a_port_names_the_driver(tmp_path: Path) -> None:
    problem = refusal(Sysfs(tmp_path))
    assert problem.message == "this node has no QSFP port" and "mlx5_core" in problem.cause and "lspci" in problem.hint


# NVIDIA/NV-Kernels #271 names the folder; the flag file is in NVIDIA's guide to the Holoscan sensor bridge.
DEBUG_STATE = "sys/devices/platform/MTKP0001:00/pcie_hotplug/debug_state"


@pytest.mark.parametrize("named", [None, "enp1s0f0np0"])
@pytest.mark.parametrize(("path", "content"), [(qsfp.HOTPLUG.lstrip("/"), ""), (DEBUG_STATE, "0\n")])
def test_used_port_with_the_card_switched_off_names_the_power_saving(
    tmp_path: Path, path: str, content: str, named: str | None
) -> None:
    node = Sysfs(tmp_path)
    node.card("enP7s7", "r8127", True)
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(content)
    problem = refusal(node, named)
    assert problem.message == "this node has no QSFP port"
    assert "switched off to save power until a cable is plugged in and the other node is on" in problem.cause
    assert "cable in at both ends" in problem.hint and "reboot both with the cable plugged in" in problem.hint
    assert "`sudo mv /etc/nvidia/cx7-hotplug-enabled /etc/nvidia/cx7-hotplug-disabled`" in problem.hint
    assert "mstflint" not in problem.hint


def test_used_port_with_power_saving_enabled_uses_a_card_that_is_on(tmp_path: Path) -> None:
    node = spark(tmp_path)
    (tmp_path / "etc/nvidia").mkdir(parents=True)
    (tmp_path / qsfp.HOTPLUG.lstrip("/")).touch()
    assert halves(qsfp.used_port(reader(node), configured())) == HALVES[0]


def test_used_port_without_a_card_that_counts_as_plugged_in_names_lspci(tmp_path: Path) -> None:
    node = Sysfs(tmp_path)
    (tmp_path / DEBUG_STATE).parent.mkdir(parents=True)
    (tmp_path / DEBUG_STATE).write_text("1\n")
    assert "lspci" in refusal(node).hint


@pytest.mark.parametrize("name", ["enP7s7", "wlP9s9"])
def test_used_port_named_by_a_management_interface_is_refused(tmp_path: Path, name: str) -> None:
    problem = refusal(spark(tmp_path), name)
    assert problem.message.startswith(f"{name} must not be changed: it ")
    assert "port 0: enp1s0f0np0 + enP2p1s0f0np0" in problem.cause and "--interface enp1s0f0np0" in problem.hint


@pytest.mark.parametrize("named", [None, "enp1s0f0np0", "enP2p1s0f0np0"])
def test_used_port_with_the_default_route_is_refused(tmp_path: Path, named: str | None) -> None:
    node = spark(tmp_path)
    node.default_route("enP2p1s0f0np0")
    problem = refusal(node, named)
    assert "enP2p1s0f0np0 has the default route" in problem.cause
    assert "another interface" in problem.hint and "--interface" not in problem.hint


def test_used_port_beside_one_with_the_default_route_is_found(tmp_path: Path) -> None:
    node = spark(tmp_path, cable=1)
    node.default_route("enp1s0f0np0")
    (tmp_path / "sys/class/net/enp1s0f0np0/carrier").write_text("1\n")
    assert qsfp.used_port(reader(node), configured()).number == 1


@pytest.mark.parametrize(
    ("name", "what"),
    [("enp9s0f0np0", "this node has no interface enp9s0f0np0"), ("lo", "lo is not a half of a QSFP port")],
)
def test_used_port_named_by_no_half_is_refused_with_the_candidates(tmp_path: Path, name: str, what: str) -> None:
    problem = refusal(spark(tmp_path, cable=1), name)
    assert problem.message == what
    assert (
        "enp1s0f0np0" in problem.cause and "enp1s0f1np1" in problem.cause and "--interface enp1s0f1np1" in problem.hint
    )


def test_used_port_named_without_a_cable_is_refused_if_the_other_has_one(tmp_path: Path) -> None:
    node = spark(tmp_path, cable=1)
    problem = refusal(node, "enp1s0f0np0")
    assert "enp1s0f0np0 has no carrier, but port 1 has one" in problem.message
    assert "--interface enp1s0f1np1" in problem.hint


def test_used_port_named_without_a_cable_is_kept_if_no_other_has_one(tmp_path: Path) -> None:
    assert qsfp.used_port(reader(spark(tmp_path, cable=None)), configured("enp1s0f1np1")).number == 1


def test_used_port_named_while_down_is_kept(tmp_path: Path) -> None:
    node = Sysfs(tmp_path)
    node.card("enp1s0f0np0", carrier=None)
    node.card("enp1s0f1np1", carrier=True)
    assert qsfp.used_port(reader(node), configured("enp1s0f0np0")).number == 0


# --- rehearsals


@pytest.mark.parametrize(
    ("named", "number"), [(None, 0), ("enp1s0f0np0", 0), ("enP2p1s0f0np0", 0), ("enp1s0f1np1", 1), ("enP2p1s0f1np1", 1)]
)
def test_used_port_in_a_rehearsal_is_that_of_a_spark(tmp_path: Path, named: str | None, number: int) -> None:
    found = qsfp.used_port(LocalReader(str(tmp_path)), configured(named))
    assert (found.number, halves(found), found.carrier) == (number, HALVES[number], None)


def test_used_port_in_a_rehearsal_with_interfaces_is_found_among_them(tmp_path: Path) -> None:
    spark(tmp_path, cable=1)
    assert halves(qsfp.used_port(LocalReader(str(tmp_path)), configured())) == HALVES[1]


@pytest.mark.parametrize("name", ["enP7s7", "wlP9s9", "eth0", "enp1s0f0np1"])
def test_used_port_in_a_rehearsal_named_by_no_half_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LinkProblem, match="not a half of a QSFP port"):
        qsfp.used_port(LocalReader(str(tmp_path)), configured(name))


# --- the GID table


def test_gids_are_sorted_by_index_without_empty_entries(tmp_path: Path) -> None:
    found = qsfp.gids(reader(spark(tmp_path, gid=9)), "rocep1s0f0")
    assert [(each.index, each.type, each.address) for each in found] == [
        (0, V1, ""), (1, V2, ""), (9, V1, "192.168.100.10"), (10, V2, "192.168.100.10"),
    ]  # fmt: skip
    assert {each.interface for each in found} == {"enp1s0f0np0"}


@pytest.mark.parametrize("first", [2, 4, 10])
def test_roce_gid_at_any_index_is_found(tmp_path: Path, first: int) -> None:
    on = reader(spark(tmp_path, gid=first))
    assert qsfp.roce_gid(on, "rocep1s0f0", "192.168.100.10") == first + 1
    assert qsfp.roce_gid(on, "roceP2p1s0f0", "192.168.101.10") == first + 1


def test_roce_gid_of_another_address_type_or_device_is_none(tmp_path: Path) -> None:
    node = spark(tmp_path)
    on = reader(node)
    assert qsfp.roce_gid(on, "rocep1s0f0", "192.168.100.11") is None
    assert qsfp.roce_gid(on, "rocep1s0f1", "192.168.100.10") is None
    assert qsfp.roce_gid(on, "mlx5_0", "192.168.100.10") is None
    node.gid("rocep1s0f0", 3, mapped("192.168.100.10"), V1, "enp1s0f0np0")
    assert qsfp.roce_gid(on, "rocep1s0f0", "192.168.100.10") is None


def test_roce_ready_with_devices_links_and_addresses_has_no_objection(tmp_path: Path) -> None:
    on = reader(spark(tmp_path, cable=1))
    assert qsfp.roce_ready(on, qsfp.used_port(on, configured())) == ""


def test_roce_ready_without_a_device_names_the_half(tmp_path: Path) -> None:
    on = reader(spark(tmp_path))
    shutil.rmtree(tmp_path / "sys/class/infiniband/roceP2p1s0f0/", ignore_errors=True)
    (tmp_path / "sys/class/infiniband/roceP2p1s0f0").unlink()
    assert qsfp.roce_ready(on, qsfp.used_port(on, configured())) == "enP2p1s0f0np0 has no RDMA device"


def test_roce_ready_with_a_device_down_names_its_state(tmp_path: Path) -> None:
    on = reader(spark(tmp_path))
    (tmp_path / "sys/class/infiniband/rocep1s0f0/ports/1/state").write_text("1: DOWN\n")
    reason = qsfp.roce_ready(on, qsfp.used_port(on, configured()))
    assert reason == "the RDMA device rocep1s0f0 of enp1s0f0np0 is DOWN instead of ACTIVE"


@pytest.mark.parametrize(
    ("kind", "interface"), [(V1, "enP2p1s0f0np0"), (V2, "bond0"), ("", ""), ("InfiniBand", "enP2p1s0f0np0")]
)
def test_roce_ready_without_a_gid_of_a_half_names_the_device(tmp_path: Path, kind: str, interface: str) -> None:
    node = spark(tmp_path)
    node.gid("roceP2p1s0f0", 3, mapped("192.168.101.10"), kind, interface)
    reason = qsfp.roce_ready(reader(node), qsfp.used_port(reader(node), configured()))
    assert reason == "the RDMA device roceP2p1s0f0 has no RoCE v2 GID for an IPv4 address of enP2p1s0f0np0"


def test_roce_ready_in_a_rehearsal_names_the_missing_device(tmp_path: Path) -> None:
    on = LocalReader(str(tmp_path))
    assert "rocep1s0f0" in qsfp.roce_ready(on, qsfp.used_port(on, configured()))


# --- parsers, on any input


@fuzzed
@given(st.ip_addresses(v=4))
def test_mapped_address_of_an_ipv4_gid_is_the_address(address: object) -> None:
    assert qsfp.mapped_address(mapped(str(address))) == str(address)
    assert qsfp.mapped_address(mapped(str(address)).upper()) == str(address)


@fuzzed
@given(st.text(max_size=60) | st.from_regex(r"\A[0-9a-fA-F:]{30,45}\Z"))
@example("0000:0000:0000:0000:0000:ffff:c0a8:640a\n")
@example("fe80:0000:0000:0000:0000:ffff:c0a8:640a")
@example("0000:0000:0000:0000:0000:ffff:٠٠٠٠:٠٠٠٠")
@example("::ffff:192.168.100.10")
@example("")
def test_mapped_address_of_other_text_is_empty(text: str) -> None:
    answer = qsfp.mapped_address(text)
    assert (answer != "") == bool(re.fullmatch(r"(?i)(0000:){5}ffff:[0-9a-f]{4}:[0-9a-f]{4}", text) and text.isascii())


@fuzzed
@given(st.binary(max_size=400))
@example(b"eth0\t00000000\t0\tzz\t0\t0\t0\t00000000\n")
@example(b"\xff\xfe\t00000000\t0\t0003\t0\t0\t0\t00000000\n")
@example(b"0" * 32 + b" 00 0 0 0 0 0 0 -1 x\n")
def test_default_routes_of_any_bytes_are_names(content: bytes) -> None:
    for read in (qsfp.default_routes, qsfp.default_routes6):
        assert all(name and not name.isspace() for name in read(content))


words = st.from_regex(r"\A[!-~]{1,15}\Z")
hexes = st.integers(0, 0xFFFFFFFF)


@fuzzed
@given(st.lists(st.tuples(words, hexes | st.just(0), hexes, hexes | st.just(0)), max_size=6))
def test_default_routes_are_those_in_use_to_everywhere(rows: list[tuple[str, int, int, int]]) -> None:
    lines = [
        f"{name}\t{to:08X}\t010200C0\t{flags:04X}\t0\t0\t100\t{mask:08X}\t0\t0\t0" for name, to, flags, mask in rows
    ]
    expected = [name for name, to, flags, mask in rows if to == mask == 0 and flags & 1 and not flags & 0x200]
    assert list(qsfp.default_routes("\n".join(["Iface\tDestination", *lines]).encode())) == list(
        dict.fromkeys(expected)
    )


@fuzzed
@given(st.lists(st.tuples(words, st.integers(0, 2**128 - 1) | st.just(0), st.integers(0, 128), hexes), max_size=6))
def test_default_routes6_are_those_in_use_to_everywhere(rows: list[tuple[str, int, int, int]]) -> None:
    zero = "0" * 32
    lines = [f"{to:032x} {size:02x} {zero} 00 {zero} 400 1 0 {flags:08x} {name:>8}" for name, to, size, flags in rows]
    expected = [name for name, to, size, flags in rows if to == size == 0 and flags & 1 and not flags & 0x200]
    assert list(qsfp.default_routes6("\n".join(lines).encode())) == list(dict.fromkeys(expected))
