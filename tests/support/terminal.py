"""The output of a command on a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence

from tests.support.far_nodes import FarNodes

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(far: FarNodes, argv: Sequence[str], width: int = 80) -> tuple[int, list[str]]:
    """Exit code, and every line that was drawn at any time, without colours."""
    env = {name: value for name, value in far.environment().items() if name not in ("COLUMNS", "NO_COLOR")}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    whole = [sys.executable, "-m", "sparkinstall", "cluster", *argv]
    with subprocess.Popen(
        whole, env={**env, "TERM": "xterm-256color"}, cwd=far.lab, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        drawn = b""
        while more := _read(ours):
            drawn += more
        process.wait(timeout=300)
    os.close(ours)
    text = _CONTROL.sub("", drawn.decode())
    return process.returncode, [line.rstrip() for line in re.split(r"[\r\n]+", text)]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""
