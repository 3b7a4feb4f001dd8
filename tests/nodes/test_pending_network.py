"""What is live beside the QSFP port, and what nobody applied, on nodes with the real netplan and networkd."""

import json
import time
from collections.abc import Callable, Iterator

import pytest

from tests.lab.cabling import LAN, PORT_0
from tests.lab.commands import Completed
from tests.lab.fleet import Fleet, FleetNode
from tests.nodes.fleet import LEFT_OUT
from tests.nodes.fresh import CHECKOUT, COMMAND, REPOSITORY, ignoring

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.network]

FIRST, SECOND = PORT_0
LAN_FILE = "/etc/netplan/01-lan.yaml"


@pytest.fixture(scope="module")
def node() -> Iterator[FleetNode]:
    with Fleet(1) as fleet:
        (node,) = fleet.nodes
        node.push(REPOSITORY, CHECKOUT, owner="spark", exclude=LEFT_OUT)
        node.write("/etc/sparkinstall.yaml", f"network: {{rollback_seconds: 30, interface: {FIRST}}}\n")
        node.run("./install.sh", "--tool-only", user="spark", cwd=CHECKOUT, timeout=600)
        node.run("ip", "link", "set", FIRST, "up")
        node.run("ip", "link", "set", SECOND, "up")
        yield node


def tool(node: FleetNode, *words: str) -> Completed:
    return node.run(COMMAND, *words, user="spark", cwd="/home/spark", check=False, timeout=300)


def set_up(node: FleetNode, *more: str) -> dict[str, object]:
    words = ("--role", "head", "--only", "network", "--yes", "--json")
    answer = tool(node, "multi-node", *words, *ignoring(), "--ignore", "cuda", *more)
    found: dict[str, object] = json.loads(answer.stdout)
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
    shown = [node.run("ip", "-o", *what).stdout for what in (("address",), ("-4", "route"), ("-6", "route"), ("rule",))]
    return "\n".join(shown)


def _until(holds: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"still false after {seconds:g} s"
        time.sleep(0.1)


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


def test_network_without_edits_is_set_up(node: FleetNode) -> None:
    answer = set_up(node)
    assert answer["exit_code"] == 0, answer
