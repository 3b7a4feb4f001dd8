"""The probes of an environment where vLLM is missing, was edited, or cannot be read."""

import json
import os
from pathlib import Path

import pytest

from sparkinstall.core import checks
from sparkinstall.events import silent
from sparkinstall.node import Node
from sparkinstall.probes import Finding, preflight
from sparkinstall.probes.wheels import reasoning_fields
from sparkinstall.resources import Drift, Ok, state_of
from sparkinstall.resources.fp8 import Fp8Decision
from sparkinstall.steps.env_files import EnvFiles
from sparkinstall.steps.environment import Environment
from sparkinstall.steps.fp8 import Fp8, cutlass_patch
from sparkinstall.system import Entry
from sparkinstall.system.local import LocalReader
from tests.support.nodes import node_of

SITE = "opt/sparkinstall/venv/lib/python3.12/site-packages"
DELTA = "class DeltaMessage:\n    reasoning: str\n"


def put(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def node(tmp_path: Path) -> Node:
    put(tmp_path, f"{SITE}/vllm-0.18.1.dist-info/RECORD", "")
    put(tmp_path, f"{SITE}/vllm/entrypoints/openai/protocol.py", DELTA)
    return node_of(tmp_path)


def found(node: Node, root: Path, name: str) -> Finding:
    (probe,) = (each for step in (Environment(), Fp8(), EnvFiles()) for each in step.probes(node) if each.name == name)
    return checks.look([probe], LocalReader(str(root)), silent)[0]


@pytest.mark.parametrize("name", ["wheel-gate", "reasoning-field"])
def test_vllm_missing_is_reported_as_not_installed(node: Node, tmp_path: Path, name: str) -> None:
    (tmp_path / SITE / "vllm-0.18.1.dist-info").rename(tmp_path / "gone")
    finding = found(node, tmp_path, name)
    assert (finding.verdict, finding.found) == ("fail", "vllm is not installed")
    assert finding.hint == "run `sparkinstall all`"


def test_reasoning_fields_are_read_from_vllm(node: Node, tmp_path: Path) -> None:
    assert reasoning_fields(node, LocalReader(str(tmp_path))).verdict == "pass"
    put(tmp_path, f"{SITE}/vllm/entrypoints/openai/protocol.py", "class DeltaMessage:\n    content: str\n")
    assert "does not know this vLLM" in reasoning_fields(node, LocalReader(str(tmp_path))).hint


@pytest.mark.parametrize("name", ["imports", "host-ip", "triton-compiles", "fp8-kernels", "fp8-product"])
def test_probe_of_the_node_in_a_rehearsal_is_skipped(node: Node, tmp_path: Path, name: str) -> None:
    assert found(node, tmp_path, name).verdict == "skip"


# --- which FP8 kernels


def test_fp8_path_edited_file_fails(node: Node, tmp_path: Path) -> None:
    put(tmp_path, "opt/sparkinstall/fp8.json", json.dumps({"fallback": True, "why": "vLLM's extension contains sm_90"}))
    put(tmp_path, f"{SITE}/{cutlass_patch().target}", "edited = True\n")
    finding = found(node, tmp_path, "fp8-path")
    assert (finding.verdict, finding.expected) == ("fail", "patched")
    assert "run environment" in finding.hint and "`sparkinstall run fp8`" not in finding.hint


def test_fp8_path_missing_file_fails(node: Node, tmp_path: Path) -> None:
    put(tmp_path, "opt/sparkinstall/fp8.json", json.dumps({"fallback": False, "why": "so"}))
    finding = found(node, tmp_path, "fp8-path")
    assert (finding.found, finding.expected) == (f"{cutlass_patch().target} is missing", "not patched")


@pytest.mark.parametrize("text", ["garbage", '{"fallback": 3}', '{"fallback": true}', "[]", '{"why": "so"}'])
def test_fp8_path_damaged_decision_fails(node: Node, tmp_path: Path, text: str) -> None:
    put(tmp_path, "opt/sparkinstall/fp8.json", text)
    finding = found(node, tmp_path, "fp8-path")
    assert finding.verdict == "fail" and finding.found.startswith("/opt/sparkinstall/fp8.json is damaged: ")
    assert finding.hint == "`sparkinstall all` removes it and determines it again"


def test_fp8_decision_damaged_is_drift(node: Node, tmp_path: Path) -> None:
    put(tmp_path, f"{SITE}/vllm/_C.abi3.so", "")
    decision, on = Fp8Decision(node, ()), LocalReader(str(tmp_path))
    about = decision.about(on)
    put(tmp_path, "opt/sparkinstall/fp8.json", json.dumps({"about": about, "fallback": True, "why": "so"}))
    assert isinstance(decision.check(on), Ok)
    put(tmp_path, "opt/sparkinstall/fp8.json", json.dumps({"about": about, "fallback": True}))
    state = state_of(decision, on)
    assert isinstance(state, Drift) and "fp8.json is damaged: `why` is missing" in state.summary


def test_fp8_path_without_a_decision_says_so(node: Node, tmp_path: Path) -> None:
    assert found(node, tmp_path, "fp8-path").found == "no decision is recorded"


# --- unreadable folders


class Unreadable(LocalReader):
    """A node whose venv its user cannot read; the tests in CI run as root, who could."""

    def entry(self, path: str) -> Entry | None:
        if "/venv/" in path or path.endswith("/venv"):
            raise PermissionError(13, "Permission denied", self.real("/opt/sparkinstall/venv/sparkinstall.json"))
        return super().entry(path)


@pytest.mark.parametrize("name", ["disk", "prefix"])
def test_unreadable_folder_is_named_with_a_hint(
    node: Node, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable = tmp_path / "opt/sparkinstall/venv"
    monkeypatch.setattr(os, "access", lambda path, _mode: path != unreadable)
    (probe,) = (each for each in preflight.preflight(node) if each.name == name)
    finding = probe.look(Unreadable(str(tmp_path)))
    assert (finding.verdict, finding.found) == ("fail", f"{unreadable} cannot be read")
    assert finding.hint == f"`chmod u+rwx {unreadable}`, then again"
