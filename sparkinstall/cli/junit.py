"""`verify --junit`: checks and probes as JUnit XML for GitHub and GitLab.

The format is the Jenkins xUnit schema: a suite for the checks and one per level. JUnit has no warnings, so a warning
passes, with its text in `system-out`. Reasons are in an attribute and as text, because some readers show only the
one and some (GitLab) only the other.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.cli.hints import pointed
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.engine import StepReport
from sparkinstall.errors import BadUsage, Problem, storage_problem
from sparkinstall.probes import LEVELS, Finding
from sparkinstall.redaction import redact
from sparkinstall.resources import Conflict, Drift, NodeOnly, Unknown, describe

# Characters that XML 1.0 does not allow, not even escaped.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Case(Struct, frozen=True):
    """One test case. `bad` and `skipped` are the reason, or ""."""

    suite: str
    name: str
    seconds: float = 0.0
    bad: str = ""
    skipped: str = ""
    said: str = ""


def of_checks(reports: Iterable[StepReport], host: str = "") -> list[Case]:
    """Return a case per step: are its files, packages and services up to date? `host` is a prefix of the name."""
    return [Case("checks", _named(host, each.name), each.seconds, _bad(each), _left(each)) for each in reports]


def _named(host: str, name: str) -> str:
    return f"{host}: {name}" if host else name


def _bad(report: StepReport) -> str:
    if report.problem:
        return f"{report.problem.message}\n{report.problem.hint}".strip()
    states = report.checked
    said = [f"{state.key}: {state.summary}" for state in states if isinstance(state, Drift)]
    said += [f"{state.key}: {state.message}" for state in states if isinstance(state, Conflict)]
    said += [f"{state.key}: known after {state.waits_for}" for state in states if isinstance(state, Unknown)]
    return "\n".join(said)


def _left(report: StepReport) -> str:
    return "; ".join(describe(state)[1] for state in report.checked if isinstance(state, NodeOnly))


def of_probes(results: Iterable[ProbeResult], host: str = "") -> list[Case]:
    """Return a case per probe, in the suite of its level; `host` is a prefix of the name."""
    return [of_finding(r.level, _named(host, r.name), r, r.seconds) for r in results]


def of_finding(suite: str, name: str, finding: Finding, seconds: float = 0.0) -> Case:
    """Return the case of one finding."""
    expected = f"\nexpected: {finding.expected}" if finding.expected else ""
    hint = f"\nhint: {finding.hint}" if finding.hint else ""
    words = f"{finding.found}{expected}{hint}"
    bad, skipped = finding.verdict == "fail", finding.verdict == "skip"
    return Case(
        suite, name, seconds, words if bad else "", words if skipped else "",
        "" if bad or skipped else f"{finding.verdict}: {words}",
    )  # fmt: skip


def of_problem(problem: Problem) -> list[Case]:
    """Return the case of a problem that prevented all checks."""
    return [Case("checks", "installed", bad=f"{problem.message}\n{problem.hint}".strip())]


def begin(path: Path) -> None:
    """Empty the report, so that a killed run does not leave an old one; also tests that it can be written.

    Raises:
        BadUsage: the path cannot be a file.
        Storage: the file cannot be written.
    """
    if path.is_dir() or str(path) == "-":
        raise BadUsage(f"--junit {path} is not a file", hint="name the report itself: `--junit FILE.xml`")
    if not path.parent.is_dir():
        raise BadUsage(f"there is no folder {path.parent}", hint=f"create it first: mkdir -p {path.parent}")
    try:
        path.write_bytes(b"")
    except OSError as error:
        raise storage_problem(error, f"writing {path}") from error


def write(path: Path, cases: Sequence[Case], strict: bool, root: str = "") -> None:
    """Write the report; `strict`: skipped counts as failed. `root`: the `--root` option of this run.

    Raises:
        Storage: the file cannot be written.
    """
    cases = [_pointed(case, root) for case in cases]
    words = {"name": "sparkinstall verify", **_counted(cases, strict)}
    whole = ElementTree.Element("testsuites", words)
    for suite in ("checks", *LEVELS):
        mine = [case for case in cases if case.suite == suite]
        if mine:
            whole.append(_suite(suite, mine, strict))
    try:
        ElementTree.ElementTree(whole).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise storage_problem(error, f"writing {path}") from error


def _pointed(case: Case, root: str) -> Case:
    bad, skipped, said = (pointed(each, root) for each in (case.bad, case.skipped, case.said))
    return replace(case, bad=bad, skipped=skipped, said=said)


def _counted(cases: Sequence[Case], strict: bool) -> dict[str, str]:
    failures = sum(bool(case.bad or (strict and case.skipped)) for case in cases)
    seconds = f"{sum(case.seconds for case in cases):.3f}"
    return {"tests": str(len(cases)), "failures": str(failures), "errors": "0", "time": seconds}


def _suite(name: str, cases: Sequence[Case], strict: bool) -> ElementTree.Element:
    skipped = 0 if strict else sum(bool(case.skipped and not case.bad) for case in cases)
    words = {"name": f"sparkinstall.{name}", **_counted(cases, strict), "skipped": str(skipped)}
    suite = ElementTree.Element("testsuite", words)
    for case in cases:
        _add(suite, case, strict)
    return suite


def _add(suite: ElementTree.Element, case: Case, strict: bool) -> None:
    words = {"classname": f"sparkinstall.{case.suite}", "name": case.name, "time": f"{case.seconds:.3f}"}
    element = ElementTree.SubElement(suite, "testcase", words)
    reason = case.bad or case.skipped
    if case.bad or (strict and case.skipped):
        said = reason if case.bad else f"skipped, and --strict was given: {reason}"
        _because(element, "failure", said).set("type", "verify")
    elif case.skipped:
        _because(element, "skipped", reason)
    if case.said:
        ElementTree.SubElement(element, "system-out").text = _fit(case.said)


def _because(element: ElementTree.Element, kind: str, said: str) -> ElementTree.Element:
    text = _fit(said)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "?")
    reason = ElementTree.SubElement(element, kind, message=first)
    reason.text = text
    return reason


def _fit(text: str) -> str:
    return _NO_XML.sub("?", redact(text)) or "?"
