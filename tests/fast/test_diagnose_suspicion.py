"""Suspicious lines: which are shown where no rule knows the cause, and which look like a failure and are none."""

import pytest

from tests.support.diagnosing import causes, diagnosed, example


def test_error_alone_is_a_failure_though_its_cause_is_not_known() -> None:
    found = diagnosed(b"own-tool: reading the table\nError: own rows are gone\n")
    assert found.shows_failure and not found.found
    assert [each.text for each in found.telling] == ["Error: own rows are gone"]


def test_unknown_log_shows_the_most_telling_lines_first() -> None:
    log = b"""INFO starting
(EngineCore pid=7) ERROR 11-21 10:00:00 [core.py:9] something is odd 1
(EngineCore pid=7) ERROR 11-21 10:00:01 [core.py:9] something is odd 2
(EngineCore pid=7) ERROR 11-21 10:00:01 [core.py:9] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-21 10:00:01 [core.py:9]   File "x.py", line 3, in f
(EngineCore pid=7) ERROR 11-21 10:00:01 [core.py:9] quux.FrobnicationError: the widget is upside down
"""
    found = diagnosed(log)
    assert not found.causes
    assert [(each.line, each.count) for each in found.telling] == [(6, 1), (2, 2)]


def test_good_log_has_no_findings() -> None:
    found = diagnosed(b"INFO 0 errors\nINFO no error was found\nall good\n")
    assert (found.found, found.telling) == ((), ())


@pytest.mark.parametrize(
    "words",
    [
        "Received request c-9: prompt: 'my box prints \"OSError: [Errno 28] No space left on device\"', params: x",
        "Received request chatcmpl-9: prompt: '"
        + "x" * 9000
        + " OSError: [Errno 28] No space left on device', params: x",
        "Received request chatcmpl-9: prompt: '" + "x" * 90_000 + " RuntimeError: CUDA out of memory', params: x",
        'body: {"messages": [{"role": "tool", "content": "torch.OutOfMemoryError: CUDA out of memory"}]}',
        "prompt_token_ids: [1, 2], text: 'fatal error: Python.h: No such file or directory'",
    ],
)
@pytest.mark.parametrize("prefix", ["(APIServer pid=650) INFO 10-02 09:00:01 [logger.py:39] ", ""])
def test_words_of_a_request_are_no_failure(prefix: str, words: str) -> None:
    found = diagnosed(f"{prefix}{words}\n".encode())
    assert (found.found, found.telling) == ((), ())


@pytest.mark.parametrize("before", ["+ ", "++ ", "$ ", "lab@spark-1:~/x$ "])
def test_command_that_a_shell_repeats_is_not_diagnosed(before: str) -> None:
    found = diagnosed(f"{before}grep -c 'Error: CUDA out of memory' vllm.log\n".encode())
    assert not found.found and not found.telling


def test_what_was_handled_is_shown_only_where_the_log_proves_a_failure() -> None:
    handled = b"WARNING: could not read the table: [Errno 5] Input/output error\n"
    assert diagnosed(handled + b"done\n").telling == ()
    for proof in (b"Traceback (most recent call last):\n", example("engine-dead")):
        assert [each.line for each in diagnosed(handled + proof).telling] == [1]
    other = b"ERROR: the other table is empty\n"
    assert [each.line for each in diagnosed(handled + other + example("engine-dead")).telling] == [2]


def test_last_attempt_that_failed_is_suspicious_at_level_info() -> None:
    lines = [f"INFO: attempt {at}/4 failed, no route to host\n".encode() for at in (3, 4)]
    assert diagnosed(lines[0]).telling == ()
    assert [each.line for each in diagnosed(b"".join(lines)).telling] == [2]
    assert diagnosed(b"".join(lines) + example("program-succeeded")).telling == ()


def test_fallback_forgives_only_what_the_same_process_has_just_named() -> None:
    failed = b"OSError: own-7b is not a local folder and is not a valid model identifier, no tokenizer\n"
    fallback = b"Falling back to the plain tokenizer\n"
    assert not diagnosed(failed + fallback).found
    assert causes(diagnosed(failed + b"ok\n" * 20 + fallback)) == ["model-not-found"]
    assert causes(diagnosed(failed + b"(Worker pid=9) " + fallback)) == ["model-not-found"]
