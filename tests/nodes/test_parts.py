"""Optional parts of a node, with a real systemd: the lock of the GPU's clock, the timer of `health`, and Prometheus.

A program in the place of nvidia-smi notes its arguments. One node lives through the file; its tests are in order.
"""

import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

import pytest

from sparkinstall.layout import CLOCK_LOCK_UNIT, HEALTH_TIMER, HEALTH_UNIT, unit_path
from tests.lab import cache
from tests.lab.node import FreshNode
from tests.nodes.fresh import CHECKOUT, NOT_COMPARED, REPOSITORY, ignoring, sparkinstall

pytestmark = [pytest.mark.layer3, pytest.mark.network]

NOTES = "/var/lib/nvidia-smi"
# The query gets the line of a busy GPU, as long as the clock is locked: 2190 MHz, else 2418.
NVIDIA_SMI = f"""\
#!/bin/sh
case "$1" in
-lgc) touch {NOTES}/locked && echo "$@" >> {NOTES}/said ;;
-rgc) rm -f {NOTES}/locked && echo "$@" >> {NOTES}/said ;;
*) [ -e {NOTES}/locked ] && mhz=2190 || mhz=2418; echo "NVIDIA GB10, 12.1, 580.178.04, 96, $mhz, 40.00" ;;
esac
"""
ALL = ("all", "--only", "clock-lock", "--yes", *ignoring(), "--ignore", "cuda", "--ignore", "python")


@pytest.fixture(scope="module")
def node() -> Iterator[FreshNode]:
    # It is on this machine's network, where a second run's node would find the ports of Prometheus in use.
    with cache.locked(cache.folder() / "prometheus-ports.lock"), FreshNode() as fresh:
        leave_out = [".git", ".venv", ".mypy_cache", ".ruff_cache", ".hypothesis", "__pycache__", "tests"]
        fresh.push(REPOSITORY, CHECKOUT, owner="spark", exclude=leave_out)
        fresh.run("./install.sh", "--tool-only", user="spark", cwd=CHECKOUT, timeout=300)
        fresh.run("mkdir", NOTES)
        fresh.write("/usr/bin/nvidia-smi", NVIDIA_SMI)
        fresh.run("chmod", "755", "/usr/bin/nvidia-smi")
        yield fresh


def said(node: FreshNode) -> list[str]:
    """What nvidia-smi was told since the last call."""
    lines = node.run("cat", f"{NOTES}/said").stdout.splitlines()
    node.run("truncate", "-s", "0", f"{NOTES}/said")
    return lines


def test_clock_lock_is_applied_and_proven(node: FreshNode) -> None:
    run = sparkinstall(node, *ALL, "--set", "gpu.max_clock=2200")
    assert said(node) == ["-lgc 300,2200"]
    assert "2190 MHz, 96 % busy" in run.stdout
    assert "2 steps" not in sparkinstall(node, "plan", "--only", "clock-lock").stdout
    assert node.run("systemctl", "is-active", CLOCK_LOCK_UNIT).stdout == "active\n"


def test_clock_lock_of_another_limit_is_set_by_a_restart(node: FreshNode) -> None:
    sparkinstall(node, *ALL, "--set", "gpu.max_clock=2000", check=False)
    assert said(node) == ["-rgc", "-lgc 300,2000"]


def test_clock_lock_is_set_again_at_boot(node: FreshNode) -> None:
    node.reboot()
    assert said(node)[-1] == "-lgc 300,2000"


def test_clock_that_another_program_unlocked_fails_verify(node: FreshNode) -> None:
    node.run("nvidia-smi", "-rgc")
    run = sparkinstall(node, "verify", "--only", "clock-lock", check=False)
    assert run.returncode == 3
    assert "2418 MHz, 96 % busy: the clock is not locked" in run.stdout
    said(node)


def test_uninstall_resets_the_clock_and_removes_the_unit(node: FreshNode) -> None:
    sparkinstall(node, "uninstall", "--yes")
    assert said(node) == ["-rgc"]
    assert not (node.root / unit_path(CLOCK_LOCK_UNIT)[1:]).exists()
    assert "not-found" in node.run("systemctl", "show", "-p", "LoadState", CLOCK_LOCK_UNIT).stdout


# --- the timer of `health`

FOLDER = "/var/lib/prometheus/node-exporter"
METRICS = f"{FOLDER}/sparkinstall_health.prom"


@pytest.fixture(scope="module")
def bare(node: FreshNode) -> dict[str, str]:
    """The node without any part."""
    return node.tree_digest("/", exclude=NOT_COMPARED)


def metrics(node: FreshNode) -> dict[str, float]:
    """The samples that the timer has written."""
    lines = [line for line in node.read(METRICS).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def rule(name: str) -> str:
    return f'sparkinstall_health_state{{rule="{name}"}}'


def test_health_install_runs_it_at_once_as_the_user(node: FreshNode, bare: dict[str, str]) -> None:
    assert METRICS not in bare
    answer = sparkinstall(node, "health", "--install", "--every", "7", "--yes")
    assert f"runs every 7 minutes; node_exporter reads the result from {METRICS}." in answer.stdout
    assert "health-timer" in answer.stdout
    assert node.run("systemctl", "is-active", HEALTH_TIMER).stdout == "active\n"
    shown = node.run("systemctl", "show", HEALTH_UNIT, "-p", "User", "-p", "Result", "-p", "NoNewPrivileges").stdout
    assert set(shown.split()) == {"User=spark", "Result=success", "NoNewPrivileges=yes"}
    assert node.run("stat", "-c", "%a %U", METRICS).stdout == "644 root\n"
    assert node.run("ls", "-A", FOLDER, "/run/sparkinstall-health.prom", check=False).stdout.split()[1:] == [
        "sparkinstall_health.prom"
    ]


def test_health_of_the_timer_has_the_rules_of_the_verb(node: FreshNode) -> None:
    found = metrics(node)
    # Of a card there is no sign here; what the memory has depends on the tests beside this one.
    assert found[rule("connectx-pcie")] == 0
    assert abs(found["sparkinstall_health_last_run_timestamp_seconds"] - time.time()) < 3600
    told = json.loads(sparkinstall(node, "health", "--interval", "0", "--json", check=False).stdout)["data"]
    names = {each["name"] for each in (*told["findings"], *told["unreadable"], *told["ok"])}
    assert {rule(name) for name in names} == {name for name in found if "rule=" in name}


def test_health_install_again_changes_nothing_and_status_has_the_last_run(node: FreshNode) -> None:
    again = sparkinstall(node, "health", "--install", "--yes")
    assert "begins" not in again.stderr and "every 7 minutes" in again.stdout
    told = json.loads(sparkinstall(node, "status", "--json").stdout)["data"]["health"]
    assert told["rules"] > 10 and told["at"].endswith("Z")


def test_health_timer_replaces_the_file_and_a_failed_run_leaves_it(node: FreshNode) -> None:
    before = node.run("stat", "-c", "%i", METRICS).stdout
    node.run("systemctl", "start", HEALTH_UNIT)
    after = node.run("stat", "-c", "%i", METRICS).stdout
    assert before != after, "it was not replaced by a rename"
    node.write("/etc/sparkinstall.yaml", "no: such setting\n")
    try:
        assert node.run("systemctl", "start", HEALTH_UNIT, check=False).returncode
        assert node.run("stat", "-c", "%i", METRICS).stdout == after
    finally:
        node.run("rm", "/etc/sparkinstall.yaml")


def test_health_uninstall_leaves_no_trace(node: FreshNode, bare: dict[str, str]) -> None:
    sparkinstall(node, "health", "--uninstall", "--yes")
    after = node.tree_digest("/", exclude=NOT_COMPARED)
    assert {path for path in bare | after if bare.get(path) != after.get(path)} == set()
    assert "not-found" in node.run("systemctl", "show", "-p", "LoadState", HEALTH_TIMER).stdout
    assert HEALTH_UNIT not in node.run("systemctl", "--failed", "--no-legend").stdout


# --- Debian's Prometheus; the node is on this machine's network

PORT = "19390"
INSTALL = ("monitoring", "install", "--port", PORT, "--days", "2", "--yes")
LISTEN = (
    f"import socket, time; s = socket.create_server(('127.0.0.1', {PORT})); print('up', flush=True); time.sleep(600)"
)
# useradd and userdel keep the former files beside those of the users.
COPIES = ("/etc/passwd-", "/etc/group-", "/etc/shadow-", "/etc/gshadow-", "/etc/subuid-", "/etc/subgid-")


def fetched(port: str, path: str) -> str:
    with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return str(answer.read().decode())


def asked(query: str) -> list[dict[str, Any]]:
    """What Prometheus has for a query, as soon as it has anything."""
    until = time.monotonic() + 180
    while True:
        found = json.loads(fetched(PORT, f"/api/v1/query?query={quote(query)}"))["data"]["result"]
        if found:
            return list(found)
        assert time.monotonic() < until, f"nothing for {query}"
        time.sleep(1)


def test_monitoring_install_beside_another_program_is_refused_and_changes_nothing(
    node: FreshNode, bare: dict[str, str]
) -> None:
    with node.popen("python3", "-c", LISTEN) as other:
        assert other.stdout is not None and other.stdout.readline() == "up\n"
        answer = sparkinstall(node, *INSTALL, check=False)
        node.signal(other, 9)
    assert answer.returncode == 1
    assert f"port {PORT} is in use by another program" in answer.stderr
    after = node.tree_digest("/", exclude=NOT_COMPARED)
    assert {path for path in bare | after if bare.get(path) != after.get(path)} == set()


def test_monitoring_install_runs_debians_prometheus_on_loopback(node: FreshNode) -> None:
    sparkinstall(node, "health", "--install", "--yes")
    answer = sparkinstall(node, *INSTALL)
    assert f"Prometheus watches this node: http://127.0.0.1:{PORT}" in answer.stdout
    listening = node.run("ss", "-Hltn").stdout.split()
    found = {each for each in listening if each.endswith((f":{PORT}", ":9100"))}
    assert found == {"127.0.0.1:9100", f"127.0.0.1:{PORT}"}
    node.run("promtool", "check", "config", "/etc/prometheus/sparkinstall.yml")
    node.run("promtool", "check", "metrics", input=node.read(METRICS))


@pytest.mark.usefixtures("node")
def test_prometheus_has_what_the_timer_of_health_wrote_and_our_rules() -> None:
    assert f"{rule('connectx-pcie')} 0" in fetched("9100", "/metrics")
    (found,) = asked(rule("connectx-pcie"))
    assert (found["metric"]["job"], found["value"][1]) == ("node", "0")
    groups = json.loads(fetched(PORT, "/api/v1/rules"))["data"]["groups"]
    rules = {each["name"]: each.get("lastError", "") for group in groups for each in group["rules"]}
    assert {"no-answer", "health-failure", "instance:vllm_ttft_seconds:p95"} <= rules.keys()
    assert set(rules.values()) == {""}
    # No vLLM runs here.
    assert asked('up{job="vllm"}')[0]["value"][1] == "0"


def test_monitoring_install_again_changes_nothing(node: FreshNode) -> None:
    started = ("systemctl", "show", "prometheus.service", "-p", "InvocationID")
    before = node.run(*started).stdout
    assert "begins" not in sparkinstall(node, *INSTALL).stderr
    assert node.run(*started).stdout == before
    assert not json.loads(sparkinstall(node, "plan", "--only", "monitoring", "--json").stdout)["data"]["drift"]


def test_monitoring_uninstall_leaves_the_timer_of_health(node: FreshNode) -> None:
    sparkinstall(node, "monitoring", "uninstall", "--yes")
    assert "prometheus" not in node.run("dpkg-query", "-W", "-f", "${Package}\n").stdout
    assert "prometheus:" not in node.read("/etc/passwd")
    assert metrics(node)[rule("connectx-pcie")] == 0
    node.run("systemctl", "start", HEALTH_UNIT)


def test_uninstall_of_the_rest_restores_every_byte(node: FreshNode, bare: dict[str, str]) -> None:
    sparkinstall(node, "uninstall", "--yes")
    after = node.tree_digest("/", exclude=NOT_COMPARED)
    changed = {path for path in bare | after if bare.get(path) != after.get(path)}
    assert changed <= set(COPIES), changed
