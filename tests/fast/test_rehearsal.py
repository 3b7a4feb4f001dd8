"""Rehearsals with vLLM's real wheels: `fp8.fallback`, the env files, `run --force`, and a stack without a lock."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sparkinstall.facts.env_file import assignments
from tests.support.rehearsals import Rehearsal, envelope, sparkinstall

pytestmark = pytest.mark.network
W8A8 = "vllm/model_executor/layers/quantization/utils/w8a8_utils.py"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """Stack 0.18.1: CUTLASS code for sm_120a only."""
    rehearsal = Rehearsal(tmp_path_factory.mktemp("old") / "node", ("--stack", "0.18.1"))
    assert rehearsal.all().returncode == 0
    return rehearsal


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """The default stack with the wheels that a Spark would get."""
    rehearsal = Rehearsal(tmp_path_factory.mktemp("spark") / "node", ("--platform", "aarch64"))
    assert rehearsal.all().returncode == 0
    return rehearsal


def _decision(rehearsal: Rehearsal) -> dict[str, Any]:
    return dict(json.loads((rehearsal.root / "opt/sparkinstall/fp8.json").read_text()))


def _file(rehearsal: Rehearsal) -> str:
    (path,) = rehearsal.root.glob(f"opt/sparkinstall/venv/lib/python3.*/site-packages/{W8A8}")
    return path.read_text()


def _env(rehearsal: Rehearsal, name: str = "single-node") -> str:
    return (rehearsal.root / f"opt/sparkinstall/env/{name}.env").read_text()


def test_fp8_fallback_with_code_for_another_gpu_is_on(old: Rehearsal) -> None:
    decision = _decision(old)
    assert (decision["fallback"], decision["how"]) == (True, "code")
    assert "CUTLASS_FP8_SUPPORTED = False" in _file(old)
    assert 'VLLM_DISABLED_KERNELS="CutlassFP8ScaledMMLinearKernel"' in _env(old)


def test_fp8_fallback_with_code_for_the_family_is_off(spark: Rehearsal) -> None:
    decision = _decision(spark)
    assert decision["fallback"] is False
    assert "sm_120f" in decision["why"]
    assert "CUTLASS_BLOCK_FP8_SUPPORTED = cutlass_block_fp8_supported()" in _file(spark)
    assert "VLLM_DISABLED_KERNELS" not in _env(spark)


def test_environment_for_aarch64_has_its_wheels(spark: Rehearsal) -> None:
    (extension,) = spark.root.glob("opt/sparkinstall/venv/lib/python3.*/site-packages/vllm/_C_stable_libtorch.abi3.so")
    with open(extension, "rb") as library:
        # `e_machine` of the ELF header: EM_AARCH64.
        assert int.from_bytes(library.read(20)[18:], "little") == 183


def test_fp8_fallback_set_on_and_auto_patches_and_restores_the_file(spark: Rehearsal) -> None:
    before = _file(spark)
    assert spark.all("--set", "fp8.fallback=on").returncode == 0
    assert "sparkinstall fix 5" in _file(spark)
    assert "VLLM_DISABLED_KERNELS" in _env(spark)
    assert spark.all("--set", "hub.offline=false").returncode == 0
    verified = sparkinstall("verify", "--root", spark.root)
    assert verified.returncode == 0, "verify uses the options of the last two runs: " + verified.stdout
    assert spark.all("--set", "fp8.fallback=auto").returncode == 0
    assert _file(spark) == before


def test_fp8_with_a_half_patched_file_fails_until_it_is_rebuilt(old: Rehearsal) -> None:
    (path,) = old.root.glob(f"opt/sparkinstall/venv/lib/python3.*/site-packages/{W8A8}")
    whole = path.read_text()
    half = whole.replace("CUTLASS_FP8_SUPPORTED = False", "CUTLASS_FP8_SUPPORTED = True")
    path.write_text(half)
    answer = envelope(old.all("--json"))
    assert answer["exit_code"] == 1
    assert W8A8 in answer["errors"][0]["message"]
    assert "sha256" in answer["errors"][0]["message"]
    assert "run environment --force" in answer["errors"][0]["hint"]
    assert path.read_text() == half
    rebuilt = sparkinstall("run", "environment", "fp8", "--force", "--root", old.root)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert path.read_text() == whole


def test_run_force_names_the_steps_that_are_open_now(old: Rehearsal) -> None:
    rebuilt = sparkinstall("run", "environment", "--force", "--root", old.root)
    assert rebuilt.returncode == 0
    assert "Open now: fp8" in rebuilt.stdout
    assert old.all().returncode == 0


def test_verify_in_a_rehearsal_passes_with_skipped_probes(old: Rehearsal) -> None:
    answer = envelope(sparkinstall("verify", "--json", "--root", old.root))
    verdicts = {probe["name"]: probe["verdict"] for probe in answer["data"]["probes"]}
    assert answer["exit_code"] == 0
    assert verdicts["wheel-gate"] == "pass"
    assert verdicts["imports"] == "skip"


def test_status_in_a_rehearsal_proves_no_fix(old: Rehearsal) -> None:
    answer = envelope(sparkinstall("status", "--json", "--root", old.root))
    standing = {fix["number"]: fix["standing"] for fix in answer["data"]["fixes"]}
    assert standing[2] == "not_applicable"
    assert standing[6] == "node_only"
    assert "proven" not in standing.values()


@pytest.mark.parametrize("shell", ["bash", "dash"])
@pytest.mark.parametrize("name", ["single-node", "multi-node-head", "multi-node-worker"])
def test_env_files_can_be_sourced(old: Rehearsal, shell: str, name: str) -> None:
    path = old.root / f"opt/sparkinstall/env/{name}.env"
    script = f'. {shlex.quote(str(path))} && env && command -v vllm && echo "PATH:$PATH"'
    done = subprocess.run([shell, "-euc", script], capture_output=True, text=True, check=True)
    assert "RAY_memory_usage_threshold=1.0" in done.stdout
    # `activate` names the environment itself, not the link that leads to it.
    in_use = (old.root / "opt/sparkinstall/venv").resolve()
    assert f"VIRTUAL_ENV={in_use}\n" in done.stdout
    assert f"\n{in_use}/bin/vllm\n" in done.stdout
    # A shell keeps its PATH; the line with the whole PATH is for systemd.
    assert f"{in_use}/bin:" in done.stdout
    assert "/usr/local/cuda/bin:/usr/local/sbin" not in done.stdout.split("PATH:")[-1]
    # A service finds ninja in the environment and nvcc in the toolkit: FlashInfer calls both by name.
    of_service = assignments(path.read_bytes())
    assert of_service["PATH"].split(":")[:2] == [f"{of_service[name]}/bin" for name in ("VIRTUAL_ENV", "CUDA_HOME")]


def test_env_files_and_home_contain_no_secret(tmp_path: Path, small: tuple[str, ...]) -> None:
    rehearsal = Rehearsal(tmp_path / "node", small)
    secret = "hf_" + "x1Y2z3" * 6
    run = rehearsal.all(HF_TOKEN=secret, MY_PASSWORD="correct-horse-battery")
    assert run.returncode == 0
    everything = run.stdout + run.stderr
    for path in (rehearsal.root / "opt/sparkinstall/env").iterdir():
        everything += path.read_text()
    for path in rehearsal.home.rglob("*"):
        everything += path.read_text(errors="replace") if path.is_file() else ""
    assert secret not in everything
    assert "correct-horse-battery" not in everything


OWN_STACK = """\
name: mine
summary: pins of my own, without a lock
vllm: "0.22.1"
python: "3.12"
as_of: "2026-07-05"
requirements: [vllm==0.22.1, torch==2.11.0, triton==3.6.0, transformers==4.57.6, ray==2.60.0]
nccl: {version: "2.28.9", tag: v2.28.9-1, commit: dbc86fd06e8b0c4517b95d8958a09ccacf9520c9}
platforms: {x86_64: {}, aarch64: {}}
"""


def test_stack_without_a_lock_is_recorded_and_enforced(tmp_path: Path) -> None:
    stack = tmp_path / "mine.yaml"
    stack.write_text(OWN_STACK)
    rehearsal = Rehearsal(tmp_path / "node", ("--stack", str(stack), "--platform", "aarch64"))
    assert envelope(rehearsal.all("--json"))["exit_code"] == 0
    (lock,) = rehearsal.root.glob("opt/sparkinstall/locks/mine.aarch64.lock")
    recorded = lock.read_text()
    assert "vllm==0.22.1" in recorded
    assert recorded.count("--hash=sha256:") > 100
    assert envelope(rehearsal.all("--json"))["data"]["changed"] is False
    before, vllm, after = recorded.partition("vllm==0.22.1 \\\n    --hash=sha256:")
    lock.write_text(before + vllm + "0" * 64 + after[64:])
    answer = envelope(rehearsal.all("--json"))
    assert answer["exit_code"] == 1
    assert "does not have the hash" in answer["errors"][0]["cause"]
