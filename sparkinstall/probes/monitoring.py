"""Whether Prometheus and node_exporter run, and listen where they should and nowhere else."""

import time
from collections.abc import Iterable
from functools import partial

from sparkinstall.facts.units import show
from sparkinstall.layout import EXPORTER_UNIT, PROMETHEUS_UNIT, drop_in_path
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed
from sparkinstall.system import Reader

_NODE_EXPORTER = 9100
# Seconds from the start of a service until it listens, on a busy machine.
_PATIENCE = 30.0


def probes(node: Node, impact: str) -> Iterable[Probe]:
    """Yield one probe for each service of this node."""
    needs = "a rehearsal starts no services"
    if node.role != "worker":
        look = partial(_listens, PROMETHEUS_UNIT, f"127.0.0.1:{node.config.monitoring.port}")
        yield Probe("prometheus", "Prometheus listens on loopback alone", look, "node", impact, needs_node=needs)
    host = node.address if node.role == "worker" else "127.0.0.1"
    look = partial(_listens, EXPORTER_UNIT, f"{host}:{_NODE_EXPORTER}")
    yield Probe("node-exporter", "node_exporter listens", look, "node", impact, needs_node=needs)


def _listens(unit: str, address: str, on: Reader) -> Finding:
    until, hint = time.monotonic() + _PATIENCE, f"`journalctl -u {unit} -n 50`, then `sparkinstall run monitoring`"
    while True:
        active = show(on, unit, "ActiveState")["ActiveState"]
        if active not in ("active", "activating"):
            return failed(f"{unit} is {active or 'unknown'}", hint)
        if on.entry(drop_in_path(unit)) is None:
            return passed(f"{unit} is active; others have installed it")
        if found := _at(on, address.rpartition(":")[2]):
            break
        if time.monotonic() > until:
            return failed(f"{unit} is active, and listens nowhere after {_PATIENCE:.0f} s", hint, address)
        time.sleep(0.2)
    words = ", ".join(found)
    return passed(words, address) if found == [address] else failed(f"it listens on {words}", hint, address)


def _at(on: Reader, port: str) -> list[str]:
    """Return the addresses at which anything listens on the port."""
    rows = (line.split() for line in on.ask("ss", "-Hltnp").out.splitlines())
    return sorted({row[3] for row in rows if len(row) > 3 and row[3].rpartition(":")[2] == port})
