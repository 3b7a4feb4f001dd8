"""The variables of an env file, as systemd reads them."""

import re

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_ESCAPE = re.compile(r'\\(["\\`$])')


def assignments(content: bytes) -> dict[str, str]:
    """The variables of one of our env files, as systemd's EnvironmentFile= takes them: all else is skipped."""
    lines = content.decode(errors="replace").splitlines()
    found = (match for line in lines if (match := _ASSIGNMENT.fullmatch(line.strip())))
    return {match[1]: _unquoted(match[2]) for match in found}


def _unquoted(value: str) -> str:
    inner = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
    return _ESCAPE.sub(r"\1", inner)
