"""A program of the node, started as systemd starts a service: with the env file, and with nothing of this terminal."""

from sparkinstall.node import Node
from sparkinstall.system import Reader, Result

# `exec`, so that what runs has begun with these variables: LD_PRELOAD acts when a process begins.
_START = '. "$1" && shift && exec "$@"'


def started_with(node: Node, on: Reader, *argv: str) -> tuple[str, ...]:
    """Return the words that start a program with the env file."""
    return "bash", "-c", _START, "bash", on.real(node.env_file), *argv


def with_env_file(node: Node, on: Reader, *argv: str, timeout: float = 30, **more: str) -> Result:
    """What the program answers; `more` are variables that the env file may overrule. `timeout` in seconds."""
    return on.ask(*started_with(node, on, *argv), timeout=timeout, env={**node.bare_environment, **more})
