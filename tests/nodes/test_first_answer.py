"""The README's first screen on a fresh node: `./install.sh`, one command, and a question that is answered."""

import json
from pathlib import Path

import pytest

from tests.nodes.fresh import COMMAND
from tests.nodes.serving import (
    AGREED,
    LOAD_SECONDS,
    MODEL,
    PREFIX,
    assert_no_service_is_left,
    installed_node,
    journal,
    state,
)
from tests.support import vllm_on_cpu

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.layer5, pytest.mark.network]


def test_question_is_answered_after_install_sh_and_one_command(tmp_path: Path) -> None:
    with installed_node(tmp_path) as node:

        def sparkinstall(*words: str) -> str:
            run = node.run(COMMAND, *words, user="spark", timeout=LOAD_SECONDS, check=False)
            assert run.returncode == 0, (run.stdout[-3000:], run.stderr[-3000:], journal(node, 60))
            return run.stdout

        served = sparkinstall("serve", MODEL, *AGREED)
        assert f"✓ {MODEL} answers in " in served and "sparkinstall ask 'What is a GB10?'" in served
        answer = json.loads(sparkinstall("ask", "What is a GB10?", "--max-tokens", "8", "--json"))["data"]
        assert (answer["model"], answer["finish_reason"] in ("length", "stop")) == (MODEL, True), answer
        record = json.loads(sparkinstall("serve", "status", "--json"))["data"]["serving"]
        assert record["versions"]["vllm"] == f"{vllm_on_cpu.VERSION}+cpu"
        assert state(node) == ["active", "enabled"]
        sparkinstall("uninstall", "--yes")
        assert_no_service_is_left(node)
        assert node.run("ls", PREFIX, check=False).returncode != 0
