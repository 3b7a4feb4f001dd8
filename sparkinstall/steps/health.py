"""A timer that runs `sparkinstall health` and writes the result for node_exporter."""

import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import sparkinstall
from sparkinstall.layout import HEALTH_TIMER, HEALTH_UNIT, unit_path
from sparkinstall.node import Node
from sparkinstall.probes import Probe, health
from sparkinstall.resources import Resource, systemd
from sparkinstall.resources.metrics_file import FirstMetrics, MetricsFolder
from sparkinstall.resources.systemd import Service, UnitFile
from sparkinstall.steps import Step
from sparkinstall.system import Reader

# In a folder in which only root writes.
_FRESH = "/run/sparkinstall-health.prom"


class Health(Step):
    """The unit runs as the user; root only puts the finished file into its place."""

    name = "health"
    why = "`health` from a timer, for node_exporter"
    phase = "services"
    impact = "Nobody is told what makes this node slow or unsafe while it serves."

    def wanted(self, node: Node) -> bool:
        return node.config.health.timer

    def resources(self, node: Node) -> Iterable[Resource]:
        unit, timer = unit_path(HEALTH_UNIT), unit_path(HEALTH_TIMER)
        yield MetricsFolder(node.health_metrics, HEALTH_UNIT)
        for path in (unit, timer):
            name = path.rpartition("/")[2]
            yield UnitFile(path, f"{name}.j2", partial(_values, node), noted_in=node.health_unit_record)
        yield Service(HEALTH_TIMER, lambda _: (unit, timer), noted_in=node.started_record(HEALTH_TIMER))
        yield FirstMetrics(node.health_metrics, HEALTH_UNIT)

    def probes(self, node: Node) -> Iterable[Probe]:
        return health.probes(node, self.impact)


def _values(node: Node, _: Reader) -> Mapping[str, Any]:
    return {
        "user": systemd.setting(node.user),
        "every": node.config.health.every_minutes,
        "program": systemd.program(sys.executable),
        # Of a checkout too, which is not installed.
        "modules": systemd.word(str(Path(sparkinstall.__file__).parents[1])),
        "fresh": _FRESH,
        "staged": systemd.word(f"{node.health_metrics}.new"),
        "metrics": systemd.word(node.health_metrics),
    }
