"""`cluster` on two real nodes from a third machine, over real ssh: the installation, the network, and failures.

All tests use the same nodes, in order.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.fleet import Fleet, FleetNode
from tests.nodes.fleet import armed, install, sparkinstall, two_sparks, until_armed
from tests.nodes.fresh import COMMAND, ignoring
from tests.support import stored_models
from tests.support.waiting import until

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.network]

HEAD, WORKER = "192.168.100.10", "192.168.100.11"
HUB = "/home/spark/.cache/huggingface/hub"
NETPLAN = "/etc/netplan/40-cx7.yaml"
LINK = ("--only", "packages", "--only", "network", "--only", "firewall")


@pytest.fixture(scope="module")
def pair() -> Iterator[Fleet]:
    with two_sparks() as fleet:
        install(fleet)
        yield fleet


def _cluster(fleet: Fleet, *more: str) -> tuple[int, dict[str, Any], str]:
    output = sparkinstall(fleet, "cluster", *more, "--json", check=False)
    return output.returncode, json.loads(output.stdout), output.stderr


def _set_up(fleet: Fleet, *more: str) -> tuple[int, dict[str, Any], str]:
    return _cluster(fleet, "spark-1", "spark-2", *LINK, *ignoring(), "--yes", *more)


def _largest_ping(node: FleetNode, address: str) -> bool:
    return node.run("ping", "-c", "3", "-W", "5", "-M", "do", "-s", "8972", address, check=False).returncode == 0


def test_cluster_plan_installs_only_sparkinstall(pair: Fleet) -> None:
    before = [node.tree_digest("/etc") for node in pair.nodes]
    code, output, log = _cluster(pair, "plan", "spark-1", "spark-2")
    assert code == 0, output["errors"]
    assert "installing sparkinstall on the node" in log
    assert [node["tool_brought"] for node in output["data"]["nodes"]] == [True, True]
    network = [step for step in output["data"]["nodes"][1]["steps"] if step["step"] == "network"]
    assert network[0]["outcome"] == "drift"
    # The installation of sparkinstall may add python3-venv; /etc stays the same.
    assert [node.tree_digest("/etc") for node in pair.nodes] == before


def test_cluster_with_a_user_without_sudo_names_sudo(pair: Fleet) -> None:
    code, output, _ = _cluster(pair, "spark-1", "plain@spark-2", *LINK, *ignoring(), "--stack", "0.18.1", "--yes")
    assert code == 5
    assert [node["host"] for node in output["data"]["nodes"] if node["phases"][-1]["outcome"] == "failed"] == [
        "plain@spark-2"
    ]
    assert any("sudo" in error["message"] + error["cause"] for error in output["errors"]), output["errors"]
    assert not _largest_ping(pair.nodes[0], WORKER)


def test_cluster_applies_and_confirms_the_network(pair: Fleet) -> None:
    code, output, log = _set_up(pair)
    assert code == 0, (output["errors"], log)
    head, worker = pair.nodes
    assert _largest_ping(head, WORKER)
    assert _largest_ping(worker, HEAD)
    assert not armed(head)
    assert not armed(worker)
    assert "spark-2 │ confirm: confirmed" in log


def test_cluster_repeated_changes_nothing_in_two_ssh_trips(pair: Fleet) -> None:
    before = [node.tree_digest("/etc", times=True) for node in pair.nodes]
    code, output, _ = _set_up(pair)
    assert code == 0, output["errors"]
    assert [node["ssh_trips"] for node in output["data"]["nodes"]] == [2, 2]
    assert {phase["outcome"] for node in output["data"]["nodes"] for phase in node["phases"]} == {"unchanged"}
    assert [node.tree_digest("/etc", times=True) for node in pair.nodes] == before


def test_cluster_status_and_verify_cover_all_nodes(pair: Fleet) -> None:
    code, output, _ = _cluster(pair, "status", "spark-1", "spark-2")
    assert code == 0
    assert all(node["phases"][-1]["data"]["installed"] for node in output["data"]["nodes"])
    assert _cluster(pair, "verify", "spark-1", "spark-2", *LINK)[0] == 0


def test_models_go_from_the_head_to_its_worker_over_the_link(pair: Fleet, tmp_path: Path) -> None:
    head, worker = pair.nodes
    head.run("mkdir", "-p", "-m", "700", "/home/spark/.ssh", user="spark")
    head.write(
        "/home/spark/.ssh/id_ed25519", pair.terminal.read("/home/spark/.ssh/id_ed25519"), mode="0600", user="spark"
    )
    head.write("/home/spark/.ssh/known_hosts", f"{WORKER} {worker.host_key}\n", user="spark")
    stored_models.store(tmp_path / "model", {**stored_models.FILES, "large.safetensors": os.urandom(64 << 20)})
    for name in ("", "/huggingface", "/huggingface/hub"):
        head.run("mkdir", "-p", f"/home/spark/.cache{name}", user="spark")
    head.push(tmp_path / "model", f"{HUB}/{stored_models.FOLDER}", owner="spark")
    before = _sent(head)
    reply = json.loads(head.run(COMMAND, "models", "sync", "--json", user="spark").stdout)
    (there,) = reply["data"]["nodes"]
    assert (there["host"], there["outcome"]) == (WORKER, "changed")
    assert there["bytes"] > 64 << 20 and _sent(head) - before > there["bytes"]
    assert _links(worker) == _links(head)
    assert json.loads(worker.run(COMMAND, "models", "verify", "--json", user="spark").stdout)["data"]["damaged"] == []
    # From the terminal, where no model is, both are asked.
    listed = json.loads(sparkinstall(pair, "models", "list", "spark-1", "spark-2", "--json").stdout)["data"]
    assert listed["nodes"]["spark-1"] == listed["nodes"]["spark-2"] == reply["data"]["models"]


def _links(node: FleetNode) -> list[str]:
    """The files of the model's snapshots, and what they lead to."""
    found = node.run(
        "find", f"{HUB}/{stored_models.FOLDER}/snapshots", "-type", "l", "-printf", "%P %l\n", user="spark"
    )
    return sorted(found.stdout.splitlines())


def _sent(node: FleetNode) -> int:
    """The bytes that left a node over the link."""
    link = json.loads(node.run("ip", "-j", "-4", "address", "show", "to", HEAD).stdout)[0]["ifname"]
    return int(node.read(f"/sys/class/net/{link}/statistics/tx_bytes"))


def test_cluster_killed_in_the_network_phase_rolls_back(pair: Fleet) -> None:
    """The terminal's processes and ssh sessions are killed; the node rolls back, and the next run continues."""
    changed = ("--set", "network.rollback_seconds=30", "--set", "network.mtu=8000")
    words = ("cluster", "spark-1", "spark-2", *LINK, *ignoring(), "--yes", "--json", *changed)
    head = pair.nodes[0]
    with pair.start_on_terminal(COMMAND, *words, cwd="/home/spark") as run:
        until_armed(head, run)
        pair.terminal.run("pkill", "-9", "-u", "spark", check=False)
        run.wait()
    until(lambda: not armed(head) and not head.run("pgrep", "-f", "attend", check=False).stdout)
    assert "mtu: 9000" in head.read(NETPLAN)
    code, output, log = _set_up(pair, *changed)
    assert code == 0, (output["errors"], log)
    assert "mtu: 8000" in head.read(NETPLAN)
    assert _set_up(pair, "--set", "network.mtu=9000")[0] == 0


def test_cluster_with_a_node_that_dies_names_it(pair: Fleet) -> None:
    head, worker = pair.nodes
    changed = ("--set", "network.rollback_seconds=30", "--set", "network.mtu=8000")
    words = ("cluster", "spark-1", "spark-2", *LINK, *ignoring(), "--yes", "--json", *changed)
    with pair.start_on_terminal(COMMAND, *words, cwd="/home/spark") as run:
        until_armed(head, run)
        worker.kill()
        out, _ = run.communicate(timeout=900)
    output = json.loads(out)
    assert output["exit_code"] == 5
    assert any("spark-2" in error["message"] for error in output["errors"])
    worker.boot()
    until(lambda: not armed(head))
    code, output, log = _set_up(pair, "--set", "network.mtu=9000")
    assert code == 0, (output["errors"], log)


def test_cluster_with_a_changed_host_key_names_the_command(pair: Fleet) -> None:
    pair.change_host_key(pair.nodes[1])
    code, output, _ = _cluster(pair, "status", "spark-1", "spark-2")
    assert code == 5
    (error,) = output["errors"]
    assert error["code"] == "unreachable"
    assert "host key of" in error["message"]
    assert "known_hosts:" in error["cause"]
    assert "ssh-keygen -R" in error["hint"]
    pair.terminal.know(pair.nodes)


def test_cluster_uninstall_removes_everything(pair: Fleet) -> None:
    code, output, _ = _cluster(pair, "uninstall", "spark-1", "spark-2", "--yes")
    assert code == 0, output["errors"]
    for node in pair.nodes:
        assert node.run("ls", NETPLAN, check=False).returncode != 0
    code, output, _ = _cluster(pair, "status", "spark-1", "spark-2")
    assert not any(node["phases"][-1]["data"].get("installed") for node in output["data"]["nodes"])
