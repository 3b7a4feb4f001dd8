"""The one JSON object that `--json` prints (docs/json.md)."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import to_builtins
from msgspec.structs import asdict

from sparkinstall.core.engine import Checked, StepReport
from sparkinstall.errors import Exit, Problem
from sparkinstall.probes import Finding, Probe
from sparkinstall.redaction import redact

if TYPE_CHECKING:
    from sparkinstall.core.fixes import FixState

VERSION = 1
_STATUS = {
    Exit.GOOD: "good",
    Exit.FAILED: "failed",
    Exit.USAGE: "usage",
    Exit.DRIFT: "drift",
    Exit.PREFLIGHT: "preflight",
    Exit.SOME_NODES: "some-nodes",
    Exit.INTERRUPTED: "interrupted",
}


def envelope(command: str, code: Exit, data: Mapping[str, Any], problems: Sequence[Problem]) -> str:
    """One line of JSON; the same shape whether the command went well or not."""
    whole = {
        "version": VERSION,
        "command": command,
        "status": _STATUS[code],
        "exit_code": int(code),
        "data": data,
        "errors": [problem_data(problem) for problem in problems],
    }
    return json.dumps(_redacted(whole), default=str)


def _redacted(value: Any) -> Any:
    """Before JSON escapes what a secret may hold."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {_redacted(key): _redacted(each) for key, each in value.items()}
    return [_redacted(each) for each in value] if isinstance(value, list | tuple) else value


def problem_data(problem: Problem) -> dict[str, Any]:
    return {
        "code": problem.code,
        "message": problem.message,
        "cause": problem.cause,
        "hint": problem.hint,
        "log": problem.log,
        "output": list(problem.output),
    }


def step_data(report: StepReport) -> dict[str, Any]:
    return {
        "step": report.name,
        "outcome": report.outcome,
        "seconds": round(report.seconds, 3),
        "blocked_by": report.blocked_by or None,
        "resources": [resource_data(each) for each in report.checked],
        "error": problem_data(report.problem) if report.problem else None,
    }


def resource_data(checked: Checked) -> dict[str, Any]:
    state = checked.state
    return {
        "key": checked.key,
        "changed": checked.changed,
        **to_builtins(state),
    }


def finding_data(probe: Probe, finding: Finding, seconds: float) -> dict[str, Any]:
    return {
        "name": probe.name,
        "title": probe.title,
        "level": probe.level,
        "fix": probe.fix.number if probe.fix else None,
        "seconds": round(seconds, 3),
        **asdict(finding),
    }


def fix_data(state: "FixState") -> dict[str, Any]:
    return {
        "number": state.fix.number,
        "title": state.fix.title,
        "standing": state.standing,
        "note": state.note,
    }
