"""Limit the GPU's clock at every boot: a hot unit can power off in a long prefill, with nothing in the journal."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sparkinstall.layout import CLOCK_LOCK_UNIT, unit_path
from sparkinstall.node import Node
from sparkinstall.probes import Probe, clock_lock
from sparkinstall.resources import Resource
from sparkinstall.resources.systemd import Service, UnitFile
from sparkinstall.steps import Step
from sparkinstall.system import Reader


class ClockLock(Step):
    """Stopping the unit resets the clock. Without the setting, `StaleServices` stops and removes it."""

    name = "clock-lock"
    why = "the GPU's clock is limited at every boot"
    phase = "services"
    impact = "A hot unit can power off in a long prefill."

    def wanted(self, node: Node) -> bool:
        return node.config.gpu.max_clock is not None

    def resources(self, node: Node) -> Iterable[Resource]:
        unit = unit_path(CLOCK_LOCK_UNIT)
        yield UnitFile(unit, f"{CLOCK_LOCK_UNIT}.j2", partial(_values, node), noted_in=node.clock_lock_unit_record)
        yield Service(CLOCK_LOCK_UNIT, lambda _: (unit,), noted_in=node.started_record(CLOCK_LOCK_UNIT))

    def probes(self, node: Node) -> Iterable[Probe]:
        return clock_lock.probes(node, self.impact)


def _values(node: Node, _: Reader) -> Mapping[str, Any]:
    return {"max_clock": node.config.gpu.max_clock}
