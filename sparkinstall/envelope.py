"""The JSON object that every verb prints with `--json`, and that a node replies with (docs/json.md). A leaf."""

from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from sparkinstall.errors import Problem

VERSION = 1
"""The version of the envelope that both ends speak."""

_Data = TypeVar("_Data")


class _Error(Struct, frozen=True):
    """A problem as JSON."""

    code: str
    message: str
    cause: str = ""
    hint: str = ""
    log: str = ""
    output: tuple[str, ...] = ()


def plain(value: Any) -> Any:
    """What msgspec cannot encode by itself: a problem as an object, anything else as text."""
    if not isinstance(value, Problem):
        return str(value)
    return _Error(value.code, value.message, value.cause, value.hint, value.log, value.output)


def as_problem(kind: type, data: Any) -> Problem:
    """Decode a problem, the only type in a message that msgspec does not know."""
    assert kind is Problem, kind
    error = msgspec.convert(data, _Error)
    problem = Problem(error.message, cause=error.cause, hint=error.hint, log=error.log, output=error.output)
    problem.code = error.code
    return problem


class Envelope(Struct, Generic[_Data], frozen=True, kw_only=True):
    """The whole reply. `data` is the verb's own message."""

    version: int = VERSION
    command: str = ""
    status: str = ""
    exit_code: int
    data: _Data
    errors: tuple[Problem, ...]
