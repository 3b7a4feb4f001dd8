"""All steps in one list. A new fix is one line here, one file in steps/, one test."""

from collections.abc import Iterable, Sequence

from sparkinstall.core.model_step import ModelStep
from sparkinstall.node import Node
from sparkinstall.schema import require_known
from sparkinstall.steps import Step
from sparkinstall.steps.clock_lock import ClockLock
from sparkinstall.steps.env_files import EnvFiles
from sparkinstall.steps.environment import Environment
from sparkinstall.steps.firewall import Firewall
from sparkinstall.steps.former import Former
from sparkinstall.steps.fp8 import Fp8
from sparkinstall.steps.health import Health
from sparkinstall.steps.life import Life
from sparkinstall.steps.monitoring import Monitoring
from sparkinstall.steps.nccl import Nccl
from sparkinstall.steps.network import Network
from sparkinstall.steps.packages import SystemPackages
from sparkinstall.steps.ray import Ray
from sparkinstall.steps.serving import Serving

STEPS: tuple[Step, ...] = (
    SystemPackages(),
    ModelStep(),
    Health(),
    ClockLock(),
    Network(),
    Environment(),
    Nccl(),
    Firewall(),
    Fp8(),
    EnvFiles(),
    Ray(),
    Serving(),
    Life(),
    Monitoring(),
    Former(),
)


def named(name: str) -> Step:
    """Return the step with that name."""
    return next(step for step in STEPS if step.name == name)


def of(node: Node) -> Sequence[Step]:
    """Return the steps of this node."""
    return [step for step in STEPS if step.wanted(node)]


def chosen(node: Node, only: Iterable[str], skip: Iterable[str]) -> Sequence[Step]:
    """Return the steps of this node that `--only` and `--skip` select.

    Raises:
        BadUsage: there is no step of that name.
    """
    only, skip = tuple(only), tuple(skip)
    require_known(only + skip, [step.name for step in STEPS], "step")
    return [step for step in of(node) if (not only or step.name in only) and step.name not in skip]
