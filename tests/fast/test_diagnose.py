"""`diagnose`: every signature against its examples, real logs, arbitrary bytes, followed logs and the journal."""

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkinstall import stacks
from sparkinstall.cli.app import VERBS
from sparkinstall.config import settings as all_settings
from sparkinstall.core import catalogue
from sparkinstall.diagnose import advice, programs, tracebacks
from sparkinstall.diagnose import judge as judge_module
from sparkinstall.diagnose import search as log_search
from sparkinstall.diagnose.judge import Diagnosis, judge
from sparkinstall.diagnose.search import Search, SignatureIndex, index_of
from sparkinstall.diagnose.signatures import Signature, hint_for, load
from sparkinstall.facts import vllm_releases
from sparkinstall.probes import known_hosts
from sparkinstall.schema import Malformed
from tests.support import forks
from tests.support.nodes import FIXES_OF_SPARKS
from tests.support.rehearsals import TIMEOUT_SECONDS, environment
from tests.support.waiting import until

REPOSITORY = Path(__file__).resolve().parents[2]
LOGS = REPOSITORY / "tests/logs"
INDEX = yaml.safe_load((LOGS / "index.yaml").read_text())
KNOWN = load()
LOOKED_FOR = index_of(KNOWN)
BY_NAME = {each.name: each for each in KNOWN}
HOST_CASES = yaml.safe_load((REPOSITORY / "tests/cases/known-hosts.yaml").read_text())


def of_rule(known: Signature) -> list[str]:
    """What the kernel's log has on a host that the rule of this name finds bad."""
    lines = {f"kernel: {line}" for case in HOST_CASES if case["rule"] == known.name for line in case.get("kernel", ())}
    kinds = [each.regex for each in KNOWN if each.family == known.name and not each.only_with]
    return sorted(line for line in lines if known.regex.search(line) and not any(kind.search(line) for kind in kinds))


LINES = {each.name: [*each.example, *of_rule(each)] for each in KNOWN}
EXAMPLES = [pytest.param(BY_NAME[n], line, id=f"{n}-{at}") for n, some in LINES.items() for at, line in enumerate(some)]
HARMLESS = [pytest.param(s, line, id=f"{s.name}-{at}") for s in KNOWN for at, line in enumerate(s.harmless)]


def read(data: bytes, sizes: Sequence[int] = (1 << 20,), index: SignatureIndex = LOOKED_FOR, name: str = "x") -> Search:
    """Search a log that is fed in pieces of these sizes, repeatedly."""
    search, at = Search(index, name), 0
    while at < len(data):
        for size in sizes:
            search.feed(data[at : at + size])
            at += size
    search.end()
    return search


def diagnosed(*logs: bytes) -> Diagnosis:
    return judge([read(log, name=f"log {at}") for at, log in enumerate(logs)])


def causes(found: Diagnosis) -> list[str]:
    return [each.name for each in found.causes]


# --- the signatures


def companions(known: Signature) -> bytes:
    """The lines without which a failure is none."""
    return b"".join(example(name) * BY_NAME[name].times for name in known.only_with)


@pytest.mark.parametrize(("known", "line"), EXAMPLES)
def test_example_is_diagnosed_as_its_signature_only(known: Signature, line: str) -> None:
    lines = f"INFO all good\n{chr(10).join([line] * known.times)}\nINFO all good\n".encode()
    found = diagnosed(lines + companions(known))
    if known.is_warning:
        told = [each.name for each in found.found if known.name not in BY_NAME[each.name].only_with]
        assert told == ([] if known.severity == "event" else [known.name])
        assert known.name in read(line.encode()).sightings
    else:
        failure, *others = found.found
        assert (failure.name, failure.role) == (known.name, "consequence" if known.ends_only else "cause")
        assert failure.lines[0].line == 2
        assert all(known.name in each.explained_by for each in others)


@pytest.mark.parametrize(("known", "line"), HARMLESS)
def test_harmless_line_is_not_diagnosed(known: Signature, line: str) -> None:
    assert known.name not in read(line.encode()).sightings


FORMATS: dict[str, Callable[[str], bytes]] = {
    "colours": lambda line: (
        f"\x1b[36m(RayWorkerWrapper pid=8)\x1b[0m \x1b[31mERROR\x1b[0m {line}\x1b[32m [repeated 3x]\x1b[0m\n".encode()
    ),
    "journal": lambda line: f"Nov 21 16:00:00 spark-3995 vllm[123]: {line}\n".encode(),
    "Windows": lambda line: f"before\r\n{line}\r\nafter\r\n".encode(),
    "a progress bar": lambda line: f"Loading:  10%|#  |\rLoading: 100%|###|\r{line}\n".encode(),
    "other bytes": lambda line: b"\xff\xfe\x00\n" + line.encode() + b"\x00\xff",
    "a very long line": lambda line: b"x" * 300_000 + b" " + line.encode() + b" " + b"y" * 300_000,
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "known", [each for each in KNOWN if "^" not in each.regex.pattern and not each.general], ids=lambda each: each.name
)
def test_example_is_found_in_every_format(known: Signature, form: str) -> None:
    assert known.name in read(FORMATS[form](LINES[known.name][0]), (7777,)).sightings


README_SYMPTOMS = re.findall(r"^\| (\d+) \| `([^`]+)`[^|]*\|", (REPOSITORY / "README.md").read_text(), re.M)


@pytest.mark.parametrize(("number", "line"), README_SYMPTOMS)
def test_readme_symptom_is_diagnosed_as_its_fix(number: str, line: str) -> None:
    assert [each.fix for each in diagnosed(line.encode()).causes] == [int(number)]


def test_readme_has_the_symptoms_of_five_fixes() -> None:
    assert [number for number, _ in README_SYMPTOMS] == ["1", "3", "5", "6", "7"]


def test_signatures_cover_every_fix_and_many_other_failures() -> None:
    assert {each.fix for each in KNOWN if not each.is_warning} >= {fix.number for fix in FIXES_OF_SPARKS}
    assert len([each for each in KNOWN if each.fix is None]) >= 25


@pytest.mark.parametrize("known", KNOWN, ids=lambda each: each.name)
def test_signature_fields_are_valid(known: Signature) -> None:
    assert known.title == known.title.strip(" .")
    assert known.why.endswith(".")
    assert all(link.startswith("https://") for link in known.links)
    assert len(set(known.links)) == len(known.links)
    for anchor in known.anchors:
        assert "\n" not in anchor
        assert len(anchor) >= 3


def mentioned(pattern: str) -> set[str]:
    return {name for each in KNOWN for name in re.findall(pattern, each.hint)}


def test_hints_name_existing_verbs_settings_steps_and_probes() -> None:
    assert mentioned(r"`sparkinstall ([a-z-]+)") <= set(VERBS)
    assert mentioned(r"`((?:serving|network|cluster|nccl|fp8|packages|environment)\.\w+)") <= {
        each.name for each in all_settings()
    }
    assert mentioned(r"--set ([\w.]+)=") <= {each.name for each in all_settings()}
    steps = {step.name for step in catalogue.STEPS}
    probes = set(re.findall(r"^\| `([a-z0-9-]+)` \|", (REPOSITORY / "docs/checks.md").read_text(), re.M))
    assert mentioned(r"--only ([a-z0-9-]+)") <= steps | probes
    for run in mentioned(r"`sparkinstall run ([a-z0-9 -]+)`"):
        assert {word for word in run.split() if not word.startswith("-")} <= steps, run


def test_page_lists_every_signature() -> None:
    page = (REPOSITORY / "docs/diagnose.md").read_text()
    listed = dict(re.findall(r"^\| `([a-z0-9-]+)` \| ([^|]+) \|", page, re.M))
    assert {name: title.strip() for name, title in listed.items() if name in BY_NAME} == {
        each.name: each.title + each.note for each in KNOWN
    }


GOOD: dict[str, Any] = {
    "name": "some-failure", "title": "t", "anchors": ["abcd"], "regex": "abcd", "why": "w.", "hint": "m",
    "links": ["https://a"], "example": ["abcd"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("just a text", "must be a list"),
        ([1], r"x.yaml, line 1: `\[0\]` must be a mapping with the keys name"),
        ([{**GOOD, "regexp": "x"}], r"unknown key `\[0\].regexp`: .*did you mean `regex`"),
        ([{k: v for k, v in GOOD.items() if k != "links"}], r"`\[0\].links` is missing"),
        ([{**GOOD, "links": []}], "links` must be a list of text, at least one, not"),
        ([{**GOOD, "anchors": "abcd"}], "anchors` must be a list of text"),
        ([{**GOOD, "regex": "(abcd"}], r"`\[0\].regex` is not a regular expression: missing"),
        ([{**GOOD, "name": "Some Failure"}], "name` must be words in lower case"),
        ([{**GOOD, "fix": 99}], "fix` must be the number of a fix, not 99"),
        ([{**GOOD, "severity": "bad"}], "severity` must be one of failure, warning, event, not 'bad'"),
        ([GOOD, GOOD], "two signatures"),
        ([{**GOOD, "consequence_of": ["unheard-of"]}], "unheard-of"),
        ([{**GOOD, "consequence_of": ["some-failure"]}], "in a circle"),
        ([{**GOOD, "consequence_of": ["b"]}, {**GOOD, "name": "b", "consequence_of": ["any"]}], "in a circle"),
    ],
)
def test_load_invalid_entry_is_refused_with_its_place(entries: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(entries))
    with pytest.raises(Malformed, match=words):
        load(tmp_path)


# --- real logs


def test_log_index_has_every_log() -> None:
    assert sorted(each["log"] for each in INDEX) == sorted(path.name for path in LOGS.glob("*.log"))
    assert all(each["how"] for each in INDEX)


@pytest.mark.parametrize("entry", INDEX, ids=lambda entry: str(entry["log"]))
def test_real_log_gives_the_diagnosis_of_the_index(entry: dict[str, Any]) -> None:
    found = diagnosed((LOGS / entry["log"]).read_bytes())
    assert causes(found) == entry.get("causes", [])
    assert [each.name for each in found.consequences] == entry.get("consequences", [])
    assert [each.name for each in found.warnings] == entry.get("warnings", [])
    if not found.causes:
        assert [each.line for each in found.telling] == entry.get("telling", [])


def test_word_that_the_line_lacks_leaves_no_empty_parentheses() -> None:
    named = b"own.service: Failed to set up mount namespacing: /run/systemd/unit-root/srv/own: No such file"
    unnamed = b"own.service: Main process exited, code=exited, status=226/NAMESPACE"
    assert "exists (/srv/own);" in diagnosed(named).causes[0].why
    assert "exists;" in diagnosed(unnamed).causes[0].why


# --- causes and consequences


def example(name: str) -> bytes:
    return (LINES[name][0].encode() + b"\n") * BY_NAME[name].times


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


@pytest.mark.parametrize("before", ["+ ", "++ ", "$ ", "lab@spark-1:~/x$ "])
def test_command_that_a_shell_repeats_is_not_diagnosed(before: str) -> None:
    found = diagnosed(f"{before}grep -c 'Error: CUDA out of memory' vllm.log\n".encode())
    assert not found.found and not found.telling


def test_bare_exception_is_shown_with_the_code_that_raised_it() -> None:
    frames = '  File "/a.py", line 3, in f\n    assert a >= b\n           ^^^^^^\n'
    log = f"Traceback (most recent call last):\n{frames}AssertionError\n"
    assert [each.text for each in diagnosed(log.encode()).telling] == ["AssertionError (raised by `assert a >= b`)"]


def test_general_failure_is_the_cause_only_where_no_other_is_found() -> None:
    line = example("call-does-not-fit")
    found = diagnosed(line + example("engine-dead"))
    assert causes(found) == ["call-does-not-fit"]
    assert [each.explained_by for each in found.consequences] == [("call-does-not-fit",)]
    assert [each.line for each in found.telling] == [1]
    known = diagnosed(line + example("disk-full"))
    assert (causes(known), known.telling) == (["disk-full"], ())


def test_general_failure_quotes_the_line_and_advises_what_that_names() -> None:
    raised = (
        '  File "/opt/v/lib/python3.12/site-packages/vllm/v1/attention/backends/own.py", line 8, in build',
        "    raise ValueError(",
        "ValueError: own_rows (4) of kv_cache_dtype must be one of ['auto', 'fp8'], see --own-table and VLLM_OWN_ROWS",
    )
    log = "\n".join(f"(EngineCore pid=7) ERROR 10-02 09:00:01 [core.py:9] {each}" for each in raised)
    (cause,) = diagnosed(log.encode()).causes
    assert cause.why.startswith(f'"{raised[2].removeprefix("ValueError: ")}": ')
    for words in ("['auto', 'fp8']", "`--own-table` and `--kv-cache-dtype`", "`VLLM_OWN_ROWS`"):
        assert words in cause.hint
    assert cause.hint.index("TRITON_ATTN") < cause.hint.index(BY_NAME[cause.name].hint)
    assert cause.title == f"{BY_NAME['attention-part-failed'].title}: {BY_NAME[cause.name].title}"


@pytest.mark.parametrize(
    ("file", "message", "part"),
    [
        ("vllm/config/parallel.py", "ValueError: own rows differ", "settings-part-failed"),
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
    assert (not part or BY_NAME[part].hint in cause.hint) and (kind.hint in cause.hint) == (not part or not kind.vague)


@pytest.mark.parametrize(
    ("message", "advised"),
    [
        ("RuntimeError: the table is not aligned", ""),
        ("ValueError: Unknown kind own. Supported kinds: a, b, c", "a, b, c"),
        ("ValueError: own backend is not supported for models with windows", ""),
        ("RuntimeError: unknown model architecture: 'own7'", ""),
        ("ValueError: unsupported formats: 'own', 'b'", ""),
        ("ValueError: not a valid backend: 'own', 'b'", ""),
        ("ValueError: not supported: 'own'", ""),
        ("ValueError: there are no available blocks: 'own', 'b'", ""),
        ("ValueError: 'own' is not one of ['a', 'b']", "['a', 'b']"),
        ("ValueError: 'own' is not supported. Available: ['a', 'b']", "['a', 'b']"),
        ("ValueError: the name must not be one of ['own', 'b']", ""),
        ("RuntimeError: own GEMM only supports Hopper (SM90) and B200", ""),
        ("ValueError: TRITON_ATTN and FLASHINFER_MLA refuse 7 rows", ""),
        ("RuntimeError: own, logged by /srv/own/process.go", ""),
        ("Error: run `apt install own-dev` first", "`apt install own-dev`"),
        ("OSError: [Errno 22] Invalid argument: '/srv/own/part.bin'", "`/srv/own/part.bin`"),
        ("RuntimeError: raised in /opt/v/lib/python3.12/site-packages/vllm/own.py", ""),
        ("ValueError: total heads 12 is not divisible by tp_size 8", "`--tensor-parallel-size`"),
        ("HTTPError: 404 for url: https://example.com/own/x", "https://example.com/own/x"),
        ("vllm: error: unrecognized arguments: serve own/model", "stands there twice"),
        ("vllm serve: error: unrecognized arguments: own model", "belong to no option"),
        (
            "vllm serve: error: unrecognized arguments: --tensor-paralel-size 2",
            "the nearest is `--tensor-parallel-size`",
        ),
        ("vllm serve: error: unrecognized arguments: --tp-size 2", "it is now `--tensor-parallel-size`"),
        ("request (7 tokens) exceeds the available context size (5 tokens), try increasing it", ""),
        ("Expected a word to be set. Or for one of the `X-Own-Key` or `Own` headers to be omitted", ""),
        (
            "TypeError: EngineArgs.__init__() got an unexpected keyword argument 'task'",
            "`task` is now what the option `--runner or --convert` is",
        ),
        ("vllm: error: unrecognized arguments: --host 127.0.0.1 --port 6379", "came as one word"),
        ("api_server.py: error: unrecognized arguments: serve own/x --dtype auto", "stands there twice"),
        ("vllm serve: error: ambiguous option: --model could match --model-impl", "without `--model`"),
        ("vllm serve: error: argument --max-model-len: expected one argument", "the value of `--max-model-len`"),
        ("vllm serve: error: unrecognized arguments: --swap-space 4", "nothing takes its place"),
        ("vllm serve: error: unrecognized arguments: --max-model-len 9", "this one is older, or another program"),
        ("vllm serve: error: unrecognized arguments: --linear-backend own", "only vLLM "),
        ("vllm serve: error: the following arguments are required: model_tag", "before all options"),
        (
            "vllm serve: error: argument --moe-backend: invalid choice: 'b12x'",
            "`b12x` is a value of `--moe-backend` in vLLM ",
        ),
        ("vllm serve: error: argument --own/--no-own: ignored explicit argument 'true'", "`--own` takes no value"),
    ],
)
def test_advice_is_drawn_from_the_words_of_a_message(message: str, advised: str) -> None:
    told = advice.advice(message, is_of_vllm=True)
    assert advised in "".join(told) if advised else told == ()


def test_words_of_a_message_lack_the_class_of_its_exception() -> None:
    assert advice.says("own.errors.OwnError:  the rows\n differ.") == "the rows differ"
    assert advice.says("RuntimeError: Worker failed with error 'OwnError: 3 < 4', please check the stack") == "3 < 4"
    assert advice.says("OwnError: ") == "OwnError"


def test_former_options_are_gone_from_a_release_and_name_what_vllm_has() -> None:
    shipped = vllm_releases.shipped()
    for former, now in advice.FORMER.items():
        assert not all(former in each.options for each in shipped), former
        for option in re.findall(r"--[a-z-]+", now):
            assert advice.shipped_with(option), option


def test_advice_names_options_that_vllm_has() -> None:
    known = {option for each in vllm_releases.shipped() for option in each.options}
    assert {option for _, option in advice.OPTIONS} <= known


def test_error_alone_is_a_failure_though_its_cause_is_not_known() -> None:
    found = diagnosed(b"own-tool: reading the table\nError: own rows are gone\n")
    assert found.shows_failure and not found.found
    assert [each.text for each in found.telling] == ["Error: own rows are gone"]


def test_diagnose_failure_that_is_not_known_says_so_and_exits_3(tmp_path: Path) -> None:
    log = tmp_path / "own.log"
    log.write_text("Error: own rows are gone, run `apt install own-rows`\n")
    ended = run("diagnose", str(log))
    assert ended.returncode == 3
    for words in ("The cause is not known", "own rows are gone", "`apt install own-rows`", "cause not known; see also"):
        assert words in ended.stdout


def test_general_failure_is_told_of_the_most_suspicious_lines_only() -> None:
    first = 'Traceback (most recent call last):\n  File "a.py", line 1, in b\n    c()\nacme.OwnError: no rows\n'
    assert causes(diagnosed(f"{first}error: the own table is locked by 4\n".encode())) == []


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
    stage = tracebacks.stage_of("\n".join(lines))
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in tracebacks.stage_of("\n".join(lines).replace("worker/", "worker/gpu/"))
    assert (words in stage and cause.hint.startswith(stage)) if words else stage == ""


def test_message_that_a_terminal_has_cut_has_the_numbers_of_all_its_lines() -> None:
    log = """(EngineCore pid=3) ValueError: To serve at least one request with the model's max seq len
(90000), 3.09 GiB KV cache is needed, which is larger than the available KV
cache memory (0.24 GiB). Estimated maximum model length is 57344.
"""
    (cause,) = diagnosed(log.encode()).causes
    assert (cause.name, "(57344)" in cause.hint, cause.count) == ("kv-cache-too-small", True, 1)


def test_word_that_was_cut_at_the_width_of_a_terminal_is_one_again() -> None:
    who = "(Worker_TP0 pid=28) ERROR 05-30 19:59:18 [multiproc_executor.py:870] "
    frame = '  File "/srv/env/lib/python3.12/own-packages/vllm/own.py", line 5, in own'
    whole = (who + frame, f"{who}AssertionError: 14 is not divisible by 4")
    text = "\n".join(f"{each[:96]}\n{each[96:]:96}" for each in whole)
    (cause,) = diagnosed(f"{text}\n".encode()).causes
    assert cause.name == "size-not-divisible" and cause.lines[0].text == whole[1]


def test_exception_that_looks_like_code_is_told_whole() -> None:
    told = "ValueError: own_tables='round' are not there, but ['long', 'short'] are"
    code = '  File "/opt/own.py", line 7, in own\n    raise ValueError(\n'
    (place,) = diagnosed(f"Traceback (most recent call last):\n{code}  # {told}\n".encode()).causes[0].lines
    assert place.text == told


def test_line_with_several_beginnings_is_one_line() -> None:
    who = "        (EngineCore_DP0 pid=1026745) (Worker_TP0 pid=1026751) ERROR 02-01 09:32:13 [executor.py:852] "
    found = diagnosed(f"{who}ValueError: {'own tables do not fit, ' * 6}\n".encode())
    assert found.logs[0].lines == 1 and [each.line for each in found.causes[0].lines] == [1]


def test_error_of_another_process_has_no_place_of_the_process_that_passes_it_on() -> None:
    place = '  File "/opt/v/vllm/v1/executor/own.py", line 7, in get_response\n    raise RuntimeError('
    passed_on = "RuntimeError: Worker failed with error 'AssertionError: own rows', please check the stack trace above"
    (cause,) = diagnosed(f"Traceback (most recent call last):\n{place}\n{passed_on}\n".encode()).causes
    assert (cause.where, cause.why.partition(": ")[0]) == ("", '"own rows"')


def test_first_failure_of_a_device_is_the_cause_of_its_later_ones() -> None:
    line = "[{}] NVRM: Xid (PCI:{}:01:00): {}, pid=7, name=python3, Ch 00000008\n"
    same = line.format("Fri Oct 30 11:43:09 2026", "000f", 13) + line.format("Fri Oct 30 11:43:14 2026", "000f", 109)
    assert causes(diagnosed(same.encode())) == ["gpu-kernel-xid"]
    assert causes(diagnosed(same.replace("000f", "0001", 1).encode())) == ["gpu-xid"]
    assert causes(diagnosed(same.replace("11:43:14", "19:43:14").encode())) == ["gpu-kernel-xid", "gpu-xid"]


def test_failure_that_needs_another_is_none_without_it() -> None:
    line = b"kernel: NVRM: Check failed: Out of memory [NV_ERR_NO_MEMORY] (0x00000051) returned from x\n"
    assert [each.name for each in diagnosed(line).found] == ["driver-no-memory"]
    pressed = diagnosed(line + b"systemd-journald[662]: Under memory pressure, flushing caches.\n" * 3)
    assert [each.name for each in pressed.found] == ["driver-memory-exhausted"]


def test_general_failure_is_not_told_of_what_went_on() -> None:
    line = b"error: own-tool: cannot find the file x\n"
    assert causes(diagnosed(line)) == ["path-missing"]
    assert causes(diagnosed(line + b"ok\n" * 300)) == []
    assert causes(diagnosed(line + b"Successfully installed own-1.0\n")) == []
    exception = b"FileNotFoundError: [Errno 2] No such file or directory: 'x'\n"
    assert causes(diagnosed(exception + b"ok\n" * 300)) == ["path-missing"]
    assert causes(diagnosed(exception + b"INFO:     Application startup complete.\n")) == []


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


def test_failure_with_its_consequences_has_a_cause() -> None:
    for each in (each for each in KNOWN if not each.is_warning):
        lines = b"".join(example(other.name) for other in KNOWN if other in (each, *_after(each)))
        found = diagnosed(lines + companions(each))
        assert found.causes or each.ends_only, each.name
    assert causes(diagnosed(b"".join(example(each.name) for each in KNOWN)))


def _after(known: Signature) -> list[Signature]:
    return [each for each in KNOWN if known.name in each.consequence_of]


# --- the words of others


def test_consequence_alone_is_shown_with_the_most_suspicious_line() -> None:
    log = b"""(EngineCore pid=700) ERROR 10-02 09:00:01 [core.py:1330] EngineCore failed to start.
(EngineCore pid=700) ERROR 10-02 09:00:01 [core.py:1330] RuntimeError: the widget table of layer 7 is not aligned
(APIServer pid=650) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
    found = diagnosed(log)
    assert not found.causes
    assert [each.line for each in found.telling] == [2]
    ended = run("diagnose", given=log)
    assert ended.returncode == 3
    assert "The cause is not known" in ended.stdout and "the widget table of layer 7" in ended.stdout
    assert "1 cause" not in ended.stdout


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


# --- tracebacks, families, nodes


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


def test_failure_that_needs_several_lines_is_none_with_fewer() -> None:
    line = example("ranks-hang").splitlines(keepends=True)[0]
    assert causes(diagnosed(line * 3)) == []
    assert causes(diagnosed(line * 4)) == ["ranks-hang"]


def test_warning_is_told_unless_the_failure_that_it_may_become_was_found() -> None:
    line = example("rank-stalls")
    assert [each.name for each in diagnosed(line * 3).warnings] == ["rank-stalls"]
    assert [each.name for each in diagnosed(line * 4).found] == ["ranks-hang"]


def test_hint_has_the_numbers_of_the_line() -> None:
    line = (
        b"ValueError: Free memory on device cuda:0 (104.10/121.69 GiB) on startup is less than desired GPU memory "
        b"utilization (0.90, 109.52 GiB)."
    )
    (cause,) = diagnosed(line).causes
    assert cause.why.startswith("5.42 GiB are missing: 104.10 of 121.69 GiB are available")
    assert "fit into 104.10 GiB, lower the share to at most 0.85 " in cause.hint


def test_every_rule_for_the_kernels_log_is_known() -> None:
    rules = [rule for rule in known_hosts.rules() if rule.looks == "kernel_log"]
    assert len(rules) >= 5
    for rule in rules:
        bad = [case for case in HOST_CASES if case["rule"] == rule.name and case["verdict"] in ("warn", "fail")]
        for case in (case for case in bad if case.get("kernel")):
            log = "".join(f"Oct 02 03:00:00 node-a kernel: {line}\n" for line in case["kernel"]).encode()
            names = {each.name for each in diagnosed(log).found}
            own = {each.name for each in KNOWN if rule.name in (each.name, each.family)}
            assert names & own if rule.signature else names, case


def test_hint_is_for_the_installed_release_and_otherwise_names_the_releases() -> None:
    hint = "`--a`{from 0.22.1: and `--b`}{before 0.22.1: with `C=1`}; x"
    assert hint_for(hint, "0.22.1") == hint_for(hint, "0.33.0+cu130") == "`--a` and `--b`; x"
    assert hint_for(hint, "0.18.1") == "`--a` with `C=1`; x"
    assert hint_for(hint, "") == "`--a` and `--b` (vLLM 0.22.1 and later), with `C=1` (before vLLM 0.22.1); x"
    assert not any("{from" in each.hint or "{before" in each.hint for each in KNOWN)


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


# What SGLang's start logs, and an exception in its code.
SGLANG_LOG = """[2026-10-02 09:00:01] server_args=ServerArgs(model_path='own/x')
[2026-10-02 09:00:02] Scheduler hit an exception: Traceback (most recent call last):
  File "/opt/env/lib/python3.12/site-packages/{package}/own.py", line 7, in load_weights
    raise AssertionError("own rows")
AssertionError: own rows
"""


def test_failure_of_sglang_is_told_in_its_name_and_with_its_options() -> None:
    (cause,) = diagnosed(SGLANG_LOG.format(package="sglang").encode()).causes
    told = f"{cause.title} {cause.why} {cause.hint} {cause.links}"
    assert cause.name == "checkpoint-not-loaded"
    assert "this SGLang's code" in told
    assert "`--speculative-algorithm`" in told
    assert cause.hint.endswith("a newer release of SGLang")
    assert "vllm" not in told.lower()
    assert "sparkinstall plan" not in told


def test_failure_in_vllms_code_keeps_its_name_in_a_log_of_sglang() -> None:
    (cause,) = diagnosed(SGLANG_LOG.format(package="vllm").encode()).causes
    assert "this vLLM's code" in cause.why


def test_every_hint_leaves_something_to_do_with_sglang() -> None:
    for each in KNOWN:
        hint = programs.rewritten(each, programs.SGLANG).hint
        assert hint.strip()
        assert "VLLM_" not in hint
        assert "; ;" not in hint


def test_hints_name_stacks_that_are_shipped() -> None:
    assert mentioned(r"--stack ([\d.]+)") <= set(stacks.names())
    for each in KNOWN:
        versions = re.findall(r"(?<![\d.])0\.\d\d\.\d+", each.hint)
        assert all(version in (*stacks.names(), "0.16.0", "0.17.1") for version in versions), each.name


# --- lines


def test_lines_of_a_failure_are_counted_and_the_first_kept() -> None:
    found = diagnosed(b"ok\n" + example("disk-full") * 5 + b"ok\n").causes[0]
    assert found.count == 5
    assert [place.line for place in found.lines] == [2, 3, 4]


def test_count_of_lines_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_search, "MOST", 4)
    monkeypatch.setattr(log_search, "MOST_WEIGHED", 4)
    search = read(example("disk-full") * 50 + example("oom-killer"), (300,))
    assert search.sightings["disk-full"].count == 4
    assert list(search.sightings) == ["disk-full", "oom-killer"]
    assert search.lines == 51


NO_FAILURE = b"INFO 10-02 09:00:%02d [core.py:1] option %d is not supported here, error: none\n"


@pytest.mark.parametrize("barren", [100, 3000])
@pytest.mark.parametrize("more", [b"", b", skipped"])
def test_failure_after_many_similar_lines_without_it_is_found(barren: int, more: bytes) -> None:
    log = b"".join(NO_FAILURE % (at % 60, at) for at in range(barren))
    failure = b"RuntimeError: this kernel is not supported on this device" + more + b"\n"
    (cause,) = diagnosed(log + failure).causes
    assert (cause.name, cause.lines[0].line) == ("no-code-for-this-gpu", barren + 1)


def test_failure_is_looked_for_in_a_limited_number_of_lines_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its literal stands in every line: the regex would take most of the time of a large log."""
    monkeypatch.setattr(log_search, "_MOST_FRUITLESS", 100)
    search = Search(LOOKED_FOR, "x")
    for at in range(20):
        search.feed(NO_FAILURE % (at, at))
    search.feed(b"RuntimeError: this kernel is not supported on this device\n" + example("disk-full"))
    search.end()
    assert list(search.sightings) == ["disk-full"]


def test_shown_line_has_no_host_secret_or_control_character(tmp_path: Path) -> None:
    token = "hf_" + "a" * 30
    log = tmp_path / "x.log"
    log.write_text(
        f"Nov 21 16:00:00 spark-3995 vllm[7]: \x1b]0;title\x07\x1b[2JOSError: No space left on device {token}\n"
        "spark-3995:4121:4190 [0] bootstrap.cc:251 NCCL WARN Message truncated : received 176 bytes instead of 172\n"
    )
    ended = run("diagnose", str(log))
    assert ended.returncode == 3
    assert "spark-3995" not in ended.stdout
    assert token not in ended.stdout
    assert "\x1b" not in ended.stdout
    assert "Nov 21 16:00:00 vllm[7]: OSError" in ended.stdout


def test_long_line_is_shown_around_the_match() -> None:
    (place,) = diagnosed(b"x" * 1500 + b" No space left on device " + b"y" * 9000).causes[0].lines
    assert "No space left on device" in place.text
    assert len(place.text) < 420


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


# --- any bytes, cut anywhere

_PARTS = st.sampled_from(
    [
        *(some[0].encode() for some in LINES.values()),
        *(anchor.encode() for each in KNOWN for anchor in each.anchors),
        *(b"\n", b"\r", b"\r\n", b"\x1b[31m", b"\x00", b"\xff", b" ", b"Error: x", b"ERROR ", b"FATAL", b"a" * 50),
    ]
)
_STREAMS = st.lists(st.one_of(_PARTS, st.binary(max_size=20)), max_size=25).map(b"".join)


def seen(search: Search) -> object:
    return (
        {name: (each.lines, each.count, each.last) for name, each in search.sightings.items()},
        [(each.place, each.weight, each.count) for each in search.telling],
        search.lines,
        search.bytes,
    )


@given(_STREAMS, st.lists(st.integers(1, 200), min_size=1, max_size=5))
@settings(deadline=None, max_examples=200)
def test_log_read_in_any_pieces_gives_the_same_result(data: bytes, sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_search, "REACH", 60)
        patch.setattr(log_search, "LONG", 200)
        assert seen(read(data, sizes)) == seen(read(data))


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_log_of_arbitrary_bytes_is_read(data: bytes) -> None:
    search = read(data)
    judge([search])
    assert search.lines == data.count(b"\n") + bool(data and not data.endswith(b"\n"))


def test_line_of_300_megabytes_uses_limited_memory() -> None:
    search = Search(LOOKED_FOR, "x")
    for _ in range(300):
        search.feed(b"0123456789abcdef" * 65536)
        assert len(search._waiting) <= log_search.LONG
    search.feed(b" " + example("oom-killer"))
    search.end()
    assert (search.lines, search.bytes >> 20) == (1, 300)
    assert list(search.sightings) == ["oom-killer"]


# --- the command


def run(*argv: str, given: bytes = b"") -> "subprocess.CompletedProcess[str]":
    return forks.run("sparkinstall", argv, environment(COLUMNS="100"), TIMEOUT_SECONDS, stdin=given)


def test_diagnose_prints_causes_and_consequences(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_bytes(b"ok\n" + example("nccl-versions-differ") + example("engine-dead") * 2)
    ended = run("diagnose", str(log))
    assert ended.returncode == 3
    words = ended.stdout.split("Consequences")
    for expected in (
        "nccl-versions-differ",
        "2 │",
        "why",
        "fix 1",
        "https://github.com/NVIDIA/nccl/issues/1176",
    ):
        assert expected in words[0]
    assert "engine-dead, line 3, 2 lines" in words[1]
    assert ended.stderr == ""


def test_diagnose_prints_what_is_known_first_where_nothing_tells_the_cause() -> None:
    ended = run("diagnose", given=example("worker-died") + example("engine-dead"))
    assert ended.returncode == 3
    first, others = ended.stdout.split("Consequences")
    assert first.startswith("What failed first is below, with what to do next.")
    assert first.index("a worker process has died") < first.index("journalctl -k -b")
    assert "engine-dead" not in first
    assert "engine-dead, line 2" in others
    assert "cause not known, 2 consequences" in others


def test_diagnose_prints_the_place_and_the_other_suspicious_lines_of_a_general_cause(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(
        'Traceback (most recent call last):\n  File "/e/site-packages/own/a.py", line 7, in run\n    go()\n'
        "TypeError: go() got an unexpected keyword argument 'x'\nerror: the rest was left out\n"
    )
    ended = run("diagnose", str(log))
    words = " ".join(ended.stdout.split())
    assert ended.returncode == 3
    assert "in own/a.py, run" in words
    assert "Other suspicious lines: 5 │ error: the rest was left out" in words


@pytest.mark.parametrize("packed", [False, True])
def test_diagnose_json_is_one_envelope(packed: bool, tmp_path: Path) -> None:
    log, data = tmp_path / "vllm.log", example("engine-dead") + example("oom-killer")
    log.write_bytes(gzip.compress(data) if packed else data)
    ended = run("diagnose", str(log), "--json")
    answer = json.loads(ended.stdout)
    assert (ended.returncode, answer["exit_code"], answer["status"], answer["errors"]) == (3, 3, "drift", [])
    first, second = answer["data"]["found"]
    assert (first["name"], first["severity"], first["explained_by"]) == ("oom-killer", "failure", [])
    assert first["lines"][0]["line"] == 2
    assert (second["name"], second["explained_by"]) == ("engine-dead", ["oom-killer"])
    assert answer["data"]["logs"] == [{"name": str(log), "bytes": len(data), "lines": 2}]


def test_diagnose_good_log_or_warning_exits_0() -> None:
    assert run("diagnose", "-", given=b"all good\n").returncode == 0
    ended = run("diagnose", given=example("driver-no-memory"))
    assert ended.returncode == 0
    assert "driver-no-memory" in ended.stdout


def test_diagnose_judges_several_logs_together(tmp_path: Path) -> None:
    (tmp_path / "head.log").write_bytes(example("engine-dead"))
    (tmp_path / "worker.log").write_bytes(example("ray-memory-monitor"))
    ended = run("diagnose", str(tmp_path / "head.log"), str(tmp_path / "worker.log"))
    assert ended.returncode == 3
    assert f"{tmp_path}/worker.log\n" in ended.stdout.split("Consequences")[0]
    assert f"{tmp_path}/head.log:1" in ended.stdout.split("Consequences")[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("/no/such/file",), "no such file"),
        (("/",), "is a folder"),
        (("-", "-"), "stdin can be read only once"),
        (("-", "/dev/null", "--follow"), "only one log can be followed"),
        (("/dev/null", "--boot"), "--boot needs a unit"),
    ],
)
def test_diagnose_unreadable_log_exits_2(argv: Sequence[str], words: str) -> None:
    ended = run("diagnose", *argv, "--json")
    assert ended.returncode == 2
    assert words in json.loads(ended.stdout)["errors"][0]["message"]


def test_diagnose_damaged_archive_exits_2(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(os.urandom(5000))[:3000])
    ended = run("diagnose", str(tmp_path / "x.gz"))
    assert ended.returncode == 2
    assert "is damaged" in ended.stderr


def test_diagnose_known_lists_every_signature() -> None:
    ended = run("diagnose", "--known", "--json")
    assert [each["name"] for each in json.loads(ended.stdout)["data"]["known"]] == [each.name for each in KNOWN]


# --- following


class Followed:
    """A running `diagnose --follow`, and its output so far."""

    def __init__(self, *argv: str) -> None:
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparkinstall", "diagnose", "--follow", *argv],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, env=environ,
        )  # fmt: skip
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.output += line.decode()

    def until(self, words: str) -> None:
        until(lambda: words in self.output, during=self._process)

    def until_it_reads(self, log: Path) -> None:
        files = Path(f"/proc/{self._process.pid}/fd")

        def has_read() -> bool:
            """Whether it sleeps, and its place in the file, which the kernel tells, is the end."""
            at = [each.name for each in files.iterdir() if os.path.realpath(each) == str(log)]
            try:
                told = [(files.parent / "fdinfo" / each).read_text() for each in at]
            except FileNotFoundError:
                # It has just closed one.
                return False
            state = (files.parent / "stat").read_text().rpartition(")")[2].split()[0]
            return state == "S" and any(int(each.split()[1]) == log.stat().st_size for each in told)

        until(has_read, during=self._process)

    def end(self) -> int:
        self._process.send_signal(signal.SIGINT)
        code = self._process.wait(300)
        self._reader.join(300)
        assert self._process.stderr
        assert b"Traceback" not in self._process.stderr.read()
        for stream in (self._process.stdout, self._process.stderr, self._process.stdin):
            if stream:
                stream.close()
        return code


@contextlib.contextmanager
def following(*argv: str) -> Iterator[Followed]:
    followed = Followed(*argv)
    try:
        yield followed
    finally:
        followed._process.kill()
        followed._process.wait()


def test_follow_shows_each_failure_until_ctrl_c(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_bytes(b"starting\n")
    with following(str(log)) as followed:
        with log.open("ab") as out:
            out.write(example("oom-killer"))
        followed.until("oom-killer")
        with log.open("ab") as out:
            out.write(example("engine-dead"))
        followed.until("a consequence of oom-killer")
        assert followed.end() == 3
    assert followed.output.count("the kernel ran out of memory") == 1
    assert "1 cause, 1 consequence" in followed.output


def test_follow_reads_a_rotated_and_a_rewritten_log(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_bytes(example("disk-full") + b"x" * 1000 + b"\n")
    with following(str(log)) as followed:
        followed.until("disk-full")
        log.rename(tmp_path / "vllm.log.1")
        log.write_bytes(example("oom-killer"))
        followed.until("oom-killer")
        log.write_bytes(example("gpu-fell-off"))
        followed.until("gpu-fell-off")
        assert followed.end() == 3


def test_follow_without_a_failure_exits_0(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_bytes(b"all good\n")
    with following(str(log), "--json") as followed:
        followed.until_it_reads(log)
        assert followed.end() == 0
    assert json.loads(followed.output)["data"]["logs"][0]["lines"] == 1


# --- the journal

STARTING, STARTED = "7d4958e842da4a758f6c1cdc7b36dcc5", "39f53479d3a045ac8e11786248231fbf"
AGAIN = "5eb03494b6584870a536b337290809b3"
JOURNALCTL = """#!/bin/sh
# Prints its arguments and the last entry of a unit that died; for --output=json, the marks in the file beside it.
case "$*" in *--output=json*) cat "$0.err" >&2; exec cat "$0.marks" ;; esac
echo "2026-11-21T16:00:00+0000 spark-1 asked[1]: $*"
echo "2026-11-21T16:00:01+0000 spark-1 systemd[1]: vllm.service: Failed with result 'oom-kill'."
"""


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {"journalctl": JOURNALCTL, "systemctl": "#!/bin/sh\necho not-found\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "journalctl.marks").write_text("-- No entries --\n")
    (tmp_path / "journalctl.err").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_unit_unknown_exits_2(journal: Path) -> None:
    ended = run("diagnose", "--unit", "vlm")
    assert ended.returncode == 2
    assert "no such unit: vlm.service" in ended.stderr
    del journal


def test_serve_logs_without_a_service_says_how_to_make_one(journal: Path) -> None:
    ended = run("serve", "logs")
    assert ended.returncode == 2
    assert "there is no service vllm" in ended.stderr and "`journalctl -u vllm`" in ended.stderr
    del journal


def test_unit_without_entries_is_an_error(journal: Path) -> None:
    (journal / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    (journal / "journalctl").write_text("#!/bin/sh\nexit 0\n")
    ended = run("diagnose", "--unit", "vlm")
    assert ended.returncode == 1
    assert "the journal has no entries of unit `vlm`" in ended.stderr
    assert "`systemctl list-units --all`" in ended.stderr and "group adm" in ended.stderr
    log = journal / "x.log"
    log.write_text("INFO all good\n")
    (error,) = json.loads(run("diagnose", str(log), "--unit", "vlm", "--json").stdout)["errors"]
    assert error["message"] == "the journal has no entries of unit `vlm`"
    log.write_bytes(example("triton-missing"))
    assert run("diagnose", str(log), "--unit", "vlm").returncode == 3


def test_unit_log_has_entries_of_systemd_and_the_kernel(journal: Path) -> None:
    data = unit_log_with(journal)
    assert b"_SYSTEMD_UNIT=vllm.service + UNIT=vllm.service + _TRANSPORT=kernel" in data
    assert causes(diagnosed(data)) == ["unit-out-of-memory"]


def unit_log_with(journal: Path, marks: Sequence[tuple[str, int]] = (), boot: bool = False) -> bytes:
    """The log of a unit for which systemd has recorded these starts."""
    (journal / "systemctl").write_text("#!/bin/sh\necho loaded\n")
    entries = [{"MESSAGE_ID": mark, "__REALTIME_TIMESTAMP": str(at), "__CURSOR": "s=1"} for mark, at in marks]
    if entries:
        (journal / "journalctl.marks").write_text("".join(f"{json.dumps(each)}\n" for each in entries))
    return b"".join(judge_module.unit_log("vllm", boot=boot).pieces())


def test_unit_log_begins_at_the_last_start(journal: Path) -> None:
    starts = [(STARTING, 5_000_000), (STARTED, 5_500_000), (STARTING, 1700000000_000042), (STARTED, 1700000000_900000)]
    assert b"--boot --output=short-iso --since=@1700000000.000042 _SYSTEMD_UNIT" in unit_log_with(journal, starts)
    assert b"--since" not in unit_log_with(journal, starts, boot=True)
    (journal / "journalctl.marks").write_text("")
    assert b"--since" not in unit_log_with(journal)


@pytest.mark.parametrize(
    ("marks", "begins"),
    [
        pytest.param([], None, id="none noted"),
        pytest.param([(AGAIN, 9)], None, id="the start itself is no longer there"),
        pytest.param([(STARTED, 1)], 1, id="a simple unit"),
        pytest.param([(STARTING, 1), (STARTED, 2)], 1, id="a unit that says when it is ready"),
        pytest.param([(STARTING, 1)], 1, id="still starting, or failed so"),
        pytest.param([(STARTED, 1), (STARTED, 2), (STARTED, 3)], 3, id="restarted by a person"),
        pytest.param([(STARTED, 1), (AGAIN, 2), (STARTED, 3)], 1, id="started again by systemd"),
        pytest.param([(STARTED, 1), (AGAIN, 2), (STARTED, 3), (AGAIN, 4), (STARTED, 5)], 3, id="a loop"),
        pytest.param([(STARTING, 1), (AGAIN, 2), (STARTING, 3), (AGAIN, 4), (STARTING, 5)], 3, id="a loop of starts"),
        pytest.param([(STARTED, 1), (AGAIN, 2), (STARTED, 3), (STARTED, 4)], 4, id="a loop, then a restart by hand"),
        pytest.param([(STARTING, 1), (STARTED, 2), (AGAIN, 3)], 1, id="about to be started again"),
        pytest.param([(AGAIN, 2), (STARTING, 3), (STARTED, 4)], 3, id="the run before is no longer there"),
    ],
)
def test_start_to_read_from_is_the_last_start_with_its_cause(marks: list[tuple[str, int]], begins: int | None) -> None:
    assert judge_module.start_to_read_from(marks) == begins


@pytest.mark.parametrize(
    "message",
    [
        "No journal files were opened due to insufficient permissions.\n",
        "Hint: You are currently not seeing messages from other users and the system.\n",
    ],
)
def test_unit_journal_without_permission_is_an_error(message: str, journal: Path) -> None:
    (journal / "systemctl").write_text("#!/bin/sh\necho loaded\n")
    (journal / "journalctl.err").write_text(message)
    ended = run("diagnose", "--unit", "vllm", "--json")
    (error,) = json.loads(ended.stdout)["errors"]
    assert (ended.returncode, error["code"]) == (1, "sudo")
    assert "sudo -v" in error["hint"]


def test_load_reads_signatures_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump([GOOD]))
    (mine,) = load(tmp_path)
    assert list(read(b"abcd", index=index_of([mine])).sightings) == ["some-failure"]
