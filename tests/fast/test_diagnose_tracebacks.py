"""Tracebacks: what their frames tell of an exception, and what in them is no message."""

from collections.abc import Sequence

import pytest

from sparkinstall.diagnose.stages import stage_of
from tests.support.diagnosing import causes, diagnosed


def test_code_in_a_traceback_is_no_message() -> None:
    found = diagnosed(b"""Traceback (most recent call last):
  File "x.py", line 1, in f
    raise OSError("No space left on device")
  File "y.py", line 2, in g
    g.check("torch.OutOfMemoryError: CUDA out of memory")
acme.WidgetError: upside down
""")
    assert (found.found, [each.line for each in found.telling]) == ((), [6])


def test_chained_exceptions_are_followed_to_the_first() -> None:
    found = diagnosed(b"""(EngineCore pid=5) Traceback (most recent call last):
(EngineCore pid=5)   File "x.py", line 1, in f
(EngineCore pid=5) OSError: [Errno 28] No space left on device
(Worker_TP1 pid=6) Traceback (most recent call last):
(EngineCore pid=5)
(EngineCore pid=5) During handling of the above exception, another exception occurred:
(EngineCore pid=5)
(EngineCore pid=5) Traceback (most recent call last):
(EngineCore pid=5)   File "y.py", line 2, in g
(EngineCore pid=5) PermissionError: [Errno 13] Permission denied: '/tmp/x'
""")
    assert causes(found) == ["disk-full"]
    assert [(each.name, each.explained_by) for each in found.consequences] == [("permission-denied", ("disk-full",))]


def test_exception_that_python_ignores_is_not_suspicious() -> None:
    found = diagnosed(b"""Exception ignored in: <function Socket.__del__ at 0x7f0>
Traceback (most recent call last):
  File "x.py", line 1, in __del__
acme.SocketError: not a socket
""")
    assert (found.found, found.telling) == ((), ())


def test_traceback_tells_kinds_of_a_failure_apart() -> None:
    def crashed_in(file: str) -> list[str]:
        frames = f'Traceback (most recent call last):\n  File "{file}", line 1, in f\n    f()\n'
        error = "RuntimeError: CUDA error: no kernel image is available for execution on the device\n"
        return causes(diagnosed(f"{frames}{error}".encode()))

    assert crashed_in("/env/torch/nn/functional.py") == ["no-kernel-for-this-gpu"]
    assert crashed_in("/env/flashinfer/gemm.py") == ["no-kernel-in-a-backend"]


def test_bare_exception_is_shown_with_the_code_that_raised_it() -> None:
    frames = '  File "/a.py", line 3, in f\n    assert a >= b\n           ^^^^^^\n'
    log = f"Traceback (most recent call last):\n{frames}AssertionError\n"
    assert [each.text for each in diagnosed(log.encode()).telling] == ["AssertionError (raised by `assert a >= b`)"]


def test_exception_that_looks_like_code_is_told_whole() -> None:
    told = "ValueError: own_tables='round' are not there, but ['long', 'short'] are"
    code = '  File "/opt/own.py", line 7, in own\n    raise ValueError(\n'
    (place,) = diagnosed(f"Traceback (most recent call last):\n{code}  # {told}\n".encode()).causes[0].lines
    assert place.text == told


def test_place_of_an_exception_is_that_of_its_last_frames() -> None:
    frames = [
        ("/e/site-packages/vllm/v1/a.py", "run"),
        ("/e/dist-packages/torch/nn/b.py", "go"),
        ("/usr/lib/python3.12/contextlib.py", "x"),
    ]
    log = "Traceback (most recent call last):\n"
    log += "".join(f'  File "{path}", line 7, in {name}\n    own()\n' for path, name in frames)
    cause = diagnosed(f"{log}KeyError: 'rows'\n".encode()).causes[0]
    assert cause.where == "torch/nn/b.py, go, called by vllm/v1/a.py, run"


def test_error_of_another_process_has_no_place_of_the_process_that_passes_it_on() -> None:
    place = '  File "/opt/v/vllm/v1/executor/own.py", line 7, in get_response\n    raise RuntimeError('
    passed_on = "RuntimeError: Worker failed with error 'AssertionError: own rows', please check the stack trace above"
    (cause,) = diagnosed(f"Traceback (most recent call last):\n{place}\n{passed_on}\n".encode()).causes
    assert (cause.where, cause.why.partition(": ")[0]) == ("", '"own rows"')


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        (("load_model",), ""),
        (("capture_model", "_dummy_run"), "--enforce-eager"),
        (("kernel_warmup", "capture_model"), "--enforce-eager"),
        (("kernel_warmup", "own"), "--no-enable-flashinfer-autotune"),
    ],
)
def test_stage_of_the_start_is_told_with_what_leaves_it_out(functions: Sequence[str], words: str) -> None:
    lines = [f'  File "/opt/v/vllm/v1/worker/own.py", line 7, in {each}\n    own()' for each in functions]
    head = "Traceback (most recent call last):"
    (cause,) = diagnosed("\n".join((head, *lines, "ValueError: own rows differ", "")).encode()).causes
    stage = stage_of("\n".join(lines))
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in stage_of("\n".join(lines).replace("worker/", "worker/gpu/"))
    assert (words in stage and cause.hint.startswith(stage)) if words else stage == ""


def test_a_crash_is_told_with_the_place_that_python_prints_below_it() -> None:
    log = """Fatal Python error: Segmentation fault

Current thread 0x00007f1c2a7fc640 (most recent call first):
  File "/opt/env/lib/python3.12/site-packages/vllm/own/wrapper.py", line 373 in own_reduce
  File "/opt/env/lib/python3.12/site-packages/vllm/own/worker.py", line 12 in run
  File "/usr/lib/python3.12/threading.py", line 1012 in _bootstrap

Thread 0x00007f1c2a7fc641 (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 359 in wait

Extension modules: own._core (total: 1)
"""
    (cause,) = diagnosed(log.encode()).causes
    assert cause.name == "crashed-in-native-code"
    assert cause.where == "vllm/own/wrapper.py, own_reduce"
    assert [each.line for each in cause.lines] == [1]


def test_a_notebooks_traceback_that_is_cut_off_is_read_by_its_head() -> None:
    log = """OwnPartError                              Traceback (most recent call last)
File ~/env/lib/python3.12/site-packages/own/part.py:22, in own(self)
     21     args = 1
"""
    (told,) = diagnosed(log.encode()).telling
    assert told.text.startswith("OwnPartError: ")
    assert told.where == "own/part.py, own"


def test_an_exception_of_which_a_few_letters_are_left_says_nothing_that_they_do_not_tell() -> None:
    log = """Traceback (most recent call last):
  File "/opt/env/lib/python3.12/site-packages/vllm/model_executor/model_loader/own.py", line 19, in own
    raise ValueError(
ValueError: Cann"""
    (cause,) = diagnosed(log.encode()).causes
    assert cause.name == "loader-part-failed"
    assert cause.hint.startswith("look at the whole log")
    assert "Cann" not in f"{cause.why} {cause.links}"
