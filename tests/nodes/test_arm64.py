"""sparkinstall on aarch64, in a chroot under qemu: it starts there and plans a Spark's wheels."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import arm64, commands
from tests.support.bundles import WHEEL, Maker
from tests.support.bytecode import compile_modules
from tests.support.tiny_stack import small_stack

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
        # What this machine compiles in a second takes half a minute under qemu.
        compile_modules(tree.root / arm64.SITE, f"/{arm64.SITE}")
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


def test_bundle_made_on_another_architecture_is_installed_on_arm64_without_a_network(
    spark: arm64.Arm64, tmp_path: Path
) -> None:
    maker = Maker(tmp_path, small_stack(tmp_path / "stack"), platform="aarch64", real_tool=True)
    home = spark.root / "root"
    maker.created(home / "b.tar")
    shutil.copytree(maker.stack.parent, home / "stack")

    def run(*argv: str) -> str:
        # Without the packages of the other tests.
        inside = spark.command(*argv, env={"PYTHONPATH": "", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, cwd="/root")
        return commands.run("unshare", "--net", *inside, timeout=600).stdout

    run("tar", "-xf", "b.tar", "sparkinstall")
    options = ("--root", "./node", "--stack", "stack/tiny.yaml", *WHEEL)
    assert "is done. Next:" in run("sparkinstall/install.sh", "--bundle", "b.tar", *options)
    assert "(stack tiny, aarch64)" in run("sparkinstall/install.sh", "--bundle", "b.tar", *options)
    run(".local/bin/sparkinstall", "uninstall", "--root", "./node")
    assert not (home / "node").exists()
