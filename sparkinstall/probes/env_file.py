"""A program of the node, started as systemd starts a service: with the env file, and with nothing of this terminal."""

from sparkinstall.node import Node
from sparkinstall.system import Reader, Result

# `exec`, so that what runs has begun with these variables: LD_PRELOAD acts when a process begins.
_START = '. "$1" && shift && exec "$@"'


def with_env_file(node: Node, on: Reader, *argv: str, timeout: float = 30, **more: str) -> Result:
    """What the program answers; `more` are variables that the env file may overrule. `timeout` in seconds."""
    start = ("bash", "-c", _START, "bash", on.real(node.env_file), *argv)
    return on.ask(*start, timeout=timeout, env={**node.bare_environment, **more})
