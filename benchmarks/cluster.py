"""`sparkinstall cluster` where nothing is left to do, on 1, 2, 4 and 8 nodes, beside pyinfra and Ansible.

    python -m benchmarks.cluster        as root; boots nine containers; writes cluster.md; about 8 minutes

The nodes are the tests' own (tests/lab/fleet.py): systemd as PID 1, real ssh from a terminal. All of them share the
cores of one machine, so what grows with their number here is mostly the work of the nodes, not that of the terminal.
"""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environments
from benchmarks.report import table
from benchmarks.timing import Spread
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
# One node alone has no link to set up; with a network that may use its API it has a firewall.
STEPS = ("--only", "network", "--only", "firewall", "--set", "serving.allow=198.51.100.0/24")


def main() -> None:
    """Measure, and write cluster.md."""
    with sparks(max(COUNTS)) as fleet:
        install(fleet)
        _install_peers(fleet)
        found = {count: _measure(fleet, fleet.nodes[:count]) for count in COUNTS}
    RESULTS.write_text("\n".join(_report(found)))
    print(RESULTS.read_text())


def _install_peers(fleet: Fleet) -> None:
    wanted = (f"pyinfra=={environments.PYINFRA}", f"ansible-core=={environments.ANSIBLE}")
    fleet.on_terminal("python3", "-m", "venv", PEERS, timeout=300)
    fleet.on_terminal(f"{PEERS}/bin/pip", "install", "-q", *wanted, timeout=900)
    fleet.on_terminal("mkdir", "-p", WORK)


def _measure(fleet: Fleet, nodes: Sequence[FleetNode]) -> dict[str, Any]:
    ours = (COMMAND, "cluster", *(node.name for node in nodes), *STEPS, "--yes", "--json", *ignoring())
    fleet.on_terminal(*ours, timeout=600)
    said = json.loads(fleet.on_terminal(*ours, timeout=600).stdout)
    nodes_said = said["data"]["nodes"]
    if any(phase["outcome"] == "changed" for each in nodes_said for phase in each["phases"]):
        raise RuntimeError("the second `sparkinstall cluster` changed something")
    commands = {OURS: ours, PYINFRA: _pyinfra(fleet, nodes), ANSIBLE: _ansible(fleet, nodes)}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(ROUNDS + 1):
        for name, argv in commands.items():
            started = time.perf_counter()
            fleet.on_terminal(*argv, cwd=WORK, env={"ANSIBLE_CONFIG": f"{WORK}/ansible.cfg"}, timeout=600)
            if turn:
                taken[name].append(time.perf_counter() - started)
    spreads = {name: Spread(statistics.median(each), min(each), max(each)) for name, each in taken.items()}
    return {"spreads": spreads, "trips": max(each["ssh_trips"] for each in nodes_said)}


def _declared(fleet: Fleet, nodes: Sequence[FleetNode]) -> Iterator[tuple[str, list[str]]]:
    """Each file that the nodes have, and a copy of each node's own at the terminal."""
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


def _report(found: dict[int, dict[str, Any]]) -> Iterator[str]:
    yield (
        f"# Several nodes, nothing left to do\n\nMade by `python -m benchmarks.cluster` on {datetime.date.today()}, "
        f"{len(os.sched_getaffinity(0))} cores shared by all nodes and the terminal, {platform.machine()}; "
        f"pyinfra {environments.PYINFRA}, ansible-core {environments.ANSIBLE}. Only the ratios mean something.\n"
    )
    alone = found[COUNTS[0]]["spreads"]
    rows = []
    for count, each in found.items():
        ours = each["spreads"][OURS]
        for name, spread in each["spreads"].items():
            trips = str(each["trips"]) if name == OURS else ""
            growth, beside = f"{spread.times(alone[name]):.1f} x", f"{spread.times(ours):.1f} x"
            seconds = (f"{spread.median:.2f} s", f"{spread.lowest:.2f} - {spread.highest:.2f}")
            rows.append((f"{count}", name, *seconds, growth, beside, trips))
    heads = (
        "nodes",
        "",
        "median",
        "lowest - highest",
        "beside one node",
        "beside sparkinstall",
        "ssh round trips a node",
    )
    yield table("The firewall, and with several nodes the network", heads, rows)


if __name__ == "__main__":
    main()
