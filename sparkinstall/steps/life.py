"""Proof of life: a service beside vLLM that watches whether it generates, and restarts it when it does not."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sparkinstall import payloads
from sparkinstall.facts import vllm
from sparkinstall.layout import LIFE_FOLDER, LIFE_LIVE, LIFE_PROGRAM, LIFE_UNIT, VLLM_UNIT, unit_path
from sparkinstall.node import Node
from sparkinstall.probes import Probe, life
from sparkinstall.resources import Resource, systemd
from sparkinstall.resources.files import File, OwnFolder
from sparkinstall.resources.systemd import Service, UnitFile
from sparkinstall.services import LIFE
from sparkinstall.steps import Step
from sparkinstall.system import Reader


class Life(Step):
    """Workers have none: theirs restart with the head's vLLM, or Ray starts it."""

    name = "life"
    why = "proof of life: vLLM is restarted if it generates nothing"
    needs = ("serving",)
    phase = "services"
    impact = "A server that generates nothing any more stays so, although it reports healthy."

    def wanted(self, node: Node) -> bool:
        return LIFE.wanted(node)

    def resources(self, node: Node) -> Iterable[Resource]:
        unit = unit_path(LIFE_UNIT)
        yield OwnFolder(LIFE_FOLDER)
        yield File(LIFE_PROGRAM, payloads.as_file("vllm_life"))
        yield UnitFile(unit, f"{LIFE_UNIT}.j2", partial(_values, node), noted_in=node.life_unit_record)
        yield Service(LIFE_UNIT, lambda _: (unit, LIFE_PROGRAM), noted_in=node.started_record(LIFE_UNIT))

    def probes(self, node: Node) -> Iterable[Probe]:
        return life.probes(node, self.impact)


def _values(node: Node, on: Reader) -> Mapping[str, Any]:
    return {
        "name": LIFE_UNIT.removesuffix(".service"),
        "unit": VLLM_UNIT,
        "program": systemd.word(on.real(LIFE_PROGRAM)),
        "folder": LIFE_FOLDER,
        "live": LIFE_LIVE,
        "options": [(name, systemd.word(str(value))) for name, value in _options(node)],
    }


def _options(node: Node) -> Iterable[tuple[str, str | int]]:
    settings, cluster = node.config.serving.life, node.config.cluster
    yield "port", node.config.serving.port
    yield "every", settings.every_seconds
    yield "still", settings.still_seconds
    yield "probe-every", settings.probe_every_seconds
    yield "probe", settings.probe_seconds
    yield "start", settings.start_seconds
    yield "restarts", settings.restarts_per_hour
    if node.api_key:
        # Root reads the file itself: no copy that is old after the key was changed.
        yield "key-file", node.api_key
    if node.with_ray:
        yield "also-unit", node.ray_unit
        yield "also-port", cluster.ray_port
    elif node.several:
        yield "also-port", cluster.master_port
    yield from (("running", name) for name in vllm.RUNNING_REQUESTS)
    yield from (("waiting", name) for name in vllm.WAITING_REQUESTS)
    yield "generated", vllm.GENERATED_TOKENS
    yield from (("moving", name) for name in vllm.MOVES_WITH_THE_ENGINE)
    yield "asleep", vllm.SLEEP_STATE
