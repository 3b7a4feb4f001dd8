"""The steps `ray`, `serving` and `life` on a node, without the other steps, whose work the test does itself.

    python -m tests.support.ray_on_a_node plan|converge|probe|uninstall ROLE [NAME=VALUE...]

Prints one JSON object. NAME is a setting, or one of `token_file` and `step`. Waits of minutes take seconds.
"""

import json
import sys
from pathlib import Path
from typing import Any

from msgspec import to_builtins as asdict
from msgspec.structs import replace

# It imports all undo functions.
import sparkinstall.core.catalogue  # noqa: F401
from sparkinstall import stacks
from sparkinstall.config import Layer, build, parse_assignment
from sparkinstall.core import engine
from sparkinstall.events import silent
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.journal.undo import undo_all
from sparkinstall.node import Node
from sparkinstall.resources import Drift
from sparkinstall.steps import ray
from sparkinstall.steps.life import Life
from sparkinstall.steps.serving import Serving
from sparkinstall.system.local import LocalReader, LocalSystem

ADDRESSES = {"head": "192.0.2.1", "worker": "192.0.2.2"}
STEPS = {"ray": ray.Ray(), "serving": Serving(), "life": Life()}


def main() -> None:
    verb, role, *more = sys.argv[1:]
    values = dict(each.split("=", 1) for each in more)
    token_file, step = values.pop("token_file", ""), STEPS[values.pop("step", "ray")]
    ray._ADDRESS, ray._HEAD = 3, 5
    node = replace(declared_node(role, values), token_file=token_file)
    print(
        json.dumps({"plan": _plan, "converge": _converge, "probe": _probe, "uninstall": _uninstall}[verb](node, step))
    )


def declared_node(role: str, values: dict[str, str]) -> Node:
    cluster = {"cluster.role": role, "cluster.head": ADDRESSES["head"], "cluster.workers": [ADDRESSES["worker"]]}
    settings = dict(parse_assignment(f"{name}={value}") for name, value in values.items())
    config = build([Layer("test", {**cluster, **settings})])[0]
    home = str(Path.home())
    return Node(config, stacks.load(config.stack), "x86_64", "x86_64", False, False, home, Path(home, ".cache"))


def _plan(node: Node, step: Any) -> Any:
    (report,) = engine.plan([step], node, LocalReader())
    return _shown(report)


def _converge(node: Node, step: Any) -> Any:
    state = StateFolder(LocalSystem())
    with state.hold("test", silent) as run:
        journal = state.journal(run)
        log = state.logs(run) / "log"
        make = lambda name: JournaledSystem(state.system, journal, name, log, silent)  # noqa: E731
        (report,) = engine.converge([step], node, make, silent)
    return _shown(report)


def _shown(report: engine.StepReport) -> Any:
    problem = report.problem
    drifts = [each.summary for each in report.checked if isinstance(each, Drift)]
    shown: dict[str, Any] = {"outcome": report.outcome, "seconds": report.seconds, "drifts": drifts}
    if problem:
        shown |= {
            "message": problem.message,
            "cause": problem.cause,
            "hint": problem.hint,
            "output": list(problem.output),
        }
    return shown


def _probe(node: Node, step: Any) -> Any:
    on = LocalReader()
    return {probe.name: asdict(probe.look(on)) for probe in step.probes(node)}


def _uninstall(node: Node, step: Any) -> Any:
    del node, step
    return [asdict(each) for each in undo_all(StateFolder(LocalSystem()))]


if __name__ == "__main__":
    main()
