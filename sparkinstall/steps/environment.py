"""Fix 6: the same Python packages on every node, from one lock."""

from collections.abc import Iterable

from sparkinstall.fixes import PACKAGES, REASONING
from sparkinstall.node import Node
from sparkinstall.probes import Probe, wheels
from sparkinstall.resources import Resource
from sparkinstall.resources.files import Link
from sparkinstall.resources.venv import RecordedLock, environment_of, lock_of
from sparkinstall.steps import Step


class Environment(Step):
    name = "environment"
    why = "vLLM and its dependencies, pinned, in one venv"
    needs = ("packages",)
    phase = "build"
    impact = "vLLM may not start, or may behave differently than on the other nodes."
    fixes = (PACKAGES, REASONING)

    def resources(self, node: Node) -> Iterable[Resource]:
        if not node.wheels.complete:
            yield RecordedLock(node)
        yield environment_of(node)
        if path := node.config.environment.link:
            yield Link(node.home + path[1:] if path.startswith("~/") else path, node.venv)

    def probes(self, node: Node) -> Iterable[Probe]:
        yield Probe(
            "wheel-gate", "compatibility of the packages", lambda on: wheels.gate(node, lock_of(node, on) or (), on),
            "static",
            "vLLM cannot load a model with these packages, whatever its settings are.", PACKAGES,
        )  # fmt: skip
        yield Probe(
            "reasoning-field", "reasoning field of a stream", lambda on: wheels.reasoning_fields(node, on), "static",
            "A client may show no reasoning, or show it as raw text.", REASONING,
        )  # fmt: skip
        yield Probe(
            "wheel-files", "files of the packages", lambda on: wheels.files(node, on), "node",
            "vLLM may run unreleased code, and behave differently than on the other nodes.", PACKAGES,
        )  # fmt: skip
