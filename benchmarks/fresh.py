"""A fresh install of an environment and NCCL, compared with the same by hand: venv, pip, tar, make.

Both have warm caches, the same lock, source and compiler, and the same flags of make.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import Environment
from benchmarks.timing import Command, Long, Spread, in_turns, once
from benchmarks.wheel_cache import cache_of_wheels
from tests.support.cuda_toolkit import toolkit
from tests.support.nccl_source import VERSION, tarball

_STACK = "0.29.0"
_ROUNDS = 5
_FUNCTIONS = "AllReduce Sum f32 RING SIMPLE"
_GENCODE = "-gencode=arch=compute_121,code=sm_121"


@dataclass(frozen=True)
class Installed:
    """One run of sparkinstall; `proofs`: seconds of its probes, which have no equivalent by hand."""

    whole: Long
    proofs: float

    @property
    def installing(self) -> float:
        """Seconds without the probes."""
        return self.whole.seconds - self.proofs


@dataclass(frozen=True)
class Fresh:
    """Seconds. `by_hand`: by step, in order.

    `again`: the same below another prefix, with the NCCL of the cache. `verify`: `verify --level node` on the installed
    node.
    """

    first: Installed
    again: Installed
    by_hand: Mapping[str, Long]
    engine: Mapping[str, float]
    verify: Spread
    full: bool


def measure(tool: Environment, work: Path, full: bool) -> Fresh:
    """Run each once."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    # A new cache with wheels, but without a built NCCL.
    env = {"XDG_CACHE_HOME": str(cache_of_wheels(work / "cache"))}
    lock = _warm_caches(tool, work, full, env)
    first, engine = _ours(tool, work, full, env)
    verify = _verify(tool, work / "node", env)
    shutil.rmtree(work / "node")
    again, _ = _ours(tool, work, full, env)
    shutil.rmtree(work / "node")
    by_hand = _by_hand(tool, work / "by-hand", lock)
    shutil.rmtree(work)
    return Fresh(first, again, by_hand, engine, verify, full)


def _warm_caches(tool: Environment, work: Path, full: bool, env: Mapping[str, str]) -> Path:
    """Install once in each way; return the lock of sparkinstall's installation."""
    toolkit()
    node = work / "warm"
    arguments = _arguments(node, full)
    Command((tool.program("sparkinstall"), *arguments, "--set", "nccl.mode=wheel"), env).run()
    lock = work / "installed.lock"
    shutil.copy(node / "opt/sparkinstall/venv/installed.lock", lock)
    _venv(tool, work / "warm-pip").run()
    _pip_install(work / "warm-pip", lock).run()
    shutil.rmtree(node)
    shutil.rmtree(work / "warm-pip")
    return lock


def _arguments(node: Path, full: bool) -> tuple[str, ...]:
    part = "--full" if full else "--partial"
    return ("all", "--root", str(node), "--stack", _STACK, part, "--json")


def _ours(tool: Environment, work: Path, full: bool, env: Mapping[str, str]) -> tuple[Installed, dict[str, float]]:
    """The run, and the seconds of engine_share.py."""
    settings = {
        "source": str(tarball()),
        "version": VERSION,
        "cuda_home": str(toolkit()),
        "only_functions": _FUNCTIONS,
    }
    options = [word for key, value in settings.items() for word in ("--set", f"nccl.{key}={value}")]
    wrapper, found = Path(__file__).with_name("engine_share.py"), work / "engine.json"
    argv = (tool.python, "-P", str(wrapper), str(found), *_arguments(work / "node", full), *options)
    whole, output = once(Command(argv, env))
    probes = json.loads(output)["data"]["probes"]
    return Installed(whole, sum(each["seconds"] for each in probes)), json.loads(found.read_text())


def _verify(tool: Environment, node: Path, env: Mapping[str, str]) -> Spread:
    arguments = (tool.program("sparkinstall"), "verify", "--root", str(node), "--level", "node")
    return in_turns({"verify": Command(arguments, env)}, _ROUNDS)["verify"]


def _venv(tool: Environment, venv: Path) -> Command:
    return Command((tool.python, "-m", "venv", str(venv)))


def _pip_install(venv: Path, lock: Path) -> Command:
    return Command((str(venv / "bin/pip"), "install", "--quiet", "--no-deps", "--require-hashes", "-r", str(lock)))


def _by_hand(tool: Environment, folder: Path, lock: Path) -> dict[str, Long]:
    folder.mkdir()
    taken = {"python -m venv": once(_venv(tool, folder / "venv"))[0]}
    taken["pip install"], _ = once(_pip_install(folder / "venv", lock))
    taken["tar"], _ = once(Command(("tar", "-xf", str(tarball())), cwd=folder))
    (source,) = (path for path in folder.iterdir() if path.name != "venv")
    for label, jobs in (("make -j", (f"-j{len(os.sched_getaffinity(0))}",)), ("make", ())):
        build = (f"BUILDDIR={folder / label.replace(' ', '')}", f"CUDA_HOME={toolkit()}")
        flags = (f"NVCC_GENCODE={_GENCODE}", f"ONLY_FUNCS={_FUNCTIONS}")
        taken[label], _ = once(Command(("make", *jobs, "-C", str(source), "src.build", *build, *flags)))
    return taken
