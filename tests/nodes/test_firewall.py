"""Two nodes on a cable and a stranger on their LAN: who reaches which ports before, with and after the firewall.

All tests use the same nodes, in order.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkinstall.resources import rollback
from tests.lab.cabling import LAN, PORT_0
from tests.lab.fleet import Fleet, FleetNode
from tests.lab.node import FreshNode
from tests.nodes.fresh import CHECKOUT, COMMAND, REPOSITORY, ignoring, install_tool, sparkinstall
from tests.support import services
from tests.support.waiting import until

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.network]

HEAD, WORKER = "192.168.100.10", "192.168.100.11"
LAN_6 = "fd00:5e::1"
# An address of the link that the terminal uses.
SPOOFED = "192.168.100.99"
FRIEND, STRANGER = "198.51.100.200", "198.51.100.201"
RULES = "/opt/sparkinstall/firewall.nft"
UNIT = "sparkinstall-firewall"
TABLE = ("/usr/sbin/nft", "list", "table", "inet", "sparkinstall")
# Checks of what this step does not need and its nodes do not have.
TOOLS = ("--ignore", "python", "--ignore", "cuda")
# What is armed must be seen before the timer expires.
ROLLBACK_SECONDS = 45
CLOSED = (*services.RAY, services.API, services.MEETING)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2) as fresh:
        fresh.terminal.push(Path(services.__file__), "/srv/services.py")
        for address in (f"{FRIEND}/24", f"{STRANGER}/24"):
            fresh.terminal.run("ip", "address", "add", address, "dev", LAN)
        fresh.terminal.run("ip", "address", "add", "fd00:5e::9/64", "dev", LAN, "nodad")
        fresh.terminal.run("ip", "address", "add", f"{SPOOFED}/32", "dev", "lo")
        fresh.terminal.run("ip", "route", "add", "192.168.100.0/24", "via", fresh.nodes[0].address)
        for node in fresh.nodes:
            leave_out = [".git", ".venv", ".mypy_cache", ".ruff_cache", ".hypothesis", "__pycache__", "tests"]
            node.push(REPOSITORY, CHECKOUT, owner="spark", exclude=leave_out)
            install_tool(node)
            node.push(Path(services.__file__), "/srv/services.py")
            _prepare(node, HEAD if node is fresh.nodes[0] else WORKER)
        yield fresh


def _prepare(node: FleetNode, address: str) -> None:
    """Set the link's addresses, as another step does, and start services at all ports of the tests."""
    for interface, subnet in zip(PORT_0, ("192.168.100", "192.168.101"), strict=True):
        node.run("ip", "address", "add", f"{subnet}.{address.rpartition('.')[2]}/24", "dev", interface)
    if address == HEAD:
        node.run("ip", "address", "add", f"{LAN_6}/64", "dev", LAN, "nodad")
    node.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", f"net.ipv4.conf.{LAN}.rp_filter=0", check=False)
    node.run("rm", "-f", "/run/heard")
    served = ("python3", "/srv/services.py", "serve", address)
    node.run("systemd-run", "-q", "--unit=served", *served)
    until(lambda: _reachable(node, f"{address}:{services.EPHEMERAL}"))


def _reachable(client: FreshNode, *places: str) -> set[str]:
    return set(json.loads(client.run("python3", "/srv/services.py", "ask", *places).stdout))


def _command(*more: str, role: str = "head") -> list[str]:
    return ["multi-node", "--role", role, "--only", "firewall", "--yes", *ignoring(), *TOOLS, *more]


def _set_up(node: FleetNode, *more: str, role: str = "head") -> dict[str, Any]:
    """Run `multi-node` and return its step."""
    output = json.loads(sparkinstall(node, *_command("--json", *more, role=role)).stdout)
    (step,) = output["data"]["steps"]
    return dict(step)


def _table(node: FleetNode) -> str:
    return node.run(*TABLE, check=False).stdout


def _places(address: str, *ports: int) -> set[str]:
    return {f"{address}:{port}" for port in ports}


def _senders_heard(fleet: Fleet) -> set[str]:
    """The senders that the head receives packets from, of a spoofed one on the link and then a friend on the LAN."""
    head, stranger = fleet.nodes[0], fleet.terminal
    send = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        "s.bind(({!r}, 0)); s.sendto(b'x', ({!r}, {}))"
    )
    head.run("sh", "-c", ": > /run/heard")
    for source in (SPOOFED, FRIEND):
        stranger.run("python3", "-c", send.format(source, head.address, services.UDP))
    # One after the other reads them: what was admitted before the friend's is there.
    until(lambda: FRIEND in head.read("/run/heard").split())
    return set(head.read("/run/heard").split())


def test_ports_without_the_firewall_are_open(fleet: Fleet) -> None:
    head = fleet.nodes[0]
    everything = _places(head.address, *CLOSED, services.OWN) | _places(HEAD, services.EPHEMERAL, *CLOSED)
    everything |= _places(f"[{LAN_6}]", *CLOSED)
    assert _reachable(fleet.terminal, *everything) == everything
    assert _senders_heard(fleet) == {SPOOFED, FRIEND}


def test_plan_shows_the_rules(fleet: Fleet) -> None:
    settings = ("--only", "firewall", "--set", "cluster.role=head")
    shown = sparkinstall(fleet.nodes[0], "plan", *settings).stdout
    assert "ip daddr { 192.168.100.0/24, 192.168.101.0/24 } drop" in shown
    assert "+[Service]" in shown or "[Service]" in shown
    assert _table(fleet.nodes[0]) == ""


def test_firewall_applied_is_the_only_table(fleet: Fleet) -> None:
    for node, role in zip(fleet.nodes, ("head", "worker"), strict=True):
        assert _set_up(node, role=role)["outcome"] == "changed"
        assert "policy accept" in _table(node)
        assert node.run("systemctl", "is-enabled", UNIT).stdout.strip() == "enabled"
        assert node.run("sh", "-c", "ls -d /var/lib/sparkinstall-rollback", check=False).stdout == ""
        assert node.run("/usr/sbin/nft", "list", "tables").stdout.split() == ["table", "inet", "sparkinstall"]


def _assert_who_reaches_what(fleet: Fleet) -> None:
    head, worker = fleet.nodes
    for client in (fleet.terminal, worker):
        assert _reachable(client, f"{head.address}:22", f"{HEAD}:22") == _places(head.address, 22) | _places(HEAD, 22)
    peer = _places(HEAD, *CLOSED, services.EPHEMERAL, services.OWN)
    assert _reachable(worker, *peer) == peer
    assert _reachable(head, *peer) == peer
    closed = _places(head.address, *CLOSED) | _places(HEAD, *CLOSED, services.EPHEMERAL, services.OWN)
    closed |= _places(f"[{LAN_6}]", *CLOSED)
    for client in (fleet.terminal, worker):
        on_the_lan = {place for place in closed if client is not worker or not place.startswith(HEAD)}
        assert _reachable(client, *on_the_lan) == set()
    own = _places(head.address, services.OWN) | _places(f"[{LAN_6}]", services.OWN)
    assert _reachable(fleet.terminal, *own) == own
    fleet.terminal.run("ping", "-c1", "-W2", head.address)
    fleet.terminal.run("ping", "-c1", "-W2", LAN_6)


def test_firewall_admits_the_peer_and_blocks_strangers(fleet: Fleet) -> None:
    _assert_who_reaches_what(fleet)
    assert _senders_heard(fleet) == {FRIEND}


def test_ssh_over_the_lan_works_with_the_firewall(fleet: Fleet) -> None:
    assert fleet.ssh(fleet.nodes[0], "hostname").stdout.strip() == "spark-1"


def test_firewall_applied_twice_changes_nothing(fleet: Fleet) -> None:
    head = fleet.nodes[0]
    before = head.tree_digest("/opt/sparkinstall", "/etc", times=True)
    assert _set_up(head)["outcome"] == "unchanged"
    assert head.tree_digest("/opt/sparkinstall", "/etc", times=True) == before


def test_firewall_with_a_foreign_rule_drifts_and_is_restored(fleet: Fleet) -> None:
    head = fleet.nodes[0]
    good = _table(head)
    head.run("/usr/sbin/nft", "insert rule inet sparkinstall input tcp dport 6379 accept")
    assert f"{head.address}:6379" in _reachable(fleet.terminal, f"{head.address}:6379")
    shown = sparkinstall(head, "plan", "--only", "firewall").stdout
    assert "they were changed" in shown
    assert "tcp dport 6379 accept" in shown
    assert _set_up(head)["outcome"] == "changed"
    assert _table(head) == good


def test_firewall_after_a_reboot_is_active(fleet: Fleet) -> None:
    head = fleet.nodes[0]
    head.reboot()
    _prepare(head, HEAD)
    assert head.run("systemctl", "is-active", UNIT, "ssh").stdout.split() == ["active", "active"]
    _assert_who_reaches_what(fleet)
    assert _set_up(head)["outcome"] == "unchanged"


def test_firewall_survives_the_nftables_service(fleet: Fleet) -> None:
    """Debian's /etc/nftables.conf flushes the whole ruleset; the tables that it adds are those of another program."""
    head = fleet.nodes[0]
    good = _table(head)
    head.run("systemctl", "start", "nftables")
    assert _table(head) == ""
    assert _set_up(head, "--set", "firewall.mode=on")["outcome"] == "changed"
    for verb in ("restart", "reload"):
        head.run("systemctl", verb, "nftables")
        until(lambda: _table(head) == good)
    head.run("systemctl", "stop", "nftables")
    assert _set_up(head)["outcome"] == "changed"
    assert _table(head) == good


def test_firewall_unconfirmed_rolls_back(fleet: Fleet) -> None:
    head = fleet.nodes[0]
    good, file = _table(head), head.read(RULES)
    opened = (
        "--set",
        f"serving.allow={FRIEND}/32",
        "--set",
        f"network.rollback_seconds={ROLLBACK_SECONDS}",
        "--leave-armed",
    )
    assert _set_up(head, *opened)["outcome"] == "changed"
    assert FRIEND in _table(head)
    until(lambda: _table(head) == good)
    assert head.read(RULES) == file
    assert head.run("systemctl", "is-enabled", UNIT).stdout.strip() == "enabled"


def test_firewall_with_allow_opens_the_api_to_that_network_only(fleet: Fleet) -> None:
    head = fleet.nodes[0]
    assert _set_up(head, "--set", f"serving.allow={FRIEND}/32")["outcome"] == "changed"
    assert _reaches_from(fleet, FRIEND, services.API)
    assert not _reaches_from(fleet, STRANGER, services.API)
    assert not _reaches_from(fleet, FRIEND, services.RAY[0])
    until(lambda: FRIEND in _table(head))


def _reaches_from(fleet: Fleet, source: str, port: int) -> bool:
    connect = f"import socket; socket.create_connection(({fleet.nodes[0].address!r}, {port}), 1, ({source!r}, 0))"
    return fleet.terminal.run("python3", "-c", connect, check=False).returncode == 0


def test_firewall_keeps_the_ports_of_sshd_open(fleet: Fleet) -> None:
    """Even at one of Ray's ports."""
    head, settings, port = fleet.nodes[0], "/etc/ssh/sshd_config.d/port.conf", services.RAY[-1] - 1
    assert _reachable(fleet.terminal, f"{head.address}:{port}") == set()
    head.write(settings, f"Port 22\nPort {port}\n")
    head.run("systemctl", "restart", "ssh")
    assert _set_up(head)["outcome"] == "changed"
    both = _places(head.address, 22, port)
    assert _reachable(fleet.terminal, *both) == both
    head.run("rm", settings)
    head.run("systemctl", "restart", "ssh")


def test_uninstall_removes_the_firewall(fleet: Fleet) -> None:
    for node in fleet.nodes:
        sparkinstall(node, "uninstall", "--yes")
        assert node.run("/usr/sbin/nft", "list", "ruleset").stdout == ""
        assert node.run("sh", "-c", f"ls {RULES} /etc/systemd/system/{UNIT}*", check=False).stdout == ""
        assert node.run("systemctl", "is-enabled", UNIT, check=False).stdout.strip() in ("", "not-found")
        assert node.run("test", "-e", "/opt/sparkinstall", check=False).returncode == 1


def test_firewall_killed_before_the_confirmation_rolls_back(fleet: Fleet) -> None:
    head = fleet.nodes[0]
    command = (COMMAND, *_command("--set", f"network.rollback_seconds={ROLLBACK_SECONDS}"))
    # On the node itself, at once: what comes next is the confirmation.
    session = "$(pgrep --oldest -u spark --full 'sparkinstall multi-node')"
    kill = f"until {' '.join(TABLE)} > /dev/null 2>&1; do :; done; pkill -KILL --session {session} || true"
    for _ in range(5):
        with head.popen(*command, user="spark", cwd="/home/spark"):
            head.run("sh", "-c", kill)
        if head.run("test", "-d", f"{rollback.HOME}/firewall", check=False).returncode == 0:
            break
        # It was quicker, and has confirmed the table.
        sparkinstall(head, "uninstall", "--yes")
    assert head.run("ls", rollback.HOME).stdout.split() == ["firewall", "rollback.sh"]
    assert _table(head)
    until(lambda: not _table(head))
    until(lambda: head.run("test", "-e", RULES, check=False).returncode == 1)
    assert _reachable(fleet.terminal, f"{head.address}:6379") == _places(head.address, 6379)


def test_firewall_after_a_rollback_applies_and_uninstalls(fleet: Fleet) -> None:
    head = fleet.nodes[0]
    assert _set_up(head)["outcome"] == "changed"
    assert _reachable(fleet.terminal, f"{head.address}:6379") == set()
    sparkinstall(head, "uninstall", "--yes")
    assert _table(head) == ""


OTHERS = "add table inet mine; add chain inet mine in { type filter hook input priority 0; policy drop; }"
LETS_ALL_IN = "add rule inet mine in accept"


def test_firewall_beside_another_is_node_only_unless_on(fleet: Fleet) -> None:
    worker = fleet.nodes[1]
    worker.run("/usr/sbin/nft", f"{OTHERS}; {LETS_ALL_IN}")
    kept = _set_up(worker, role="worker")
    assert kept["outcome"] == "node_only"
    assert "the nftables chain inet mine in is active" in json.dumps(kept)
    assert "6379" in json.dumps(kept)
    assert _table(worker) == ""
    assert _set_up(worker, "--set", "firewall.mode=on", role="worker")["outcome"] == "changed"
    assert _reachable(fleet.terminal, f"{worker.address}:6379") == set()
    sparkinstall(worker, "uninstall", "--yes")
    assert "chain in" in worker.run("/usr/sbin/nft", "list", "ruleset").stdout
    assert _table(worker) == ""
