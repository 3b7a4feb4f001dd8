"""`diagnose` on the real logs and the corpus of small ones: each is judged right, and so is each in other clothes."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.support.diagnosing import BY_NAME, LOOKED_FOR, REPOSITORY, causes, diagnosed
from tools import score
from tools.score import Case

LOGS = REPOSITORY / "tests/logs"
INDEX = yaml.safe_load((LOGS / "index.yaml").read_text())
CASES = {f"{kind}-{case.name}": case for kind, those in score.cases().items() for case in those}


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


# --- the corpus


def fault(case: Case, change: Callable[[str], str]) -> str:
    return score.wrong(case, score.diagnosed((change(log).encode() for log in case.nodes), LOOKED_FOR))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_log_of_the_corpus_is_judged_right(case: Case) -> None:
    assert fault(case, str) == ""


def test_corpus_has_many_logs_good_ones_included() -> None:
    every = list(CASES.values())
    assert len(every) >= 150
    assert len([case for case in every if case.cause == score.NOTHING]) >= 30
    assert len([case for case in every if case.cause == score.UNKNOWN]) >= 5
    assert len([case for case in every if case.logs]) >= 5
    assert {case.cause for case in every} <= {*BY_NAME, score.NOTHING, score.UNKNOWN}
    assert len({case.name for case in every}) == len(every)


def test_score_prints_every_kind_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main() == 0
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in score.cases())
    assert printed.splitlines()[-1].split() == ["all", str(len(CASES)), "of", str(len(CASES))]


# --- the same logs as other machines and programs write them


def lines(change: Callable[[str], str]) -> Callable[[str], str]:
    return lambda log: "".join(f"{change(line)}\n" for line in log.splitlines())


def other_processes(log: str) -> str:
    return re.sub(r"(?<=pid=)\d+|(?<=[a-z]\[)\d+(?=\])", lambda found: str(int(found[0]) + 70001), log)


def later(log: str) -> str:
    """The same half an hour later."""
    return re.sub(r"\b(\d\d):(\d)(\d):(\d\d)\b", lambda t: f"{t[1]}:{(int(t[2]) + 3) % 6}{t[3]}:{t[4]}", log)


def among_others(log: str) -> str:
    """Lines of another rank between all lines of this one."""
    other = "(Worker_TP7 pid=99999) INFO 10-02 09:00:01 [gpu_model_runner.py:5012] Loading weights, shard {} of 40\n"
    return "".join(f"{line}\n{other.format(at)}" for at, line in enumerate(log.splitlines()))


def coloured(line: str) -> str:
    return re.sub(r"^(\([^)]*\))", "\x1b[0;36m\\1\x1b[0;0m", line).replace(" ERROR ", " \x1b[31mERROR\x1b[0m ")


CLOTHES: dict[str, Callable[[str], str]] = {
    "other processes": other_processes,
    "half an hour later": later,
    "among lines of another rank": among_others,
    "coloured": lines(coloured),
    "coloured as a whole": lines(lambda line: f"\x1b[1;33m{line}\x1b[0m"),
    "with the line ends of Windows": lambda log: log.replace("\n", "\r\n"),
    "in journald": lines(lambda line: f"Oct 12 07:30:01 spark-9f3a vllm[4242]: {line}"),
    "in journald, with ISO times": lines(lambda line: f"2026-10-12T07:30:01+0200 spark-9f3a vllm[4242]: {line}"),
    "in docker, with times": lines(lambda line: f"2026-10-12T07:30:01.123456789Z {line}"),
    "in docker compose": lines(lambda line: f"vllm-head-1  | {line}"),
    "in docker's own file": lines(
        lambda line: json.dumps({"log": f"{line}\n", "stream": "stderr", "time": "2026-10-12"})
    ),
    "in kubectl": lines(lambda line: f"[pod/vllm-0/server] {line}"),
    "in kubectl, with times": lines(lambda line: f"[pod/vllm-0/server] 2026-10-12T07:30:01.123456789Z {line}"),
    "in containerd's file": lines(lambda line: f"2026-10-12T07:30:01.123456789+02:00 stderr F {line}"),
}


@pytest.mark.parametrize("clothes", CLOTHES)
def test_log_of_the_corpus_is_judged_the_same(clothes: str) -> None:
    faults = {name: fault(case, CLOTHES[clothes]) for name, case in CASES.items()}
    assert {name: words for name, words in faults.items() if words} == {}
