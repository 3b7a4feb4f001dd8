"""What a switch to another stack leaves: removed once everything else is up to date."""

from collections.abc import Iterable

from sparkinstall.node import Node
from sparkinstall.resources import Resource
from sparkinstall.resources.venv import FormerEnvironments
from sparkinstall.steps import Step


class Former(Step):
    name = "former"
    why = "removes the environment of a former stack, unless `environment.keep_old` is set"
    # Last: services that still run from it are restarted before, and after a failure it is whole.
    needs = ("environment", "env-files", "ray", "serving")
    phase = "services"
    impact = "The former environment takes up disk space."

    def resources(self, node: Node) -> Iterable[Resource]:
        yield FormerEnvironments(node)
