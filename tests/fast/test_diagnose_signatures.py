"""The signatures of known failures: each is found by its examples alone, and its texts name what exists."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparkinstall import stacks
from sparkinstall.cli.app import VERBS
from sparkinstall.config import settings as all_settings
from sparkinstall.core import catalogue
from sparkinstall.diagnose.index import index_of
from sparkinstall.diagnose.signatures import Signature, hint_for, load, steps
from sparkinstall.probes import known_hosts
from sparkinstall.redaction import redact
from sparkinstall.schema import Malformed
from tests.support.diagnosing import (
    BY_NAME,
    HOST_CASES,
    KNOWN,
    LINES,
    REPOSITORY,
    companions,
    diagnosed,
    read,
)
from tests.support.nodes import FIXES_OF_SPARKS

EXAMPLES = [pytest.param(BY_NAME[n], line, id=f"{n}-{at}") for n, some in LINES.items() for at, line in enumerate(some)]
HARMLESS = [pytest.param(s, line, id=f"{s.name}-{at}") for s in KNOWN for at, line in enumerate(s.harmless)]


@pytest.mark.parametrize(("known", "line"), EXAMPLES)
def test_example_is_diagnosed_as_its_signature_only(known: Signature, line: str) -> None:
    lines = f"INFO all good\n{chr(10).join([line] * known.times)}\nINFO all good\n".encode()
    found = diagnosed(lines + companions(known))
    if known.is_warning:
        told = [each.name for each in found.found if known.name not in BY_NAME[each.name].only_with]
        assert told == ([] if known.severity == "event" else [known.name])
        assert known.name in read(line.encode()).found.sightings
    else:
        failure, *others = found.found
        assert (failure.name, failure.role) == (known.name, "consequence" if known.ends_only else "cause")
        assert failure.lines[0].line == 2
        assert all(known.name in each.explained_by for each in others)


@pytest.mark.parametrize(("known", "line"), HARMLESS)
def test_harmless_line_is_not_diagnosed(known: Signature, line: str) -> None:
    assert known.name not in read(line.encode()).found.sightings


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
    assert known.name in read(FORMATS[form](LINES[known.name][0]), (7777,)).found.sightings


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
        # Every line of a process whose number has it would be tried.
        assert not re.fullmatch(r"[ =(:]?\d{1,4} ?", anchor)


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


def test_hints_name_stacks_that_are_shipped() -> None:
    assert mentioned(r"--stack ([\d.]+)") <= set(stacks.names())
    for each in KNOWN:
        versions = re.findall(r"(?<![\d.])0\.\d\d\.\d+", each.hint)
        assert all(version in (*stacks.names(), "0.16.0", "0.17.1") for version in versions), each.name


def test_page_lists_every_signature() -> None:
    page = (REPOSITORY / "docs/diagnose.md").read_text()
    listed = dict(re.findall(r"^\| `([a-z0-9-]+)` \| ([^|]+) \|", page, re.M))
    assert {name: title.strip() for name, title in listed.items() if name in BY_NAME} == {
        each.name: each.title + each.note for each in KNOWN
    }


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


def test_hint_has_the_numbers_of_the_line() -> None:
    line = (
        b"ValueError: Free memory on device cuda:0 (104.10/121.69 GiB) on startup is less than desired GPU memory "
        b"utilization (0.90, 109.52 GiB)."
    )
    (cause,) = diagnosed(line).causes
    assert cause.why.startswith("5.42 GiB are missing: 104.10 of 121.69 GiB are available")
    assert "fit into 104.10 GiB, lower the share to at most 0.85 " in cause.hint


def test_word_that_the_line_lacks_leaves_no_empty_parentheses() -> None:
    named = b"own.service: Failed to set up mount namespacing: /run/systemd/unit-root/srv/own: No such file"
    unnamed = b"own.service: Main process exited, code=exited, status=226/NAMESPACE"
    assert "exists (/srv/own);" in diagnosed(named).causes[0].why
    assert "exists;" in diagnosed(unnamed).causes[0].why


def test_hint_is_for_the_installed_release_and_otherwise_names_the_releases() -> None:
    hint = "`--a`{from 0.22.1: and `--b`}{before 0.22.1: with `C=1`}; x"
    assert hint_for(hint, "0.22.1") == hint_for(hint, "0.33.0+cu130") == "`--a` and `--b`; x"
    assert hint_for(hint, "0.18.1") == "`--a` with `C=1`; x"
    assert hint_for(hint, "") == "`--a` and `--b` (vLLM 0.22.1 and later), with `C=1` (before vLLM 0.22.1); x"
    assert not any("{from" in each.hint or "{before" in each.hint for each in KNOWN)


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


def test_load_reads_signatures_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump([GOOD]))
    (mine,) = load(tmp_path)
    assert list(read(b"abcd", index=index_of([mine])).found.sightings) == ["some-failure"]


def test_no_literal_is_in_the_lines_that_a_server_repeats() -> None:
    """Each would be tried against a regex: the log of a good server would be read at half the speed."""
    repeated = (
        "(APIServer pid=20033) INFO 11-02 10:22:31 [loggers.py:127] Engine 000: Avg prompt throughput: 12.3 tokens/s, "
        "Avg generation throughput: 45.6 tokens/s, Running: 3 reqs, Waiting: 0 reqs, GPU KV cache usage: 12.3%, "
        "Prefix cache hit rate: 41.0%",
        '(APIServer pid=20033) INFO:     192.0.2.7:41234 - "POST /v1/chat/completions HTTP/1.1" 200 OK',
    )
    literals = [anchor for each in KNOWN for anchor in each.anchors]
    assert [each for each in literals if any(each in line for line in repeated)] == []


@pytest.mark.parametrize("known", KNOWN, ids=lambda each: each.name)
def test_nothing_in_what_is_told_is_taken_for_a_secret(known: Signature) -> None:
    for text in (known.title, known.why, known.elsewhere, *steps(known.hint), *steps(known.elsewhere_hint)):
        assert redact(text) == text
