"""sparkinstall on aarch64, in a chroot under qemu: it starts there and plans a Spark's wheels."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import arm64

pytestmark = [pytest.mark.layer6, pytest.mark.network]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[arm64.Arm64]:
    """An arm64 tree with the built wheel of this checkout and its dependencies."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY)],
        check=True,
        capture_output=True,
    )
    (wheel,) = out.glob("*.whl")
    with arm64.chroot() as tree:
        tree.install(str(wheel))
        yield tree


def test_version_on_arm64_is_printed(spark: arm64.Arm64) -> None:
    assert "sparkinstall" in spark.run("python3", "-m", "sparkinstall", "--version").stdout


def test_plan_on_arm64_has_the_default_stack(spark: arm64.Arm64) -> None:
    answer = spark.run("python3", "-m", "sparkinstall", "plan", "--json", "--root", "/tmp/node")
    steps = {step["step"]: step for step in json.loads(answer.stdout)["data"]["steps"]}
    environment = steps["environment"]["resources"]
    assert "vllm 0.29.0 for aarch64" in environment[0]["summary"]


def test_plan_on_arm64_with_an_incomplete_lock_records_it(spark: arm64.Arm64) -> None:
    answer = spark.run("python3", "-m", "sparkinstall", "plan", "--json", "--root", "/tmp/node", "--stack", "0.18.1")
    steps = {step["step"]: step for step in json.loads(answer.stdout)["data"]["steps"]}
    assert steps["environment"]["resources"][0]["key"] == "lock:/opt/sparkinstall/locks/0.18.1.aarch64.lock"


def test_preflight_on_arm64_accepts_the_architecture(spark: arm64.Arm64) -> None:
    answer = spark.run("python3", "-m", "sparkinstall", "plan", "--json")
    checks = {check["name"]: check for check in json.loads(answer.stdout)["data"]["preflight"]}
    assert checks["arch"]["verdict"] == "pass"
    assert checks["machine"]["verdict"] == "fail"
