"""Which failure caused the others, in one log and in those of several nodes."""

import pytest

from sparkinstall.diagnose.signatures import Signature, steps
from tests.support.diagnosing import BY_NAME, KNOWN, causes, companions, diagnosed, example


@pytest.mark.parametrize(
    "cause", ["oom-killer", "ray-memory-monitor", "nccl-versions-differ", "gpu-fell-off", "disk-full"]
)
def test_dead_engine_is_a_consequence_of_its_cause(cause: str) -> None:
    log = example("worker-died") + example("engine-dead") + example(cause) + example("engine-dead")
    found = diagnosed(log)
    assert causes(found) == [cause]
    assert {each.name for each in found.consequences} == {"worker-died", "engine-dead"}
    assert all(cause in each.explained_by for each in found.consequences)


def test_consequences_alone_are_no_cause() -> None:
    found = diagnosed(example("engine-dead") + example("worker-died"))
    assert not found.causes
    assert [(each.name, each.explained_by) for each in found.consequences] == [
        ("engine-dead", ("worker-died",)),
        ("worker-died", ()),
    ]


def test_cause_in_another_log_is_found() -> None:
    found = diagnosed(example("engine-dead"), b"\n\n" + example("oom-killer"))
    assert [(each.log, each.line) for each in found.causes[0].lines] == [("log 1", 3)]
    assert [each.name for each in found.consequences] == ["engine-dead"]


def test_warning_is_no_cause() -> None:
    found = diagnosed(example("driver-no-memory") + example("engine-dead"))
    assert [each.role for each in found.found] == ["consequence", "warning"]


def test_warning_is_the_cause_of_a_failure_that_names_it_unless_another_failure_is() -> None:
    found = diagnosed(example("env-file-ignored") + example("engine-dead"))
    assert [(each.name, each.role) for each in found.found] == [
        *[("env-file-ignored", "cause"), ("engine-dead", "consequence")]
    ]
    assert causes(diagnosed(example("env-file-ignored") + example("disk-full") + example("engine-dead"))) == [
        "disk-full"
    ]


def test_event_is_told_only_where_it_explains_a_failure() -> None:
    assert causes(diagnosed(example("cable-unplugged") + example("rdma-failed"))) == ["cable-unplugged"]
    assert [each.name for each in diagnosed(example("cable-unplugged") + example("disk-full")).found] == ["disk-full"]


def test_event_that_tells_more_about_a_failure_is_told_with_it() -> None:
    failure = example("ray-memory-monitor")
    assert "stands first" not in diagnosed(failure).causes[0].why
    found = diagnosed(failure + example("ray-memory-holder"))
    assert causes(found) == ["ray-memory-monitor"]
    assert "process 5120 (ray::RayWorkerWrapper.execute_method) stands first, with 104.83 GB." in found.causes[0].why


def test_failure_with_its_consequences_has_a_cause() -> None:
    for each in (each for each in KNOWN if not each.is_warning):
        lines = b"".join(example(other.name) for other in KNOWN if other in (each, *_after(each)))
        found = diagnosed(lines + companions(each))
        assert found.causes or each.ends_only, each.name
    assert causes(diagnosed(b"".join(example(each.name) for each in KNOWN)))


def _after(known: Signature) -> list[Signature]:
    return [each for each in KNOWN if known.name in each.consequence_of]


def test_family_yields_to_its_kind_on_a_line_and_follows_from_it_on_another() -> None:
    kind, family = example("nvcc-too-old"), example("compiling-failed")
    assert [each.name for each in diagnosed(kind).found] == ["nvcc-too-old"]
    found = diagnosed(family + kind)
    assert causes(found) == ["nvcc-too-old"]
    assert [(each.name, each.explained_by) for each in found.consequences] == [("compiling-failed", ("nvcc-too-old",))]


def test_earliest_failure_of_several_nodes_is_the_cause() -> None:
    def at(time_of_day: str, error: str) -> bytes:
        return f"(Worker pid=1) ERROR 10-02 {time_of_day} [x.py:1] {error}\n".encode()

    full, crashed = "OSError: No space left on device", "RuntimeError: CUDA error: misaligned address"
    assert causes(diagnosed(at("09:10:00", full), at("09:00:00", crashed))) == ["gpu-kernel-crashed"]
    assert causes(diagnosed(at("09:00:00", full), at("09:10:00", crashed))) == ["disk-full"]
    assert causes(diagnosed(at("09:00:00", full), at("12:00:00", crashed))) == ["disk-full", "gpu-kernel-crashed"]


def test_first_failure_of_a_device_is_the_cause_of_its_later_ones() -> None:
    line = "[{}] NVRM: Xid (PCI:{}:01:00): {}, pid=7, name=python3, Ch 00000008\n"
    same = line.format("Fri Oct 30 11:43:09 2026", "000f", 13) + line.format("Fri Oct 30 11:43:14 2026", "000f", 109)
    assert causes(diagnosed(same.encode())) == ["gpu-kernel-xid"]
    assert causes(diagnosed(same.replace("000f", "0001", 1).encode())) == ["gpu-xid"]
    assert causes(diagnosed(same.replace("11:43:14", "19:43:14").encode())) == ["gpu-kernel-xid", "gpu-xid"]


def test_failure_that_needs_several_lines_is_none_with_fewer() -> None:
    line = example("ranks-hang").splitlines(keepends=True)[0]
    assert causes(diagnosed(line * 3)) == []
    assert causes(diagnosed(line * 4)) == ["ranks-hang"]


def test_failure_that_needs_another_is_none_without_it() -> None:
    line = b"kernel: NVRM: Check failed: Out of memory [NV_ERR_NO_MEMORY] (0x00000051) returned from x\n"
    assert [each.name for each in diagnosed(line).found] == ["driver-no-memory"]
    pressed = diagnosed(line + b"systemd-journald[662]: Under memory pressure, flushing caches.\n" * 3)
    assert [each.name for each in pressed.found] == ["driver-memory-exhausted"]


def test_warning_is_told_unless_the_failure_that_it_may_become_was_found() -> None:
    line = example("rank-stalls")
    assert [each.name for each in diagnosed(line * 3).warnings] == ["rank-stalls"]
    assert [each.name for each in diagnosed(line * 4).found] == ["ranks-hang"]


# An error that a program logs, and after which it goes on until another one ends it.
LOGGED = """(APIServer pid=7) ERROR 10-02 09:00:02 [own.py:57] Traceback (most recent call last):
(APIServer pid=7) ERROR 10-02 09:00:02 [own.py:57]   File "/opt/own/cache.py", line 4, in read
(APIServer pid=7) ERROR 10-02 09:00:02 [own.py:57] ModuleNotFoundError: No module named 'own_cache'
(APIServer pid=7) INFO 10-02 09:00:03 [own.py:61] starting
"""
ENDING = """(APIServer pid=7) Traceback (most recent call last):
(APIServer pid=7)   File "/opt/env/bin/vllm", line 10, in <module>
(APIServer pid=7)     sys.exit(main())
"""


@pytest.mark.parametrize(
    ("end", "first"),
    [
        ("(APIServer pid=7) OSError: [Errno 28] No space left on device\n", "disk-full"),
        ("(APIServer pid=7) KeyError: 'own_widget'\n", "key-missing"),
    ],
)
def test_error_after_which_a_program_went_on_is_told_after_the_one_that_ended_it(end: str, first: str) -> None:
    assert causes(diagnosed(f"{LOGGED}{ENDING}{end}".encode())) == [first, "module-not-installed"]


def test_error_that_ended_the_program_stays_the_cause_where_it_was_logged_before() -> None:
    found = diagnosed(f"{LOGGED}{ENDING}(APIServer pid=7) ModuleNotFoundError: No module named 'own_cache'\n".encode())
    assert causes(found) == ["module-not-installed"]


def test_logged_error_of_another_process_stays_the_first_cause() -> None:
    other = LOGGED.replace("APIServer pid=7", "EngineCore pid=9")
    found = diagnosed(f"{other}{ENDING}(APIServer pid=7) OSError: [Errno 28] No space left on device\n".encode())
    assert causes(found) == ["module-not-installed", "disk-full"]


def test_general_failure_is_the_cause_only_where_no_other_is_found() -> None:
    line = example("call-does-not-fit")
    found = diagnosed(line + example("engine-dead"))
    assert causes(found) == ["call-does-not-fit"]
    assert [each.explained_by for each in found.consequences] == [("call-does-not-fit",)]
    assert [each.line for each in found.telling] == [1]
    known = diagnosed(line + example("disk-full"))
    assert (causes(known), known.telling) == (["disk-full"], ())


def test_general_failure_is_told_of_the_most_suspicious_lines_only() -> None:
    first = 'Traceback (most recent call last):\n  File "a.py", line 1, in b\n    c()\nacme.OwnError: no rows\n'
    assert causes(diagnosed(f"{first}error: the own table is locked by 4\n".encode())) == []


def test_general_failure_is_not_told_of_what_went_on() -> None:
    line = b"error: own-tool: cannot find the file x\n"
    assert causes(diagnosed(line)) == ["path-missing"]
    assert causes(diagnosed(line + b"ok\n" * 300)) == []
    assert causes(diagnosed(line + b"Successfully installed own-1.0\n")) == []
    exception = b"FileNotFoundError: [Errno 2] No such file or directory: 'x'\n"
    assert causes(diagnosed(exception + b"ok\n" * 300)) == ["path-missing"]
    assert causes(diagnosed(exception + b"INFO:     Application startup complete.\n")) == []


@pytest.mark.parametrize(
    ("file", "message", "part"),
    [
        ("vllm/engine/arg_utils.py", "ValueError: own rows differ", "settings-part-failed"),
        ("vllm/config/speculative.py", "ValueError: own rows differ", "speculation-part-failed"),
        ("vllm/v1/kv_cache_interface.py", "AssertionError: own page", "kv-cache-part-failed"),
        ("vllm/models/own/nvidia/ops/own.py", "ValueError: own rows differ", "kernel-part-failed"),
        ("/srv/vllm/own/start.py", "ValueError: own LoRA rows differ", "lora-part-failed"),
        ("/srv/vllm/own/start.py", "ValueError: own rows differ", ""),
    ],
)
def test_general_failure_tells_the_part_by_its_frames_or_else_its_words(file: str, message: str, part: str) -> None:
    head, frame = (
        "Traceback (most recent call last):",
        f'  File "/opt/v/lib/python3.12/site-packages/{file}", line 8, in own',
    )
    (cause,) = diagnosed(f"{head}\n{frame}\n    own()\n{message}\n".encode()).causes
    kind = BY_NAME[cause.name]
    assert cause.title == (f"{BY_NAME[part].title}: {kind.title}" if part else kind.title)
    told = steps(cause.hint)
    assert not part or set(steps(BY_NAME[part].hint)) <= set(told)
    assert (steps(kind.hint)[0] in told) == (not part or not kind.vague)


def test_step_that_names_what_another_has_named_is_told_once() -> None:
    frame = '  File "/opt/v/vllm/v1/worker/gpu_model_runner.py", line 7, in capture_model'
    (cause,) = diagnosed(
        f"Traceback (most recent call last):\n{frame}\n    own()\nValueError: own rows\n".encode()
    ).causes
    assert cause.hint.count("`--enforce-eager`") == 1


# The parent repeats the traceback of its child below its own.
SPAWNED = """Traceback (most recent call last):
  File "/opt/env/lib/python3.12/site-packages/torch/multiprocessing/spawn.py", line 114, in join
    raise Exception(msg)
Exception:

-- Process 0 terminated with the following error:
Traceback (most recent call last):
  File "/work/train.py", line 9, in train
    own()
{error}
"""


@pytest.mark.parametrize(
    "error", ["OwnError: no own 7", "torch.distributed.DistNetworkError: The client socket failed"]
)
def test_an_exception_that_only_announces_that_of_another_process_is_not_the_cause(error: str) -> None:
    found = diagnosed(SPAWNED.format(error=error).encode())
    first = found.causes[0].lines[0] if found.causes else found.telling[0]
    assert (first.line, first.text) == (10, error)


def test_a_place_in_the_stack_of_a_program_in_c_is_not_suspicious() -> None:
    log = b"own: recv failed on a socket: Connection reset by peer\nframe #0: c10::Error::Error(c10::Source) + 0x80\n"
    found = diagnosed(log)
    shown = [place.line for each in found.found for place in each.lines] + [each.line for each in found.telling]
    assert set(shown) == {1}
