"""sparkinstall with two steps that run long programs in parallel, and would change more after them.

The programs write their process ids to SLEEPY_PIDS; with SLEEPY_HOW=stubborn they ignore TERM.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sparkinstall.errors import Problem
from sparkinstall.node import Node
from sparkinstall.resources import Drift, Resource, State
from sparkinstall.steps import Step
from sparkinstall.system import Reader, System

_SLEEP = 'trap "{trap}" TERM; echo $$ >> {pids}; while :; do sleep 0.1; done'


@dataclass(frozen=True)
class Sleep:
    """A resource that always differs and whose `apply` takes long."""

    key: str

    def check(self, on: Reader) -> State:
        del on
        return Drift(f"sleep for {self.key}")

    def apply(self, on: System) -> None:
        trap = "" if os.environ.get("SLEEPY_HOW") else "exit 1"
        script = _SLEEP.format(trap=trap, pids=os.environ["SLEEPY_PIDS"])
        try:
            on.run("sh", "-c", script)
        except Problem:
            # As in a step with an alternative.
            on.run("sh", "-c", script)
        on.write(f"/later/{self.key}", b"")


class One(Step):
    name = "one"
    why = "sleeps"

    def resources(self, node: Node) -> Iterable[Resource]:
        del node
        yield Sleep(f"{self.name}-first")


class Two(One):
    name = "two"


def main() -> None:
    """Run sparkinstall with these steps instead of its own."""
    from sparkinstall.__main__ import main as run
    from sparkinstall.core import catalogue
    from sparkinstall.system import processes

    steps: Any = catalogue
    steps.STEPS = (One(), Two())
    waits: Any = processes
    waits._GRACE = 1.0
    run()


if __name__ == "__main__":
    main()
