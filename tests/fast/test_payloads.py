"""The programs that are sent into the node's environment: each is a whole text that needs nothing of sparkinstall."""

import ast
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sparkinstall import payloads

NAMES = sorted(path.stem for path in Path(payloads.__file__).parent.glob("*.py") if path.stem != "__init__")


def isolated(name: str, *words: str) -> tuple[str, ...]:
    """The command line of a payload under a Python that finds no sparkinstall."""
    return (sys.executable, "-I", "-c", payloads.source(name), *words)


def said(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(isolated(name, *words), capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", NAMES)
def test_payload_as_text_is_whole_and_imports_nothing_of_ours(name: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse(payloads.source(name))):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
        elif isinstance(node, ast.Import):
            imported.update(each.name for each in node.names)
    assert not {module for module in imported if module.startswith("sparkinstall")}
    assert payloads.source(name).count('if __name__ == "__main__":') <= 1


@pytest.mark.parametrize("name", NAMES)
def test_siblings_in_one_text_define_no_name_twice(name: str) -> None:
    body = ast.parse(payloads.source(name)).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main"]
    names += [
        each.id for node in body if isinstance(node, ast.Assign) for each in node.targets if isinstance(each, ast.Name)
    ]
    assert sorted(names) == sorted(set(names))


def test_vllm_client_where_nothing_listens_says_refused() -> None:
    asked = {"verb": "health", "port": 9, "patience": 1, "tokens": 0, "model": ""}
    assert json.loads(said("vllm_client", json.dumps(asked)).stdout)["refused"] is True


def test_loaded_nccl_without_nccl_names_no_library() -> None:
    assert json.loads(said("loaded_nccl").stdout) == {"bound": "", "version": 0, "mapped": []}


def test_with_head_ends_the_program_when_the_head_has_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        program = ("127.0.0.1", str(head.getsockname()[1]), "/bin/sleep", "60")
        with subprocess.Popen(isolated("with_head", *program), stdout=subprocess.PIPE, text=True) as vllm:
            head.accept()[0].close()
            assert vllm.wait(timeout=30) == -signal.SIGKILL
            assert vllm.stdout is not None and "has ended; this one restarts too" in vllm.stdout.read()
