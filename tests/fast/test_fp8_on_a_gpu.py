"""The decision of fix 5 on a machine with a GPU. No GPU and no vLLM that could use it are to be had here, so the
interpreter of the environment is played by a script; what is real is everything around it: the process of its own,
its crash, its time limit and what is made of its answer."""

from pathlib import Path

import pytest

from sparkinstall.config import Config
from sparkinstall.errors import CommandFailed
from sparkinstall.node import Node
from sparkinstall.resources.fp8 import Fp8Decision, loadable
from sparkinstall.stacks import load
from sparkinstall.system.local import LocalSystem
from tests.support.machine import Machine


class WithDriver(Machine, LocalSystem):
    """This machine's folder as a node, with a driver loaded."""

    def read(self, path: str) -> bytes | None:
        return b"NVRM version: 580.95\n" if path == "/proc/driver/nvidia/version" else super().read(path)


def _decided(folder: Path, script: str) -> tuple[bool, str, str]:
    python = folder / "opt/sparkinstall/venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n" + script)
    python.chmod(0o755)
    node = Node(Config(), load("0.18.1"), "aarch64", "aarch64", False, False, str(folder), folder)
    return Fp8Decision(node, ("Kernel",))._decide(WithDriver(str(folder)))


def test_a_right_product_leaves_cutlass_on(tmp_path: Path) -> None:
    fallback, why, how = _decided(tmp_path, """echo noise; echo ready; echo '{"works": true, "said": ""}'""")
    assert (fallback, how) == (False, "gpu")
    assert "right product" in why


def test_an_error_turns_the_fallback_on_and_is_quoted(tmp_path: Path) -> None:
    fallback, why, _ = _decided(tmp_path, """echo ready; echo '{"works": false, "said": "Error Internal"}'""")
    assert fallback is True
    assert "Error Internal" in why


def test_a_crash_takes_only_its_own_process(tmp_path: Path) -> None:
    fallback, why, _ = _decided(tmp_path, "echo ready; echo 'CUDA error: no kernel image' >&2; kill -SEGV $$")
    assert fallback is True
    assert "no kernel image" in why


def test_a_gpu_that_cannot_be_asked_decides_nothing(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="could not be tried on the GPU"):
        _decided(tmp_path, "echo 'torch.OutOfMemoryError: CUDA out of memory' >&2; exit 1")


@pytest.mark.parametrize(
    ("arch", "there", "not_there"),
    [("121", {"sm_120f", "sm_121f", "sm_121a"}, {"sm_120", "sm_120a", "sm_122f"}), ("90", {"sm_90a"}, {"sm_80f"})],
)
def test_what_loads_where(arch: str, there: set[str], not_there: set[str]) -> None:
    assert there <= loadable(arch)
    assert not not_there & loadable(arch)
