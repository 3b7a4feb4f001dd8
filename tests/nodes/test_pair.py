"""The whole job on two real nodes from one terminal: from fresh to a Ray of two, through faults and deaths, and back.

The nodes live through the whole file; the tests are their days, in order. Faults that concern a single step have
their tests in the other files beside this one.
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
from tests.nodes.fleet import armed, install, sparkinstall, two_sparks
from tests.nodes.fresh import COMMAND, NOT_COMPARED, ignoring

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.network]

NAMES = ("spark-1", "spark-2")
HEAD, WORKER = ADDRESSES = ("192.168.100.10", "192.168.100.11")
SECOND_HALF = {HEAD: "192.168.101.10", WORKER: "192.168.101.11"}
PREFIX = "/opt/sparkinstall"
NETPLAN = "/etc/netplan/40-cx7.yaml"
TOKEN = f"{PREFIX}/ray-token"
ENV_FILES = (f"{PREFIX}/env/multi-node-head.env", f"{PREFIX}/env/multi-node-worker.env")
# Something of each phase, and not what takes long to be proven.
QUICK = tuple(word for step in ("network", "firewall", "env-files", "ray") for word in ("--only", step))
OURS = (PREFIX, "/etc", "/var/lib/sparkinstall")
# What Ray says itself, asked as a person would on the head; the file gives the address and the token. A driver
# prints what befalls other nodes among its own output, until it has left.
ASK_RAY = f'. {ENV_FILES[0]}; exec timeout 20 python -W ignore -c "$0"'
NODES_OF_RAY = """
import json, ray
ray.init(logging_level="ERROR")
found = [[node["NodeManagerAddress"], node["NodeID"]] for node in ray.nodes() if node["Alive"]]
ray.shutdown()
print(json.dumps(found))
"""
# What a person would have to type to be asked the question: a terminal, which `script` gives.
AT_A_KEYBOARD = ("script", "-qec")


class Told(NamedTuple):
    """What `cluster --json` said."""

    code: int
    data: Mapping[str, Any]
    errors: str
    log: str


@pytest.fixture(scope="module")
def pair() -> Iterator[Fleet]:
    with two_sparks() as fleet:
        install(fleet)
        yield fleet


@pytest.fixture(scope="module")
def before(pair: Fleet) -> list[dict[str, str]]:
    """Both nodes before anything but the tool was brought to them."""
    assert _cluster(pair, "plan", *NAMES).code == 0
    return [node.tree_digest("/", exclude=NOT_COMPARED) for node in pair.nodes]


def _cluster(fleet: Fleet, *words: str) -> Told:
    return _told(sparkinstall(fleet, "cluster", *words, "--json", check=False))


def _told(answer: Completed) -> Told:
    said = json.loads(answer.stdout)
    errors = "\n".join(f"{each['message']} | {each['cause']} | {each['hint']}" for each in said["errors"])
    return Told(answer.returncode, said["data"], errors, answer.stderr)


def _set_up(fleet: Fleet, *more: str) -> Told:
    return _cluster(fleet, *NAMES, *ignoring(), "--yes", *more)


def _nodes_of_ray(head: FleetNode) -> list[tuple[str, str]]:
    """Address and id of every node that the running Ray has; none where it does not answer."""
    said = head.run("bash", "-c", ASK_RAY, NODES_OF_RAY, user="spark", check=False)
    return sorted(map(tuple, json.loads(said.stdout.splitlines()[-1]))) if said.returncode == 0 else []


def _is_whole(head: FleetNode, *, without: list[tuple[str, str]] = []) -> bool:  # noqa: B006 - only read
    """Both nodes are in Ray, at the QSFP addresses, and none of those that were there `before`."""
    now = _nodes_of_ray(head)
    return [address for address, _ in now] == [*ADDRESSES] and not set(now) & set(without)


def _until(so: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < until, f"not so after {seconds:g} s"
        time.sleep(0.2)


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


def _spoil(pair: Fleet) -> None:
    """Somebody changed files on both nodes: every phase has something to do, and Ray need not be started anew."""
    for node in pair.nodes:
        node.run("sed", "-i", "s/mtu: 9000/mtu: 8000/", NETPLAN)
        node.run("sh", "-c", f"echo '# by hand' >> {PREFIX}/env/single-node.env")


def _untouched(pair: Fleet) -> list[str]:
    """Every file of ours with its inode, size, owner, mode and times, its ctime too: a write cannot hide from it."""
    shown = ("find", *OURS, "-printf", "%p %i %s %u %m %T@ %C@ %l\\n")
    return [node.run(*shown).stdout for node in pair.nodes]


# --- from fresh to a Ray of two


def test_one_plan_for_all_is_shown_and_nothing_is_touched(pair: Fleet) -> None:
    there = [node.tree_digest("/etc", "/opt", "/var/lib/sparkinstall") for node in pair.nodes]
    shown = sparkinstall(pair, "cluster", "plan", *NAMES).stdout
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "spark-1 head 192.168.100.10 on the link" in lines
    assert "spark-2 worker 192.168.100.11 on the link" in lines
    assert any(line.startswith("+ environment all install the ") for line in lines), shown
    assert any(line.startswith("+ network all set up enp1s0f0np0 and enP2p1s0f0np0 with MTU 9000") for line in lines)
    assert any("spark-1" in line and "create the token that all nodes share" in line for line in lines), shown
    assert [node.tree_digest("/etc", "/opt", "/var/lib/sparkinstall") for node in pair.nodes] == there


@pytest.mark.usefixtures("before")
def test_from_fresh_to_a_ray_of_two_nodes_at_the_two_addresses(pair: Fleet) -> None:
    answer = sparkinstall(pair, "cluster", *NAMES, *ignoring(), "--yes", check=False)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    assert "The cluster of 2 nodes is set up and verified." in answer.stdout
    assert [address for address, _ in _nodes_of_ray(pair.nodes[0])] == [*ADDRESSES]


def test_both_halves_carry_packets_of_9000_bytes_both_ways(pair: Fleet) -> None:
    head, worker = pair.nodes
    assert _is_linked(head, HEAD)
    assert _is_linked(worker, WORKER)
    for node, other in ((head, WORKER), (worker, HEAD)):
        assert all(_carries_9000(node, to) for to in (other, SECOND_HALF[other]))
    assert not armed(head) and not armed(worker)


def test_the_token_is_the_same_and_nobody_else_can_read_it(pair: Fleet) -> None:
    tokens = {node.read(TOKEN) for node in pair.nodes}
    assert len(tokens) == 1
    for node in pair.nodes:
        assert node.run("stat", "-c", "%a %U", TOKEN).stdout.split() == ["600", "spark"]
        looked = node.run("grep", "-rlF", tokens.copy().pop().strip(), "/var/lib/sparkinstall", "/etc", check=False)
        assert looked.stdout == ""


def test_a_re_run_changes_nothing_and_asks_little(pair: Fleet) -> None:
    there = _untouched(pair)
    pids = [_main_pid(node) for node in pair.nodes]
    told = _set_up(pair)
    assert told.code == 0, told.errors
    assert [node["ssh_trips"] for node in told.data["nodes"]] == [2, 2]
    assert {phase["outcome"] for node in told.data["nodes"] for phase in node["phases"]} == {"unchanged"}
    assert _untouched(pair) == there
    assert [_main_pid(node) for node in pair.nodes] == pids


def _main_pid(node: FleetNode) -> str:
    unit = "ray-head" if node.name == NAMES[0] else "ray-worker"
    return node.run("systemctl", "show", "-P", "MainPID", unit).stdout.strip()


# --- killed, and gone on with


def test_a_tool_that_is_killed_at_any_barrier_is_gone_on_with(pair: Fleet) -> None:
    """Killed where the n-th phase begins, n = 1, 2, ..., each time at once followed by the next run."""
    begun: list[str] = []
    for nth in itertools.count(1):
        _spoil(pair)
        phase, answer = _run_and_kill(pair, nth)
        if answer:
            break
        begun.append(phase)
    assert answer is not None
    assert answer.code == 0, (begun, answer.errors, answer.log)
    assert {"look", "network", "reach", "confirm", "head", "workers", "verify"} <= set(begun), begun
    assert all("mtu: 9000" in node.read(NETPLAN) for node in pair.nodes)
    assert not any(armed(node) for node in pair.nodes)
    assert _is_whole(pair.nodes[0])
    assert all(_is_linked(node, address) for node, address in zip(pair.nodes, ADDRESSES, strict=True))


def _run_and_kill(pair: Fleet, nth: int) -> tuple[str, Told | None]:
    """The phase in which the tool was killed, or what it said if it had fewer than `nth`.

    Every other time its ssh sessions die with it, and none of them can tell the node.
    """
    begun: list[str] = []
    with _running(pair, *QUICK) as run:
        for line in run.log():
            phase = line.partition("│")[2].removeprefix(" ")
            if not phase.startswith(" ") and phase.endswith(": begins\n") and phase not in begun:
                begun.append(phase)
            if len(begun) == nth:
                _kill(pair, run.process, everything=nth % 2 == 0)
                return begun[-1].removesuffix(": begins\n"), None
        return "", run.told()


class Running:
    """`cluster` at work; what it says at its end goes to a file, that no full pipe holds it up."""

    def __init__(self, process: Process, out: IO[str]) -> None:
        self.process = process
        self._out = out
        self._log: list[str] = []

    def log(self) -> Iterator[str]:
        """Its lines on stderr, as they come."""
        for line in cast(IO[str], self.process.stderr):
            self._log.append(line)
            yield line

    def told(self) -> Told:
        """What it said, once it has ended."""
        list(self.log())
        code = self.process.wait(120)
        self._out.seek(0)
        return _told(Completed((), code, self._out.read(), "".join(self._log)))


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
    run.wait(60)


def test_a_lost_ssh_session_is_told_and_gone_on_with(pair: Fleet) -> None:
    """The worker's end of ssh is killed while it starts Ray with a token that was not the head's."""
    worker = pair.nodes[1]
    worker.write(TOKEN, "f" * 64 + "\n", mode="0600", user="spark")
    with _running(pair) as run:
        next(line for line in run.log() if "spark-2" in line and "ray: begins" in line)
        worker.run("pkill", "-9", "-f", "^sshd.*spark")
        told = run.told()
    assert told.code == 5
    assert "the connection to spark-2 was lost" in told.errors, told.errors
    again = _set_up(pair)
    assert again.code == 0, (again.errors, again.log)
    assert worker.read(TOKEN).strip() == pair.nodes[0].read(TOKEN).strip()
    assert _is_whole(pair.nodes[0])


def test_a_cable_that_is_pulled_while_the_network_is_applied(pair: Fleet) -> None:
    _spoil(pair)
    head = pair.nodes[0]
    with _running(pair, "--set", "network.rollback_seconds=30") as run:
        _until(lambda: armed(head))
        pair.unplug(head)
        told = run.told()
    assert told.code == 5, told
    assert "does not answer over the link" in told.errors or "the new network was not kept" in told.errors
    assert pair.ssh(head, "true").returncode == 0
    _until(lambda: not any(armed(node) for node in pair.nodes), 120)
    assert "mtu: 8000" in head.read(NETPLAN)
    pair.plug(head)
    again = _set_up(pair)
    assert again.code == 0, (again.errors, again.log)
    assert all(_is_linked(node, address) for node, address in zip(pair.nodes, ADDRESSES, strict=True))


# --- deaths of nodes and services


def test_a_workers_ray_that_is_killed_comes_back(pair: Fleet) -> None:
    head, worker = pair.nodes
    lost = _nodes_of_ray(head)[1:]
    worker.run("systemctl", "kill", "--signal=KILL", "ray-worker")
    _until(lambda: _is_whole(head, without=lost), 180)


def test_a_node_that_dies_between_the_plan_and_the_yes_is_named(pair: Fleet) -> None:
    head, worker = pair.nodes
    lost = _nodes_of_ray(head)[1:]
    worker.run("sh", "-c", f"echo >> {ENV_FILES[1]}")
    typed = " ".join((COMMAND, "cluster", *NAMES, *ignoring()))
    with pair.start_on_terminal(*AT_A_KEYBOARD, typed, "/dev/null", stdin=-1, cwd="/home/spark") as run:
        shown = _read_until(run, "Go on, on 2 nodes?")
        worker.kill()
        try:
            run.stdin.write("y\n")  # type: ignore[union-attr]
            run.stdin.flush()  # type: ignore[union-attr]
            rest, _ = run.communicate(timeout=150)
        finally:
            worker.boot()
    assert run.returncode == 5, shown + rest
    # Whether the open connection breaks first or a new one finds nobody is a matter of seconds.
    words = " ".join(rest.split())
    assert "the connection to spark-2 was lost" in words or "spark-2 does not answer" in words, rest
    _until(lambda: _is_whole(head, without=lost), 180)
    told = _set_up(pair)
    assert told.code == 0, told.errors


def _read_until(run: Any, words: str) -> str:
    said = ""
    while words not in said:
        more = run.stdout.read(1)
        assert more, f"no {words!r} in: {said[-3000:]}"
        said += more
    return said


# --- the head's Ray dies; until it is back, faults that are told before anything is begun


@pytest.fixture(scope="module")
def lost() -> dict[str, list[tuple[str, str]]]:
    """The nodes that Ray had before a death, for the tests that come after it."""
    return {}


def test_a_heads_ray_that_is_killed_is_told_at_the_worker(pair: Fleet, lost: dict[str, list[tuple[str, str]]]) -> None:
    head, worker = pair.nodes
    lost["ray"] = _nodes_of_ray(head)
    head.run("systemctl", "kill", "--signal=KILL", "ray-head")
    said = json.loads(worker.run(COMMAND, "verify", "--only", "ray", "--json", user="spark", check=False).stdout)
    (probe,) = said["data"]["probes"]
    assert said["exit_code"] == 3
    assert probe["found"].startswith(f"the head does not answer at {HEAD}:6379: "), probe


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("network.twin_subnet=192.168.100.0",), "both halves of the port"),
        (("cluster.head=10.77.0.1", "cluster.workers=[192.168.100.11]"), "is not in the head's subnet 10.77.0.0/24"),
        (("cluster.workers=[192.168.100.10]",), "two nodes have the address 192.168.100.10"),
    ],
)
def test_multi_node_with_invalid_settings_is_refused(pair: Fleet, settings: tuple[str, ...], sentence: str) -> None:
    told = _cluster(pair, *NAMES, *ignoring(), "--yes", *(word for each in settings for word in ("--set", each)))
    assert told.code == 2, told
    assert sentence in told.errors


def test_what_stands_in_the_way_on_one_node_stops_all_before_anything_is_begun(pair: Fleet) -> None:
    """Both nodes are spoilt; where one is in the way of the re-run, the other is not mended either."""
    worker = pair.nodes[1]
    _spoil(pair)
    with _their_bond(worker):
        told = _set_up(pair)
        assert told.code == 5
        assert "spark-2: network: `bond0` (bonds) in /etc/netplan/90-theirs.yaml contains enp1s0f0np0" in told.errors
    with _an_address(worker, f"{WORKER}/32"):
        told = _set_up(pair)
        assert told.code == 5
        assert "spark-2: network: the address 192.168.100.11 is already in use: enP7s7 has it" in told.errors
    told = _set_up(pair, "--interface", LAN)
    assert told.code == 5
    assert "spark-1: " in told.errors and "spark-2: " in told.errors
    assert "enP7s7 must not be changed: it has the default route" in told.errors
    assert all("mtu: 8000" in node.read(NETPLAN) for node in pair.nodes)


@contextmanager
def _their_bond(node: FleetNode) -> Iterator[None]:
    theirs = "/etc/netplan/90-theirs.yaml"
    bond = f"{{bond0: {{interfaces: [{PORT_0[0]}], parameters: {{mode: active-backup}}}}}}"
    node.write(theirs, f"network: {{version: 2, bonds: {bond}}}\n", mode="0600")
    try:
        yield
    finally:
        node.run("rm", theirs)


@contextmanager
def _an_address(node: FleetNode, address: str) -> Iterator[None]:
    node.run("ip", "address", "add", address, "dev", LAN)
    try:
        yield
    finally:
        node.run("ip", "address", "del", address, "dev", LAN)


def test_the_heads_ray_came_back_by_itself(pair: Fleet, lost: dict[str, list[tuple[str, str]]]) -> None:
    _until(lambda: _is_whole(pair.nodes[0], without=lost["ray"]), 180)


def test_versions_that_differ_are_told_before_ray_is_touched(pair: Fleet) -> None:
    worker = pair.nodes[1]
    site = worker.run("sh", "-c", f"echo {PREFIX}/venv/lib/python3*/site-packages").stdout.strip()
    real, other = f"{site}/triton-3.6.0.dist-info", f"{site}/triton-3.5.1.dist-info"
    worker.run("mv", real, other)
    try:
        told = _set_up(pair, "--skip", "environment", "--skip", "fp8")
    finally:
        worker.run("mv", other, real)
    assert told.code == 5
    assert "spark-1 and spark-2 differ in triton" in told.errors, told.errors
    assert "triton: 3.6.0 on spark-1, 3.5.1 on spark-2" in told.errors
    again = _set_up(pair)
    assert again.code == 0, again.errors


def test_an_mtu_too_small_and_halves_in_one_subnet_are_told_apart(pair: Fleet) -> None:
    head, worker = pair.nodes
    pair.set_mtu(1500, worker, interfaces=PORT_0[:1])
    head.run("ip", "address", "add", "192.168.100.77/24", "dev", PORT_0[1])
    try:
        told = _cluster(pair, "verify", *NAMES, "--only", "network")
    finally:
        pair.set_mtu(9000, worker)
        head.run("ip", "address", "del", "192.168.100.77/24", "dev", PORT_0[1])
    assert told.code == 5
    assert "enp1s0f0np0 and enP2p1s0f0np0 are in one subnet" in told.errors, told.errors
    assert "192.168.100.11 answers small packets and not large ones" in told.errors
    assert "enp1s0f0np0 has MTU 1500" in told.errors
    assert _cluster(pair, "verify", *NAMES, "--only", "network").code == 0


# --- a reboot


def test_a_head_that_is_rebooted_comes_back(pair: Fleet) -> None:
    head = pair.nodes[0]
    lost = _nodes_of_ray(head)
    head.reboot()
    _until(lambda: _is_whole(head, without=lost), 180)
    assert all(_is_linked(node, address) for node, address in zip(pair.nodes, ADDRESSES, strict=True))
    told = _cluster(pair, "verify", *NAMES)
    assert told.code == 0, told.errors


def test_status_tells_of_every_node(pair: Fleet) -> None:
    told = _cluster(pair, "status", *NAMES)
    assert told.code == 0, told.errors
    for node in told.data["nodes"]:
        data = node["phases"][0]["data"]
        assert data["installed"]
        assert {fix["standing"] for fix in data["fixes"]} <= {"proven", "done"}, data["fixes"]


# --- each node by itself, and everything back


def test_each_node_by_itself_as_the_readme_says(pair: Fleet) -> None:
    head, worker = pair.nodes
    for node in pair.nodes:
        _take_away_by_hand(node)
    assert not _carries_9000(head, WORKER)
    said = _at_the_keyboard(head, f"{COMMAND} multi-node --role head {' '.join(ignoring())}")
    assert "is done" in said, said
    with _a_key_for(worker, pair.terminal):
        given = f"ssh spark-1 cat {TOKEN} | {COMMAND} multi-node --role worker --head {HEAD} --token-file - --yes"
        told = worker.run("bash", "-c", f"{given} {' '.join(ignoring())}", user="spark", timeout=300)
    assert "is done" in told.stdout, told.stdout
    assert [address for address, _ in _nodes_of_ray(head)] == [*ADDRESSES]
    for node, other in ((head, WORKER), (worker, HEAD)):
        assert all(_carries_9000(node, to) for to in (other, SECOND_HALF[other]))
        assert node.run(COMMAND, "verify", user="spark", timeout=120).returncode == 0


def _take_away_by_hand(node: FleetNode) -> None:
    """Network, env files and Ray, as somebody who starts over would."""
    unit = "ray-head" if node.name == NAMES[0] else "ray-worker"
    node.run("systemctl", "disable", "--now", unit)
    node.run("rm", "-r", f"/etc/systemd/system/{unit}.service", TOKEN, f"{PREFIX}/env", f"{PREFIX}/services", NETPLAN)
    node.run("systemctl", "daemon-reload")
    node.run("netplan", "apply")
    for name in PORT_0:
        node.run("ip", "address", "flush", "dev", name)
        node.run("ip", "link", "set", "dev", name, "mtu", "1500")


def _at_the_keyboard(node: FleetNode, typed: str) -> str:
    with node.popen(*AT_A_KEYBOARD, typed, "/dev/null", stdin=-1, user="spark") as run:
        shown = _read_until(run, "[Y/n]")
        rest, _ = run.communicate("y\n", timeout=300)
    assert run.returncode == 0, shown + rest
    return str(rest)


@contextmanager
def _a_key_for(node: FleetNode, terminal: FleetNode) -> Iterator[None]:
    """`ssh spark-1` works at the node as it does at the terminal."""
    files = [f"/home/spark/.ssh/{name}" for name in ("id_ed25519", "config", "known_hosts")]
    for path in files:
        node.write(path, terminal.read(path), mode="0600", user="spark")
    try:
        yield
    finally:
        node.run("rm", *files)


def test_uninstall_takes_every_byte_back_on_both_nodes(pair: Fleet, before: list[dict[str, str]]) -> None:
    told = _cluster(pair, "uninstall", *NAMES, "--yes")
    assert told.code == 0, told.errors
    for node, there in zip(pair.nodes, before, strict=True):
        after = node.tree_digest("/", exclude=NOT_COMPARED)
        assert {path for path in there | after if there.get(path) != after.get(path)} == set()
        assert _links(node) == [(1500, []), (1500, [])]
        assert "sparkinstall" not in node.run("nft", "list", "tables", check=False).stdout
        assert node.run("pgrep", "-x", "raylet", check=False).stdout == ""
    told = _cluster(pair, "status", *NAMES)
    assert not any(node["phases"][0]["data"].get("installed") for node in told.data["nodes"])
