"""Run programs, each in its own process group and with exactly the given environment."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

from sparkinstall.errors import Interrupted

Process = subprocess.Popen[bytes]

RUN_MARK = "SPARKINSTALL_RUN"
"""Environment variable of every program we start, so that a later run can kill those of a killed run."""

_GRACE = 10.0
"""Seconds between TERM and KILL: apt must not be killed in the middle of a package."""
_LEFTOVER_TIMEOUT = 5.0
"""Seconds during which programs of a killed run are searched for."""

_LONGEST_LINE = 1 << 16
"""Bytes; a longer line of a program is passed on in pieces."""

_running: set[int] = set()
_stopped = threading.Event()
_killers: list[threading.Timer] = []
_guard = threading.Lock()


def start(argv: tuple[str, ...], env: Mapping[str, str], **options: Any) -> Process | None:
    """Start `argv`; return None if there is no such program.

    Raises:
        Interrupted: Ctrl-C has stopped this run; no more programs are started.
    """
    refuse_if_stopped()
    where = shutil.which(argv[0], path=env.get("PATH", os.defpath))
    if where is None:
        return None
    # A process group, not a session: sudo caches the password per terminal session.
    process = _command(where).popen(list(argv[1:]), env=dict(env), process_group=0, bufsize=-1, **options)
    with _guard:
        _running.add(process.pid)
    return cast("Process", process)


def _command(where: str) -> Any:
    # plumbum takes 0.1 s to import, and a converged node runs no program at all.
    from plumbum.machines.local import LocalCommand, LocalMachine

    class Exact(LocalMachine):
        env: Any = {}  # noqa: RUF012 - plumbum would add this process's own variables

    class Command(LocalCommand):
        @property
        def machine(self) -> LocalMachine:
            return Exact()

    return Command(LocalMachine().path(where))


def ended(process: "Process") -> None:
    """Forget a program that has ended and been waited for."""
    with _guard:
        _running.discard(process.pid)


def kill_group(pid: int, sig: signal.Signals = signal.SIGKILL) -> None:
    """Signal a program and everything it started in its process group."""
    try:
        os.killpg(pid, sig)
    except (ProcessLookupError, PermissionError):
        pass


def with_terminal(*argv: str) -> bool:
    """Run a program that uses the terminal; return whether it succeeded."""
    return shutil.which(argv[0]) is not None and subprocess.call(argv) == 0


def stop_all() -> None:
    """On Ctrl-C: end every program that this process has started, and start no more."""
    _stopped.set()
    _end_running(signal.SIGTERM)
    # Some programs ignore TERM, and nobody who pressed Ctrl-C waits for them.
    killing = threading.Timer(_GRACE, _end_running, (signal.SIGKILL,))
    killing.daemon = True
    killing.start()
    _killers.append(killing)


def start_again() -> None:
    """After `stop_all`: wait for what still works, then let programs be started again, to restore what was before."""
    for each in threading.enumerate():
        if not each.daemon and each is not threading.current_thread() and each is not threading.main_thread():
            each.join(_GRACE * 2)
    while _killers:
        _killers.pop().cancel()
    _stopped.clear()


def _end_running(sig: signal.Signals) -> None:
    with _guard:
        pids = tuple(_running)
    for pid in pids:
        kill_group(pid, sig)


def refuse_if_stopped() -> None:
    """Raise Interrupted once `stop_all` was called, so that other threads end too."""
    if _stopped.is_set():
        raise Interrupted("interrupted")


def answer(
    argv: tuple[str, ...], env: Mapping[str, str], timeout: float, stdin: bytes = b""
) -> tuple[int, bytes, bytes]:
    """Run `argv`; return exit code (127 not found, 124 after `timeout` seconds), stdout and stderr."""
    process = start(argv, env, stdin=subprocess.PIPE if stdin else subprocess.DEVNULL)
    if process is None:
        return 127, b"", f"{argv[0]}: not found".encode()
    try:
        out, err = process.communicate(stdin or None, timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_group(process.pid)
        process.communicate()
        return 124, b"", f"no answer within {timeout:g} s".encode()
    except BaseException:
        kill_group(process.pid)
        process.wait()
        raise
    finally:
        ended(process)
    return process.returncode, out, err


def stream(argv: tuple[str, ...], env: Mapping[str, str], on_line: Callable[[str], None], timeout: float | None) -> int:
    """Run `argv` and pass each line of stdout and stderr to `on_line`.

    Returns the exit code; 127: not found, 124: killed after `timeout` seconds.
    """
    process = start(argv, env, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    if process is None:
        on_line(f"{argv[0]}: not found")
        return 127
    late = threading.Event()
    timer = threading.Timer(timeout or 0, _kill_late, (process.pid, late))
    timer.daemon = True
    if timeout is not None:
        timer.start()
    try:
        while raw := cast(IO[bytes], process.stdout).readline(_LONGEST_LINE):
            # A progress bar redraws its line after \r: keep only the last state.
            on_line(raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2])
        code = process.wait()
        return 124 if late.is_set() else code
    except BaseException:
        kill_group(process.pid)
        raise
    finally:
        process.wait()
        timer.cancel()
        cast(IO[bytes], process.stdout).close()
        ended(process)


def _kill_late(pid: int, late: threading.Event) -> None:
    late.set()
    kill_group(pid)


def end_leftovers(run: str) -> int:
    """Kill the programs that the killed run `run` left behind; return how many.

    They are found by `RUN_MARK` in their environment; programs of other users cannot be read and are left alone.
    """
    ended: set[int] = set()
    until = time.monotonic() + _LEFTOVER_TIMEOUT
    # Repeat until none is left: a program may have started another meanwhile, and a killed one keeps its
    # files open for a moment.
    while (found := _pids_with(f"{RUN_MARK}={run}".encode())) and time.monotonic() < until:
        ended |= {pid for pid in found if _kill(pid)}
        time.sleep(0.02)
    return len(ended)


def _pids_with(mark: bytes) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    return [pid for pid in pids if mark in _environ_of(pid)]


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _environ_of(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as handle:
            return handle.read().split(b"\0")
    except OSError:
        return []
