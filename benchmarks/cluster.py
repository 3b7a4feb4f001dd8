"""`sparkinstall cluster` on 1, 2, 4 and 8 converged nodes, compared with pyinfra and Ansible.

    python -m benchmarks.cluster        as root; boots nine containers; writes cluster.md; 7 minutes

The nodes are those of the tests (tests/lab/fleet.py): systemd as PID 1, real ssh from a terminal. All of them share the
cores of one machine, so mostly the nodes' own work grows with their number. Nodes with their own cores are simulated:
every node's replies are recorded once; then a replacement for sparkinstall at each node replays them, as many seconds
after the request as one node alone takes.
"""

import datetime
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environments, recorded
from benchmarks.report import table
from benchmarks.timing import Spread, in_turns
from tests.lab.fleet import Fleet, FleetNode
from tests.nodes.fleet import install, sparks
from tests.nodes.fresh import COMMAND, ignoring

RESULTS = Path(__file__).with_name("cluster.md")
COUNTS = (1, 2, 4, 8)
ROUNDS = 5
PEERS = "/home/spark/peers"
WORK = "/home/spark/bench"
UNIT = "sparkinstall-firewall.service"
FILES = ("/etc/netplan/40-cx7.yaml", "/opt/sparkinstall/firewall.nft", f"/etc/systemd/system/{UNIT}")
OURS, PYINFRA, ANSIBLE = "`sparkinstall cluster`", "pyinfra", "ansible-playbook"
OWN_CORES = "`sparkinstall cluster`, the nodes' own work as on one node"
# A single node has no link to set up; with a network that may use its API it has a firewall.
STEPS = ("--only", "network", "--only", "firewall", "--set", "serving.allow=198.51.100.0/24")


@dataclass(frozen=True)
class Measured:
    """Seconds by command, and the number of ssh trips to each node."""

    spreads: dict[str, Spread]
    trips: int


def main() -> None:
    """Measure, and write cluster.md."""
    with sparks(max(COUNTS)) as fleet:
        install(fleet)
        _install_peers(fleet)
        found = dict(_all_counts(fleet))
    RESULTS.write_text("\n".join(_report(found)))
    print(RESULTS.read_text())


def _all_counts(fleet: Fleet) -> Iterator[tuple[int, Measured]]:
    alone: dict[str, float] = {}
    for count in COUNTS:
        nodes = fleet.nodes[:count]
        ours, trips = _converged(fleet, nodes)
        commands = {OURS: ours, PYINFRA: _pyinfra(fleet, nodes), ANSIBLE: _ansible(fleet, nodes)}
        spreads = in_turns({name: AtTerminal(fleet, argv) for name, argv in commands.items()}, ROUNDS)
        with recorded.recording(nodes):
            fleet.on_terminal(*ours, timeout=600)
        alone = alone or recorded.seconds(nodes[0])
        with recorded.replaying(nodes, alone):
            spreads |= in_turns({OWN_CORES: AtTerminal(fleet, ours)}, ROUNDS)
        yield count, Measured(spreads, trips)


def _converged(fleet: Fleet, nodes: Sequence[FleetNode]) -> tuple[tuple[str, ...], int]:
    """The command that changes nothing on these nodes any more, and its number of ssh trips to each."""
    ours = (COMMAND, "cluster", *(node.name for node in nodes), *STEPS, "--yes", "--json", *ignoring())
    fleet.on_terminal(*ours, timeout=600)
    replies = json.loads(fleet.on_terminal(*ours, timeout=600).stdout)["data"]["nodes"]
    if any(phase["outcome"] == "changed" for each in replies for phase in each["phases"]):
        raise RuntimeError("the second `sparkinstall cluster` changed something")
    return ours, max(each["ssh_trips"] for each in replies)


@dataclass(frozen=True)
class AtTerminal:
    """A command at the terminal of the fleet."""

    fleet: Fleet
    argv: Sequence[str]

    def seconds(self) -> float:
        started = time.perf_counter()
        self.fleet.on_terminal(*self.argv, cwd=WORK, env={"ANSIBLE_CONFIG": f"{WORK}/ansible.cfg"}, timeout=600)
        return time.perf_counter() - started


def _install_peers(fleet: Fleet) -> None:
    wanted = (f"pyinfra=={environments.PYINFRA}", f"ansible-core=={environments.ANSIBLE}")
    fleet.on_terminal("python3", "-m", "venv", PEERS, timeout=300)
    fleet.on_terminal(f"{PEERS}/bin/pip", "install", "-q", *wanted, timeout=900)
    fleet.on_terminal("mkdir", "-p", WORK)


def _declared(fleet: Fleet, nodes: Sequence[FleetNode]) -> Iterator[tuple[str, list[str]]]:
    """Each file of the nodes, with a copy of each node's file at the terminal."""
    for path in FILES[0 if len(nodes) > 1 else 1 :]:
        copies = []
        for node in nodes:
            copies.append(f"{WORK}/{node.name}-{Path(path).name}")
            fleet.terminal.write(copies[-1], node.read(path), user="spark")
        yield path, copies


def _pyinfra(fleet: Fleet, nodes: Sequence[FleetNode]) -> tuple[str, ...]:
    lines = ["from pyinfra import host", "from pyinfra.operations import files, systemd"]
    for path, copies in _declared(fleet, nodes):
        sources = dict(zip((node.name for node in nodes), copies, strict=True))
        mode = "600" if path == FILES[0] else "644"
        lines.append(f"files.put(src={sources!r}[host.name], dest={path!r}, mode={mode!r}, _sudo=True)")
    lines.append(f"systemd.service(service={UNIT!r}, running=True, enabled=True, _sudo=True)")
    fleet.terminal.write(f"{WORK}/deploy.py", "\n".join(lines) + "\n", user="spark")
    inventory = ",".join(node.name for node in nodes)
    return (f"{PEERS}/bin/pyinfra", "-y", inventory, "deploy.py")


def _ansible(fleet: Fleet, nodes: Sequence[FleetNode]) -> tuple[str, ...]:
    tasks: list[dict[str, Any]] = []
    for path, _ in _declared(fleet, nodes):
        source = f"{WORK}/{{{{ inventory_hostname }}}}-{Path(path).name}"
        mode = "0600" if path == FILES[0] else "0644"
        tasks.append({"ansible.builtin.copy": {"src": source, "dest": path, "mode": mode}})
    tasks.append({"ansible.builtin.systemd_service": {"name": UNIT, "state": "started", "enabled": True}})
    play = {"hosts": "all", "gather_facts": False, "become": True, "tasks": tasks}
    play["vars"] = {"ansible_python_interpreter": "/usr/bin/python3"}
    fleet.terminal.write(f"{WORK}/play.yml", json.dumps([play]), user="spark")
    settings = f"[defaults]\nforks = {len(nodes)}\n[connection]\npipelining = True\n"
    fleet.terminal.write(f"{WORK}/ansible.cfg", settings, user="spark")
    return (f"{PEERS}/bin/ansible-playbook", "-i", ",".join(n.name for n in nodes) + ",", "play.yml")


def _report(found: Mapping[int, Measured]) -> Iterator[str]:
    yield (
        f"# Several nodes, nothing left to do\n\nMade by `python -m benchmarks.cluster` on {datetime.date.today()}, "
        f"{len(os.sched_getaffinity(0))} cores shared by all nodes and the terminal, {platform.machine()}; "
        f"pyinfra {environments.PYINFRA}, ansible-core {environments.ANSIBLE}. Only the ratios mean something.\n"
        "README.md in this folder says what is measured.\n"
    )
    rows = [_row(count, name, found) for count, each in found.items() for name in each.spreads]
    heads = ("nodes", "", "median", "lowest - highest", "beside one node", "beside sparkinstall", "ssh trips a node")
    yield table("The firewall, and with several nodes the network", heads, rows)


def _row(count: int, name: str, found: Mapping[int, Measured]) -> tuple[str, ...]:
    spread, ours, alone = (found[of].spreads[which] for of, which in ((count, name), (count, OURS), (COUNTS[0], name)))
    seconds = (f"{spread.median:.2f} s", f"{spread.lowest:.2f} - {spread.highest:.2f}")
    beside = "" if name == OWN_CORES else f"{spread.times(ours):.1f} x"
    trips = f"{found[count].trips}" if name == OURS else ""
    return (f"{count}", name, *seconds, f"{spread.times(alone):.1f} x", beside, trips)


if __name__ == "__main__":
    main()
