"""The JUnit report: what its schema asks for, what the common readers take from it, and texts that try to break it."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sparkinstall.cli import junit
from sparkinstall.cli.junit import Case
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.engine import StepReport
from sparkinstall.errors import BadConfig, BadUsage, Problem
from sparkinstall.probes import LEVELS, Finding, Probe, Verdict, failed, passed, skipped, warned
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok, Unknown

# The rules of junit-10.xsd of Jenkins' xUnit plugin for what is written here: attributes (with * those that must be
# there), and what may stand inside.
# https://github.com/jenkinsci/xunit-plugin/blob/master/src/main/resources/org/jenkinsci/plugins/xunit/types/model/xsd/junit-10.xsd
RULES: dict[str, tuple[set[str], set[str]]] = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {
            "name*",
            "tests*",
            "failures*",
            "errors*",
            "time",
            "skipped",
            "timestamp",
            "hostname",
            "id",
            "package",
            "file",
        },
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "testcase": (
        {"name*", "time", "classname", "group"},
        {"skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": ({"type", "message"}, set()),
    "skipped": ({"type", "message"}, set()),
    "system-out": (set(), set()),
}


def require_valid(element: ElementTree.Element) -> None:
    attributes, inside = RULES[element.tag]
    allowed = {name.rstrip("*") for name in attributes}
    assert set(element.attrib) <= allowed, element.tag
    assert {name.rstrip("*") for name in attributes if name.endswith("*")} <= set(element.attrib), element.tag
    if "time" in element.attrib:
        whole, _, parts = element.attrib["time"].partition(".")
        assert whole.isdigit() and parts.isdigit(), "seconds as the schema has them: no exponent, no sign"
    for child in element:
        assert child.tag in inside, f"{child.tag} in {element.tag}"
        require_valid(child)


def written(path: Path, cases: list[Case], strict: bool = False) -> ElementTree.Element:
    junit.write(path, cases, strict)
    root = ElementTree.parse(path).getroot()
    require_valid(root)
    for suite in root:
        inside = [next((child.tag for child in case if child.tag in ("failure", "skipped")), "") for case in suite]
        assert suite.attrib["tests"] == str(len(suite))
        assert suite.attrib["failures"] == str(inside.count("failure"))
        assert suite.attrib["skipped"] == str(inside.count("skipped"))
    for name in ("tests", "failures", "errors"):
        assert root.attrib[name] == str(sum(int(suite.attrib[name]) for suite in root))
    return root


def look(name: str, finding: Finding, level: str = "node", seconds: float = 0.25) -> ProbeResult:
    probe = Probe(name, name, lambda _: finding, next(each for each in LEVELS if each == level))
    return ProbeResult.of(probe, finding, seconds)


REPORTS = [
    StepReport.of("good", [Ok("as it should be", key="file:/a")], seconds=1234.5),
    StepReport.of("drifts", [Drift("write /b", key="file:/b"), Unknown("good", key="file:/c")]),
    StepReport.of("left", [NodeOnly("apt installs them", key="packages")]),
    StepReport.of("blocked", [Conflict("it is a dir", hint="move it away", key="link:/d")]),
    StepReport.of("broken", problem=Problem("the disk is full", hint="free some space")),
]
LOOKED = [
    look("fine", passed("4 of 4"), "static"),
    look("slow", warned("13 Gb/s", "see the issue", "200 Gb/s")),
    look("wrong", failed("CPU torch", "`sparkinstall run environment`", "CUDA 13")),
    look("unseen", skipped("no GPU here"), "gpu"),
]


def test_every_outcome_is_in_it_as_ci_has_to_take_it(tmp_path: Path) -> None:
    root = written(tmp_path / "j.xml", [*junit.of_checks(REPORTS), *junit.of_probes(LOOKED)])
    assert [suite.attrib["name"] for suite in root] == [
        f"sparkinstall.{x}" for x in ("checks", "static", "node", "gpu")
    ]
    cases = {case.attrib["name"]: case for case in root.iter("testcase")}
    bad = {name for name, case in cases.items() if case.find("failure") is not None}
    assert bad == {"drifts", "blocked", "broken", "wrong"}
    assert {name for name, case in cases.items() if case.find("skipped") is not None} == {"left", "unseen"}
    failure = cases["wrong"].find("failure")
    assert failure is not None and failure.attrib["message"] == "CPU torch"
    assert failure.text == "CPU torch\nexpected: CUDA 13\nhint: `sparkinstall run environment`"
    said = cases["slow"].find("system-out")
    assert said is not None and said.text == "warn: 13 Gb/s\nexpected: 200 Gb/s\nhint: see the issue"
    assert cases["good"].attrib["time"] == "1234.500"


def test_strict_turns_what_was_skipped_into_failures(tmp_path: Path) -> None:
    root = written(tmp_path / "j.xml", junit.of_probes(LOOKED), strict=True)
    case = next(each for each in root.iter("testcase") if each.attrib["name"] == "unseen")
    failure = case.find("failure")
    assert failure is not None and failure.attrib["message"] == "skipped, and --strict was given: no GPU here"
    assert case.find("skipped") is None


def test_readers_that_know_texts_only_and_those_that_know_attributes_only_see_the_reason(tmp_path: Path) -> None:
    """GitLab shows the text of `failure` and `skipped`; Jenkins and most actions of GitHub the message."""
    root = written(tmp_path / "j.xml", [*junit.of_checks(REPORTS), *junit.of_probes(LOOKED)])
    for kind in ("failure", "skipped"):
        for element in root.iter(kind):
            assert element.text and element.attrib["message"] in element.text


def test_no_two_cases_have_one_name(tmp_path: Path) -> None:
    """GitLab leaves out the second of two cases with the same class and name."""
    from sparkinstall.core import catalogue, checks
    from tests.support.nodes import HEAD

    chosen = checks.chosen(HEAD, measure=True)
    reports = [StepReport(step.name) for step in catalogue.of(HEAD)]
    looked = [ProbeResult.of(probe, passed("x")) for probe in chosen.probes]
    root = written(tmp_path / "j.xml", [*junit.of_checks(reports), *junit.of_probes(looked)])
    names = [(case.attrib["classname"], case.attrib["name"]) for case in root.iter("testcase")]
    assert len(names) == len(set(names)) == len(reports) + len(looked)


def test_what_kept_everything_from_being_looked_at(tmp_path: Path) -> None:
    root = written(tmp_path / "j.xml", junit.of_problem(BadConfig("there is no level 'x'", hint="did you mean y?")))
    (failure,) = root.iter("failure")
    assert failure.text == "there is no level 'x'\ndid you mean y?"


def test_the_commands_in_a_report_mean_the_rehearsal_that_was_looked_at(tmp_path: Path) -> None:
    bad, left = failed("no NCCL", "`sparkinstall run nccl`"), skipped("set up with `sparkinstall all --root ./other`")
    cases = junit.of_probes([look("a", bad), look("b", left)])
    junit.write(tmp_path / "j.xml", cases, False, " --root ./node")
    said = (tmp_path / "j.xml").read_text()
    assert "`sparkinstall run nccl --root ./node`" in said and "`sparkinstall all --root ./other`" in said


def test_a_report_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    for place in (tmp_path / "no" / "j.xml", tmp_path, Path(""), Path("-")):
        with pytest.raises(BadUsage) as refused:
            junit.begin(place)
        assert refused.value.hint
    path = tmp_path / "j.xml"
    path.write_text("of the last run")
    junit.begin(path)
    assert path.read_bytes() == b""


hostile = st.text(max_size=40) | st.sampled_from(
    ["]]>", "<!--", "&amp;", "\x1b[31m", "\x00", "\n\n", "\ud800", "￿", "\r"]
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(hostile, st.sampled_from(["pass", "fail", "skip", "warn"])), min_size=1, max_size=4),
    st.booleans(),
)
@example([("\x00\n", "fail"), ("\n", "skip")], False)
@example([("\u2028\x85\x0b", "skip")], True)
def test_no_text_breaks_it(tmp_path: Path, said: list[tuple[str, Verdict]], strict: bool) -> None:
    findings = [Finding(verdict, text, text, text) for text, verdict in said]
    looked = [look(f"p{at}", finding) for at, finding in enumerate(findings)]
    root = written(tmp_path / "j.xml", junit.of_probes(looked), strict)
    assert len(list(root.iter("testcase"))) == len(said)
    assert "\x1b" not in (tmp_path / "j.xml").read_text()
    for element in (*root.iter("failure"), *root.iter("skipped")):
        assert element.attrib["message"] and "\n" not in element.attrib["message"]


def test_no_secret_is_in_it(tmp_path: Path) -> None:
    looked = [look("x", failed("401 for https://me:pw@host.example", "set hf_abcdefghijklmnopqrstuvwxyz anew"))]
    written(tmp_path / "j.xml", junit.of_probes(looked))
    text = (tmp_path / "j.xml").read_text()
    assert "me:pw" not in text and "hf_abc" not in text
