"""Read an env file as systemd does."""

import re

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_ESCAPE = re.compile(r'\\(["\\`$])')


def assignments(content: bytes) -> dict[str, str]:
    """Return the variables of one of our env files as systemd's EnvironmentFile= reads them, skipping other lines."""
    lines = content.decode(errors="replace").splitlines()
    found = (match for line in lines if (match := _ASSIGNMENT.fullmatch(line.strip())))
    return {match[1]: _unquoted(match[2]) for match in found}


def _unquoted(value: str) -> str:
    inner = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
    return _ESCAPE.sub(r"\1", inner)
