"""Bandwidth and drift between two nodes, measured from one terminal with iperf3 through the firewall.

The wires are this machine's memory, whose speed has no meaning, so a token bucket slows a half.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab.cabling import PORT_0
from tests.lab.commands import run
from tests.lab.fleet import Fleet, FleetNode
from tests.nodes.fleet import install, sparkinstall, two_sparks
from tests.nodes.fresh import COMMAND, ignoring
from tests.support.waiting import until

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


def _envelope(fleet: Fleet, *words: str) -> dict[str, Any]:
    answer = sparkinstall(fleet, *words, "--json", check=False)
    output: dict[str, Any] = json.loads(answer.stdout)
    assert output["data"], (output["errors"], answer.stderr)
    return output


def _bandwidth(output: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The measurements by kind and sender."""
    return {(each["name"], each["from"]): each for each in output["data"]["bandwidth"]}


def _servers(pair: Fleet) -> list[str]:
    return [node.run("pgrep", "-a", "iperf3", check=False).stdout for node in pair.nodes]


@contextmanager
def _throttled(*wires: tuple[FleetNode, str]) -> Iterator[None]:
    """Limit what these nodes send on these interfaces to 60 Mb/s: less than a third of the slowest machine's memory."""
    bucket = ("root", "tbf", "rate", "60mbit", "burst", "128kb", "latency", "50ms")
    for node, interface in wires:
        run("tc", "-n", node.plugs.netns, "qdisc", "add", "dev", interface, *bucket)
    try:
        yield
    finally:
        for node, interface in wires:
            run("tc", "-n", node.plugs.netns, "qdisc", "del", "dev", interface, "root")


def test_measure_covers_both_halves_in_both_directions(pair: Fleet) -> None:
    for node in pair.nodes:
        assert "29600-29699" in node.run("nft", "list", "table", "inet", "sparkinstall").stdout
    found = _bandwidth(_envelope(pair, *MEASURE))
    for host in NAMES:
        tcp = found["tcp-bandwidth", host]
        assert tcp["measured"]["halves"].keys() == set(PORT_0), tcp
        assert min(tcp["measured"]["halves"].values()) > 0, tcp
    assert found["rdma-bandwidth", NAMES[0]]["found"] == f"spark-1: {FIRST} has no RDMA device"
    assert found["nccl-bandwidth", NAMES[0]]["verdict"] == "skip"
    assert "no GPU" in found["nccl-bandwidth", NAMES[0]]["found"]
    assert _servers(pair) == ["", ""]


def test_measure_with_a_slow_half_or_a_slow_card_names_which(pair: Fleet) -> None:
    first, second = pair.nodes
    with _throttled((first, SECOND), (second, FIRST), (second, SECOND)):
        output = _envelope(pair, *MEASURE)
    found = _bandwidth(output)
    one_half, degraded = (found["tcp-bandwidth", host] for host in NAMES)
    assert one_half["verdict"] == "fail"
    assert one_half["found"].startswith("one half: "), one_half
    assert f"{SECOND} reaches a fraction" in one_half["found"]
    assert degraded["found"].startswith("a degraded card: "), degraded
    assert 0.05 < sum(degraded["measured"]["halves"].values()) < 0.2
    assert output["exit_code"] == 5


def test_measure_with_the_terminal_killed_ends_the_servers(pair: Fleet) -> None:
    with pair.start_on_terminal(COMMAND, *MEASURE, cwd="/home/spark") as process:
        until(lambda: any(" -s " in each for each in _servers(pair)), during=process)
        pair.terminal.run("pkill", "-9", "-u", "spark", check=False)
        process.wait(300)
    until(lambda: _servers(pair) == ["", ""])


def test_measure_without_iperf3_names_the_package(pair: Fleet) -> None:
    pair.nodes[1].run("mv", "/usr/bin/iperf3", "/usr/bin/iperf3-away")
    try:
        found = _bandwidth(_envelope(pair, *MEASURE))
    finally:
        pair.nodes[1].run("mv", "/usr/bin/iperf3-away", "/usr/bin/iperf3")
    assert found["tcp-bandwidth", NAMES[0]]["verdict"] == "skip"
    wanted = "spark-2: iperf3 is not installed: `sudo apt-get install iperf3`"
    assert found["tcp-bandwidth", NAMES[0]]["found"] == wanted


def test_cluster_verify_with_another_mtu_names_only_this_difference(pair: Fleet) -> None:
    output = _envelope(pair, *COMPARE)
    assert output["data"]["differences"] == [], output["data"]["differences"]
    pair.set_mtu(1500, pair.nodes[1], interfaces=(SECOND,))
    try:
        (row,) = _envelope(pair, *COMPARE)["data"]["differences"]
    finally:
        pair.set_mtu(9000, pair.nodes[1], interfaces=(SECOND,))
    assert (row["name"], row["weight"]) == ("mtu", "fail")
    assert row["values"] == {"spark-1": "9000 + 9000", "spark-2": "9000 + 1500"}


def test_cluster_verify_with_another_wheel_of_the_same_version_fails(pair: Fleet) -> None:
    for node, digest in zip(pair.nodes, ("aaaa", "bbbb"), strict=True):
        node.run("mkdir", "-p", RECORD.rpartition("/")[0])
        node.write(RECORD, f"vllm/_C.abi3.so,sha256={digest},386000000\n")
    try:
        (row,) = _envelope(pair, *COMPARE)["data"]["differences"]
    finally:
        for node in pair.nodes:
            node.run("rm", "-r", "/opt/sparkinstall/venv")
    assert (row["name"], row["weight"]) == ("vllm-files", "fail")
