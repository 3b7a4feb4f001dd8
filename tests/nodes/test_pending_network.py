"""What is live beside the QSFP port, and what nobody applied, on nodes with the real netplan and networkd."""

import json
import signal
from collections.abc import Iterator

import pytest

from sparkinstall.resources import rollback
from tests.lab import cabling
from tests.lab.cabling import LAN, PORT_0
from tests.lab.commands import Completed, Process
from tests.lab.fleet import Fleet, FleetNode
from tests.nodes.fresh import CHECKOUT, COMMAND, LEFT_OUT, REPOSITORY, ignoring, install_tool
from tests.support.waiting import until

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.network]

FIRST, SECOND = PORT_0
LAN_FILE = "/etc/netplan/01-lan.yaml"
FLAGS = ("nodad", "tentative")
BY_HAND = (
    f"address add 10.77.0.1/24 dev {FIRST}",
    f"route add 10.78.0.0/16 via 10.77.0.9 dev {FIRST} metric 7",
    f"-6 address add 2001:db8:7::1/64 dev {FIRST}",
    f"-6 route add 2001:db8:9::/48 via 2001:db8:7::9 dev {FIRST}",
    f"link set {SECOND} mtu 2000",
    f"address add 10.79.0.1 peer 10.79.0.2 dev {FIRST}",
    f"address add 10.80.0.1/24 broadcast 10.80.0.9 scope link noprefixroute dev {SECOND}",
    "route add 10.81.0.0/16 nexthop via 10.77.0.8 nexthop via 10.77.0.9",
    f"neighbour replace 10.77.0.7 lladdr 02:00:00:00:00:07 dev {FIRST} nud permanent",
    f"neighbour replace 198.51.100.77 lladdr 02:00:00:00:00:08 dev {LAN} nud permanent",
    "rule add from 10.77.0.0/16 lookup 100 pref 50",
)


@pytest.fixture(scope="module")
def pair() -> Iterator[Fleet]:
    with Fleet(2) as fleet:
        node = fleet.nodes[0]
        node.push(REPOSITORY, CHECKOUT, owner="spark", exclude=LEFT_OUT)
        node.write("/etc/sparkinstall.yaml", f"network: {{interface: {FIRST}}}\n")
        install_tool(node)
        node.run("ip", "link", "set", FIRST, "up")
        node.run("ip", "link", "set", SECOND, "up")
        yield fleet


@pytest.fixture(scope="module")
def node(pair: Fleet) -> FleetNode:
    return pair.nodes[0]


def tool(node: FleetNode, *words: str) -> Completed:
    return node.run(COMMAND, *words, user="spark", cwd="/home/spark", check=False, timeout=1200)


def words(*more: str) -> tuple[str, ...]:
    said = ("multi-node", "--role", "head", "--only", "network", "--yes", "--json")
    return (*said, *ignoring(), "--ignore", "cuda", *more)


def set_up(node: FleetNode) -> dict[str, object]:
    found: dict[str, object] = json.loads(tool(node, *words()).stdout)
    return found


def refused(node: FleetNode, word: str) -> None:
    """`plan` shows it, and a run refuses before anything is touched."""
    before = node.tree_digest("/etc", times=True), _network(node)
    shown = tool(node, "plan", "--only", "network", "--set", "cluster.role=head")
    assert word in " ".join(shown.stdout.split()), shown.stdout
    answer = set_up(node)
    assert answer["exit_code"] == 1 and word in json.dumps(answer["errors"]), answer
    assert (node.tree_digest("/etc", times=True), _network(node)) == before


def _network(node: FleetNode) -> str:
    """Addresses, links, routes, rules and neighbours, without their order, and without how an address came to be."""
    shown = [
        node.run("ip", "-o", *what).stdout
        for what in (
            ("-d", "address"),
            ("link",),
            ("-4", "route"),
            ("-6", "route"),
            ("rule",),
            ("neighbour", "show", "nud", "permanent"),
        )
    ]
    lines = "".join(shown).replace(" proto kernel_ll", "").splitlines()
    return "\n".join(sorted(" ".join(each for each in line.split() if each not in FLAGS) for line in lines))


def _until_armed(node: FleetNode, name: str, process: Process) -> None:
    """Wait until a rollback timer runs. What follows has to be in time: this looks often, and only from outside."""
    until(lambda: (node.root / rollback.HOME.lstrip("/") / name).exists(), during=process, pause=0.01)


@pytest.mark.parametrize("generated", [False, True], ids=["written", "generated"])
@pytest.mark.parametrize(
    ("former", "now"),
    [("/24]", "/24, 198.51.100.77/24]"), ("renderer: networkd", "renderer: NetworkManager")],
    ids=["address", "renderer"],
)
def test_network_with_an_edit_that_nobody_applied_is_refused(
    node: FleetNode, former: str, now: str, generated: bool
) -> None:
    lines = node.read(LAN_FILE)
    assert former in lines, lines
    try:
        node.write(LAN_FILE, lines.replace(former, now), mode="0600")
        if generated:
            node.run("systemctl", "daemon-reload")
        refused(node, "netplan apply")
    finally:
        node.write(LAN_FILE, lines, mode="0600")
        node.run("netplan", "generate")


def test_network_with_an_address_by_hand_on_the_lan_is_refused(node: FleetNode) -> None:
    node.run("ip", "address", "add", "10.0.0.9/8", "dev", LAN)
    try:
        refused(node, "10.0.0.9/8")
    finally:
        node.run("ip", "address", "del", "10.0.0.9/8", "dev", LAN)


def test_network_with_a_half_in_a_bridge_is_refused(node: FleetNode) -> None:
    node.run("ip", "link", "add", "br-x", "type", "bridge")
    node.run("ip", "link", "set", FIRST, "master", "br-x")
    try:
        refused(node, "br-x")
    finally:
        node.run("ip", "link", "del", "br-x")


def test_network_with_a_file_of_networkd_for_the_port_is_refused(node: FleetNode) -> None:
    path = "/etc/systemd/network/05-cx7.network"
    node.write(path, f"[Match]\nName={FIRST}\n[Network]\nAddress=10.9.0.1/24\n[Link]\nMTUBytes=2500\n")
    try:
        refused(node, path)
    finally:
        node.run("rm", path)


def test_uninstall_restores_what_was_set_by_hand(node: FleetNode) -> None:
    for line in BY_HAND:
        node.run("ip", *line.split())
    before = _network(node)
    answer = set_up(node)
    assert answer["exit_code"] == 0, answer["errors"]
    assert "192.168.100.10/24" in _network(node) and "10.77.0.1/24" not in _network(node)
    undone = tool(node, "uninstall", "--yes")
    assert undone.returncode == 0, undone.stderr
    assert _network(node) == before


def test_rollback_restores_what_was_set_by_hand(pair: Fleet, node: FleetNode) -> None:
    """The gateway does not answer while the network is applied, so the new one is not kept."""
    before, switch = _network(node), pair._wires.switch
    with node.popen(COMMAND, *words(), user="spark", cwd="/home/spark") as process:
        _until_armed(node, "network", process)
        cabling.ip(switch, "link", "set", "lan", "down")
        output, _ = process.communicate(timeout=600)
        cabling.ip(switch, "link", "set", "lan", "up")
    (error,) = json.loads(output)["errors"]
    assert "the former network was restored" in error["message"], error
    assert set(_network(node).splitlines()) ^ set(before.splitlines()) == set()


def test_uninstall_after_a_kill_at_the_firewalls_timer_leaves_nothing(node: FleetNode) -> None:
    answer = set_up(node)
    assert answer["exit_code"] == 0, answer["errors"]
    with node.popen(COMMAND, *words("--only", "firewall"), user="spark", cwd="/home/spark") as process:
        _until_armed(node, "firewall", process)
        node.signal(process, signal.SIGKILL)
        process.wait(300)
    undone = tool(node, "uninstall", "--yes")
    assert undone.returncode == 0, undone.stderr
    assert node.run("test", "-e", rollback.HOME, check=False).returncode == 1
    assert not node.run("systemctl", "list-units", "--all", "--no-legend", "*rollback*").stdout
    assert not node.run("find", "/etc/systemd/system", "-name", "*rollback*").stdout
