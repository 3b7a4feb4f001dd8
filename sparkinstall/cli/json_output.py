"""The one JSON object that `--json` prints (docs/json.md)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, to_builtins

from sparkinstall.envelope import Envelope, plain
from sparkinstall.errors import Exit, Problem
from sparkinstall.redaction import redact


def envelope(command: str, code: Exit, data: Struct | Mapping[str, Any], problems: Sequence[Problem]) -> str:
    """Encode a result in one line of JSON; the shape is the same whether the command succeeded or not."""
    whole = Envelope(command=command, status=code.word, exit_code=int(code), data=data, errors=tuple(problems))
    return json.dumps(_redacted(to_builtins(whole, enc_hook=plain)))


def _redacted(value: Any) -> Any:
    """Redact each string before JSON escapes characters of a secret."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {_redacted(key): _redacted(each) for key, each in value.items()}
    return [_redacted(each) for each in value] if isinstance(value, list | tuple) else value
