"""Runs commands for the lab; failures show the output of the command."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable

Completed = subprocess.CompletedProcess[str]
Process = subprocess.Popen[str]

SHOWN_LINES = 30


class CommandFailedError(subprocess.CalledProcessError):
    """A command's exit status is not 0; the message ends with its last lines, which pytest shows."""

    def __str__(self) -> str:
        output = f"{self.stdout or ''}\n{self.stderr or ''}".strip().splitlines()[-SHOWN_LINES:]
        return "\n".join([super().__str__(), *output])


class CommandTimedOutError(AssertionError):
    """A command ran longer than its limit; the message ends with its output until then."""


def run(*argv: str, timeout: float = 300, check: bool = True, env: dict[str, str] | None = None) -> Completed:
    """Run a command of this machine; `timeout` in seconds."""
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=env,
    )
    return finish(process, argv, None, timeout, check, process.kill)


def finish(
    process: Process,
    argv: tuple[str, ...],
    stdin: str | None,
    timeout: float,
    check: bool,
    kill: Callable[[], None],
) -> Completed:
    """Wait for a started command; `kill` ends it, and all that it started, after `timeout` seconds."""
    with process:
        try:
            out, err = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            kill()
            raise CommandTimedOutError(_late(process, argv, timeout)) from None
        except BaseException:
            kill()
            raise
    if check and process.returncode != 0:
        raise CommandFailedError(process.returncode, list(argv), out, err)
    return subprocess.CompletedProcess(list(argv), process.returncode, out, err)


def _late(process: Process, argv: tuple[str, ...], timeout: float) -> str:
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        # A daemon that left the killed group may keep the pipes open for ever.
        process.send_signal(signal.SIGKILL)
        out, err = "", "(a program that it started keeps its output open)"
    output = f"{out}\n{err}".strip().splitlines()[-SHOWN_LINES:]
    return "\n".join([f"{' '.join(argv)}: not done after {timeout:g} s", *output])
