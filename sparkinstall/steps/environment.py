"""Fix 6: the same Python packages on every node, from one lock."""

from collections.abc import Iterable

from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe
from sparkinstall.probes.reasoning import reasoning_fields
from sparkinstall.probes.wheels import Gate
from sparkinstall.resources import Resource
from sparkinstall.resources.files import Link
from sparkinstall.resources.venv import PythonEnvironment, RecordedLock, lock_of
from sparkinstall.steps import Step
from sparkinstall.system import Reader


class Environment(Step):
    name = "environment"
    why = "vLLM and all it needs, pinned, in one venv"
    needs = ("packages",)
    looks_at_files = True

    def resources(self, node: Node) -> Iterable[Resource]:
        if not node.wheels.complete:
            yield RecordedLock(node)
        yield PythonEnvironment(node)
        if node.config.environment.link:
            yield Link(_in_home(node, node.config.environment.link), node.venv)

    def probes(self, node: Node) -> Iterable[Probe]:
        yield Probe("wheel-gate", "the packages fit together", lambda on: _gate(node, on), "static")
        yield Probe(
            "reasoning-field", "the reasoning field of a stream", lambda on: reasoning_fields(node, on), "static"
        )
        yield Probe("wheel-files", "the files of the packages", lambda on: _wheel_files(node, on), "node")


def _gate(node: Node, on: Reader) -> Finding:
    return Gate(node, lock_of(node, on) or ()).look(on)


def _wheel_files(node: Node, on: Reader) -> Finding:
    # Imported late: a run with nothing to do asks static probes alone, and would start more slowly.
    from sparkinstall.probes import wheel_files

    return wheel_files.look(node, on)


def _in_home(node: Node, path: str) -> str:
    return node.home + path[1:] if path.startswith("~/") else path
