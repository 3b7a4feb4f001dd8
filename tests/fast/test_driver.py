"""The preflight check `driver`: the output of nvidia-smi in, its finding and hint out.

The error messages are those of nvidia-smi, from NVIDIA/open-gpu-kernel-modules #862 and vllm-project/vllm #1772.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from sparkinstall.facts.gpu import Gpu, first_gpu, gpu_or_complaint
from sparkinstall.probes import Finding
from sparkinstall.probes.preflight import preflight
from sparkinstall.system import Result
from tests.support.machine import Machine
from tests.support.nodes import node_of

MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"


class WithSmi(Machine):
    """A machine whose nvidia-smi exits with `code` and prints `out`."""

    def __init__(self, root: Path, code: int, out: str, err: str = "") -> None:
        super().__init__(str(root))
        self.answer = code, out, err

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        del timeout, env, root, stdin
        return Result(argv, *self.answer)


def driver(on: Machine, root: Path) -> Finding:
    (check,) = [each for each in preflight(node_of(root)) if each.name == "driver"]
    return check.look(on)


def test_driver_loaded_passes(tmp_path: Path) -> None:
    on = WithSmi(tmp_path, 0, "NVIDIA GB10, 12.1, 580.95.05, 3, [N/A], 4.3\n")
    assert (driver(on, tmp_path).verdict, driver(on, tmp_path).found) == ("pass", "580.95.05")
    assert first_gpu(on) == Gpu("NVIDIA GB10", "12.1", "580.95.05", 3, None, 4.3)


@pytest.mark.parametrize("message", ["No devices were found", "NVIDIA-SMI has failed because it couldn't communicate"])
def test_driver_error_of_nvidia_smi_is_shown_with_nvidias_update_as_hint(tmp_path: Path, message: str) -> None:
    found = driver(WithSmi(tmp_path, 6, f"{message}\nMake sure ...\n"), tmp_path)
    assert (found.verdict, found.found) == ("fail", f"nvidia-smi reports: {message}")
    assert "DGX Dashboard" in found.hint and "sudo apt dist-upgrade" in found.hint and "fwupdmgr upgrade" in found.hint
    assert "apt install" not in found.hint


def test_driver_that_needs_a_reboot_has_only_that_hint(tmp_path: Path) -> None:
    mismatch = driver(WithSmi(tmp_path, 18, f"{MISMATCH}\nNVML library version: 580.95\n"), tmp_path)
    assert mismatch.found == f"nvidia-smi reports: {MISMATCH}"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/reboot-required").touch()
    waiting = driver(WithSmi(tmp_path, 9, "", "No devices were found\n"), tmp_path)
    for each in (mismatch, waiting):
        assert "reboot first" in each.hint and "apt" not in each.hint


@pytest.mark.parametrize(("code", "err"), [(127, "nvidia-smi: not found"), (124, "")])
def test_driver_without_an_answer_of_nvidia_smi_fails(tmp_path: Path, code: int, err: str) -> None:
    found = driver(WithSmi(tmp_path, code, "", err), tmp_path)
    assert found.found == "nvidia-smi does not answer" and "DGX Dashboard" in found.hint


def test_gpu_or_complaint_has_no_control_character(tmp_path: Path) -> None:
    assert gpu_or_complaint(WithSmi(tmp_path, 1, "\x1b[2Jgone\n")) == "?[2Jgone"
