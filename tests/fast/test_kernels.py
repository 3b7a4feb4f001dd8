"""Which kernels run: recorded answers of vLLM and Triton, and processes of an environment that fail in every way."""

import json
import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sparkinstall.config import Config, NcclConfig
from sparkinstall.core import checks
from sparkinstall.events import silent
from sparkinstall.node import Node
from sparkinstall.payloads import inspect_env
from sparkinstall.probes import Finding, kernels, nccl_tests
from sparkinstall.probes import environment as environment_probes
from sparkinstall.resources.template import render
from sparkinstall.system import Result
from sparkinstall.system.local import LocalReader
from tests.support.nodes import node_of

# The selection of vLLM for sm_121 on a machine without a GPU, in the order of PICKED_FOR.
NAMES = ("block", "per-tensor", "per-channel")
PATCH_ALONE = ("W8A8BlockFp8LinearOp._run_triton", *["CutlassFP8ScaledMMLinearKernel"] * 2)
BOTH = (
    "W8A8BlockFp8LinearOp._run_triton",
    "PerTensorTorchFP8ScaledMMLinearKernel",
    "ChannelWiseTorchFP8ScaledMMLinearKernel",
)
CLASSES = ("TritonFp8BlockScaledMMKernel", *BOTH[1:])
TRITON = {
    "triton": "3.6.0", "arch": 121, "not_run": "no GPU", "target": "sm_121a",
    "ptxas": "/venv/triton/backends/nvidia/bin/ptxas-blackwell", "ptxas_version": "12.9",
}  # fmt: skip


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return node_of(tmp_path)


def judged(node: Node, root: Path, name: str, answer: Mapping[str, Any]) -> Finding:
    reply = msgspec.convert(answer, kernels.Answer)
    probe = next(probe for probe in kernels.probes(node, lambda _: reply, "") if probe.name == name)
    return probe.look(LocalReader(str(root)))


def decide(node: Node, root: Path, fallback: bool) -> None:
    path = root / node.fp8_decision.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"fallback": fallback, "why": "sm_120a only"}))


def picked(names: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {"fp8": {"picked": dict(zip(NAMES, names, strict=True)), "given_arch": "121", "not_run": "no GPU", **more}}


# --- fp8-kernels


@pytest.mark.parametrize(
    ("names", "fallback", "verdict"),
    [(BOTH, True, "pass"), (CLASSES, True, "pass"), (PATCH_ALONE, True, "fail"), (PATCH_ALONE, False, "pass")],
)
def test_fp8_kernels_with_the_fallback_are_not_cutlass(
    node: Node, tmp_path: Path, names: tuple[str, ...], fallback: bool, verdict: str
) -> None:
    decide(node, tmp_path, fallback)
    found = judged(node, tmp_path, "fp8-kernels", picked(names))
    assert found.verdict == verdict
    assert "for sm_121; no GPU here" in found.found
    assert all(name in found.found for name in names)


def test_is_cutlass_excludes_kernels_of_flashinfer() -> None:
    assert kernels.is_cutlass("CutlassFp8BlockScaledMMKernel")
    assert kernels.is_cutlass("W8A8BlockFp8LinearOp._run_cutlass")
    assert not kernels.is_cutlass("FlashInferCutlassMxfp8LinearKernel")


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        ({"not_asked": "vLLM cannot be imported"}, "skip"),
        ({"given_arch": "121", "error": "AttributeError: '_C' has no cutlass_scaled_mm_supports_fp8"}, "skip"),
        ({"given_arch": "", "error": "AttributeError: no choose_scaled_mm_linear_kernel"}, "skip"),
        ({"given_arch": "", "error": "ValueError: Failed to find a kernel"}, "fail"),
        ({"given_arch": "", "ended": "SIGILL"}, "fail"),
    ],
)
def test_fp8_kernels_without_a_selection_are_skipped_or_fail(
    node: Node, tmp_path: Path, facts: dict[str, Any], verdict: str
) -> None:
    decide(node, tmp_path, True)
    found = judged(node, tmp_path, "fp8-kernels", {"fp8": facts})
    assert found.verdict == verdict
    assert str(next(reversed(facts.values()))) in found.found


def test_fp8_kernels_without_a_decision_fail(node: Node, tmp_path: Path) -> None:
    assert judged(node, tmp_path, "fp8-kernels", picked(BOTH)).verdict == "fail"


# --- fp8-product


@pytest.mark.parametrize(
    ("off_by", "more", "verdict"),
    [
        ((0.027, 0.026, 0.027), {"trying": ""}, "pass"),
        ((0.027, 0.026, 1.4), {"trying": ""}, "fail"),
        ((0.027, float("nan"), 0.027), {"trying": ""}, "fail"),
        ((0.027,), {"trying": "per-channel", "ended": "SIGSEGV"}, "fail"),
        ((), {"trying": "per-tensor", "error": "RuntimeError: Error Internal"}, "fail"),
        ((), {"trying": "per-tensor", "error": "TypeError: apply_weights() takes 2 arguments"}, "skip"),
        ((), {"not_run": "no GPU"}, "skip"),
        ((), {"not_run": "only 900 MiB of memory are available"}, "skip"),
    ],
)
def test_fp8_product_far_from_the_exact_one_fails(
    node: Node, tmp_path: Path, off_by: tuple[float, ...], more: dict[str, Any], verdict: str
) -> None:
    named = dict(zip(("per-tensor", "per-channel", "block"), off_by, strict=False))
    answer = picked(CLASSES, **{"given_arch": "", "not_run": "", "off_by": named, **more})
    found = judged(node, tmp_path, "fp8-product", answer)
    assert found.verdict == verdict
    if "ended" in more or verdict == "fail":
        assert found.hint


def test_fp8_product_names_the_kernel_that_crashed(node: Node, tmp_path: Path) -> None:
    answer = picked(CLASSES, given_arch="", not_run="", trying="block", ended="SIGSEGV")
    found = judged(node, tmp_path, "fp8-product", answer)
    assert found.found == "block, TritonFp8BlockScaledMMKernel: its process ended: SIGSEGV"


# --- triton-compiles


@pytest.mark.parametrize(
    ("change", "verdict", "text"),
    [
        ({}, "pass", "sm_121a, compiled, not run: no GPU (ptxas 12.9, /venv"),
        ({"not_run": "", "arch": 90, "target": "sm_90a"}, "pass", "sm_90a, compiled and run"),
        ({"target": "sm_120"}, "fail", "a kernel for sm_120"),
        ({"target": ""}, "fail", "a kernel for nothing"),
        ({"error": "PTXASError: PTXAS error: Internal Triton PTX codegen error"}, "fail", "ptxas 12.9"),
        ({"ended": "no answer within 120 s"}, "fail", "no answer within 120 s"),
    ],
)
def test_triton_compiles_only_for_this_gpu_passes(
    node: Node, tmp_path: Path, change: dict[str, Any], verdict: str, text: str
) -> None:
    found = judged(node, tmp_path, "triton-compiles", {"triton_kernel": {**TRITON, **change}})
    assert (found.verdict, text in found.found) == (verdict, True), found
    assert bool(found.hint) == (verdict == "fail")


def test_triton_compiles_error_names_the_variable_that_is_not_read(node: Node, tmp_path: Path) -> None:
    answer = {"triton_kernel": {**TRITON, "error": "PTXASError: PTXAS error: Internal Triton PTX codegen error"}}
    assert "TRITON_PTXAS_PATH is not read" in judged(node, tmp_path, "triton-compiles", answer).hint


# --- the process


def environment(node: Node, root: Path, **modules: str) -> Node:
    """An environment of this Python, with stand-ins for the modules."""
    import sys

    site, programs = root / "site", root / node.venv.lstrip("/") / "bin"
    site.mkdir()
    programs.mkdir(parents=True)
    for name, source in {**dict.fromkeys(environment_probes.MODULES, ""), **modules}.items():
        (site / f"{name}.py").write_text(f"__version__ = '1.0'\n{source}")
    (programs / "python").symlink_to(sys.executable)
    (programs / "activate").write_text(f'export PATH="{programs}:$PATH" PYTHONPATH="{site}"\n')
    env_file = root / node.env_file.lstrip("/")
    env_file.parent.mkdir(parents=True)
    values = {
        "path": node.env_file, "stack": "test", "venv": str(root / node.venv.lstrip("/")), "library": "",
        "cuda_home": "/usr/local/cuda", "disabled_kernels": [], "fp8_why": "", "hub_offline": True,
    }  # fmt: skip
    env_file.write_bytes(render("single-node.env.j2", values))
    return replace(node, full=True, platform=node.machine)


NO_GPU = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
CRASHES = "import os\nclass cuda:\n    is_available = staticmethod(lambda: os.kill(os.getpid(), 11))\n"


def results(node: Node, root: Path) -> dict[str, Finding]:
    on = LocalReader(str(root))
    found = checks.look(environment_probes.probes(node), on, silent)
    return {each.name: each for each in found}


def test_inspection_crash_of_one_part_leaves_the_others(node: Node, tmp_path: Path) -> None:
    node = environment(node, tmp_path, torch=CRASHES)
    decide(node, tmp_path, True)
    found = results(node, tmp_path)
    assert found["imports"].verdict == "pass"
    assert found["fp8-kernels"].verdict == "fail"
    assert found["fp8-kernels"].found == "its process ended: SIGSEGV"
    # This Triton is a stand-in too: its child process reports what it lacks.
    assert "triton.language" in found["triton-compiles"].found


def test_inspection_of_all_probes_is_one_process(node: Node, tmp_path: Path) -> None:
    node = environment(node, tmp_path, torch=NO_GPU, vllm=f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\n")
    results(node, tmp_path)
    assert (tmp_path / "starts").read_text() == "x"


def test_inspection_ended_by_a_signal_names_it(node: Node, tmp_path: Path) -> None:
    node = environment(node, tmp_path, torch="import os\nos.kill(os.getpid(), 4)\n")
    assert {each.found for each in results(node, tmp_path).values() if each.verdict == "fail"} >= {
        "the process ended with SIGILL"
    }


def test_inspection_ignores_what_a_library_prints(node: Node, tmp_path: Path) -> None:
    noise = "import os\nos.system('echo {}')\nprint('{}')\n"
    node = environment(node, tmp_path, torch=NO_GPU, ray=noise)
    assert results(node, tmp_path)["imports"].verdict == "pass"


def test_inspection_names_a_module_that_cannot_be_imported(node: Node, tmp_path: Path) -> None:
    node = environment(node, tmp_path, torch=NO_GPU)
    (tmp_path / "site/vllm.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    found = results(node, tmp_path)
    assert "libcudart.so.12" in found["imports"].found
    assert (found["fp8-kernels"].verdict, found["fp8-kernels"].found) == ("skip", "vLLM cannot be imported")


def test_inspection_without_the_whole_environment_is_skipped(node: Node, tmp_path: Path) -> None:
    node = replace(environment(node, tmp_path), rehearsal=True, full=False)
    found = results(node, tmp_path)
    assert {found[name].verdict for name in ("triton-compiles", "fp8-kernels", "fp8-product")} == {"skip"}


def test_inspection_ends_a_child_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(asked: dict[str, Any]) -> Any:
        yield {"arch": asked["arch"]}
        time.sleep(600)

    monkeypatch.setattr(inspect_env, "_LIMIT", 0.2)
    child, reads, _ = inspect_env.start_child(hangs, {"arch": "121"})
    # What it has written within the limit counts, and the first fact may be late on a busy machine.
    select.select([reads], [], [])
    facts = inspect_env.end_child(child, reads, time.monotonic() + inspect_env._LIMIT)
    assert facts == {"arch": "121", "ended": "no answer within 0.2 s"}


# --- nccl-tests: the output of v2.19.6

PRINTED = """\
# nccl-tests version 2.19.6 nccl-headers=22907 nccl-library=22907
# Out of bounds values : {wrong} OK
# Avg bus bandwidth    : 123.456
#
"""


def answers(node: Node, **programs: Result) -> Finding:
    return nccl_tests.judged(replace(node, config=Config(nccl=NcclConfig(version="2.29.7"))), programs)


def printed(text: str, code: int = 0) -> Result:
    return Result(("x",), code, text, "" if not code else "Test NCCL failure: unhandled cuda error")


@pytest.mark.parametrize(
    ("answer", "verdict", "text"),
    [
        (printed(PRINTED.format(wrong=0)), "pass", "all_gather 123.5 GB/s"),
        (printed(PRINTED.format(wrong=3)), "fail", "3 values are wrong"),
        (printed(PRINTED.format(wrong=0).replace("library=22907", "library=22809")), "fail", "NCCL 2.28.9 loaded"),
        (printed("", 3), "fail", "unhandled cuda error"),
        (printed("# unknown output"), "fail", "# unknown output"),
    ],
)
def test_nccl_tests_output_gives_a_verdict(node: Node, answer: Result, verdict: str, text: str) -> None:
    found = answers(node, all_gather_perf=answer)
    assert (found.verdict, text in found.found) == (verdict, True), found


def test_nccl_tests_size_depends_on_the_free_memory() -> None:
    gib = 1 << 30
    assert nccl_tests.size(100 * gib, 2) == gib
    assert nccl_tests.size(8 * gib, 2) == gib // 2
    assert nccl_tests.size(1 << 26, 2) == 0


def test_nccl_tests_with_one_gpu_have_no_probe(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for count, names in ((1, []), (2, ["nccl-local"])):
        monkeypatch.setattr(nccl_tests, "gpus", lambda count=count: count)
        assert [probe.name for probe in nccl_tests.probes(node)] == names


def test_nccl_tests_without_nccl_are_not_built(node: Node, tmp_path: Path) -> None:
    with pytest.raises(nccl_tests.NotBuilt, match="no NCCL"):
        nccl_tests.programs(node, LocalReader(str(tmp_path)))
