"""The QSFP link of two nodes: the real netplan, packets of 9000 bytes, and a rollback after each failure.

All tests use the same nodes, in order.
"""

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab import cabling
from tests.lab.cabling import LAN, PORT_0
from tests.lab.commands import Completed, Process, run
from tests.lab.fleet import ROUTER_ADDRESS, Fleet, FleetNode
from tests.nodes.fresh import CHECKOUT, COMMAND, LEFT_OUT, REPOSITORY, ignoring, install_tool
from tests.support.waiting import until

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.network]

FIRST, SECOND = PORT_0
TARGET = "/etc/netplan/40-cx7.yaml"
THEIRS = "/etc/netplan/60-theirs.yaml"
THEIR_LINES = f"# by hand\nnetwork: {{version: 2, ethernets: {{{FIRST}: {{addresses: [10.77.0.1/24], mtu: 2000}}}}}}\n"
HEAD, WORKER = "192.168.100.10", "192.168.100.11"
# Of the run that is killed and whose timer expires. Those before must have applied the network by then.
ROLLBACK_SECONDS = 60
ARMED = "/var/lib/sparkinstall-rollback/network"
AT_BOOT = "/etc/systemd/system/sparkinstall-rollback.service"
# Their times change with their entries.
FOLDERS = {"/etc", "/etc/netplan", "/etc/systemd/system", "/etc/systemd/system/multi-user.target.wants"}


@pytest.fixture(scope="module")
def pair() -> Iterator[Fleet]:
    with Fleet(2) as fleet:
        for node in fleet.nodes:
            node.push(REPOSITORY, CHECKOUT, owner="spark", exclude=LEFT_OUT)
            node.write("/etc/sparkinstall.yaml", "network: {rollback_seconds: 900}\n")
            install_tool(node)
        head = fleet.nodes[0]
        head.write(THEIRS, THEIR_LINES, mode="0640")
        head.run("touch", "-d", "2001-02-03 04:05:06.789", THEIRS)
        head.run("netplan", "apply")
        until(lambda: "10.77.0.1/24" in _addresses(head, FIRST))
        yield fleet


@pytest.fixture(scope="module")
def head(pair: Fleet) -> FleetNode:
    return pair.nodes[0]


@pytest.fixture(scope="module")
def worker(pair: Fleet) -> FleetNode:
    return pair.nodes[1]


@pytest.fixture(scope="module")
def before(head: FleetNode) -> dict[str, str]:
    return head.tree_digest("/etc", times=True)


def set_up(node: FleetNode, role: str, *more: str, check: bool = True) -> Completed:
    return _tool(node, *_words(role, *more), check=check)


def _words(role: str, *more: str) -> tuple[str, ...]:
    return ("multi-node", "--role", role, "--only", "network", "--yes", *ignoring(), "--ignore", "cuda", *more)


def _tool(node: FleetNode, *words: str, check: bool = True) -> Completed:
    return node.run(COMMAND, *words, user="spark", cwd="/home/spark", check=check, timeout=1200)


def _address_facts(node: FleetNode, interface: str) -> dict[str, object]:
    found: list[dict[str, object]] = json.loads(node.run("ip", "-j", "-4", "address", "show", interface).stdout)
    return found[0] if found else {}


def _addresses(node: FleetNode, interface: str) -> list[str]:
    found = _address_facts(node, interface).get("addr_info", [])
    assert isinstance(found, list)
    return [f"{each['local']}/{each['prefixlen']}" for each in found]


def _mtu(node: FleetNode, interface: str) -> int:
    output = run("ip", "-n", node.plugs.netns, "-j", "link", "show", interface).stdout
    return int(json.loads(output)[0]["mtu"])


def _exists(node: FleetNode, path: str) -> bool:
    return (node.root / path.lstrip("/")).exists() or node.run("test", "-e", path, check=False).returncode == 0


def is_set_up(node: FleetNode, address: str) -> bool:
    other = address.replace("192.168.100.", "192.168.101.")
    lives = [(_mtu(node, name), _addresses(node, name)) for name in PORT_0]
    return lives == [(9000, [f"{address}/24"]), (9000, [f"{other}/24"])]


def is_as_before(node: FleetNode, tree: dict[str, str]) -> bool:
    lives = [(_mtu(node, name), _addresses(node, name)) for name in PORT_0]
    return lives == [(2000, ["10.77.0.1/24"]), (1500, [])] and node.tree_digest("/etc", times=True).items() >= {
        (path, what) for path, what in tree.items() if path.startswith("/etc/netplan/")
    }


@contextmanager
def gateway_silent(pair: Fleet) -> Iterator[None]:
    """During the context the router does not answer, so a former address is unreachable."""
    switch = pair._wires.switch
    cabling.ip(switch, "link", "set", "lan", "down")
    try:
        yield
    finally:
        cabling.ip(switch, "link", "set", "lan", "up")
        until(lambda: pair.nodes[0].run("ping", "-c1", "-W1", ROUTER_ADDRESS, check=False).returncode == 0)


def test_plan_shows_the_netplan_file_that_it_replaces(head: FleetNode, before: dict[str, str]) -> None:
    output = _planned(head)
    assert "60-theirs.yaml" in output
    assert f"{FIRST}: 192.168.100.10/24, MTU 9000" in output
    assert head.tree_digest("/etc", times=True) == before


def test_plan_with_a_subnet_of_the_lan_is_refused(head: FleetNode) -> None:
    output = _planned(head, "--set", "network.twin_subnet=198.51.100.128")
    assert "198.51.100.0/24 of enP2p1s0f0np0 is already in use: enP7s7 has a route to 198.51.100.0/24" in output
    assert "network.twin_subnet" in output


def test_plan_with_the_interface_of_the_lan_is_refused(head: FleetNode) -> None:
    output = _planned(head, "--set", f"network.interface={LAN}")
    assert f"{LAN} must not be changed" in output, output


def _planned(node: FleetNode, *more: str) -> str:
    answer = _tool(node, "plan", "--only", "network", "--set", "cluster.role=head", *more, check=False)
    return " ".join((answer.stdout + answer.stderr).split())


def test_network_with_an_address_in_use_is_refused(head: FleetNode, worker: FleetNode, before: dict[str, str]) -> None:
    worker.run("ip", "address", "add", f"{HEAD}/24", "dev", FIRST)
    try:
        answer = set_up(head, "head", "--json", check=False)
    finally:
        worker.run("ip", "address", "del", f"{HEAD}/24", "dev", FIRST)
    (error,) = json.loads(answer.stdout)["errors"]
    assert f"the address {HEAD} is already in use: 02:00:5e:00" in error["message"], error
    assert is_as_before(head, before)
    assert not _exists(head, ARMED)


def test_network_that_loses_the_gateway_rolls_back_at_once(
    pair: Fleet, head: FleetNode, before: dict[str, str]
) -> None:
    with head.popen(COMMAND, *_words("head", "--json"), user="spark", cwd="/home/spark") as process:
        _until_armed(head, process)
        with gateway_silent(pair):
            output, _ = process.communicate(timeout=600)
    (error,) = json.loads(output)["errors"]
    assert f"{ROUTER_ADDRESS} no longer answers; the former network was restored" in error["message"]
    assert not _exists(head, ARMED)
    until(lambda: is_as_before(head, before))


def test_network_of_a_killed_run_rolls_back(pair: Fleet, head: FleetNode, before: dict[str, str]) -> None:
    _kill_after_the_apply(pair, head, "--set", f"network.rollback_seconds={ROLLBACK_SECONDS}")
    until(lambda: is_as_before(head, before))
    until(lambda: not _exists(head, str(Path(ARMED).parent)) and not _exists(head, AT_BOOT))
    until(lambda: not head.run("systemctl", "list-units", "--all", "--no-legend", "*rollback*").stdout)


def test_network_unconfirmed_before_a_reboot_rolls_back(pair: Fleet, head: FleetNode, before: dict[str, str]) -> None:
    """As a user does with a machine that does not answer, long before the timer expires."""
    _kill_after_the_apply(pair, head)
    head.reboot()
    until(lambda: is_as_before(head, before))
    until(lambda: not _exists(head, str(Path(ARMED).parent)) and not _exists(head, AT_BOOT))
    assert head.run("systemctl", "is-failed", Path(AT_BOOT).name, check=False).stdout.strip() == "inactive"
    assert _changed(head, before) <= FOLDERS


def test_network_confirmed_after_a_killed_run_is_kept(pair: Fleet, head: FleetNode) -> None:
    _kill_after_the_apply(pair, head)
    assert "confirm" in _planned(head)
    assert "confirm the network" in set_up(head, "head").stderr
    assert not _exists(head, ARMED)
    until(lambda: not head.run("systemctl", "list-units", "--all", "--no-legend", "*rollback*").stdout)
    assert is_set_up(head, HEAD)


def _changed(node: FleetNode, before: dict[str, str]) -> set[str]:
    after = node.tree_digest("/etc", times=True)
    return {path for path in before | after if before.get(path) != after.get(path)}


def _kill_after_the_apply(pair: Fleet, head: FleetNode, *more: str) -> None:
    with head.popen(COMMAND, *_words("head", *more), user="spark", cwd="/home/spark") as process:
        _until_armed(head, process)
        with gateway_silent(pair):
            until(lambda: is_set_up(head, HEAD), during=process, pause=0.05)
            assert not _exists(head, THEIRS)
            head.signal(process, signal.SIGKILL)
            process.wait(300)


def _until_armed(head: FleetNode, process: Process) -> None:
    """Wait until the rollback timer runs. What follows has to be in time: this looks often, and only from outside."""
    until(lambda: (head.root / ARMED.lstrip("/")).exists(), during=process, pause=0.01)


def test_peers_with_a_peer_that_is_not_set_up_warns(head: FleetNode) -> None:
    answer = json.loads(_tool(head, "verify", "--only", "network", "--json").stdout)
    found = {probe["name"]: probe for probe in answer["data"]["probes"]}
    # Only the speed differs: the lab's wires have 10000 Mb/s.
    assert found["link"]["found"].endswith(": 10000 Mb/s"), found["link"]
    assert found["peers"]["verdict"] == "warn"
    assert "set up the other node" in found["peers"]["hint"]


def test_link_carries_packets_of_9000_bytes(head: FleetNode, worker: FleetNode) -> None:
    set_up(worker, "worker", "--address", WORKER)
    assert is_set_up(worker, WORKER)
    for node, peer in ((head, WORKER), (worker, HEAD)):
        for to in (peer, peer.replace(".100.", ".101.")):
            node.run("ping", "-c", "3", "-W", "5", "-M", "do", "-s", "8972", to)
        answer = json.loads(_tool(node, "verify", "--only", "network", "--only", "round-trip", "--json").stdout)
        found = {probe["name"]: probe for probe in answer["data"]["probes"]}
        assert found["peers"]["verdict"] == "pass", found["peers"]
        both = rf"{peer} 0\.\d+ ms, {peer.replace('.100.', '.101.')} 0\.\d+ ms"
        assert re.match(both, found["round-trip"]["found"]), found["round-trip"]


def test_network_applied_twice_changes_nothing(head: FleetNode) -> None:
    unchanged = head.tree_digest("/etc", "/var/lib/sparkinstall", times=True)
    answer = json.loads(set_up(head, "head", "--json").stdout)
    assert answer["data"]["changed"] is False
    assert head.tree_digest("/etc", "/var/lib/sparkinstall", times=True) == unchanged


def test_peers_with_a_small_mtu_on_one_node_fails(pair: Fleet, head: FleetNode, worker: FleetNode) -> None:
    pair.set_mtu(1500, worker)
    answer = json.loads(_tool(head, "verify", "--only", "network", "--json", check=False).stdout)
    peers = {probe["name"]: probe for probe in answer["data"]["probes"]}["peers"]
    assert answer["exit_code"] == 3 and peers["verdict"] == "fail"
    assert f"{WORKER} answers small packets and not large ones" in peers["found"]
    at_worker = json.loads(_tool(worker, "verify", "--only", "network", "--json", check=False).stdout)
    assert "has MTU 1500" in {probe["name"]: probe for probe in at_worker["data"]["probes"]}["link"]["found"]
    set_up(worker, "worker", "--address", WORKER)
    assert json.loads(_tool(head, "verify", "--only", "network", "--json").stdout)["exit_code"] == 0


def test_link_with_a_pulled_cable_fails_and_keeps_its_address(pair: Fleet, head: FleetNode) -> None:
    pair.unplug(head)
    try:
        answer = json.loads(_tool(head, "verify", "--only", "network", "--json", check=False).stdout)
        assert is_set_up(head, HEAD)
    finally:
        pair.plug(head)
    assert "carrier" in json.dumps(answer)
    assert answer["exit_code"] == 3


def test_network_after_a_reboot_is_set_up(head: FleetNode, worker: FleetNode) -> None:
    head.reboot()
    until(lambda: is_set_up(head, HEAD))
    until(lambda: worker.run("ping", "-c1", "-W1", "-M", "do", "-s", "8972", HEAD, check=False).returncode == 0)


def test_uninstall_with_a_file_that_cannot_be_removed_keeps_its_link_and_can_be_repeated(head: FleetNode) -> None:
    # Nobody can remove a mount point.
    head.run("mount", "--bind", TARGET, TARGET)
    try:
        for _ in range(2):
            answer = _tool(head, "uninstall", "--yes", check=False)
            assert answer.returncode == 1
            said = " ".join((answer.stdout + answer.stderr).split())
            assert f"{TARGET} could not be undone" in said and "the QSFP link could not be undone" in said
            assert is_set_up(head, HEAD), "the file and the link agree"
    finally:
        head.run("umount", TARGET)


def test_uninstall_restores_files_and_interfaces(head: FleetNode, worker: FleetNode, before: dict[str, str]) -> None:
    answer = _tool(head, "uninstall", "--yes")
    assert "kept" not in answer.stdout
    assert is_as_before(head, before)
    assert _changed(head, before) <= FOLDERS
    _tool(worker, "uninstall", "--yes")
    assert [(_mtu(worker, name), _addresses(worker, name)) for name in PORT_0] == [(1500, []), (1500, [])]
    assert not _exists(worker, TARGET)
