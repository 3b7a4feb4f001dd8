"""Services that this node ran in another role or with other settings: what is not asked for any more must not run."""

from collections.abc import Iterable

from msgspec import Struct

from sparkinstall.facts import packet_filters
from sparkinstall.node import Node
from sparkinstall.probes import ray, serving
from sparkinstall.resources import Drift, Ok, State, systemd
from sparkinstall.system import Reader, System, Undo

_OURS = ("ray-head.service", "ray-worker.service", serving.UNIT, packet_filters.UNIT)


def wanted(node: Node) -> frozenset[str]:
    """The units that the settings ask for on this node."""
    cluster = node.config.cluster
    with_ray = node.several and cluster.executor == "ray"
    serves = node.config.serving.model is not None and (node.role != "worker" or not with_ray)
    asked = {ray.unit(node): with_ray, serving.UNIT: serves, packet_filters.UNIT: node.filtered}
    return frozenset(name for name, so in asked.items() if so)


class StaleServices(Struct, frozen=True):
    """Units of ours that nothing asks for any more are stopped and gone. A Ray of the former role would hold the
    ports of the new one, and a firewall that was switched off would still filter."""

    node: Node

    @property
    def key(self) -> str:
        return "services:former"

    def check(self, on: Reader) -> State:
        former = self._former(on)
        return Drift(f"stop {', '.join(former)}: not asked for any more") if former else Ok()

    def _former(self, on: Reader) -> list[str]:
        return [name for name in _OURS if name not in wanted(self.node) and _is_ours(on, _path(name))]

    def apply(self, on: System) -> None:
        for name in self._former(on):
            if not on.rehearsal:
                on.promise(Undo("service", name, {}, {"enabled": False, "active": False}))
                on.run("systemctl", "disable", "--now", name, root=True)
            for path in self._files(name):
                on.remove(path)
            if not on.rehearsal:
                on.run("systemctl", "daemon-reload", root=True)

    def _files(self, name: str) -> Iterable[str]:
        # The unit last: it is what a run that was killed in between is known by.
        if name == packet_filters.UNIT:
            from sparkinstall.resources.firewall import rules_path

            yield rules_path(self.node)
        yield _path(name)


def _path(name: str) -> str:
    return f"{systemd.FOLDER}/{name}"


def _is_ours(on: Reader, path: str) -> bool:
    first = (on.read(path) or b"").partition(b"\n")[0].decode(errors="replace")
    return first == f"# {on.real(path)}, made by sparkinstall."
