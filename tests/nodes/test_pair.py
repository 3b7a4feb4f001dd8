"""`cluster` on two real nodes from one terminal: from fresh nodes to a Ray of two, with failures, to `uninstall`.

All tests use the same nodes, in order. Failures of a single step have their tests in the other files of this folder.
"""

import itertools
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

import pytest

from tests.lab.cabling import LAN, PORT_0
from tests.lab.commands import Completed, Process
from tests.lab.fleet import Fleet, FleetNode
from tests.nodes.fleet import armed, install, sparkinstall, two_sparks, until_armed
from tests.nodes.fresh import COMMAND, NOT_COMPARED, file_metadata, ignoring

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.network]

NAMES = ("spark-1", "spark-2")
HEAD, WORKER = ADDRESSES = ("192.168.100.10", "192.168.100.11")
SECOND_HALF = {HEAD: "192.168.101.10", WORKER: "192.168.101.11"}
PREFIX = "/opt/sparkinstall"
NETPLAN = "/etc/netplan/40-cx7.yaml"
TOKEN = f"{PREFIX}/ray-token"
ENV_FILE = f"{PREFIX}/env/multi-node-head.env"
# Steps of each phase whose probes are quick: those of `env-files` import torch and vLLM.
QUICK = tuple(word for step in ("network", "firewall", "ray") for word in ("--only", step))
OURS = (PREFIX, "/etc", "/var/lib/sparkinstall")
# Ask Ray on the head; the env file has the address and the token. A user's program, for which Ray would start a worker
# on each processor, runs in tests/nodes/test_ray_units.py.
ASK_RAY = f'. {ENV_FILE}; exec timeout 120 python -W ignore -c "$0"'
NODES_OF_RAY = """
import json, os
from ray._raylet import GcsClient
nodes = GcsClient(address=os.environ["RAY_ADDRESS"]).get_all_node_info(timeout=60).values()
print(json.dumps([[each.node_manager_address, each.node_id.hex()] for each in nodes if each.state == each.ALIVE]))
"""
# `script` provides the terminal without which sparkinstall does not ask.
ON_A_TERMINAL = ("script", "-qec")


class ClusterResult(NamedTuple):
    """The result of `cluster --json`."""

    code: int
    data: Mapping[str, Any]
    errors: str
    log: str


@pytest.fixture(scope="module")
def pair() -> Iterator[Fleet]:
    with two_sparks(on_cpu=True) as fleet:
        install(fleet)
        yield fleet


@pytest.fixture(scope="module")
def before(pair: Fleet) -> list[dict[str, str]]:
    """Both nodes after the installation of sparkinstall, before any other change."""
    assert _cluster(pair, "plan", *NAMES).code == 0
    return [node.tree_digest("/", exclude=NOT_COMPARED) for node in pair.nodes]


def _cluster(fleet: Fleet, *words: str) -> ClusterResult:
    return _parsed(sparkinstall(fleet, "cluster", *words, "--json", check=False))


def _parsed(answer: Completed) -> ClusterResult:
    output = json.loads(answer.stdout)
    errors = "\n".join(f"{each['message']} | {each['cause']} | {each['hint']}" for each in output["errors"])
    return ClusterResult(answer.returncode, output["data"], errors, answer.stderr)


def _set_up(fleet: Fleet, *more: str) -> ClusterResult:
    return _cluster(fleet, *NAMES, *ignoring(), "--yes", *more)


def _nodes_of_ray(head: FleetNode) -> list[tuple[str, str]]:
    """Address and id of every node in the running Ray; none if it does not answer."""
    output = head.run("bash", "-c", ASK_RAY, NODES_OF_RAY, user="spark", check=False)
    return sorted(map(tuple, json.loads(output.stdout.splitlines()[-1]))) if output.returncode == 0 else []


def _is_complete(head: FleetNode, *, without: list[tuple[str, str]] = []) -> bool:  # noqa: B006 - only read
    """Whether both nodes are in Ray at the QSFP addresses, and none of those in `without`."""
    now = _nodes_of_ray(head)
    return [address for address, _ in now] == [*ADDRESSES] and not set(now) & set(without)


def _until(condition: Callable[[], bool], seconds: float = 600, pause: float = 0.2) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"still false after {seconds:g} s"
        time.sleep(pause)


def _until_complete(pair: Fleet, lost: list[tuple[str, str]]) -> None:
    """Wait until Ray has both nodes again. Each question costs a second of a processor that Ray starts with."""
    _until(lambda: _is_complete(pair.nodes[0], without=lost), pause=3)


def _links(node: FleetNode) -> list[tuple[int, list[str]]]:
    """MTU and IPv4 addresses of both halves."""
    rows = {row["ifname"]: row for row in json.loads(node.run("ip", "-j", "address").stdout)}
    return [
        (rows[name]["mtu"], [a["local"] for a in rows[name]["addr_info"] if a["family"] == "inet"]) for name in PORT_0
    ]


def _is_linked(node: FleetNode, address: str) -> bool:
    return _links(node) == [(9000, [address]), (9000, [SECOND_HALF[address]])]


def _carries_9000(node: FleetNode, to: str) -> bool:
    ping = ("ping", "-c", "2", "-i", "0.2", "-W", "3", "-M", "do", "-s", "8972", to)
    return node.run(*ping, check=False).returncode == 0


def _change_by_hand(pair: Fleet) -> None:
    """Change files on both nodes, so that every phase has drift, but Ray needs no restart."""
    for node in pair.nodes:
        node.run("sed", "-i", "s/mtu: 9000/mtu: 8000/", NETPLAN)
        node.run("chmod", "0644", TOKEN)


def _file_metadata(pair: Fleet) -> list[str]:
    return [file_metadata(node, *OURS) for node in pair.nodes]


# --- from fresh nodes to a Ray of two


def test_cluster_plan_shows_all_nodes_and_changes_nothing(pair: Fleet) -> None:
    former = [node.tree_digest("/etc", "/opt", "/var/lib/sparkinstall") for node in pair.nodes]
    shown = sparkinstall(pair, "cluster", "plan", *NAMES).stdout
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "spark-1 head 192.168.100.10 on the link" in lines
    assert "spark-2 worker 192.168.100.11 on the link" in lines
    assert any(line.startswith("+ environment all install the ") for line in lines), shown
    assert any(line.startswith("+ network all set up enp1s0f0np0 and enP2p1s0f0np0 with MTU 9000") for line in lines)
    assert any("spark-1" in line and "create the token that all nodes share" in line for line in lines), shown
    assert [node.tree_digest("/etc", "/opt", "/var/lib/sparkinstall") for node in pair.nodes] == former


@pytest.mark.usefixtures("before")
def test_cluster_on_fresh_nodes_starts_ray_at_both_addresses(pair: Fleet) -> None:
    answer = sparkinstall(pair, "cluster", *NAMES, *ignoring(), "--yes", check=False)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    assert "The cluster of 2 nodes is set up and verified." in answer.stdout
    assert [address for address, _ in _nodes_of_ray(pair.nodes[0])] == [*ADDRESSES]


def test_both_halves_carry_packets_of_9000_bytes(pair: Fleet) -> None:
    head, worker = pair.nodes
    assert _is_linked(head, HEAD)
    assert _is_linked(worker, WORKER)
    for node, other in ((head, WORKER), (worker, HEAD)):
        assert all(_carries_9000(node, to) for to in (other, SECOND_HALF[other]))
    assert not armed(head) and not armed(worker)


def test_token_is_shared_and_readable_by_its_owner_only(pair: Fleet) -> None:
    tokens = {node.read(TOKEN) for node in pair.nodes}
    assert len(tokens) == 1
    for node in pair.nodes:
        assert node.run("stat", "-c", "%a %U", TOKEN).stdout.split() == ["600", "spark"]
        found = node.run("grep", "-rlF", tokens.copy().pop().strip(), "/var/lib/sparkinstall", "/etc", check=False)
        assert found.stdout == ""


def test_cluster_repeated_changes_nothing_in_two_ssh_trips(pair: Fleet) -> None:
    former = _file_metadata(pair)
    pids = [_main_pid(node) for node in pair.nodes]
    result = _set_up(pair)
    assert result.code == 0, result.errors
    assert [node["ssh_trips"] for node in result.data["nodes"]] == [2, 2]
    assert {phase["outcome"] for node in result.data["nodes"] for phase in node["phases"]} == {"unchanged"}
    assert _file_metadata(pair) == former
    assert [_main_pid(node) for node in pair.nodes] == pids


def _main_pid(node: FleetNode) -> str:
    unit = "ray-head" if node.name == NAMES[0] else "ray-worker"
    return node.run("systemctl", "show", "-P", "MainPID", unit).stdout.strip()


# --- killed and continued runs


def test_cluster_killed_in_any_phase_continues_with_the_next_run(pair: Fleet) -> None:
    """Killed at the beginning of the n-th phase, n = 1, 2, ..., each time followed by the next run."""
    killed_in: list[str] = []
    for nth in itertools.count(1):
        _change_by_hand(pair)
        phase, answer = _run_and_kill(pair, nth)
        if answer:
            break
        killed_in.append(phase)
    assert answer is not None
    assert answer.code == 0, (killed_in, answer.errors, answer.log)
    assert {"look", "network", "reach", "confirm", "head", "workers", "verify"} <= set(killed_in), killed_in
    assert all("mtu: 9000" in node.read(NETPLAN) for node in pair.nodes)
    assert not any(armed(node) for node in pair.nodes)
    assert _is_complete(pair.nodes[0])
    assert all(_is_linked(node, address) for node, address in zip(pair.nodes, ADDRESSES, strict=True))


def _run_and_kill(pair: Fleet, nth: int) -> tuple[str, ClusterResult | None]:
    """The phase in which `cluster` was killed, or its result if it had fewer than `nth`.

    Every other time its ssh sessions are killed too, so that none of them can inform the node.
    """
    phases: list[str] = []
    with _running(pair, *QUICK) as run:
        for line in run.log():
            phase = line.partition("│")[2].removeprefix(" ")
            if not phase.startswith(" ") and phase.endswith(": begins\n") and phase not in phases:
                phases.append(phase)
            if len(phases) == nth:
                _kill(pair, run.process, everything=nth % 2 == 0)
                return phases[-1].removesuffix(": begins\n"), None
        return "", run.result()


class Running:
    """A running `cluster`, whose output goes to a file, so that no full pipe blocks it."""

    def __init__(self, process: Process, out: IO[str]) -> None:
        self.process = process
        self._out = out
        self._log: list[str] = []

    def log(self) -> Iterator[str]:
        """Its lines on stderr."""
        for line in cast(IO[str], self.process.stderr):
            self._log.append(line)
            yield line

    def result(self) -> ClusterResult:
        """Its result, after its end."""
        list(self.log())
        code = self.process.wait(600)
        self._out.seek(0)
        return _parsed(Completed((), code, self._out.read(), "".join(self._log)))


@contextmanager
def _running(pair: Fleet, *more: str) -> Iterator[Running]:
    words = ("cluster", *NAMES, *ignoring(), "--yes", "--json", *more)
    with (
        tempfile.TemporaryFile("w+") as out,
        pair.start_on_terminal(COMMAND, *words, cwd="/home/spark", stdout=out) as process,
    ):
        yield Running(process, out)


def _kill(pair: Fleet, run: Process, *, everything: bool) -> None:
    if everything:
        pair.terminal.run("pkill", "-9", "-u", "spark", check=False)
    else:
        pair.terminal.signal(run, signal.SIGKILL)
    run.wait(600)


def test_cluster_with_a_lost_ssh_session_fails_and_can_be_repeated(pair: Fleet) -> None:
    """The worker's sshd is killed while it starts Ray with another token than the head's, and its changed env file."""
    worker = pair.nodes[1]
    env_file = f"{PREFIX}/env/multi-node-worker.env"
    former = worker.read(env_file)
    worker.run("sed", "-i", "/VLLM_HOST_IP/d", env_file)
    assert worker.read(env_file) != former
    worker.write(TOKEN, "f" * 64 + "\n", mode="0600", user="spark")
    with _running(pair) as run:
        next(line for line in run.log() if "spark-2" in line and "ray: begins" in line)
        worker.run("pkill", "-9", "-f", "^sshd.*spark")
        result = run.result()
    assert result.code == 5
    assert "the connection to spark-2 was lost" in result.errors, result.errors
    again = _set_up(pair, *QUICK)
    assert again.code == 0, (again.errors, again.log)
    assert worker.read(TOKEN).strip() == pair.nodes[0].read(TOKEN).strip()
    assert worker.read(env_file) == former
    assert _is_complete(pair.nodes[0])


def test_cluster_with_the_cable_pulled_while_it_applies_rolls_back(pair: Fleet) -> None:
    _change_by_hand(pair)
    head = pair.nodes[0]
    with _running(pair, "--set", "network.rollback_seconds=30") as run:
        until_armed(head, run.process)
        pair.unplug(head)
        result = run.result()
    assert result.code == 5, result
    assert "does not answer over the link" in result.errors or "the new network was not kept" in result.errors
    assert pair.ssh(head, "true").returncode == 0
    _until(lambda: not any(armed(node) for node in pair.nodes))
    assert "mtu: 8000" in head.read(NETPLAN)
    pair.plug(head)
    again = _set_up(pair, *QUICK)
    assert again.code == 0, (again.errors, again.log)
    assert all(_is_linked(node, address) for node, address in zip(pair.nodes, ADDRESSES, strict=True))


# --- killed nodes and services


def test_ray_of_the_worker_that_is_killed_restarts(pair: Fleet) -> None:
    head, worker = pair.nodes
    lost = _nodes_of_ray(head)[1:]
    worker.run("systemctl", "kill", "--signal=KILL", "ray-worker")
    _until_complete(pair, lost)


def test_cluster_with_a_node_that_dies_before_yes_names_it(pair: Fleet) -> None:
    head, worker = pair.nodes
    lost = _nodes_of_ray(head)[1:]
    worker.run("chmod", "0644", TOKEN)
    typed = " ".join((COMMAND, "cluster", *NAMES, *ignoring()))
    with pair.start_on_terminal(*ON_A_TERMINAL, typed, "/dev/null", stdin=-1, cwd="/home/spark") as run:
        shown = _read_until(run, "Go on, on 2 nodes?")
        worker.kill()
        try:
            run.stdin.write("y\n")  # type: ignore[union-attr]
            run.stdin.flush()  # type: ignore[union-attr]
            rest, _ = run.communicate(timeout=900)
        finally:
            worker.boot()
    assert run.returncode == 5, shown + rest
    # Either the open connection breaks first or a new one gets no answer: a matter of seconds.
    words = " ".join(rest.split())
    assert "the connection to spark-2 was lost" in words or "spark-2 does not answer" in words, rest
    _until_complete(pair, lost)
    result = _set_up(pair, *QUICK)
    assert result.code == 0, result.errors


def _read_until(run: Any, words: str) -> str:
    output = ""
    while words not in output:
        more = run.stdout.read(1)
        assert more, f"no {words!r} in: {output[-3000:]}"
        output += more
    return output


# --- the head's Ray is killed; until it runs again, errors that are found before any change


@pytest.fixture(scope="module")
def lost() -> dict[str, list[tuple[str, str]]]:
    """The nodes of Ray before it was killed, for the later tests."""
    return {}


def test_verify_at_the_worker_without_the_heads_ray_fails(pair: Fleet, lost: dict[str, list[tuple[str, str]]]) -> None:
    head, worker = pair.nodes
    lost["ray"] = _nodes_of_ray(head)
    head.run("systemctl", "kill", "--signal=KILL", "ray-head")
    output = json.loads(worker.run(COMMAND, "verify", "--only", "ray", "--json", user="spark", check=False).stdout)
    (probe,) = output["data"]["probes"]
    assert output["exit_code"] == 3
    assert probe["found"].startswith(f"the head does not answer at {HEAD}:6379: "), probe


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("network.twin_subnet=192.168.100.0",), "both halves of the port"),
        (("cluster.head=10.77.0.1", "cluster.workers=[192.168.100.11]"), "is not in the head's subnet 10.77.0.0/24"),
        (("cluster.workers=[192.168.100.10]",), "two nodes have the address 192.168.100.10"),
    ],
)
def test_cluster_with_invalid_addresses_is_refused(pair: Fleet, settings: tuple[str, ...], sentence: str) -> None:
    result = _cluster(pair, *NAMES, *ignoring(), "--yes", *(word for each in settings for word in ("--set", each)))
    assert result.code == 2, result
    assert sentence in result.errors


def test_cluster_with_a_conflict_on_one_node_changes_nothing(pair: Fleet) -> None:
    """Both nodes have drift; a conflict on one node stops the run on the other one too."""
    worker = pair.nodes[1]
    _change_by_hand(pair)
    with _bond_at(worker):
        result = _set_up(pair, *QUICK)
        assert result.code == 5
        assert "spark-2: network: `bond0` (bonds) in /etc/netplan/90-theirs.yaml contains enp1s0f0np0" in result.errors
    with _address_at(worker, f"{WORKER}/32"):
        result = _set_up(pair, *QUICK)
        assert result.code == 5
        assert "spark-2: network: the address 192.168.100.11 is already in use: enP7s7 has it" in result.errors
    result = _set_up(pair, *QUICK, "--interface", LAN)
    assert result.code == 5
    assert "spark-1: " in result.errors and "spark-2: " in result.errors
    assert "enP7s7 must not be changed: it has the default route" in result.errors
    assert all("mtu: 8000" in node.read(NETPLAN) for node in pair.nodes)


@contextmanager
def _bond_at(node: FleetNode) -> Iterator[None]:
    theirs = "/etc/netplan/90-theirs.yaml"
    bond = f"{{bond0: {{interfaces: [{PORT_0[0]}], parameters: {{mode: active-backup}}}}}}"
    node.write(theirs, f"network: {{version: 2, bonds: {bond}}}\n", mode="0600")
    try:
        yield
    finally:
        node.run("rm", theirs)


@contextmanager
def _address_at(node: FleetNode, address: str) -> Iterator[None]:
    node.run("ip", "address", "add", address, "dev", LAN)
    try:
        yield
    finally:
        node.run("ip", "address", "del", address, "dev", LAN)


def test_ray_of_the_head_that_was_killed_has_restarted(pair: Fleet, lost: dict[str, list[tuple[str, str]]]) -> None:
    _until_complete(pair, lost["ray"])


def test_cluster_with_different_versions_fails_before_ray(pair: Fleet) -> None:
    worker = pair.nodes[1]
    site = worker.run("sh", "-c", f"echo {PREFIX}/venv/lib/python3*/site-packages").stdout.strip()
    real = worker.run("sh", "-c", f"echo {site}/triton-*.dist-info").stdout.strip()
    version, other = real.removeprefix(f"{site}/triton-").removesuffix(".dist-info"), f"{site}/triton-3.5.1.dist-info"
    worker.run("mv", real, other)
    try:
        result = _set_up(pair, "--skip", "environment", "--skip", "fp8")
    finally:
        worker.run("mv", other, real)
    assert result.code == 5
    assert "spark-1 and spark-2 differ in triton" in result.errors, result.errors
    assert f"triton: {version} on spark-1, 3.5.1 on spark-2" in result.errors
    again = _set_up(pair, *QUICK)
    assert again.code == 0, again.errors


def test_cluster_verify_with_a_small_mtu_and_one_subnet_names_both(pair: Fleet) -> None:
    head, worker = pair.nodes
    pair.set_mtu(1500, worker, interfaces=PORT_0[:1])
    head.run("ip", "address", "add", "192.168.100.77/24", "dev", PORT_0[1])
    try:
        result = _cluster(pair, "verify", *NAMES, "--only", "network")
    finally:
        pair.set_mtu(9000, worker)
        head.run("ip", "address", "del", "192.168.100.77/24", "dev", PORT_0[1])
    assert result.code == 5
    assert "enp1s0f0np0 and enP2p1s0f0np0 are in one subnet" in result.errors, result.errors
    assert "192.168.100.11 answers small packets and not large ones" in result.errors
    assert "enp1s0f0np0 has MTU 1500" in result.errors
    assert _cluster(pair, "verify", *NAMES, "--only", "network").code == 0


# --- a reboot


def test_head_after_a_reboot_has_network_and_ray(pair: Fleet) -> None:
    head = pair.nodes[0]
    lost = _nodes_of_ray(head)
    head.reboot()
    _until_complete(pair, lost)
    assert all(_is_linked(node, address) for node, address in zip(pair.nodes, ADDRESSES, strict=True))
    # What imports torch and vLLM is proven two tests on, on each node, where `multi-node` ends with it.
    result = _cluster(pair, "verify", *NAMES, "--skip", "env-files")
    assert result.code == 0, result.errors


def test_cluster_status_covers_all_nodes(pair: Fleet) -> None:
    result = _cluster(pair, "status", *NAMES)
    assert result.code == 0, result.errors
    for node in result.data["nodes"]:
        data = node["phases"][-1]["data"]
        assert data["installed"]
        assert {fix["standing"] for fix in data["fixes"]} <= {"proven", "done"}, data["fixes"]


# --- each node by itself, and `uninstall`


def test_multi_node_on_each_node_as_in_the_readme_sets_up_both(pair: Fleet) -> None:
    head, worker = pair.nodes
    for node in pair.nodes:
        _remove_by_hand(node)
    assert not _carries_9000(head, WORKER)
    output = _run_with_yes(head, f"{COMMAND} multi-node --role head {' '.join(ignoring())}")
    assert "is done" in output, output
    with _ssh_key_at(worker, pair.terminal):
        given = f"ssh spark-1 cat {TOKEN} | {COMMAND} multi-node --role worker --head {HEAD} --token-file - --yes"
        result = worker.run("bash", "-c", f"{given} {' '.join(ignoring())}", user="spark", timeout=1800)
    assert "is done" in result.stdout, result.stdout
    assert [address for address, _ in _nodes_of_ray(head)] == [*ADDRESSES]
    for node, other in ((head, WORKER), (worker, HEAD)):
        assert all(_carries_9000(node, to) for to in (other, SECOND_HALF[other]))
        # Each has proven the rest by itself.
        assert node.run(COMMAND, "verify", *QUICK, user="spark", timeout=1200).returncode == 0


def _remove_by_hand(node: FleetNode) -> None:
    """Remove network, env files and Ray, as a user who starts over."""
    unit = "ray-head" if node.name == NAMES[0] else "ray-worker"
    node.run("systemctl", "disable", "--now", unit)
    node.run("rm", "-r", f"/etc/systemd/system/{unit}.service", TOKEN, f"{PREFIX}/env", f"{PREFIX}/services", NETPLAN)
    node.run("systemctl", "daemon-reload")
    node.run("netplan", "apply")
    for name in PORT_0:
        node.run("ip", "address", "flush", "dev", name)
        node.run("ip", "link", "set", "dev", name, "mtu", "1500")


def _run_with_yes(node: FleetNode, typed: str) -> str:
    with node.popen(*ON_A_TERMINAL, typed, "/dev/null", stdin=-1, user="spark") as run:
        shown = _read_until(run, "[Y/n]")
        rest, _ = run.communicate("y\n", timeout=1800)
    assert run.returncode == 0, shown + rest
    return str(rest)


@contextmanager
def _ssh_key_at(node: FleetNode, terminal: FleetNode) -> Iterator[None]:
    """During the context `ssh spark-1` works at the node as at the terminal."""
    files = [f"/home/spark/.ssh/{name}" for name in ("id_ed25519", "config", "known_hosts")]
    for path in files:
        node.write(path, terminal.read(path), mode="0600", user="spark")
    try:
        yield
    finally:
        node.run("rm", *files)


def test_cluster_uninstall_restores_every_byte(pair: Fleet, before: list[dict[str, str]]) -> None:
    result = _cluster(pair, "uninstall", *NAMES, "--yes")
    assert result.code == 0, result.errors
    for node, former in zip(pair.nodes, before, strict=True):
        after = node.tree_digest("/", exclude=NOT_COMPARED)
        assert {path for path in former | after if former.get(path) != after.get(path)} == set()
        assert _links(node) == [(1500, []), (1500, [])]
        assert "sparkinstall" not in node.run("nft", "list", "tables", check=False).stdout
        assert node.run("pgrep", "-x", "raylet", check=False).stdout == ""
    result = _cluster(pair, "status", *NAMES)
    assert not any(node["phases"][-1]["data"].get("installed") for node in result.data["nodes"])
