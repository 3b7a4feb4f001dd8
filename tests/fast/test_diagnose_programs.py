"""Logs of another server than vLLM are told in its name and with its options."""

import pytest
from msgspec.structs import replace

from sparkinstall.diagnose import programs
from sparkinstall.diagnose.signatures import Signature
from tests.support.diagnosing import KNOWN, diagnosed

# What SGLang's start logs, and an exception in its code.
SGLANG_LOG = """[2026-10-02 09:00:01] server_args=ServerArgs(model_path='own/x')
[2026-10-02 09:00:02] Scheduler hit an exception: Traceback (most recent call last):
  File "/opt/env/lib/python3.12/site-packages/{package}/own.py", line 7, in load_weights
    raise AssertionError("own rows")
AssertionError: own rows
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("this vLLM cannot", "this SGLang cannot"),
        ("A vLLM that ends", "A server that ends"),
        ("vLLM 0.24 moved it", "vLLM 0.24 moved it"),
        ("vllm/own.py of vLLM", "vllm/own.py of SGLang"),
    ],
)
def test_another_name_stands_for_vllms_but_where_its_release_is_told(text: str, told: str) -> None:
    assert programs.rewritten(replace(KNOWN[0], why=text), programs.SGLANG).why == told


def test_failure_of_sglang_is_told_in_its_name_and_with_its_options() -> None:
    (cause,) = diagnosed(SGLANG_LOG.format(package="sglang").encode()).causes
    told = f"{cause.title} {cause.why} {cause.hint} {cause.links}"
    assert cause.name == "checkpoint-not-loaded"
    assert "this release's code" in told
    assert "`--speculative-algorithm`" in told
    assert cause.hint.endswith("a newer release of SGLang")
    assert "vllm" not in told.lower()
    assert "sparkinstall plan" not in told


def test_failure_in_vllms_code_keeps_its_name_in_a_log_of_sglang() -> None:
    (cause,) = diagnosed(SGLANG_LOG.format(package="vllm").encode()).causes
    assert "this release's code" in cause.why
    assert "a newer release of SGLang" not in cause.hint


@pytest.mark.parametrize("program", programs.PROGRAMS, ids=lambda each: each.name)
def test_every_hint_leaves_something_to_do_with_another_program(program: programs.Program) -> None:
    for each in KNOWN:
        hint = programs.rewritten(each, program).hint
        assert hint.strip()
        assert "VLLM_" not in hint
        assert "; ;" not in hint


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        (
            "take TRITON_ATTN, FLASHINFER or FLASH_ATTN; `--moe-backend triton`",
            "take triton or flashinfer; `--moe-runner-backend triton`",
        ),
        ("FLASHINFER or FLASH_ATTN", "flashinfer"),
        (
            "`--no-async-scheduling`; `--no-enable-flashinfer-autotune`",
            "`--disable-overlap-schedule`; `--disable-flashinfer-autotune`",
        ),
        (
            "`--linear-backend marlin`; `--no-enable-expert-parallel`; `--port 1`",
            "`--port 1`; a newer release of SGLang",
        ),
    ],
)
def test_hint_names_what_sglang_has_instead(hint: str, told: str) -> None:
    assert programs.rewritten(replace(KNOWN[0], hint=hint), programs.SGLANG).hint == told


def test_failure_of_a_training_is_told_without_what_only_a_server_has() -> None:
    told = programs.rewritten(
        replace(KNOWN[0], title="this vLLM cannot", why="a fault of vLLM", hint="`--enforce-eager`; a smaller batch"),
        programs.TRAINING,
    )
    assert told.title == "this training cannot"
    assert told.why == "a fault of the training"
    assert told.hint == "a smaller batch; a newer release of the training"


def test_code_in_a_hint_is_no_end_of_a_step() -> None:
    hint = '`python -c "import own; own.show()"`; `--enforce-eager`'
    told = programs.rewritten(replace(KNOWN[0], hint=hint), programs.COMFYUI).hint
    assert told == '`python -c "import own; own.show()"`; a newer release of ComfyUI'


# A kernel's library, called by a script or by a server.
LACKING = """Traceback (most recent call last):
  File "{caller}", line 20, in main
    run()
  File "/opt/env/lib/python3.12/site-packages/own/utils.py", line 90, in precision
    raise AssertionError(f"Unsupported SM {{sm}}")
AssertionError: Unsupported SM 121
"""


def test_a_known_failure_of_a_script_is_told_without_vllms_options() -> None:
    (of_vllm,) = diagnosed(LACKING.format(caller="/opt/env/lib/python3.12/site-packages/vllm/own.py").encode()).causes
    (of_a_script,) = diagnosed(LACKING.format(caller="/work/paint.py").encode()).causes
    assert of_a_script.name == of_vllm.name == "no-code-for-this-gpu"
    assert "--moe-backend" in of_vllm.hint
    told = f"{of_a_script.title} {of_a_script.why} {of_a_script.hint}"
    assert of_a_script.hint
    assert "vllm" not in told.lower()
    assert "--moe-backend" not in told


@pytest.mark.parametrize("known", KNOWN, ids=lambda each: each.name)
def test_every_hint_leaves_something_to_do_with_a_script(known: Signature) -> None:
    told = programs.of_a_script(known)
    assert told.hint.strip()
    assert "VLLM_" not in told.hint
