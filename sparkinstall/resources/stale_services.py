"""Remove services that an earlier role or other settings of this node required."""

from collections.abc import Iterable
from typing import ClassVar

from msgspec import Struct

from sparkinstall.layout import FIREWALL_UNIT, HEALTH_UNIT, unit_path
from sparkinstall.node import Node
from sparkinstall.resources import Drift, Ok, State
from sparkinstall.resources.metrics_file import remove_metrics
from sparkinstall.services import UNITS
from sparkinstall.system import Reader, System, Undo


class StaleServices(Struct, frozen=True):
    """Our units that are no longer required are stopped and removed. A Ray of the former role would hold the new one's
    ports, and a disabled firewall would still filter."""

    key: ClassVar[str] = "services:former"
    node: Node

    def check(self, on: Reader) -> State:
        former = self._former(on)
        return Drift(f"stop {', '.join(former)}: no longer required") if former else Ok()

    def _former(self, on: Reader) -> list[str]:
        return [unit.name for unit in UNITS if not unit.wanted(self.node) and is_ours(on, unit.name)]

    def apply(self, on: System) -> None:
        for name in self._former(on):
            if not on.rehearsal:
                on.promise(Undo("service", name, {}, {"enabled": False, "active": False}))
                on.run("systemctl", "disable", "--now", name, root=True)
            for path in self._files(name):
                on.remove(path)
            if name == HEALTH_UNIT:
                remove_metrics(on, self.node.health_metrics)
            if not on.rehearsal:
                on.run("systemctl", "daemon-reload", root=True)

    def _files(self, name: str) -> Iterable[str]:
        # The unit file last, so that the run after a killed one still finds it.
        if name == FIREWALL_UNIT:
            yield self.node.firewall_rules
        yield unit_path(name)


def is_ours(on: Reader, name: str) -> bool:
    """Return whether we have written the file of this unit."""
    path = unit_path(name)
    first = (on.read(path) or b"").partition(b"\n")[0].decode(errors="replace")
    return first == f"# {on.real(path)}, created by sparkinstall."
