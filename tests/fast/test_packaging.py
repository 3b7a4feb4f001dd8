"""sdist -> wheel -> a new environment -> `plan`: a release has all files that it needs."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from uv import find_uv_bin

REPOSITORY = Path(__file__).resolve().parents[2]
CONTAINED = (
    "sparkinstall/_assets/templates/single-node.env.j2",
    "sparkinstall/_assets/patches/patches.yaml",
    "sparkinstall/_assets/knowledge/logs/nccl.yaml",
    "sparkinstall/stacks/0.18.1.yaml",
    "sparkinstall/stacks/0.18.1.aarch64.lock",
)


def _run(*argv: str, cwd: Path) -> str:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, as an index would serve it."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), ".", cwd=REPOSITORY)
    (sdist,) = out.glob("*.tar.gz")
    # tarfile has no filter before Python 3.11.4, and from 3.12 on it warns without one.
    _run("tar", "-xzf", str(sdist), cwd=out)
    source = out / sdist.name.removesuffix(".tar.gz")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), ".", cwd=source)
    return next(out.glob("*.whl"))


def test_wheel_contains_templates_patches_and_locks(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(CONTAINED) <= names
    assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.network
def test_wheel_installed_from_the_lock_plans(wheel: Path, tmp_path: Path) -> None:
    uv, install = find_uv_bin(), ("pip", "install", "--quiet", "--python", "tool")
    _run(uv, "venv", "--quiet", "--python", sys.executable, "tool", cwd=tmp_path)
    _run(uv, *install, "--require-hashes", "-r", str(REPOSITORY / "requirements.lock"), cwd=tmp_path)
    _run(uv, *install, "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    output = _run(str(tmp_path / "tool/bin/sparkinstall"), "plan", "--json", "--root", "./node", cwd=tmp_path)
    plan = json.loads(output)
    assert plan["exit_code"] == 0
    assert {"packages", "environment"} <= {step["step"] for step in plan["data"]["steps"]}
    assert not (tmp_path / "node").exists()
