"""The CPU time that the proof of life uses beside a real vLLM.

    python -m benchmarks.life      as root; writes life.md

A node of the tests (systemd as PID 1) with vLLM built for the CPU; the service and its settings are those of a Spark.
"""

import datetime
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import table
from sparkinstall.layout import LIFE_LIVE, LIFE_UNIT, VLLM_UNIT
from tests.lab.node import Bind, FreshNode
from tests.support import vllm_on_cpu

RESULTS = Path(__file__).with_name("life.md")
REPOSITORY = Path(__file__).parents[1]
CHECKOUT, MODEL, PREFIX = "/srv/checkout", "/srv/model", "/opt/sparkinstall"
SECONDS = 60.0
LOADING = 900.0
ENV = f'VLLM_HOST_IP="127.0.0.1"\nPATH="{PREFIX}/venv/bin:/usr/local/bin:/usr/bin:/bin"\n'
# The kernel's ticks of the service's process and of the programs that it has run and waited for, and a tick's length.
TICKS = """
import os, sys
fields = open(f"/proc/{sys.argv[1]}/stat").read().rpartition(")")[2].split()
print(sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"))
"""


def main() -> None:
    """Measure, and write life.md."""
    with tempfile.TemporaryDirectory() as scratch:
        model = vllm_on_cpu.model(Path(scratch, "model"))
        Path(scratch).chmod(0o755)
        parts = [Bind(vllm_on_cpu.environment(), vllm_on_cpu.PLACE), Bind(REPOSITORY, CHECKOUT), Bind(model, MODEL)]
        with FreshNode(bind=parts) as node:
            _prepare(node)
            for step in ("serving", "life"):
                _converge(node, step)
            starting = _share(node)
            _wait_for(node, "alive", "idle")
            serving = _share(node)
    RESULTS.write_text(_report({"vLLM starts: nothing listens": starting, "vLLM serves, idle": serving}))
    print(RESULTS.read_text())


def _prepare(node: FreshNode) -> None:
    node.run("install", "-d", "-o", "spark", "-g", "spark", PREFIX, f"{PREFIX}/env")
    node.write(f"{PREFIX}/env/single-node.env", ENV, user="spark")
    node.run("mkdir", f"/etc/systemd/system/{VLLM_UNIT}.d")
    node.write(f"/etc/systemd/system/{VLLM_UNIT}.d/cpu.conf", vllm_on_cpu.DROP_IN)


def _converge(node: FreshNode, step: str) -> None:
    words = ("-m", "tests.support.ray_on_a_node", "converge", "single", f"step={step}", f"serving.model={MODEL}")
    env = {"PYTHONPATH": CHECKOUT, "PYTHONDONTWRITEBYTECODE": "1"}
    length = "serving.max_model_len=512"
    node.run(f"{PREFIX}/venv/bin/python", *words, length, user="spark", env=env, cwd=CHECKOUT, timeout=600)


def _wait_for(node: FreshNode, *states: str) -> None:
    until = time.monotonic() + LOADING
    while (state := _state(node)["state"]) not in states:
        if time.monotonic() > until:
            raise RuntimeError(f"vLLM is still {state}")
        time.sleep(2)


def _state(node: FreshNode) -> dict[str, Any]:
    return dict(json.loads(node.read(f"{LIFE_LIVE}/state.json")))


def _share(node: FreshNode) -> float:
    """The share of one core that the service uses for a minute."""
    time.sleep(2)
    before, began = _cpu(node), time.monotonic()
    time.sleep(SECONDS)
    return (_cpu(node) - before) / (time.monotonic() - began)


def _cpu(node: FreshNode) -> float:
    pid = node.run("systemctl", "show", "-P", "MainPID", LIFE_UNIT).stdout.strip()
    return float(node.run("python3", "-I", "-c", TICKS, pid).stdout)


def _report(found: dict[str, float]) -> str:
    made = (
        f"Made by `python -m benchmarks.life` on {datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}."
    )
    rows = [(name, f"{share:.2%}") for name, share in found.items()]
    title = f"The service `vllm-life`, a look every 10 seconds, over {SECONDS:.0f} seconds"
    return "\n".join(["# Proof of life", "", made, "", table(title, ("", "of one core"), rows)])


if __name__ == "__main__":
    main()
