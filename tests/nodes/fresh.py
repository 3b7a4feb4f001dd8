"""A fresh Debian node with the checkout on it, and the commands that a user types there."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.commands import Completed
from tests.lab.node import Bind, FreshNode
from tests.support.cuda_toolkit import toolkit
from tests.support.nccl_source import tarball

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKOUT = "/home/spark/sparkinstall"
COMMAND = "/home/spark/.local/bin/sparkinstall"
# Checks of a Spark's hardware; all others must pass here too.
NOT_A_SPARK = ("machine", "arch", "os", "driver", "memory", "disk")
SPARK_UID = 1000
CONFIG = f"""\
stack: {CHECKOUT}/tests/lab/stacks/lab-full.yaml
nccl:
  source: /srv/nccl/{{tarball}}
  version: 2.29.7
  only_functions: AllReduce Sum f32 RING SIMPLE
"""


@contextmanager
def fresh_node(*more: Bind) -> Iterator[FreshNode]:
    """A node on this machine's network with a CUDA toolkit in its usual place and a cache that outlives it."""
    cache = _shared_cache()
    # NCCL must be built in this run.
    shutil.rmtree(cache / "nccl/built", ignore_errors=True)
    binds = [
        Bind(toolkit(), "/usr/local/cuda"),
        Bind(tarball().parent, "/srv/nccl"),
        Bind(cache, "/home/spark/.cache/sparkinstall", read_only=False),
        *more,
    ]
    with FreshNode(bind=binds) as node:
        node.run("chown", "spark:spark", "/home/spark/.cache")
        leave_out = [".git", ".venv", ".mypy_cache", ".ruff_cache", ".hypothesis", "__pycache__"]
        node.push(REPOSITORY, CHECKOUT, owner="spark", exclude=leave_out)
        node.write("/etc/sparkinstall.yaml", CONFIG.format(tarball=tarball().name))
        yield node


def _shared_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(base) / "sparkinstall" / "tests" / "node-cache"
    cache.mkdir(parents=True, exist_ok=True)
    os.chown(cache, SPARK_UID, SPARK_UID)
    return cache


def ignoring() -> list[str]:
    """`--ignore` for each check that asks for the hardware of a Spark."""
    return [word for name in NOT_A_SPARK for word in ("--ignore", name)]


def sparkinstall(node: FreshNode, *argv: str, check: bool = True, timeout: float = 1800) -> Completed:
    """The installed command, as the ordinary user `spark`."""
    return node.run(COMMAND, *argv, user="spark", cwd="/home/spark", check=check, timeout=timeout)


def objects(node: FreshNode, prefix: str) -> dict[str, int]:
    """The object files of the NCCL build below `prefix`, each with its time of change (ns)."""
    found = (node.root / prefix.lstrip("/")).glob("nccl/build-*/obj/**/*.o")
    return {str(path): path.stat().st_mtime_ns for path in found}


def wait_for_objects(node: FreshNode, prefix: str, count: int, seconds: float = 600) -> None:
    """Return when the build has compiled so many object files."""
    until = time.monotonic() + seconds
    while len(objects(node, prefix)) < count:
        assert time.monotonic() < until, f"{len(objects(node, prefix))} of {count} object files in {seconds:g} s"
        time.sleep(0.1)


NOT_COMPARED = (
    "/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp", "/var/log", "/var/cache", "/var/lib/apt", "/var/lib/dpkg",
    "/var/lib/systemd", "/etc/ld.so.cache", "/home/spark/.cache", "/home/spark/.local", CHECKOUT, "/usr/local/cuda",
    "/srv", "/usr/share/man", "/usr/lib/python3*/__pycache__", "*/__pycache__",
)  # fmt: skip
