"""NCCL, really built for sm_121 by the step itself: killed on the way, gone on with, and proven."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkinstall import elf
from tests.support.cuda_toolkit import toolkit
from tests.support.nccl_source import tarball
from tests.support.wheel_cache import cache_of_wheels

pytestmark = [pytest.mark.layer4, pytest.mark.network]
REPOSITORY = Path(__file__).resolve().parents[2]


class Rehearsal:
    """A rehearsal of stack 0.32.0 with a small build of NCCL 2.29.7; its cache has wheels, and no NCCL yet."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.root = folder / "node"
        self.cache = cache
        self.options = [
            "--root", str(self.root), "--stack", "0.32.0", "--set", f"nccl.source={tarball()}",
            "--set", f"nccl.cuda_home={toolkit()}", "--set", "nccl.only_functions=AllReduce Sum f32 RING SIMPLE",
        ]  # fmt: skip
        self.library = self.root / "opt/sparkinstall/nccl/lib/libnccl.so.2"

    def start(self, *argv: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "sparkinstall", *argv, *self.options, "--json"],
            cwd=REPOSITORY,
            env={**os.environ, "XDG_CACHE_HOME": str(self.cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: str, code: int = 0) -> dict[str, Any]:
        out, err = (process := self.start(*argv)).communicate(timeout=1800)
        assert process.returncode == code, out + err
        return dict(json.loads(out))

    def objects(self) -> int:
        return sum(1 for _ in self.root.glob("opt/sparkinstall/nccl/build-*/obj/**/*.o"))

    def kill_after(self, objects: int, *argv: str) -> None:
        """Start it, and SIGKILL it when so many objects are compiled."""
        process, until = self.start(*argv), time.monotonic() + 600
        while self.objects() < objects:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache_of_wheels(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Rehearsal]:
    """Built in two goes, with a SIGKILL between them."""
    rehearsal = Rehearsal(tmp_path_factory.mktemp("nccl"), cache)
    rehearsal.kill_after(40, "all")
    rehearsal.run("all")
    yield rehearsal


def test_the_file_itself_says_that_it_is_for_sm_121(built: Rehearsal) -> None:
    assert "sm_121" in {code.arch for code in elf.gpu_code(built.library)}
    stamp = json.loads((built.root / "opt/sparkinstall/nccl/build.json").read_text())
    assert stamp["build_id"] == elf.build_id(built.library)
    assert stamp["recipe"]["version"] == "2.29.7"


def test_it_is_what_a_process_with_the_env_file_has_loaded(built: Rehearsal) -> None:
    probes = {probe["name"]: probe for probe in built.run("verify")["data"]["probes"]}
    assert probes["nccl-loaded"]["verdict"] == "pass"
    assert "opt/sparkinstall/nccl/build-" in probes["nccl-loaded"]["found"]
    assert probes["nccl-preload"]["verdict"] == "pass"
    assert "sm_121" in probes["nccl-preload"]["found"]


def test_it_is_not_built_again(built: Rehearsal) -> None:
    before = built.library.stat().st_mtime_ns
    assert built.run("all")["data"]["changed"] is False
    assert built.library.stat().st_mtime_ns == before


def test_below_another_prefix_it_is_what_was_built_before(built: Rehearsal, tmp_path: Path) -> None:
    another = Rehearsal(tmp_path, built.cache)
    (step,) = another.run("plan", "--only", "nccl")["data"]["steps"]
    assert "install NCCL 2.29.7 for sm_121 from the cache" in str(step)
    another.run("run", "nccl")
    assert another.library.read_bytes() == built.library.read_bytes()
    assert another.objects() == 0
    assert another.run("run", "nccl")["data"]["changed"] is False


@pytest.mark.parametrize("damaged", [True, False])
def test_it_is_built_where_what_is_kept_is_damaged_or_not_wanted(
    built: Rehearsal, tmp_path: Path, damaged: bool
) -> None:
    another = Rehearsal(tmp_path, tmp_path / "cache")
    shutil.copytree(built.cache, another.cache, symlinks=True)
    if damaged:
        (kept,) = another.cache.glob("sparkinstall/nccl/built/*/libnccl.so")
        kept.write_bytes(kept.read_bytes()[:-1])
    else:
        another.run("run", "nccl")
    another.kill_after(1, "run", "nccl", *([] if damaged else ["--force"]))


def test_another_recipe_would_be_a_build(built: Rehearsal) -> None:
    plan = built.run("plan", "--only", "nccl", "--set", "nccl.arch=120")
    assert plan["data"]["drift"] is True


def test_an_arch_that_nvcc_does_not_know_is_refused_before_time_is_lost(built: Rehearsal) -> None:
    answer = built.run("run", "nccl", "--set", "nccl.arch=999", code=4)
    assert "nvcc 13.0 does not support compute_999" in str(answer["errors"])


def test_a_source_of_another_version_is_refused(built: Rehearsal) -> None:
    answer = built.run("run", "nccl", "--set", "nccl.version=2.28.9", code=1)
    assert "is the source of NCCL 2.29.7, not of 2.28.9" in answer["errors"][0]["message"]


def test_a_tarball_with_another_hash_is_refused(built: Rehearsal) -> None:
    answer = built.run("run", "nccl", "--set", f"nccl.sha256={'0' * 64}", code=1)
    assert "does not have the expected hash" in answer["errors"][0]["message"]
    assert built.library.exists()


def test_all_of_it_goes_back(built: Rehearsal) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "sparkinstall", "uninstall", "--root", str(built.root), "--json"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout
    assert not built.root.exists()
