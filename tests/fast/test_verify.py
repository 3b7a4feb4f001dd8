"""`verify`: what its options choose, what counts as wrong, and the report that CI gets in each case."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sparkinstall.core import catalogue, checks, fixes
from sparkinstall.core.checks import Chosen
from sparkinstall.core.engine import Checked, StepReport
from sparkinstall.core.fixes import FixState
from sparkinstall.errors import BadUsage
from sparkinstall.probes import LEVELS, Finding, Level, Probe, failed, passed, skipped, warned
from sparkinstall.resources import Ok
from tests.support.documents import commands_of, workflows
from tests.support.mounts import read_only
from tests.support.nodes import HEAD
from tests.support.rehearsals import begun, envelope, in_this_process, said, sparkinstall

GOOD, USAGE, DRIFT = 0, 2, 3
EVERYTHING = checks.chosen(HEAD, measure=True)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A rehearsal that has a journal and nothing else: everything is still to be done."""
    return begun(tmp_path / "node")


def journal_of(node: Path) -> Path:
    return node / "var/lib/sparkinstall/journal.jsonl"


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Verify these probes, and no step."""

    def these(*findings: tuple[str, Finding]) -> None:
        probes = tuple(Probe(name, name, lambda _, each=each: each, "node") for name, each in findings)  # type: ignore[misc]
        monkeypatch.setattr(checks, "chosen", lambda *_, **__: Chosen((), probes, False))

    yield these


# --- what is chosen


def names(chosen: Chosen) -> set[str]:
    return {probe.name for probe in chosen.probes}


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_goes_as_far_as_its_name_says(level: Level) -> None:
    found = checks.chosen(HEAD, level=level, measure=True)
    far = LEVELS.index(level)
    assert names(found) == {p.name for p in EVERYTHING.probes if LEVELS.index(p.level) <= far}
    assert [step.name for step in found.steps] == [step.name for step in catalogue.of(HEAD)], (
        "checks are of every level"
    )


def test_the_levels_come_in_their_order() -> None:
    order = [LEVELS.index(probe.level) for probe in EVERYTHING.probes]
    assert order == sorted(order) and len(set(order)) > 3


def test_a_step_stands_for_its_checks_and_its_probes() -> None:
    found = checks.chosen(HEAD, only=["environment"])
    assert [step.name for step in found.steps] == ["environment"]
    assert {"wheel-gate", "reasoning-field"} <= names(found)
    assert "nccl-loaded" not in names(found)
    left = checks.chosen(HEAD, skip=["environment"])
    assert "environment" not in [step.name for step in left.steps]
    assert not {"wheel-gate", "reasoning-field"} & names(left) and "nccl-loaded" in names(left)


def test_a_probe_alone() -> None:
    found = checks.chosen(HEAD, only=["nccl-loaded"])
    assert names(found) == {"nccl-loaded"} and not found.steps and not found.whole
    assert "nccl-loaded" not in names(checks.chosen(HEAD, skip=["nccl-loaded"]))


def test_load_is_put_on_only_where_it_is_asked_for() -> None:
    loads = {probe.name for probe in EVERYTHING.probes if probe.load}
    assert not loads & names(checks.chosen(HEAD))
    for name in loads:
        assert names(checks.chosen(HEAD, only=[name])) == {name}, "by its name it is asked for"


@pytest.mark.parametrize(("option", "word"), [("only", "wheel-gat"), ("skip", "nccl-loadedd")])
def test_a_name_that_there_is_not_is_refused_with_the_nearest(option: str, word: str) -> None:
    with pytest.raises(BadUsage) as refused:
        checks.chosen(HEAD, **{option: [word]})  # type: ignore[arg-type]
    assert "did you mean" in refused.value.hint


# --- how the fixes stand

ORDER = ("proven", "done", "node_only")
AS_IT_SHOULD_BE = [StepReport(step.name, "x", [Checked("k", Ok(""))]) for step in catalogue.STEPS]


def standing_of(findings: dict[str, Finding]) -> dict[int, FixState]:
    return {each.fix.number: each for each in fixes.stand(HEAD, AS_IT_SHOULD_BE, findings)}


@pytest.mark.parametrize("finding", [passed("x"), warned("x", "y"), skipped("no GPU")], ids=lambda each: each.verdict)
def test_a_fix_that_looks_better_for_less_looking_says_so(finding: Finding) -> None:
    everything = standing_of({probe.name: finding for probe in EVERYTHING.probes})
    for level in LEVELS:
        part = standing_of(dict.fromkeys(names(checks.chosen(HEAD, level=level, measure=True)), finding))
        for number, state in part.items():
            better = ORDER.index(state.standing) < ORDER.index(everything[number].standing)
            assert not better or "; not run: " in state.note, (level, number)


def test_a_fix_says_which_of_its_probes_were_not_asked() -> None:
    static = {probe.name: passed("x") for probe in checks.chosen(HEAD, level="static").probes}
    found = standing_of(static)[5]
    assert (found.standing, found.note) == ("done", "by its files; not run: fp8-kernels, fp8-product")
    assert standing_of({})[1].note.endswith("not run: nccl-preload, running-nccl, nccl-loaded")
    assert not standing_of({})[7].note, "there is no probe to ask"
    everything = standing_of({probe.name: passed("x") for probe in EVERYTHING.probes})
    assert everything[5].standing == "proven"


# --- how it ends


@pytest.mark.parametrize(
    ("findings", "strict", "code"),
    [
        ([passed("x")], True, GOOD),
        ([warned("x", "y")], True, GOOD),
        ([passed("x"), skipped("no GPU")], False, GOOD),
        ([passed("x"), skipped("no GPU")], True, DRIFT),
        ([failed("x", "y"), passed("x")], False, DRIFT),
    ],
)
def test_exit_codes(probed: Any, node: Path, findings: list[Finding], strict: bool, code: int) -> None:
    probed(*((f"p{at}", finding) for at, finding in enumerate(findings)))
    options = ["--strict"] if strict else []
    run = in_this_process("verify", "--root", node, *options)
    assert run.returncode == code, said(run)
    report = node.parent / "j.xml"
    assert in_this_process("verify", "--root", node, "--junit", report, *options).returncode == code
    assert (next(ElementTree.parse(report).getroot().iter("failure"), None) is not None) == (code == DRIFT)


def test_the_conclusion_names_what_was_not_looked_at(probed: Any, node: Path) -> None:
    probed(("seen", passed("x")), ("unseen", skipped("no GPU")))
    assert "skipped: unseen" in in_this_process("verify", "--root", node).stdout
    assert "--strict was given: unseen" in in_this_process("verify", "--root", node, "--strict").stdout


def test_what_was_not_looked_at_is_not_called_as_it_should_be(probed: Any, node: Path) -> None:
    probed(("seen", passed("x")))
    assert "everything is ok" in in_this_process("verify", "--root", node).stdout
    probed(("seen", warned("x", "y")), *((f"unseen-{at}", skipped("no GPU")) for at in range(5)))
    last = in_this_process("verify", "--root", node).stdout.splitlines()[-1]
    assert last == "✓ everything that was checked is ok (1 warning; 5 skipped: -v names them)"
    last = in_this_process("verify", "--root", node, "-v").stdout.splitlines()[-1]
    assert "5 skipped: unseen-0, unseen-1, unseen-2, unseen-3, unseen-4)" in last


def test_a_probe_that_crashes_is_a_failure_of_it_alone(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_: object) -> Finding:
        raise ZeroDivisionError("boom")

    probes = (Probe("crashes", "x", crash, "node"), Probe("runs", "x", lambda _: passed("fine"), "node"))
    monkeypatch.setattr(checks, "chosen", lambda *_, **__: Chosen((), probes, False))
    found = envelope(in_this_process("verify", "--root", node, "--json"))["data"]["probes"]
    assert [each["verdict"] for each in found] == ["fail", "pass"]
    assert "ZeroDivisionError: boom" in found[0]["found"]


def test_what_is_not_done_is_drift_with_a_report(node: Path) -> None:
    report = node.parent / "j.xml"
    run = sparkinstall("verify", "--root", node, "--level", "static", "--junit", report)
    assert run.returncode == DRIFT, said(run)
    root = ElementTree.parse(report).getroot()
    assert {suite.attrib["name"] for suite in root} == {"sparkinstall.checks", "sparkinstall.static"}
    assert int(root.attrib["failures"]) > 3


# --- the report where nothing could be looked at


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ([], DRIFT, "nothing is installed in"),
        (["--level", "nod"], USAGE, "there is no level 'nod'"),
        (["--only", "wheel-gat"], USAGE, "there is no step or probe"),
        (["--set", "nonsense=1"], USAGE, "nonsense"),
    ],
)
def test_a_report_says_why_nothing_was_looked_at(tmp_path: Path, options: list[str], code: int, says: str) -> None:
    report = tmp_path / "j.xml"
    report.write_text("<testsuites><testsuite name='of the last run'/></testsuites>")
    run = in_this_process("verify", "--root", tmp_path / "node", "--junit", report, *options)
    assert run.returncode == code, said(run)
    (case,) = ElementTree.parse(report).getroot().iter("testcase")
    failure = case.find("failure")
    assert (case.attrib["name"], failure is not None and says in failure.attrib["message"]) == ("installed", True)


def test_a_report_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, node: Path) -> None:
    for place in (tmp_path / "no" / "j.xml", tmp_path, "", "-"):
        run = in_this_process("verify", "--root", node, "--junit", place, "--json")
        errors = envelope(run)["errors"]
        assert (run.returncode, errors[0]["code"]) == (USAGE, "usage"), said(run)
        assert errors[0]["hint"]
    with read_only(tmp_path):
        run = in_this_process("verify", "--root", node, "--junit", tmp_path / "j.xml", "--json")
    assert (run.returncode, envelope(run)["errors"][0]["code"]) == (1, "storage")


# --- the journal, which no check needs and everything that changes or takes back does


def test_a_journal_that_cannot_be_used_is_told_by_name(probed: Any, node: Path) -> None:
    probed(("fine", passed("x")))
    assert in_this_process("verify", "--root", node).returncode == GOOD
    with open(journal_of(node), "a") as out:
        out.write("rubbish\n")
    for verb, *where in (("verify", "probes"), ("doctor", "broken")):
        run = in_this_process(verb, "--root", node, "--json")
        (first, *_) = envelope(run)["data"][where[0]]
        assert (run.returncode, first["name"]) == (DRIFT, "journal"), said(run)
        assert "journal.jsonl line 3 cannot be read" in first["found"] and first["hint"]
        assert first["title"] == "the journal of changes", "it must not read as if that were so"
    report = node.parent / "j.xml"
    assert in_this_process("verify", "--root", node, "--junit", report).returncode == DRIFT
    failures = [
        case.get("name") for case in ElementTree.parse(report).iter("testcase") if case.find("failure") is not None
    ]
    assert failures == ["journal"]


def test_a_journal_that_is_a_folder_is_told_by_every_verb(node: Path) -> None:
    journal_of(node).unlink()
    journal_of(node).mkdir()
    for verb, code in (("verify", DRIFT), ("doctor", DRIFT), ("plan", 1), ("status", 1), ("all", 1), ("uninstall", 1)):
        run = in_this_process(verb, "--root", node)
        assert run.returncode == code, said(run)
        assert re.search(r"reading the journal .* failed: is a directory", said(run), re.IGNORECASE), said(run)
        assert "internal error" not in said(run)


@pytest.mark.parametrize("content", [None, ""], ids=["gone", "empty"])
def test_what_is_here_without_a_journal_is_not_called_well(node: Path, content: str | None) -> None:
    journal_of(node).unlink()
    if content is not None:
        journal_of(node).write_text(content)
    assert "nothing is installed in" in said(in_this_process("verify", "--root", node))
    (node / "opt/sparkinstall/venv").mkdir(parents=True)
    (node / "opt/sparkinstall/venv/sparkinstall.json").write_text("{}")
    for verb, code in (("verify", DRIFT), ("plan", 1), ("status", 1), ("all", 1)):
        run = in_this_process(verb, "--root", node)
        assert run.returncode == code and "journal.jsonl is missing or empty" in said(run), said(run)
        assert "restore the journal" in said(run)
    back = in_this_process("uninstall", "--root", node)
    assert ("there is no journal" if content is None else "removed 0") in back.stdout


# --- the workflows of docs/ci.md


def test_the_workflows_are_what_their_readers_take() -> None:
    github, gitlab, rehearsal = workflows()
    # YAML 1.1 reads the word `on` as true.
    assert set(github) == {"name", True, "permissions", "jobs"}
    steps = github["jobs"]["verify"]["steps"]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    report = next(step for step in steps if "junit" in step.get("uses", ""))
    written = re.findall(r"--junit (\S+)", steps[0]["run"])
    assert [report["with"]["report_paths"]] == written, "what is written is what is read"
    assert report["if"] == "success() || failure()", "a report of what is wrong is the one that is wanted"
    for job in (gitlab["verify"], rehearsal["rehearse"]):
        assert job["artifacts"]["when"] == "always"
        (file,) = re.findall(r"--junit (\S+)", " ".join(job["script"]))
        assert job["artifacts"]["reports"]["junit"] == file and file.endswith(".xml")


WORKFLOW_LINES = sorted(set(commands_of(workflows())))


def test_the_commands_of_the_workflows_are_found() -> None:
    assert len(WORKFLOW_LINES) == 4 and any("--strict" in line for line in WORKFLOW_LINES)


def test_the_rehearsals_verify_ends_well_for_ci(tmp_path: Path) -> None:
    """The command of the page itself, on a rehearsal with nothing on it: the report is there though it failed."""
    (line,) = [each for each in WORKFLOW_LINES if "verify --root" in each]
    words = line.replace("./node", str(tmp_path / "node")).replace("spark.xml", str(tmp_path / "spark.xml")).split()
    assert in_this_process(*words[1:]).returncode == DRIFT
    assert ElementTree.parse(tmp_path / "spark.xml").getroot().attrib["failures"] == "1"
