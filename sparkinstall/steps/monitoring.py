"""Debian's Prometheus and node_exporter, on loopback, with our files."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sparkinstall.layout import (
    API_KEY,
    EXPORTER_UNIT,
    PROMETHEUS_CONFIG,
    PROMETHEUS_RULES,
    PROMETHEUS_UNIT,
    drop_in_path,
)
from sparkinstall.node import Node
from sparkinstall.probes import Probe, monitoring
from sparkinstall.resources import Resource, Unknown, systemd
from sparkinstall.resources.debian_service import DropIn, NoOther, OwnService, PackageUser
from sparkinstall.resources.files import File
from sparkinstall.resources.packages import Packages
from sparkinstall.resources.systemd import Service
from sparkinstall.steps import Step
from sparkinstall.steps.prometheus_files import NODE_EXPORTER, rule_file, scrape_config
from sparkinstall.system import Reader

_PROMETHEUS, _EXPORTER = (unit.removesuffix(".service") for unit in (PROMETHEUS_UNIT, EXPORTER_UNIT))
# systemd's folder for the credentials of that unit.
_KEY = f"/run/credentials/{PROMETHEUS_UNIT}/api-key"
_LOOPBACK = "127.0.0.1"
_HINT = (
    "give it our files: `sparkinstall monitoring render scrape` and `sparkinstall monitoring render rules`; "
    "or another port: `--port`"
)


class Monitoring(Step):
    """Each package starts its service at once, so what configures it is there before."""

    name = "monitoring"
    why = "Prometheus and node_exporter, on loopback"
    needs = ("packages", "serving")
    phase = "services"
    impact = "Nothing is recorded of how the served model and the node did, and nobody is alerted."

    def wanted(self, node: Node) -> bool:
        return node.config.monitoring.prometheus

    def resources(self, node: Node) -> Iterable[Resource]:
        with_prometheus = node.role != "worker"
        if with_prometheus:
            yield NoOther(_PROMETHEUS, node.config.monitoring.port, _HINT)
            yield File(PROMETHEUS_CONFIG, _config(node).encode())
            yield File(PROMETHEUS_RULES, _rules(node).encode())
            yield _drop_in(node, PROMETHEUS_UNIT)
        yield _drop_in(node, EXPORTER_UNIT)
        yield PackageUser("prometheus")
        yield Packages((_PROMETHEUS, _EXPORTER) if with_prometheus else (_EXPORTER,), str(node.debian_packages))
        yield OwnService(EXPORTER_UNIT, lambda _: (drop_in_path(EXPORTER_UNIT),), node.started_record(EXPORTER_UNIT))
        if with_prometheus:
            inputs = (drop_in_path(PROMETHEUS_UNIT), PROMETHEUS_CONFIG, PROMETHEUS_RULES)
            secrets = (node.api_key,) if node.api_key else ()
            noted = node.started_record(PROMETHEUS_UNIT)
            yield Service(PROMETHEUS_UNIT, lambda _: inputs, noted, secrets=secrets)

    def probes(self, node: Node) -> Iterable[Probe]:
        return monitoring.probes(node, self.impact)


def _drop_in(node: Node, unit: str) -> DropIn:
    values = {PROMETHEUS_UNIT: _of_prometheus, EXPORTER_UNIT: _of_exporter}[unit]
    template = f"{unit.removesuffix('.service')}.conf.j2"
    record, optional = node.monitoring_unit_record, unit == EXPORTER_UNIT
    return DropIn(drop_in_path(unit), template, partial(values, node), unit=unit, noted_in=record, optional=optional)


def _of_prometheus(node: Node, on: Reader) -> Mapping[str, Any] | Unknown:
    if node.api_key == API_KEY and on.entry(API_KEY) is None:
        return Unknown("serving")
    settings = node.config.monitoring
    key = node.api_key and systemd.setting(node.api_key)
    return {"config": PROMETHEUS_CONFIG, "port": settings.port, "days": settings.days, "api_key": key}


def _of_exporter(node: Node, _: Reader) -> Mapping[str, Any]:
    return {"address": f"{exporter_address(node)}:{NODE_EXPORTER}", "folder": systemd.word(node.config.health.folder)}


def exporter_address(node: Node) -> str:
    """Return where node_exporter listens: the head's Prometheus asks a worker over the link."""
    return node.address if node.role == "worker" else _LOOPBACK


def _config(node: Node) -> str:
    workers = node.config.cluster.workers if node.role == "head" else ()
    return scrape_config([_LOOPBACK], workers, node.config.serving.port, _KEY if node.api_key else "")


def _rules(node: Node) -> str:
    settings = node.config.monitoring
    return rule_file(settings.ttft_ms or None, settings.itl_ms or None)
