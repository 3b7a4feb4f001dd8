"""Read an env file as systemd does, and run a program with it as systemd starts a service."""

import re

from sparkinstall.node import Node
from sparkinstall.system import Reader, Result
from sparkinstall.system.read_only import WITH_ENV_FILE

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


def started_with(node: Node, on: Reader, *argv: str) -> tuple[str, ...]:
    """Return the words that start a program with the env file."""
    return "bash", "-c", WITH_ENV_FILE, "bash", on.real(node.env_file), *argv


def with_env_file(node: Node, on: Reader, *argv: str, timeout: float = 30, **more: str) -> Result:
    """Run `argv` without this terminal's variables and return its result; the env file overrides variables in `more`.

    `timeout` in seconds.
    """
    return on.ask(*started_with(node, on, *argv), timeout=timeout, env={**node.bare_environment, **more})
