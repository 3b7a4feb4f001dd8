"""vLLM, built for the CPU, as a unit of systemd on two nodes with a cable.

All tests use the same nodes, in order.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkinstall.cluster import bootstrap
from tests.lab.cabling import PORT_0
from tests.nodes.fresh import REPOSITORY
from tests.nodes.serving import (
    AGREED,
    CHECKOUT,
    LIFE,
    LOAD_SECONDS,
    MODEL,
    PACKAGES,
    PREFIX,
    UNIT,
    UNWATCHED,
    ServingNodes,
    ask,
    completion,
    findings,
    journal,
    life_says,
    life_state,
    main_pid,
    run_step,
    serving_finding,
    serving_nodes,
    set_up,
    set_up_life,
    state,
    uninstall,
    until_it_completes,
    until_it_serves,
    write_env,
)
from tests.support.ray_on_a_node import ADDRESSES
from tests.support.waiting import until

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.layer5, pytest.mark.network]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingNodes]:
    with serving_nodes(tmp_path_factory.mktemp("serving"), "head", "worker") as served:
        yield served


COMMAND = (sys.executable, "-m", "sparkinstall")
# Instead of ssh, whose way to a node tests/nodes/test_pair.py has: the command is run there as the user `spark`.
SSH = """\
#!/bin/sh
while [ "$1" != -- ]; do case $1 in -O) exit 0 ;; esac; shift; done
case $2 in
{cases}esac
"""
TOOL_ON_A_NODE = "/home/spark/.local/share/sparkinstall/tool"
TOOL = f"""\
#!/bin/sh
export PYTHONPATH={CHECKOUT}:{PACKAGES} PYTHONDONTWRITEBYTECODE=1
exec {PREFIX}/venv/bin/python -m sparkinstall "$@"
"""


def _terminal(pair: ServingNodes, folder: Path) -> dict[str, str]:
    """The variables of a terminal whose `ssh` reaches both nodes, with the checkout as their tool."""
    cases = ""
    for role, node in pair.nodes.items():
        node.run("mkdir", "-p", f"{TOOL_ON_A_NODE}/bin", user="spark")
        node.write(f"{TOOL_ON_A_NODE}/made-from", f"{bootstrap.digest()} /usr/bin/python3\n", user="spark")
        node.write(f"{TOOL_ON_A_NODE}/bin/sparkinstall", TOOL, mode="0755", user="spark")
        cases += f'{role}) exec {shlex.join(node.command("sh", "-c", user="spark"))} "$3" ;;\n'
    (folder / "ssh").write_text(SSH.format(cases=cases))
    (folder / "ssh").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HOME": str(folder), "PYTHONPATH": str(REPOSITORY)}


def _cluster(pair: ServingNodes, folder: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Run `sparkinstall cluster` on this machine."""
    addresses = (f"cluster.head={ADDRESSES['head']}", f"cluster.workers=[{ADDRESSES['worker']}]")
    settings = (*addresses, "network.manage=false", "network.transport=socket")
    given = [word for each in settings for word in ("--set", each)]
    argv = [*COMMAND, "cluster", *words, *given, *AGREED, *UNWATCHED, "--json"]
    env = _terminal(pair, folder)
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=2 * LOAD_SECONDS, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_cluster_serve_ends_when_the_pair_has_answered(pair: ServingNodes, tmp_path: Path) -> None:
    for role, node in pair.nodes.items():
        write_env(node, role)
    code, reply, log = _cluster(pair, tmp_path, "head", "worker", "--serve", MODEL, "--only", "serving")
    assert code == 0, (reply["errors"], log[-3000:])
    serving = reply["data"]["serving"]
    assert (serving["changed"], serving["serving"]["served"]) == (True, MODEL)
    assert "--nnodes 2 --node-rank 0" in " ".join(serving["serving"]["server"]["argv"])
    assert [state(node) for node in pair.nodes.values()] == [["active", "enabled"]] * 2
    assert all(f"vllm serve {MODEL} " in node.read(f"/etc/systemd/system/{UNIT}") for node in pair.nodes.values())
    assert completion(pair.head)
    again, reply, _ = _cluster(pair, tmp_path, "head", "worker", "--serve", MODEL, "--only", "serving")
    assert (again, reply["data"]["serving"]["changed"]) == (0, False), reply["errors"]


def test_watch_sees_both_nodes_while_bench_measures_the_pair(pair: ServingNodes, tmp_path: Path) -> None:
    env, record = _terminal(pair, tmp_path), tmp_path / "watch.jsonl"
    watch = [*COMMAND, "watch", *pair.nodes, "--interval", "1", "--record", str(record)]
    with (
        (tmp_path / "watch.txt").open("w") as shown,
        subprocess.Popen(watch, env=env, stdout=shown, stderr=shown) as run,
    ):
        until(lambda: {"head", "worker"} <= set(_nodes_of(record)), during=run)
        words = ("bench", "58/2", "--concurrency", "2", "--requests", "4", "--output", "pair.json", "--json")
        measured = pair.head.run(
            "sh",
            "-c",
            f"cd && {TOOL_ON_A_NODE}/bin/sparkinstall {shlex.join(words)}",
            user="spark",
            timeout=LOAD_SECONDS,
        )
        # Of the samples of the head, the one that is taken now may still lack the last request.
        enough = _nodes_of(record).count("head") + 2
        until(lambda: _nodes_of(record).count("head") >= enough, during=run)
        run.send_signal(signal.SIGINT)
    found = json.loads(measured.stdout)["data"]["record"]
    results = [*found["scenarios"], *found["levels"]]
    assert [(each["completed"], each["failed"]) for each in results] == [(3, 0), (4, 0)], found
    replayed = subprocess.run(
        [*COMMAND, "watch", "--replay", str(record), "--once", "--window", "3600", "--json"],
        env=env, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False,
    )  # fmt: skip
    seen = {each["node"]: each for each in json.loads(replayed.stdout)["data"]["nodes"]}
    head, worker = seen["head"], seen["worker"]
    assert (head["models"], worker["models"]) == ([MODEL], [])
    # Three requests warm up.
    assert head["ttft"]["count"] == 3 + sum(each["completed"] for each in results), head
    assert worker["trouble"] is None and worker["machine"]["memory"] > 0, worker


def _nodes_of(record: Path) -> list[str]:
    """The node of each sample of a record, which may be missing yet; its last line may be incomplete."""
    content = record.read_text() if record.exists() else ""
    return re.findall(r'^\{"node":"([^"]+)"', content, re.MULTILINE)


@pytest.fixture(scope="module")
def alone(pair: ServingNodes) -> str:
    """The completion of a single node."""
    set_up(pair.head, "single")
    until_it_serves(pair.head, "single")
    return completion(pair.head)


def test_two_nodes_give_the_completion_of_one(pair: ServingNodes, alone: str) -> None:
    for role, node in pair.nodes.items():
        set_up(node, role)
    until_it_serves(pair.head, "head")
    assert [state(node) for node in pair.nodes.values()] == [["active", "enabled"]] * 2
    assert completion(pair.head) == alone
    assert findings(pair.worker, "worker") == {}, "a worker has no API"
    assert "TP rank 1" in journal(pair.worker)


def test_serving_with_the_link_down_fails_despite_health(pair: ServingNodes) -> None:
    pair.wires.pull(pair.plugs["worker"], PORT_0[:1])
    try:
        found = serving_finding(pair.head, "head")
        ask(pair.head, "/health")
    finally:
        pair.wires.insert(pair.plugs["worker"], PORT_0[:1])
    assert found["verdict"] == "fail"
    assert found["found"] == "no completion within 60 s, although /health returns 200"
    assert "`sparkinstall verify --only peers`" in found["hint"]


def test_serving_after_the_cable_is_inserted_passes_without_a_restart(pair: ServingNodes) -> None:
    before = main_pid(pair.head)
    until = time.monotonic() + LOAD_SECONDS
    while (found := serving_finding(pair.head, "head"))["verdict"] != "pass":
        assert time.monotonic() < until, (found, journal(pair.head))
    assert main_pid(pair.head) == before


def test_life_with_a_full_disk_restarts_both_ranks_when_the_workers_is_stopped(pair: ServingNodes) -> None:
    set_up_life(pair.head, "head", "serving.life.restarts_per_hour=20")
    pair.head.run("systemctl", "stop", LIFE)
    before, since = [main_pid(node) for node in pair.nodes.values()], time.time()
    pair.head.run("mount", "-t", "tmpfs", "-o", "size=16k,mode=755", "full", "/var/lib/vllm-life")
    try:
        pair.head.run("sh", "-c", "cat /dev/zero > /var/lib/vllm-life/zeros || true")
        pair.head.run("systemctl", "start", LIFE)
        life_says(pair.head, "watching vllm.service", since)
        pair.worker.run("pkill", "--full", "VLLM::Worker", "--signal", "STOP")
        life_says(
            pair.head, "the evidence could not be saved: No space left on device (/var/lib/vllm-life/evidence)", since
        )
        life_says(pair.head, "vllm.service was restarted; ", since)
        until_it_serves(pair.head, "head")
        for node, pid in zip(pair.nodes.values(), before, strict=True):
            assert main_pid(node) != pid
        of_the_worker = journal(pair.worker, 2000)
        assert "sparkinstall: vLLM on the head 192.0.2.1 has ended" in of_the_worker
        assert re.search(r"sparkinstall: until then VLLM::Worker\S* \(pid \d+\) was T \(stopped\)", of_the_worker)
        assert run_step(pair.worker, "plan", "worker")["outcome"] == "unchanged"
        wedge = life_state(pair.head)["wedges"][-1]
        assert wedge["trouble"] == "the evidence could not be saved: No space left on device"
    finally:
        pair.head.run("umount", "--lazy", "/var/lib/vllm-life")
        pair.head.run("systemctl", "restart", LIFE)


def test_life_restarts_a_pair_whose_link_passes_one_way_only(pair: ServingNodes) -> None:
    set_up_life(pair.head, "head", "serving.life.restarts_per_hour=20")
    before = main_pid(pair.head)
    rule = f"type filter hook input priority 0\niifname {PORT_0[0]} drop"
    pair.worker.run("/usr/sbin/nft", "-f", "-", input=f"table inet oneway {{\nchain in {{\n{rule}\n}}\n}}\n")
    try:
        count = len(life_state(pair.head)["wedges"])
        deadline = time.monotonic() + LOAD_SECONDS
        while not [each for each in life_state(pair.head)["wedges"][count:] if each["action"]]:
            assert time.monotonic() < deadline, life_state(pair.head)
            time.sleep(1)
    finally:
        pair.worker.run("/usr/sbin/nft", "delete", "table", "inet", "oneway")
    wedge = life_state(pair.head)["wedges"][-1]
    assert wedge["action"] == "restarted"
    sockets = pair.head.read(f"{wedge['evidence']}/sockets.txt")
    assert re.search(r"192\.0\.2\.2\]?:\d+ .*VLLM::Worker", sockets), sockets
    until_it_completes(pair.head)
    assert main_pid(pair.head) != before


def test_pair_whose_worker_is_killed_answers_again(pair: ServingNodes) -> None:
    pair.worker.run("pkill", "--full", "VLLM::Worker", "--signal", "KILL")
    until_it_completes(pair.head)


def test_uninstall_removes_vllm(pair: ServingNodes) -> None:
    for role, node in pair.nodes.items():
        uninstall(node, role)
