"""`verify --junit`: checks and probes as JUnit XML for GitHub and GitLab.

The format is the Jenkins xUnit schema: a suite for the checks and one per level. JUnit has no warnings, so a warning
passes, with its text in `system-out`. Reasons are in an attribute and as text, because some readers show only the
one and some (GitLab) only the other.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.cli.hints import pointed
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.engine import StepReport
from sparkinstall.errors import BadUsage, Problem, Storage, storage_problem
from sparkinstall.given import absolute
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
    if str(path) == "-":
        raise BadUsage("--junit - is not a file", hint="name the report itself: `--junit FILE.xml`")
    path = absolute(path, "--junit", hidden=True)
    try:
        _open(path).close()
    except IsADirectoryError as error:
        raise BadUsage(f"--junit {path} is a folder", hint="name the report itself: `--junit FILE.xml`") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = f"create it first: mkdir -p {path.parent}"
        raise BadUsage(f"there is no folder {path.parent}", hint=hint) from error
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> Storage:
    return storage_problem(error, f"writing {path}", "choose a folder that you can write to: `--junit FILE.xml`")


def _open(path: Path) -> BinaryIO:
    """Open the report; a pipe without a reader is an error, and is not waited for."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    os.set_blocking(handle, True)
    return os.fdopen(handle, "wb")


def write(path: Path, cases: Sequence[Case], strict: bool, root: str = "") -> None:
    """Write the report; `strict`: skipped counts as failed. `root`: the `--root` option of this run.

    Raises:
        Storage: the file cannot be written.
    """
    cases = [_completed(case, strict, root) for case in cases]
    whole = ElementTree.Element("testsuites", {"name": "sparkinstall verify", **_counted(cases)})
    for suite in ("checks", *LEVELS):
        if mine := [case for case in cases if case.suite == suite]:
            whole.append(_suite(suite, mine))
    try:
        with _open(absolute(path, "--junit", hidden=True)) as file:
            ElementTree.ElementTree(whole).write(file, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _completed(case: Case, strict: bool, root: str) -> Case:
    bad, skipped, said = (pointed(each, root) for each in (case.bad, case.skipped, case.said))
    if strict and skipped and not bad:
        bad = f"skipped, and --strict was given: {skipped}"
    return replace(case, bad=bad, skipped="" if bad else skipped, said=said)


def _counted(cases: Sequence[Case]) -> dict[str, str]:
    failures, seconds = sum(bool(case.bad) for case in cases), sum(case.seconds for case in cases)
    return {"tests": str(len(cases)), "failures": str(failures), "errors": "0", "time": f"{seconds:.3f}"}


def _suite(name: str, cases: Sequence[Case]) -> ElementTree.Element:
    skipped = str(sum(bool(case.skipped) for case in cases))
    suite = ElementTree.Element("testsuite", {"name": f"sparkinstall.{name}", **_counted(cases), "skipped": skipped})
    for case in cases:
        words = {"classname": f"sparkinstall.{case.suite}", "name": case.name, "time": f"{case.seconds:.3f}"}
        element = ElementTree.SubElement(suite, "testcase", words)
        if case.bad:
            _because(element, "failure", case.bad).set("type", "verify")
        elif case.skipped:
            _because(element, "skipped", case.skipped)
        if case.said:
            ElementTree.SubElement(element, "system-out").text = _fit(case.said)
    return suite


def _because(element: ElementTree.Element, kind: str, said: str) -> ElementTree.Element:
    text = _fit(said)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "?")
    reason = ElementTree.SubElement(element, kind, message=first)
    reason.text = text
    return reason


def _fit(text: str) -> str:
    return _NO_XML.sub("?", redact(text)) or "?"
