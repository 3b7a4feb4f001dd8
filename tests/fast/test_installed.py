"""What the probes of an environment say where vLLM is not there, was changed by hand, or cannot be looked into."""

import json
import os
from pathlib import Path

import pytest

from sparkinstall.core import checks
from sparkinstall.events import silent
from sparkinstall.node import Node
from sparkinstall.probes import Finding, preflight
from sparkinstall.probes.wheels import reasoning_fields
from sparkinstall.resources import Drift, Ok
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
def test_a_vllm_that_never_came_is_not_blamed_on_the_lock(node: Node, tmp_path: Path, name: str) -> None:
    (tmp_path / SITE / "vllm-0.18.1.dist-info").rename(tmp_path / "gone")
    finding = found(node, tmp_path, name)
    assert (finding.verdict, finding.found) == ("fail", "vllm is not installed")
    assert finding.hint == "run `sparkinstall all`"


def test_with_it_the_fields_are_read(node: Node, tmp_path: Path) -> None:
    assert reasoning_fields(node, LocalReader(str(tmp_path))).verdict == "pass"
    put(tmp_path, f"{SITE}/vllm/entrypoints/openai/protocol.py", "class DeltaMessage:\n    content: str\n")
    assert "does not know this vLLM" in reasoning_fields(node, LocalReader(str(tmp_path))).hint


@pytest.mark.parametrize("name", ["imports", "host-ip", "triton-compiles", "fp8-kernels", "fp8-product"])
def test_what_a_rehearsal_cannot_show_is_skipped_also_without_an_env_file(
    node: Node, tmp_path: Path, name: str
) -> None:
    assert found(node, tmp_path, name).verdict == "skip"


# --- which FP8 kernels


def test_a_patched_file_that_somebody_edited_is_told_as_such(node: Node, tmp_path: Path) -> None:
    put(tmp_path, "opt/sparkinstall/fp8.json", json.dumps({"fallback": True, "why": "vLLM's extension contains sm_90"}))
    put(tmp_path, f"{SITE}/{cutlass_patch().target}", "edited = True\n")
    finding = found(node, tmp_path, "fp8-path")
    assert (finding.verdict, finding.expected) == ("fail", "patched")
    assert "run environment" in finding.hint and "`sparkinstall run fp8`" not in finding.hint


def test_a_file_that_is_gone_is_told(node: Node, tmp_path: Path) -> None:
    put(tmp_path, "opt/sparkinstall/fp8.json", json.dumps({"fallback": False, "why": "so"}))
    finding = found(node, tmp_path, "fp8-path")
    assert (finding.found, finding.expected) == (f"{cutlass_patch().target} is missing", "not patched")


@pytest.mark.parametrize("text", ["garbage", '{"fallback": 3}', '{"fallback": true}', "[]", '{"why": "so"}'])
def test_a_damaged_decision_is_called_so(node: Node, tmp_path: Path, text: str) -> None:
    put(tmp_path, "opt/sparkinstall/fp8.json", text)
    finding = found(node, tmp_path, "fp8-path")
    assert finding.verdict == "fail" and finding.found.endswith("is damaged")
    assert finding.hint == "run `sparkinstall run fp8 --force`"


def test_a_damaged_decision_is_made_anew(node: Node, tmp_path: Path) -> None:
    put(tmp_path, f"{SITE}/vllm/_C.abi3.so", "")
    decision, on = Fp8Decision(node, ()), LocalReader(str(tmp_path))
    about = decision.about(on)
    put(tmp_path, "opt/sparkinstall/fp8.json", json.dumps({"about": about, "fallback": True, "why": "so"}))
    assert isinstance(decision.check(on), Ok)
    put(tmp_path, "opt/sparkinstall/fp8.json", json.dumps({"about": about, "fallback": True}))
    assert isinstance(decision.check(on), Drift)


def test_without_a_decision_nothing_was_decided(node: Node, tmp_path: Path) -> None:
    assert found(node, tmp_path, "fp8-path").found == "no decision is recorded"


# --- folders that are shut


class Shut(LocalReader):
    """A node whose venv its user cannot look into; root, who runs the tests in CI, could."""

    def entry(self, path: str) -> Entry | None:
        if "/venv/" in path or path.endswith("/venv"):
            raise PermissionError(13, "Permission denied", self.real("/opt/sparkinstall/venv/sparkinstall.json"))
        return super().entry(path)


@pytest.mark.parametrize("name", ["disk", "prefix"])
def test_a_folder_that_is_shut_is_named_with_what_to_do(
    node: Node, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut = tmp_path / "opt/sparkinstall/venv"
    monkeypatch.setattr(os, "access", lambda path, _mode: path != shut)
    (probe,) = (each for each in preflight.preflight(node) if each.name == name)
    finding = probe.look(Shut(str(tmp_path)))
    assert (finding.verdict, finding.found) == ("fail", f"{shut} cannot be read")
    assert finding.hint == f"`chmod u+rwx {shut}`, then again"
