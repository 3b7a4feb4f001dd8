"""The services that sparkinstall sets up, and which nodes run them."""

from collections.abc import Callable

from msgspec import Struct

from sparkinstall.layout import (
    CLOCK_LOCK_UNIT,
    FIREWALL_UNIT,
    HEALTH_TIMER,
    HEALTH_UNIT,
    LIFE_UNIT,
    RAY_UNITS,
    VLLM_UNIT,
)
from sparkinstall.node import Node


class Unit(Struct, frozen=True):
    """A systemd unit. `wanted`: whether a node's settings require it. `env_file`: it starts with the env file."""

    name: str
    wanted: Callable[[Node], bool]
    env_file: bool = True


def _of_ray(name: str) -> Unit:
    return Unit(name, lambda node: node.with_ray and node.ray_unit == name)


# On a worker with Ray, the head starts vLLM through Ray.
VLLM = Unit(
    VLLM_UNIT, lambda node: node.config.serving.model is not None and (node.role != "worker" or not node.with_ray)
)
# The API is on one node only, whatever the executor.
LIFE = Unit(
    LIFE_UNIT,
    lambda node: node.config.serving.model is not None and node.role != "worker" and node.config.serving.life.enabled,
    env_file=False,
)
UNITS = (
    *map(_of_ray, RAY_UNITS),
    VLLM,
    LIFE,
    Unit(FIREWALL_UNIT, lambda node: node.filtered, env_file=False),
    Unit(CLOCK_LOCK_UNIT, lambda node: node.config.gpu.max_clock is not None, env_file=False),
    # The timer first: it starts the other.
    *(Unit(name, lambda node: node.config.health.timer, env_file=False) for name in (HEALTH_TIMER, HEALTH_UNIT)),
)


def env_units(node: Node) -> tuple[str, ...]:
    """The units that start with the env file on this node; a rehearsal starts none."""
    return tuple(unit.name for unit in UNITS if unit.env_file and unit.wanted(node) and not node.rehearsal)
