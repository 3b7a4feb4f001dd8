"""The JUnit report: its schema, what common readers show of it, and hostile texts."""

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

# The rules of junit-10.xsd of Jenkins' xUnit plugin for the elements written here: attributes (* marks required ones),
# and child elements.
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
        assert whole.isdigit() and parts.isdigit(), "the schema allows no exponent and no sign in seconds"
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


def result(name: str, finding: Finding, level: str = "node", seconds: float = 0.25) -> ProbeResult:
    probe = Probe(name, name, lambda _: finding, next(each for each in LEVELS if each == level))
    return ProbeResult.of(probe, finding, seconds)


REPORTS = [
    StepReport.of("good", [Ok("up to date", key="file:/a")], seconds=1234.5),
    StepReport.of("drifts", [Drift("write /b", key="file:/b"), Unknown("good", key="file:/c")]),
    StepReport.of("left", [NodeOnly("apt installs them", key="packages")]),
    StepReport.of("blocked", [Conflict("it is a dir", hint="move it away", key="link:/d")]),
    StepReport.of("broken", problem=Problem("the disk is full", hint="free some space")),
]
RESULTS = [
    result("fine", passed("4 of 4"), "static"),
    result("slow", warned("13 Gb/s", "see the issue", "200 Gb/s")),
    result("wrong", failed("CPU torch", "`sparkinstall run environment`", "CUDA 13")),
    result("unseen", skipped("no GPU here"), "gpu"),
]


def test_report_has_every_outcome(tmp_path: Path) -> None:
    root = written(tmp_path / "j.xml", [*junit.of_checks(REPORTS), *junit.of_probes(RESULTS)])
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
    output = cases["slow"].find("system-out")
    assert output is not None and output.text == "warn: 13 Gb/s\nexpected: 200 Gb/s\nhint: see the issue"
    assert cases["good"].attrib["time"] == "1234.500"


def test_report_strict_turns_skipped_probes_into_failures(tmp_path: Path) -> None:
    root = written(tmp_path / "j.xml", junit.of_probes(RESULTS), strict=True)
    case = next(each for each in root.iter("testcase") if each.attrib["name"] == "unseen")
    failure = case.find("failure")
    assert failure is not None and failure.attrib["message"] == "skipped, and --strict was given: no GPU here"
    assert case.find("skipped") is None


def test_report_has_each_reason_as_text_and_as_attribute(tmp_path: Path) -> None:
    """GitLab shows the text of `failure` and `skipped`; Jenkins and most actions of GitHub the message."""
    root = written(tmp_path / "j.xml", [*junit.of_checks(REPORTS), *junit.of_probes(RESULTS)])
    for kind in ("failure", "skipped"):
        for element in root.iter(kind):
            assert element.text and element.attrib["message"] in element.text


def test_report_has_a_unique_name_for_every_case(tmp_path: Path) -> None:
    """GitLab leaves out the second of two cases with the same class and name."""
    from sparkinstall.core import catalogue, checks
    from tests.support.nodes import HEAD

    chosen = checks.chosen(HEAD, measure=True)
    reports = [StepReport(step.name) for step in catalogue.of(HEAD)]
    results = [ProbeResult.of(probe, passed("x")) for probe in chosen.probes]
    root = written(tmp_path / "j.xml", [*junit.of_checks(reports), *junit.of_probes(results)])
    names = [(case.attrib["classname"], case.attrib["name"]) for case in root.iter("testcase")]
    assert len(names) == len(set(names)) == len(reports) + len(results)


def test_report_of_a_problem_is_one_failure(tmp_path: Path) -> None:
    root = written(tmp_path / "j.xml", junit.of_problem(BadConfig("there is no level 'x'", hint="did you mean y?")))
    (failure,) = root.iter("failure")
    assert failure.text == "there is no level 'x'\ndid you mean y?"


def test_report_adds_the_root_to_commands(tmp_path: Path) -> None:
    bad, left = failed("no NCCL", "`sparkinstall run nccl`"), skipped("set up with `sparkinstall all --root ./other`")
    cases = junit.of_probes([result("a", bad), result("b", left)])
    junit.write(tmp_path / "j.xml", cases, False, " --root ./node")
    text = (tmp_path / "j.xml").read_text()
    assert "`sparkinstall run nccl --root ./node`" in text and "`sparkinstall all --root ./other`" in text


def test_report_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
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
def test_report_with_hostile_texts_is_valid(tmp_path: Path, texts: list[tuple[str, Verdict]], strict: bool) -> None:
    findings = [Finding(verdict, text, text, text) for text, verdict in texts]
    results = [result(f"p{at}", finding) for at, finding in enumerate(findings)]
    root = written(tmp_path / "j.xml", junit.of_probes(results), strict)
    assert len(list(root.iter("testcase"))) == len(texts)
    assert "\x1b" not in (tmp_path / "j.xml").read_text()
    for element in (*root.iter("failure"), *root.iter("skipped")):
        assert element.attrib["message"] and "\n" not in element.attrib["message"]


def test_report_has_no_secret(tmp_path: Path) -> None:
    results = [result("x", failed("401 for https://me:pw@host.example", "set hf_abcdefghijklmnopqrstuvwxyz again"))]
    written(tmp_path / "j.xml", junit.of_probes(results))
    text = (tmp_path / "j.xml").read_text()
    assert "me:pw" not in text and "hf_abc" not in text
