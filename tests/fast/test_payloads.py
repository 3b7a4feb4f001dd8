"""The programs that are sent into the node's environment: each is one text that needs nothing of sparkinstall."""

import ast
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sparkinstall import payloads
from tests.support.local_server import Endless, listening
from tests.support.waiting import until

NAMES = sorted(path.stem for path in Path(payloads.__file__).parent.glob("*.py") if path.stem != "__init__")


def isolated(name: str, *words: str) -> tuple[str, ...]:
    """The command line of a payload with a Python that does not find sparkinstall."""
    return (sys.executable, "-I", "-c", payloads.source(name), *words)


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(isolated(name, *words), capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", NAMES)
def test_payload_source_imports_nothing_of_sparkinstall(name: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse(payloads.source(name))):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
        elif isinstance(node, ast.Import):
            imported.update(each.name for each in node.names)
    assert not {module for module in imported if module.startswith("sparkinstall")}
    assert payloads.source(name).count('if __name__ == "__main__":') <= 1


@pytest.mark.parametrize("name", NAMES)
def test_payload_source_defines_each_name_once(name: str) -> None:
    body = ast.parse(payloads.source(name)).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main"]
    names += [
        each.id for node in body if isinstance(node, ast.Assign) for each in node.targets if isinstance(each, ast.Name)
    ]
    assert sorted(names) == sorted(set(names))


def test_vllm_client_without_a_server_reports_refused() -> None:
    request = {"verb": "health", "port": 9, "patience": 1, "tokens": 0, "model": ""}
    assert json.loads(run("vllm_client", json.dumps(request)).stdout)["refused"] is True


@pytest.mark.parametrize("verb", ["complete", "first"])
def test_vllm_client_reads_no_answer_without_an_end(verb: str) -> None:
    with listening(Endless) as url:
        request = {"verb": verb, "port": urlsplit(url).port, "patience": 300, "tokens": 1, "model": ""}
        assert json.loads(run("vllm_client", json.dumps(request)).stdout)["error"] == "it sends more than 8 MiB"


def test_loaded_nccl_without_nccl_names_no_library() -> None:
    assert json.loads(run("loaded_nccl").stdout) == {"bound": "", "version": 0, "mapped": []}


def _status(process: "subprocess.Popen[str]") -> str:
    return Path(f"/proc/{process.pid}/status").read_text()


def test_with_head_ends_the_program_with_the_head() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        program = ("127.0.0.1", str(head.getsockname()[1]), "/bin/sleep", "600")
        with subprocess.Popen(isolated("with_head", *program), stdout=subprocess.PIPE, text=True) as vllm:
            link = head.accept()[0]
            until(lambda: "Name:\tsleep\nUmask" in (status := _status(vllm)) and "State:\tS" in status, during=vllm)
            link.close()
            assert vllm.wait(timeout=300) == -signal.SIGKILL
            assert vllm.stdout is not None
            output = vllm.stdout.read()
    assert "has ended; this one restarts too" in output
    assert f"until then sleep (pid {vllm.pid}) was S (sleeping), in the kernel at " in output
