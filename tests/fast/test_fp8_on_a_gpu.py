"""The decision of fix 5 on a machine with a GPU.

No GPU and no vLLM that could use one are available here: a script stands in for the interpreter of the environment. Its
process, its crash and the meaning of its answer are tested.
"""

from pathlib import Path

import pytest

from sparkinstall.config import Config
from sparkinstall.errors import CommandFailed
from sparkinstall.facts.decisions import Fp8Fallback, recorded
from sparkinstall.node import Node
from sparkinstall.resources.fp8 import Fp8Decision, loadable
from sparkinstall.stacks import load
from sparkinstall.system.local import LocalSystem
from tests.support.machine import Machine


class WithDriver(Machine, LocalSystem):
    """A folder as a node that has a driver loaded."""

    def read(self, path: str) -> bytes | None:
        return b"NVRM version: 580.95\n" if path == "/proc/driver/nvidia/version" else super().read(path)


def decision(folder: Path, script: str) -> Fp8Fallback:
    """The recorded decision where the environment's Python is `script`."""
    python = folder / "opt/sparkinstall/venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n" + script)
    python.chmod(0o755)
    node = Node(Config(), load("0.18.1"), "aarch64", "aarch64", False, False, str(folder), folder)
    on = WithDriver(str(folder))
    Fp8Decision(node, ("Kernel",)).apply(on)
    found = recorded(on, node.fp8_decision, Fp8Fallback)
    assert found
    return found


def test_decision_correct_product_leaves_cutlass_on(tmp_path: Path) -> None:
    found = decision(tmp_path, """echo noise; echo ready; echo '{"works": true, "said": ""}'""")
    assert (found.fallback, found.how) == (False, "gpu")
    assert "right product" in found.why


def test_decision_error_turns_the_fallback_on_and_is_quoted(tmp_path: Path) -> None:
    found = decision(tmp_path, """echo ready; echo '{"works": false, "said": "Error Internal"}'""")
    assert found.fallback is True
    assert "Error Internal" in found.why


def test_decision_crash_ends_only_its_own_process(tmp_path: Path) -> None:
    found = decision(tmp_path, "echo ready; echo 'CUDA error: no kernel image' >&2; kill -SEGV $$")
    assert found.fallback is True
    assert "no kernel image" in found.why


def test_decision_unusable_gpu_fails(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="could not be tried on the GPU"):
        decision(tmp_path, "echo 'torch.OutOfMemoryError: CUDA out of memory' >&2; exit 1")


@pytest.mark.parametrize(
    ("arch", "loads", "does_not_load"),
    [("121", {"sm_120f", "sm_121f", "sm_121a"}, {"sm_120", "sm_120a", "sm_122f"}), ("90", {"sm_90a"}, {"sm_80f"})],
)
def test_loadable_is_the_code_of_the_architecture_and_its_family(
    arch: str, loads: set[str], does_not_load: set[str]
) -> None:
    assert loads <= loadable(arch)
    assert not does_not_load & loadable(arch)
