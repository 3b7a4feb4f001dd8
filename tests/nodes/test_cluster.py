"""`cluster` on two real nodes from a third machine, over real ssh: the tool, the network, and what can go wrong.

The nodes live through the whole file; the tests are their days, in order.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.fleet import Fleet, FleetNode
from tests.nodes.fleet import armed, install, sparkinstall, two_sparks
from tests.nodes.fresh import COMMAND, ignoring

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.network]

HEAD, WORKER = "192.168.100.10", "192.168.100.11"
NETPLAN = "/etc/netplan/40-cx7.yaml"
LINK = ("--only", "packages", "--only", "network", "--only", "firewall")


@pytest.fixture(scope="module")
def pair() -> Iterator[Fleet]:
    with two_sparks() as fleet:
        install(fleet)
        yield fleet


def _cluster(fleet: Fleet, *more: str) -> tuple[int, dict[str, Any], str]:
    said = sparkinstall(fleet, "cluster", *more, "--json", check=False)
    return said.returncode, json.loads(said.stdout), said.stderr


def _set_up(fleet: Fleet, *more: str) -> tuple[int, dict[str, Any], str]:
    return _cluster(fleet, "spark-1", "spark-2", *LINK, *ignoring(), "--yes", *more)


def _largest_ping(node: FleetNode, address: str) -> bool:
    return node.run("ping", "-c", "2", "-W", "2", "-M", "do", "-s", "8972", address, check=False).returncode == 0


def _until(true: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come so far in time"
        time.sleep(0.1)


def test_a_plan_brings_the_tool_and_touches_nothing_else(pair: Fleet) -> None:
    before = [node.tree_digest("/etc") for node in pair.nodes]
    code, said, log = _cluster(pair, "plan", "spark-1", "spark-2")
    assert code == 0, said["errors"]
    assert "installing sparkinstall on the node" in log
    assert [node["tool_brought"] for node in said["data"]["nodes"]] == [True, True]
    network = [step for step in said["data"]["nodes"][1]["steps"] if step["step"] == "network"]
    assert network[0]["outcome"] == "drift"
    # The tool's installation may bring python3-venv; /etc stays as it was.
    assert [node.tree_digest("/etc") for node in pair.nodes] == before


def test_a_user_without_sudo_is_told_what_to_allow(pair: Fleet) -> None:
    code, said, _ = _cluster(pair, "spark-1", "plain@spark-2", *LINK, *ignoring(), "--stack", "0.18.1", "--yes")
    assert code == 5
    assert [node["host"] for node in said["data"]["nodes"] if node["phases"][-1]["outcome"] == "failed"] == [
        "plain@spark-2"
    ]
    assert any("sudo" in error["message"] + error["cause"] for error in said["errors"]), said["errors"]
    assert not _largest_ping(pair.nodes[0], WORKER)


def test_the_network_comes_up_is_reached_anew_and_confirmed(pair: Fleet) -> None:
    code, said, log = _set_up(pair)
    assert code == 0, (said["errors"], log)
    head, worker = pair.nodes
    assert _largest_ping(head, WORKER)
    assert _largest_ping(worker, HEAD)
    assert not armed(head)
    assert not armed(worker)
    assert "spark-2 │ confirm: confirmed" in log


def test_a_second_run_changes_nothing_and_asks_little(pair: Fleet) -> None:
    before = [node.tree_digest("/etc", times=True) for node in pair.nodes]
    code, said, _ = _set_up(pair)
    assert code == 0, said["errors"]
    assert [node["ssh_trips"] for node in said["data"]["nodes"]] == [2, 2]
    assert {phase["outcome"] for node in said["data"]["nodes"] for phase in node["phases"]} == {"unchanged"}
    assert [node.tree_digest("/etc", times=True) for node in pair.nodes] == before


def test_status_and_verify_tell_of_every_node(pair: Fleet) -> None:
    code, said, _ = _cluster(pair, "status", "spark-1", "spark-2")
    assert code == 0
    assert all(node["phases"][0]["data"]["installed"] for node in said["data"]["nodes"])
    assert _cluster(pair, "verify", "spark-1", "spark-2", *LINK)[0] == 0


def test_a_run_that_is_killed_in_the_network_phase_locks_nobody_out(pair: Fleet) -> None:
    """The terminal's tool and its ssh sessions are gone; the node goes back by itself, and a re-run goes on."""
    changed = ("--set", "network.rollback_seconds=30", "--set", "network.mtu=8000")
    words = ("cluster", "spark-1", "spark-2", *LINK, *ignoring(), "--yes", "--json", *changed)
    head = pair.nodes[0]
    with pair.start_on_terminal(COMMAND, *words, cwd="/home/spark") as run:
        _until(lambda: armed(head))
        pair.terminal.run("pkill", "-9", "-u", "spark", check=False)
        run.wait()
    _until(lambda: not armed(head) and not head.run("pgrep", "-f", "attend", check=False).stdout, 180)
    assert "mtu: 9000" in head.read(NETPLAN)
    code, said, log = _set_up(pair, *changed)
    assert code == 0, (said["errors"], log)
    assert "mtu: 8000" in head.read(NETPLAN)
    assert _set_up(pair, "--set", "network.mtu=9000")[0] == 0


def test_a_node_that_dies_in_the_middle_is_named(pair: Fleet) -> None:
    head, worker = pair.nodes
    changed = ("--set", "network.rollback_seconds=30", "--set", "network.mtu=8000")
    words = ("cluster", "spark-1", "spark-2", *LINK, *ignoring(), "--yes", "--json", *changed)
    with pair.start_on_terminal(COMMAND, *words, cwd="/home/spark") as run:
        _until(lambda: armed(head))
        worker.kill()
        out, _ = run.communicate(timeout=200)
    said = json.loads(out)
    assert said["exit_code"] == 5
    assert any("spark-2" in error["message"] for error in said["errors"])
    worker.boot()
    _until(lambda: not armed(head), 120)
    code, said, log = _set_up(pair, "--set", "network.mtu=9000")
    assert code == 0, (said["errors"], log)


def test_a_host_key_that_changed_is_explained(pair: Fleet) -> None:
    pair.change_host_key(pair.nodes[1])
    code, said, _ = _cluster(pair, "status", "spark-1", "spark-2")
    assert code == 5
    (error,) = said["errors"]
    assert error["code"] == "unreachable"
    assert "host key of" in error["message"]
    assert "known_hosts:" in error["cause"]
    assert "ssh-keygen -R" in error["hint"]
    pair.terminal.know(pair.nodes)


def test_everything_is_taken_back(pair: Fleet) -> None:
    code, said, _ = _cluster(pair, "uninstall", "spark-1", "spark-2", "--yes")
    assert code == 0, said["errors"]
    for node in pair.nodes:
        assert node.run("ls", NETPLAN, check=False).returncode != 0
    code, said, _ = _cluster(pair, "status", "spark-1", "spark-2")
    assert not any(node["phases"][0]["data"].get("installed") for node in said["data"]["nodes"])
