"""Bandwidth and drift between two nodes, really measured from one terminal: iperf3 through the firewall.

The wires are this machine's memory: how fast they are says nothing, so a slow half is made with a token bucket.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab.cabling import PORT_0
from tests.lab.commands import run
from tests.lab.fleet import Fleet, FleetNode
from tests.nodes.fleet import install, sparkinstall, two_sparks
from tests.nodes.fresh import COMMAND, ignoring

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.network]

NAMES = ("spark-1", "spark-2")
FIRST, SECOND = PORT_0
LINK = ("--only", "network", "--only", "firewall")
MEASURE = ("cluster", "verify", "--level", "link", "--measure", *LINK, *NAMES)
COMPARE = ("cluster", "verify", "--level", "cluster", *LINK, *NAMES)
SITE = "/opt/sparkinstall/venv/lib/python3.12/site-packages"
RECORD = f"{SITE}/vllm-0.18.1.dist-info/RECORD"


@pytest.fixture(scope="module")
def pair() -> Iterator[Fleet]:
    """Two nodes with their network and firewall, and nothing else."""
    with two_sparks() as fleet:
        install(fleet)
        sparkinstall(fleet, "cluster", *NAMES, *LINK, *ignoring(), "--yes")
        yield fleet


def _asked(fleet: Fleet, *words: str) -> dict[str, Any]:
    answer = sparkinstall(fleet, *words, "--json", check=False)
    said: dict[str, Any] = json.loads(answer.stdout)
    assert said["data"], (said["errors"], answer.stderr)
    return said


def _bandwidth(said: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What was found by kind and sender."""
    return {(each["name"], each["from"]): each for each in said["data"]["bandwidth"]}


def _servers(pair: Fleet) -> list[str]:
    return [node.run("pgrep", "-a", "iperf3", check=False).stdout for node in pair.nodes]


@contextmanager
def _slow(*wires: tuple[FleetNode, str]) -> Iterator[None]:
    """What these nodes send on these interfaces goes at 200 Mb/s."""
    bucket = ("root", "tbf", "rate", "200mbit", "burst", "256kb", "latency", "50ms")
    for node, interface in wires:
        run("tc", "-n", node.plugs.netns, "qdisc", "add", "dev", interface, *bucket)
    try:
        yield
    finally:
        for node, interface in wires:
            run("tc", "-n", node.plugs.netns, "qdisc", "del", "dev", interface, "root")


def _until(so: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < until, f"not so after {seconds:g} s"
        time.sleep(0.1)


def test_both_halves_are_measured_both_ways_through_the_firewall(pair: Fleet) -> None:
    for node in pair.nodes:
        assert "29600-29699" in node.run("nft", "list", "table", "inet", "sparkinstall").stdout
    found = _bandwidth(_asked(pair, *MEASURE))
    for host in NAMES:
        tcp = found["tcp-bandwidth", host]
        assert tcp["measured"]["halves"].keys() == set(PORT_0), tcp
        assert min(tcp["measured"]["halves"].values()) > 0.3, tcp
    assert found["rdma-bandwidth", NAMES[0]]["found"] == f"spark-1: {FIRST} has no RDMA device"
    assert found["nccl-bandwidth", NAMES[0]]["verdict"] == "skip"
    assert "no GPU" in found["nccl-bandwidth", NAMES[0]]["found"]
    assert _servers(pair) == ["", ""]


def test_a_slow_half_and_a_slow_card_are_told_apart(pair: Fleet) -> None:
    first, second = pair.nodes
    with _slow((first, SECOND), (second, FIRST), (second, SECOND)):
        said = _asked(pair, *MEASURE)
    found = _bandwidth(said)
    one_half, degraded = (found["tcp-bandwidth", host] for host in NAMES)
    assert one_half["verdict"] == "fail"
    assert one_half["found"].startswith("one half: "), one_half
    assert f"{SECOND} reaches a fraction" in one_half["found"]
    assert degraded["found"].startswith("a degraded card: "), degraded
    assert 0.2 < sum(degraded["measured"]["halves"].values()) < 0.5
    assert said["exit_code"] == 5


def test_a_terminal_that_is_killed_leaves_nobody_listening(pair: Fleet) -> None:
    with pair.start_on_terminal(COMMAND, *MEASURE, cwd="/home/spark") as process:
        _until(lambda: any(" -s " in each for each in _servers(pair)), 60)
        pair.terminal.run("pkill", "-9", "-u", "spark", check=False)
        process.wait(60)
    _until(lambda: _servers(pair) == ["", ""], 60)


def test_a_program_that_is_missing_is_named_with_its_package(pair: Fleet) -> None:
    pair.nodes[1].run("mv", "/usr/bin/iperf3", "/usr/bin/iperf3-away")
    try:
        found = _bandwidth(_asked(pair, *MEASURE))
    finally:
        pair.nodes[1].run("mv", "/usr/bin/iperf3-away", "/usr/bin/iperf3")
    assert found["tcp-bandwidth", NAMES[0]]["verdict"] == "skip"
    wanted = "spark-2: iperf3 is not installed: `sudo apt-get install iperf3`"
    assert found["tcp-bandwidth", NAMES[0]]["found"] == wanted


def test_only_what_differs_is_told(pair: Fleet) -> None:
    said = _asked(pair, *COMPARE)
    assert said["data"]["differences"] == [], said["data"]["differences"]
    pair.set_mtu(1500, pair.nodes[1], interfaces=(SECOND,))
    try:
        (row,) = _asked(pair, *COMPARE)["data"]["differences"]
    finally:
        pair.set_mtu(9000, pair.nodes[1], interfaces=(SECOND,))
    assert (row["name"], row["weight"]) == ("mtu", "fail")
    assert row["values"] == {"spark-1": "9000 + 9000", "spark-2": "9000 + 1500"}


def test_cluster_verify_with_another_wheel_of_the_same_version_fails(pair: Fleet) -> None:
    for node, digest in zip(pair.nodes, ("aaaa", "bbbb"), strict=True):
        node.run("mkdir", "-p", RECORD.rpartition("/")[0])
        node.write(RECORD, f"vllm/_C.abi3.so,sha256={digest},386000000\n")
    try:
        (row,) = _asked(pair, *COMPARE)["data"]["differences"]
    finally:
        for node in pair.nodes:
            node.run("rm", "-r", "/opt/sparkinstall/venv")
    assert (row["name"], row["weight"]) == ("vllm-files", "fail")
