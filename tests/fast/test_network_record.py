"""The record of live interfaces: whatever netplan does to them, the record's script restores it, with the real `ip`."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkinstall.errors import Problem
from sparkinstall.resources.netplan import files, record
from sparkinstall.system import Result
from tests.support.namespace import Namespace

FIRST, SECOND, LAN = "enp1s0f0np0", "enP2p1s0f0np0", "enP7s7"
OURS = "192.168.100.10/24"
VETH = "ip link add {0} type veth peer name {1} && ip link set {1} up && ip link set {0} up"
NAMESPACE = ["unshare", "--map-root-user", "--net", "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"]
NONE = subprocess.run(NAMESPACE, capture_output=True, check=False).returncode

pytestmark = pytest.mark.skipif(NONE != 0, reason="no user namespace with veth interfaces")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Namespace]:
    with Namespace(tmp_path) as node:
        for number, name in enumerate((FIRST, SECOND, LAN)):
            node.shell(VETH.format(name, f"peer{number}"))
        yield node


SETTINGS = {
    "address": "ip address add 10.1.1.1/24 dev {name}",
    "IPv6 address": "ip address add 2001:db8:5::1/64 dev {name} nodad",
    "MTU": "ip link set {name} mtu 1400",
    "route": "ip address add 10.2.1.1/24 dev {name}; ip route add 10.9.0.0/16 via 10.2.1.9 metric 7",
    "route of another table": "ip route add 10.8.0.0/16 dev {name} table 100",
    "IPv6 route": "ip -6 route add 2001:db8:9::/48 dev {name}",
    "bridge": "ip link add br-{name} type bridge && ip link set {name} master br-{name}",
    "rule": "ip rule add from 10.0.0.0/8 lookup 100 pref 50",
    "IPv6 rule": "ip -6 rule add from 2001:db8::/32 lookup 100",
    "down": "ip link set {name} down",
    "peer": "ip address add 10.3.1.1 peer 10.3.1.2 dev {name}",
    "address with properties": "ip address add 10.3.2.1/24 broadcast 10.3.2.9 dev {name} scope link label {name}:x"
    " noprefixroute preferred_lft 0",
    "route over another one": "ip route add 10.5.0.9 dev {name}; ip route add 10.4.0.0/16 via 10.5.0.9 dev {name}",
    "several next hops": "ip address add 10.6.1.1/24 dev {name};"
    " ip route add 10.60.0.0/16 nexthop via 10.6.1.2 weight 2 nexthop via 10.6.1.3",
    "next hop object": "ip address add 10.6.2.1/24 dev {name}; ip nexthop add id 7 via 10.6.2.2 dev {name};"
    " ip route add 10.61.0.0/16 nhid 7",
    "neighbour": "ip neighbour replace 10.1.1.7 lladdr 02:00:00:00:00:07 dev {name} nud permanent",
    "IPv6 neighbour": "ip neighbour replace 2001:db8::7 lladdr 02:00:00:00:00:07 dev {name} nud permanent",
    "router announcements": "echo 2 > /proc/sys/net/ipv6/conf/{name}/accept_ra",
    "privacy": "echo 2 > /proc/sys/net/ipv6/conf/{name}/use_tempaddr",
    "secondary addresses": "echo 1 > /proc/sys/net/ipv4/conf/{name}/promote_secondaries",
    "no IPv6": "echo 1 > /proc/sys/net/ipv6/conf/{name}/disable_ipv6",
}
# What networkd does to an interface that it configures again; `all` at once is a renderer that does not run.
DAMAGE = {
    "addresses": "ip address flush dev {name}",
    "link": "ip link set {name} down",
    "IPv6": "ip link set dev {name} addrgenmode none; echo 1 > /proc/sys/net/ipv6/conf/{name}/disable_ipv6",
    "MTU": "ip link set {name} mtu 9000",
    "master": "ip link set {name} nomaster",
    "routes": "for each in 4 6; do ip -$each route flush dev {name} proto boot; done; ip route flush table 100;"
    " ip route flush root 10.60.0.0/15; ip nexthop flush",
    "rules": "ip rule del pref 50 2> /dev/null || true; ip -6 rule del from 2001:db8::/32 2> /dev/null || true",
    "up": "ip link set {name} up",
    "neighbours": "ip neighbour flush nud permanent dev {name}",
    "kernel": "cd /proc/sys/net; for each in ipv6/conf/{name}/accept_ra ipv6/conf/{name}/use_tempaddr"
    " ipv4/conf/{name}/promote_secondaries; do echo 0 > $each; done",
}


def without_netplan(script: str) -> str:
    assert script.startswith(f"{files.PROGRAM} apply\n")
    return script.partition("\n")[2].replace("sleep 1\n", "")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from([FIRST, LAN]), st.sampled_from([*SETTINGS])), max_size=6, unique=True),
    st.lists(st.tuples(st.sampled_from([FIRST, LAN]), st.sampled_from([*DAMAGE])), max_size=6),
)
def test_record_of_any_state_is_restored_after_any_damage(
    tmp_path: Path, before: list[tuple[str, str]], damage: list[tuple[str, str]]
) -> None:
    with Namespace(tmp_path) as node:
        for number, name in enumerate((FIRST, LAN)):
            node.shell(VETH.format(name, f"peer{number}"))
        for name, what in before:
            node.shell(f"({SETTINGS[what].format(name=name)}) 2> /dev/null || true")
        taken = record.taken(node, [FIRST, LAN])
        assert record.differences(taken, node, {FIRST: OURS}) == []
        for name, what in [*damage, (FIRST, "ours")]:
            lines = f"ip address add {OURS} dev {FIRST}" if what == "ours" else DAMAGE[what].format(name=name)
            node.shell(f"({lines}) 2> /dev/null || true")
        node.shell(without_netplan(record.restoring(taken, {FIRST: OURS})))
        assert record.differences(taken, node, {FIRST: OURS}) == []


@pytest.mark.parametrize(
    ("what", "damage", "word"),
    [
        ("address", "addresses", "lacks 10.1.1.1/24 (`sudo ip address add 10.1.1.1/24 dev enP7s7`)"),
        ("IPv6 address", "addresses", "lacks 2001:db8:5::1/64"),
        ("MTU", "MTU", "has MTU 9000 (`sudo ip link set dev enP7s7 mtu 1400`)"),
        ("route", "routes", "lacks the route 10.9.0.0/16 via 10.2.1.9"),
        ("route of another table", "routes", "lacks the route 10.8.0.0/16"),
        ("IPv6 route", "link", "lacks the route 2001:db8:9::/48"),
        ("bridge", "master", "is a part of nothing (`sudo ip link set dev enP7s7 master br-enP7s7`)"),
        ("rule", "rules", "the rule -4 pref 50 from 10.0.0.0/8 lookup 100 is gone (`sudo ip -4 rule add"),
        ("IPv6 rule", "rules", "the rule -6 pref"),
        ("peer", "addresses", "lacks 10.3.1.1 peer 10.3.1.2/32"),
        (
            "address with properties",
            "addresses",
            "lacks 10.3.2.1/24 broadcast 10.3.2.9 scope link label enP7s7:x noprefixroute preferred_lft 0",
        ),
        ("route over another one", "routes", "lacks the route 10.4.0.0/16 via 10.5.0.9"),
        ("several next hops", "routes", "lacks the route 10.60.0.0/16 nexthop via 10.6.1.2"),
        ("next hop object", "routes", "lacks the route 10.61.0.0/16 via 10.6.2.2"),
        ("neighbour", "neighbours", "lacks the neighbour 10.1.1.7 lladdr 02:00:00:00:00:07"),
        ("IPv6 neighbour", "neighbours", "lacks the neighbour 2001:db8::7 lladdr 02:00:00:00:00:07"),
        ("router announcements", "kernel", "has ipv6/accept_ra 0 (`sudo sysctl -q -w net/ipv6/conf/enP7s7/accept_ra=2"),
        ("secondary addresses", "kernel", "has ipv4/promote_secondaries 0"),
        ("address", "link", "is down (`sudo ip link set dev enP7s7 up`)"),
    ],
)
def test_record_names_what_is_missing_with_a_command_that_restores_it(
    node: Namespace, what: str, damage: str, word: str
) -> None:
    node.shell(SETTINGS[what].format(name=LAN))
    taken = record.taken(node, [LAN])
    node.shell(f"({DAMAGE[damage].format(name=LAN)}) 2> /dev/null || true")
    found = record.differences(taken, node, {})
    assert any(word in each for each in found), found
    for _ in range(3):
        for each in record.differences(taken, node, {}):
            node.shell(f"{each.partition('`sudo ')[2].rstrip('`)')} || true")
    assert record.differences(taken, node, {}) == []


def test_record_leaves_out_what_returns_by_itself(node: Namespace) -> None:
    node.shell(
        f"ip address add 10.5.0.7/24 dev {LAN} valid_lft 600 preferred_lft 600",
        f"ip route add 10.6.0.0/16 dev {LAN} proto dhcp",
        f"ip route add 10.7.0.0/16 dev {LAN} proto bird",
    )
    taken = record.taken(node, [LAN])
    assert taken[LAN]["routes"] == [] and "10.5.0.7/24" not in taken[LAN]["addresses"] and taken[LAN]["dhcp"]
    node.shell(f"ip address del 10.5.0.7/24 dev {LAN}")
    assert "no address from DHCP" in record.differences(taken, node, {})[0]
    assert record.differences(taken, node, {}, soft=False) == []


def test_record_of_an_interface_that_was_removed_says_so(node: Namespace) -> None:
    taken = record.taken(node, [SECOND])
    node.shell(f"ip link del {SECOND}")
    assert record.differences(taken, node, {}) == [f"{SECOND} does not exist"]


def test_record_of_an_earlier_version_is_restored(node: Namespace) -> None:
    was = {FIRST: {"mtu": 1500, "up": True, "addresses": ["10.1.1.1/24"]}}
    node.shell(f"ip address add {OURS} dev {FIRST}", f"ip link set {FIRST} mtu 9000")
    node.shell(without_netplan(record.restoring(was, {FIRST: OURS})))
    assert record.differences(was, node, {FIRST: OURS}) == []


def test_record_that_cannot_be_taken_is_an_error(tmp_path: Path) -> None:
    """An empty record would be "as before" whatever is live."""

    class Unreadable(Namespace):
        def ask(self, *argv: str, **_: Any) -> Result:
            return Result(argv, 1, "", "Cannot open netlink socket: Too many open files")

    with pytest.raises(Problem, match="the network cannot be read") as found:
        record.taken(Unreadable(tmp_path), [LAN])
    assert "Too many open files" in found.value.cause


def test_record_leaves_alone_what_other_programs_switch_for_all_interfaces(node: Namespace) -> None:
    """Docker, for one, lets the kernel forward packets."""
    taken = record.taken(node, [FIRST, LAN])
    node.shell("echo 1 > /proc/sys/net/ipv4/ip_forward", "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
    assert record.differences(taken, node, {}) == []
    assert "forwarding" not in record.restoring(taken, {})
