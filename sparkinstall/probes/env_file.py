"""Run a program as systemd starts a service: with the env file and without this terminal's variables."""

from sparkinstall.node import Node
from sparkinstall.system import Reader, Result

# `exec`, so that the process starts with these variables: LD_PRELOAD acts at process start.
_START = '. "$1" && shift && exec "$@"'


def started_with(node: Node, on: Reader, *argv: str) -> tuple[str, ...]:
    """Return the words that start a program with the env file."""
    return "bash", "-c", _START, "bash", on.real(node.env_file), *argv


def with_env_file(node: Node, on: Reader, *argv: str, timeout: float = 30, **more: str) -> Result:
    """Run `argv` and return its result; the env file overrides variables in `more`. `timeout` in seconds."""
    return on.ask(*started_with(node, on, *argv), timeout=timeout, env={**node.bare_environment, **more})
