"""Interfaces with a Spark's names as a real kernel shows them, in a network namespace that ends with the test:
carriers that cannot be read, routes, bridges and the like, and the address of the ssh session."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lab.commands import run

pytestmark = [pytest.mark.layer2]

CHECKOUT = Path(__file__).parents[2]
LOOK = """
import json
from sparkinstall.facts import qsfp
from sparkinstall.system.local import LocalReader
on = LocalReader()
print(json.dumps({
    "ports": [
        [port.number, port.carrier, [[each.name, each.mtu, each.hca] for each in port.twins]]
        for port in qsfp.ports(on)
    ],
    "management": dict(qsfp.management(on)),
    "addresses": {name: list(each) for name, each in qsfp.addresses(on).items()},
}))
"""
CABLE = (
    "ip link add enp1s0f0np0 type veth peer name far0",
    "ip link add enP2p1s0f0np0 type veth peer name far1",
    "ip link set far0 up",
    "ip link set far1 up",
)
LOST_CARRIER = ("while grep -q 1 /sys/class/net/enp1s0f0np0/carrier /sys/class/net/enP2p1s0f0np0/carrier; do :; done",)
UP = (
    "ip link set enp1s0f0np0 mtu 9000 up",
    "ip link set enP2p1s0f0np0 up",
    "ip address add 192.0.2.1/24 dev enp1s0f0np0",
)


LOST = """
import json, subprocess
from pathlib import Path
from sparkinstall.config import Layer, build
from sparkinstall.node import Node
from sparkinstall.facts import network
from sparkinstall.stacks import load
from sparkinstall.system.local import LocalReader
config, _ = build([Layer("the test", {"cluster.role": "head"})])
node = Node(config, load(config.stack), "aarch64", "aarch64", False, False, "/", Path("/nowhere"))
on = LocalReader()
before = network.reach(on, node)
found = [network.lost(before, on, node)]
subprocess.run(["ip", "-6", "route", "del", "default"], check=True)
print(json.dumps([*found, network.lost(before, on, node)]))
"""


def facts_after(*setup: str, ssh: str = "", ask: str = LOOK) -> Any:
    """The facts after the commands of `setup`, in a new namespace."""
    script = [
        "set -e",
        # A new namespace's interfaces are in a sysfs that is mounted inside it.
        "mount -t sysfs sysfs /sys",
        *setup,
        f"PYTHONPATH={shlex.quote(str(CHECKOUT))} SSH_CONNECTION={shlex.quote(ssh)}"
        f" {shlex.quote(sys.executable)} -c {shlex.quote(ask)}",
    ]
    answer = run("unshare", "--net", "--mount", "sh", "-c", "\n".join(script))
    return json.loads(answer.stdout)


def test_port_that_is_down_has_an_unknown_carrier() -> None:
    found = facts_after(*CABLE)
    assert found["ports"] == [[0, None, [["enp1s0f0np0", 1500, ""], ["enP2p1s0f0np0", 1500, ""]]]]
    assert found["management"] == {} and found["addresses"] == {}


def test_port_that_is_up_has_carrier_mtu_and_addresses() -> None:
    found = facts_after(*CABLE, *UP, "ip address add 198.51.100.1/25 dev enp1s0f0np0")
    assert found["ports"] == [[0, True, [["enp1s0f0np0", 9000, ""], ["enP2p1s0f0np0", 1500, ""]]]]
    assert found["addresses"] == {"enp1s0f0np0": ["192.0.2.1/24", "198.51.100.1/25"]}


def test_port_with_a_pulled_cable_has_no_carrier() -> None:
    found = facts_after(*CABLE, *UP, "ip link set far0 down", "ip link set far1 down", *LOST_CARRIER)
    assert [port[:2] for port in found["ports"]] == [[0, False]]


@pytest.mark.parametrize("route", ["ip route add default via 192.0.2.9", "ip -6 route add default dev enp1s0f0np0"])
def test_management_includes_the_default_route(route: str) -> None:
    assert facts_after(*CABLE, *UP, route)["management"] == {"enp1s0f0np0": "has the default route"}


def test_management_ignores_an_unreachable_default_route() -> None:
    setup = ("ip route add unreachable default", "ip -6 route add unreachable default")
    assert facts_after(*CABLE, *UP, "ip link set lo up", *setup)["management"] == {}


@pytest.mark.parametrize(
    ("client", "server", "expected"),
    [
        ("192.0.2.9", "192.0.2.1", ["enp1s0f0np0"]),
        ("2001:db8::9", "2001:db8::1", ["enP2p1s0f0np0"]),
        ("fe80::9", "fe80::5%enP2p1s0f0np0", ["enP2p1s0f0np0"]),
        ("203.0.113.9", "203.0.113.1", []),
    ],
)
def test_management_includes_the_interface_of_the_ssh_session(client: str, server: str, expected: list[str]) -> None:
    found = facts_after(
        *CABLE,
        *UP,
        "ip address add 2001:db8::1/64 dev enP2p1s0f0np0 nodad",
        "ip address add fe80::5/64 dev enp1s0f0np0 nodad",
        "ip address add fe80::5/64 dev enP2p1s0f0np0 nodad",
        ssh=f"{client} 50000 {server} 22",
    )
    assert found["management"] == dict.fromkeys(expected, "carries this ssh session")


def test_management_includes_members_of_a_bridge_with_the_default_route() -> None:
    bridge = ("ip link add br0 type bridge", "ip link set br0 up", "ip link set enP2p1s0f0np0 master br0")
    found = facts_after(
        *CABLE, *UP, *bridge, "ip address add 198.51.100.1/24 dev br0", "ip route add default via 198.51.100.9"
    )
    assert found["management"] == {
        "br0": "has the default route",
        "enP2p1s0f0np0": "carries br0, which has the default route",
    }


def test_management_includes_the_interface_below_the_default_route() -> None:
    """With a macvlan, which more kernels have than a VLAN; its link to the lower interface is the same."""
    lan = ("ip link add link enp1s0f0np0 name lan type macvlan", "ip link set lan up")
    found = facts_after(
        *CABLE, *UP, *lan, "ip address add 198.51.100.1/24 dev lan", "ip route add default via 198.51.100.9"
    )
    assert found["management"] == {
        "lan": "has the default route",
        "enp1s0f0np0": "carries lan, which has the default route",
    }


def test_lost_without_the_ipv6_default_route_names_it() -> None:
    lan = ("ip address add 2001:db8::1/64 dev enP2p1s0f0np0 nodad", "ip -6 route add default via fe80::9 dev far1")
    found = facts_after(*CABLE, *UP[1:2], "ip link set lo up", "ip link set far1 up", *lan, ask=LOST)
    assert found == ["", "the default route over far1 is gone"]


def test_lost_with_an_ipv4_default_route_is_empty() -> None:
    """Routers announce that of IPv6 at any time, so it is not required if there is one of IPv4."""
    ways = ("ip route add default via 192.0.2.9", "ip -6 route add default dev enp1s0f0np0")
    assert facts_after(*CABLE, *UP, *ways, ask=LOST) == ["", ""]
