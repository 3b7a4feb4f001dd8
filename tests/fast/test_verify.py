"""`verify`: what its options select, the exit codes, and the report for CI."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sparkinstall.core import catalogue, checks, fixes
from sparkinstall.core.checks import Chosen
from sparkinstall.core.engine import StepReport
from sparkinstall.core.fixes import FixState
from sparkinstall.errors import BadUsage
from sparkinstall.probes import LEVELS, Finding, Level, Probe, failed, passed, skipped, warned
from sparkinstall.resources import Ok
from tests.support.documents import commands_of, workflows
from tests.support.mounts import read_only
from tests.support.nodes import HEAD
from tests.support.rehearsals import empty_rehearsal, envelope, in_this_process, output_of, sparkinstall

GOOD, USAGE, DRIFT = 0, 2, 3
EVERYTHING = checks.chosen(HEAD, measure=True)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A rehearsal that has a journal and nothing else."""
    return empty_rehearsal(tmp_path / "node")


def journal_of(node: Path) -> Path:
    return node / "var/lib/sparkinstall/journal.jsonl"


@pytest.fixture
def verify_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Verify these probes, and no step."""

    def these(*findings: tuple[str, Finding]) -> None:
        probes = tuple(Probe(name, name, lambda _, each=each: each, "node") for name, each in findings)  # type: ignore[misc]
        monkeypatch.setattr(checks, "chosen", lambda *_, **__: Chosen((), probes, False))

    yield these


# --- selection


def names(chosen: Chosen) -> set[str]:
    return {probe.name for probe in chosen.probes}


@pytest.mark.parametrize("level", LEVELS)
def test_chosen_with_a_level_has_probes_up_to_it(level: Level) -> None:
    found = checks.chosen(HEAD, level=level, measure=True)
    far = LEVELS.index(level)
    assert names(found) == {p.name for p in EVERYTHING.probes if LEVELS.index(p.level) <= far}
    assert [step.name for step in found.steps] == [step.name for step in catalogue.of(HEAD)], "every level has checks"


def test_chosen_probes_are_sorted_by_level() -> None:
    order = [LEVELS.index(probe.level) for probe in EVERYTHING.probes]
    assert order == sorted(order) and len(set(order)) > 3


def test_chosen_with_a_step_has_its_checks_and_probes() -> None:
    found = checks.chosen(HEAD, only=["environment"])
    assert [step.name for step in found.steps] == ["environment"]
    assert {"wheel-gate", "reasoning-field"} <= names(found)
    assert "nccl-loaded" not in names(found)
    left = checks.chosen(HEAD, skip=["environment"])
    assert "environment" not in [step.name for step in left.steps]
    assert not {"wheel-gate", "reasoning-field"} & names(left) and "nccl-loaded" in names(left)


def test_chosen_with_a_probe_has_it_alone() -> None:
    found = checks.chosen(HEAD, only=["nccl-loaded"])
    assert names(found) == {"nccl-loaded"} and not found.steps and not found.whole
    assert "nccl-loaded" not in names(checks.chosen(HEAD, skip=["nccl-loaded"]))


def test_chosen_without_measure_has_no_load() -> None:
    loads = {probe.name for probe in EVERYTHING.probes if probe.load}
    assert not loads & names(checks.chosen(HEAD))
    for name in loads:
        assert names(checks.chosen(HEAD, only=[name])) == {name}, "its name selects it"


@pytest.mark.parametrize(("option", "word"), [("only", "wheel-gat"), ("skip", "nccl-loadedd")])
def test_chosen_with_an_unknown_name_is_refused_with_the_nearest(option: str, word: str) -> None:
    with pytest.raises(BadUsage) as refused:
        checks.chosen(HEAD, **{option: [word]})  # type: ignore[arg-type]
    assert "did you mean" in refused.value.hint


# --- standing of the fixes

ORDER = ("proven", "done", "node_only")
UP_TO_DATE = [StepReport.of(step.name, [Ok(key="k")]) for step in catalogue.STEPS]


def standing_of(findings: dict[str, Finding]) -> dict[int, FixState]:
    return {each.number: each for each in fixes.stand(HEAD, UP_TO_DATE, findings)}


@pytest.mark.parametrize("finding", [passed("x"), warned("x", "y"), skipped("no GPU")], ids=lambda each: each.verdict)
def test_fix_with_a_better_standing_at_a_lower_level_names_what_was_not_run(finding: Finding) -> None:
    everything = standing_of({probe.name: finding for probe in EVERYTHING.probes})
    for level in LEVELS:
        part = standing_of(dict.fromkeys(names(checks.chosen(HEAD, level=level, measure=True)), finding))
        for number, state in part.items():
            better = ORDER.index(state.standing) < ORDER.index(everything[number].standing)
            assert not better or "; not run: " in state.note, (level, number)


def test_fix_names_its_probes_that_were_not_run() -> None:
    static = {probe.name: passed("x") for probe in checks.chosen(HEAD, level="static").probes}
    found = standing_of(static)[5]
    assert (found.standing, found.note) == ("done", "by its files; not run: fp8-kernels, fp8-product")
    assert standing_of({})[1].note.endswith("not run: nccl-preload, running-nccl, nccl-loaded")
    assert not standing_of({})[7].note, "the fix has no probe"
    everything = standing_of({probe.name: passed("x") for probe in EVERYTHING.probes})
    assert everything[5].standing == "proven"


# --- exit codes and messages


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
def test_verify_exit_code_follows_the_findings(
    verify_only: Any, node: Path, findings: list[Finding], strict: bool, code: int
) -> None:
    verify_only(*((f"p{at}", finding) for at, finding in enumerate(findings)))
    options = ["--strict"] if strict else []
    run = in_this_process("verify", "--root", node, *options)
    assert run.returncode == code, output_of(run)
    report = node.parent / "j.xml"
    assert in_this_process("verify", "--root", node, "--junit", report, *options).returncode == code
    assert (next(ElementTree.parse(report).getroot().iter("failure"), None) is not None) == (code == DRIFT)


def test_verify_counts_skipped_probes_and_names_them_as_failed_with_strict(verify_only: Any, node: Path) -> None:
    verify_only(("run", passed("x")), ("not-run", skipped("no GPU")))
    assert "(1 skipped)" in in_this_process("verify", "--root", node).stdout
    assert "--strict was given: not-run" in in_this_process("verify", "--root", node, "--strict").stdout


def test_verify_with_skipped_probes_counts_warnings_too(verify_only: Any, node: Path) -> None:
    verify_only(("run", passed("x")))
    assert "everything is ok" in in_this_process("verify", "--root", node).stdout
    verify_only(("run", warned("x", "y")), *((f"not-run-{at}", skipped("no GPU")) for at in range(5)))
    last = in_this_process("verify", "--root", node).stdout.splitlines()[-1]
    assert last == "✓ everything that was checked is ok (1 warning; 5 skipped)"


def test_verify_with_a_crashed_probe_fails_that_probe_only(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_: object) -> Finding:
        raise ZeroDivisionError("boom")

    probes = (Probe("crashes", "x", crash, "node"), Probe("runs", "x", lambda _: passed("fine"), "node"))
    monkeypatch.setattr(checks, "chosen", lambda *_, **__: Chosen((), probes, False))
    found = envelope(in_this_process("verify", "--root", node, "--json"))["data"]["probes"]
    assert [each["verdict"] for each in found] == ["fail", "pass"]
    assert "ZeroDivisionError: boom" in found[0]["found"]


def test_verify_with_drift_writes_the_report(node: Path) -> None:
    report = node.parent / "j.xml"
    run = sparkinstall("verify", "--root", node, "--level", "static", "--junit", report)
    assert run.returncode == DRIFT, output_of(run)
    root = ElementTree.parse(report).getroot()
    assert {suite.attrib["name"] for suite in root} == {"sparkinstall.checks", "sparkinstall.static"}
    assert int(root.attrib["failures"]) > 3


# --- the report without results


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ([], DRIFT, "nothing is installed in"),
        (["--level", "nod"], USAGE, "there is no level 'nod'"),
        (["--only", "wheel-gat"], USAGE, "there is no step or probe"),
        (["--set", "nonsense=1"], USAGE, "nonsense"),
    ],
)
def test_verify_report_without_results_names_the_cause(
    tmp_path: Path, options: list[str], code: int, says: str
) -> None:
    report = tmp_path / "j.xml"
    report.write_text("<testsuites><testsuite name='of the last run'/></testsuites>")
    run = in_this_process("verify", "--root", tmp_path / "node", "--junit", report, *options)
    assert run.returncode == code, output_of(run)
    (case,) = ElementTree.parse(report).getroot().iter("testcase")
    failure = case.find("failure")
    assert (case.attrib["name"], failure is not None and says in failure.attrib["message"]) == ("installed", True)


def test_verify_report_that_cannot_be_written_is_refused(tmp_path: Path, node: Path) -> None:
    for place in (tmp_path / "no" / "j.xml", tmp_path, "-"):
        run = in_this_process("verify", "--root", node, "--junit", place, "--json")
        errors = envelope(run)["errors"]
        assert (run.returncode, errors[0]["code"]) == (USAGE, "usage"), output_of(run)
        assert errors[0]["hint"]
    with read_only(tmp_path):
        run = in_this_process("verify", "--root", node, "--junit", tmp_path / "j.xml", "--json")
    assert (run.returncode, envelope(run)["errors"][0]["code"]) == (1, "storage")


# --- the journal, which no check needs, but every change and undo


def test_verify_and_doctor_with_a_damaged_journal_name_it(verify_only: Any, node: Path) -> None:
    verify_only(("fine", passed("x")))
    assert in_this_process("verify", "--root", node).returncode == GOOD
    with open(journal_of(node), "a") as out:
        out.write("invalid\n")
    for verb, *where in (("verify", "probes"), ("doctor", "broken")):
        run = in_this_process(verb, "--root", node, "--json")
        (first, *_) = envelope(run)["data"][where[0]]
        assert (run.returncode, first["name"]) == (DRIFT, "journal"), output_of(run)
        assert "journal.jsonl line 4 cannot be read" in first["found"] and first["hint"]
        assert first["title"] == "the journal of changes", "the title claims no result"
    report = node.parent / "j.xml"
    assert in_this_process("verify", "--root", node, "--junit", report).returncode == DRIFT
    failures = [
        case.get("name") for case in ElementTree.parse(report).iter("testcase") if case.find("failure") is not None
    ]
    assert failures == ["journal"]


def test_verbs_with_a_folder_as_journal_name_it(node: Path) -> None:
    journal_of(node).unlink()
    journal_of(node).mkdir()
    for verb, code in (("verify", DRIFT), ("doctor", DRIFT), ("plan", 1), ("status", 1), ("all", 1), ("uninstall", 1)):
        run = in_this_process(verb, "--root", node)
        assert run.returncode == code, output_of(run)
        assert re.search(r"journal.jsonl (cannot be read: it )?is a folder", output_of(run))
        assert "internal error" not in output_of(run)


@pytest.mark.parametrize("content", [None, ""], ids=["gone", "empty"])
def test_verbs_with_an_installation_without_journal_fail(node: Path, content: str | None) -> None:
    journal_of(node).unlink()
    if content is not None:
        journal_of(node).write_text(content)
    if content is None:
        # Of an older version; without an installation, all is gone together.
        (journal_of(node).parent / "journal.last").unlink()
        assert "nothing is installed in" in output_of(in_this_process("verify", "--root", node))
    (node / "opt/sparkinstall/venv").mkdir(parents=True)
    (node / "opt/sparkinstall/venv/sparkinstall.json").write_text("{}")
    what = "is missing" if content is None else "has not one complete line"
    for verb, code in (("verify", DRIFT), ("plan", 1), ("status", 1), ("all", 1)):
        run = in_this_process(verb, "--root", node)
        assert run.returncode == code and f"journal.jsonl {what}" in output_of(run), output_of(run)
        assert "restore the journal" in output_of(run)
    run = in_this_process("uninstall", "--root", node)
    assert run.returncode == (0 if content is None else 1), output_of(run)
    assert ("there is no journal" if content is None else f"journal.jsonl {what}") in output_of(run)


# --- the workflows of docs/ci.md


def test_ci_workflows_read_the_report_that_they_write() -> None:
    github, gitlab, rehearsal = workflows()
    # YAML 1.1 reads the word `on` as true.
    assert set(github) == {"name", True, "permissions", "jobs"}
    steps = github["jobs"]["verify"]["steps"]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    report = next(step for step in steps if "junit" in step.get("uses", ""))
    written = re.findall(r"--junit (\S+)", steps[0]["run"])
    assert [report["with"]["report_paths"]] == written, "the report that is read is the one that is written"
    assert report["if"] == "success() || failure()", "the report is also used after a failure"
    for job in (gitlab["verify"], rehearsal["rehearse"]):
        assert job["artifacts"]["when"] == "always"
        (file,) = re.findall(r"--junit (\S+)", " ".join(job["script"]))
        assert job["artifacts"]["reports"]["junit"] == file and file.endswith(".xml")


WORKFLOW_LINES = sorted(set(commands_of(workflows())))


def test_ci_workflow_commands_are_found() -> None:
    assert len(WORKFLOW_LINES) == 4 and any("--strict" in line for line in WORKFLOW_LINES)


def test_ci_rehearsal_that_fails_writes_the_report(tmp_path: Path) -> None:
    """The command of the page, in an empty rehearsal: the report exists although it failed."""
    (line,) = [each for each in WORKFLOW_LINES if "verify --root" in each]
    words = line.replace("./node", str(tmp_path / "node")).replace("spark.xml", str(tmp_path / "spark.xml")).split()
    assert in_this_process(*words[1:]).returncode == DRIFT
    assert ElementTree.parse(tmp_path / "spark.xml").getroot().attrib["failures"] == "1"
