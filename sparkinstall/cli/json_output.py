"""The one JSON object that `--json` prints (docs/json.md)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, to_builtins

from sparkinstall.cluster.protocol import VERSION, Error, FixMessage, ProbeMessage, StepMessage
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.engine import StepReport
from sparkinstall.core.fixes import FixState
from sparkinstall.errors import Exit, Problem
from sparkinstall.probes import Finding, Probe
from sparkinstall.redaction import redact

STATUS = {
    Exit.GOOD: "good",
    Exit.FAILED: "failed",
    Exit.USAGE: "usage",
    Exit.DRIFT: "drift",
    Exit.PREFLIGHT: "preflight",
    Exit.SOME_NODES: "some-nodes",
    Exit.INTERRUPTED: "interrupted",
}


def envelope(command: str, code: Exit, data: Struct | Mapping[str, Any], problems: Sequence[Problem]) -> str:
    """One line of JSON; the same shape whether the command went well or not."""
    whole = {
        "version": VERSION,
        "command": command,
        "status": STATUS[code],
        "exit_code": int(code),
        "data": to_builtins(data, enc_hook=str),
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
    return _as_dict(Error.of(problem))


def step_data(report: StepReport) -> dict[str, Any]:
    return _as_dict(StepMessage.of(report))


def finding_data(probe: Probe, finding: Finding, seconds: float) -> dict[str, Any]:
    return _as_dict(ProbeMessage.of(ProbeResult(probe, finding, seconds)))


def fix_data(state: FixState) -> dict[str, Any]:
    return _as_dict(FixMessage.of(state))


def _as_dict(message: Struct) -> dict[str, Any]:
    return dict(to_builtins(message))
