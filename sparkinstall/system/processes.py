"""Programs: started in a process group of their own, with exactly the environment given."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, cast

from sparkinstall.errors import Interrupted

if TYPE_CHECKING:
    Process = subprocess.Popen[bytes]

RUN_MARK = "SPARKINSTALL_RUN"
"""Set in every program we start, so that a later run can end what a killed one left behind."""

_GRACE = 10.0
"""How long after TERM a program may go on, in seconds: apt must not be cut off in the middle of a package."""
_PATIENCE = 5.0
"""How long the programs of a killed run are looked for, in seconds."""

_running: set[int] = set()
_stopped = threading.Event()
_guard = threading.Lock()


def start(argv: tuple[str, ...], env: Mapping[str, str], **options: Any) -> "Process | None":
    """Start `argv`, or answer None where there is no such program.

    Raises:
        Interrupted: Ctrl-C has ended all programs, and no other is to begin.
    """
    refuse_if_stopped()
    where = shutil.which(argv[0], path=env.get("PATH", os.defpath))
    if where is None:
        return None
    # A group and not a session of its own: sudo remembers a password for the terminal of the session.
    process = _command(where).popen(list(argv[1:]), env=dict(env), process_group=0, bufsize=-1, **options)
    with _guard:
        _running.add(process.pid)
    return cast("Process", process)


def _command(where: str) -> Any:
    # plumbum is imported late (0.1 s): a converged node needs no program at all.
    from plumbum.machines.local import LocalCommand, LocalMachine

    class Exact(LocalMachine):
        env: Any = {}  # noqa: RUF012 - plumbum would add this process's own variables

    class Command(LocalCommand):
        @property
        def machine(self) -> LocalMachine:
            return Exact()

    return Command(LocalMachine().path(where))


def ended(process: "Process") -> None:
    """Forget a program that has been waited for."""
    with _guard:
        _running.discard(process.pid)


def kill_group(pid: int, sig: signal.Signals = signal.SIGKILL) -> None:
    """Signal a program and all it started."""
    try:
        os.killpg(pid, sig)
    except (ProcessLookupError, PermissionError):
        pass


def with_terminal(*argv: str) -> bool:
    """Run a program that talks to the person at the terminal; whether it ended well."""
    return shutil.which(argv[0]) is not None and subprocess.call(argv) == 0


def stop_all() -> None:
    """End every program this process has started, and start none any more; for Ctrl-C."""
    _stopped.set()
    _end_running(signal.SIGTERM)
    # Some ignore TERM; a person who pressed Ctrl-C does not wait for those.
    killing = threading.Timer(_GRACE, _end_running, (signal.SIGKILL,))
    killing.daemon = True
    killing.start()


def _end_running(sig: signal.Signals) -> None:
    with _guard:
        pids = tuple(_running)
    for pid in pids:
        kill_group(pid, sig)


def refuse_if_stopped() -> None:
    """Raise Interrupted once `stop_all` was called: threads that it cannot reach end here."""
    if _stopped.is_set():
        raise Interrupted("interrupted")


def answer(argv: tuple[str, ...], env: Mapping[str, str], timeout: float) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr; 127 not found, 124 past `timeout` seconds."""
    process = start(argv, env, stdin=subprocess.DEVNULL)
    if process is None:
        return 127, b"", f"{argv[0]}: not found".encode()
    try:
        out, err = process.communicate(timeout=timeout)
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


def stream(
    argv: tuple[str, ...],
    env: Mapping[str, str],
    on_line: Callable[[str], None],
    *,
    cwd: str | None,
    keep_open: tuple[int, ...] = (),
) -> int:
    """Run to the end, each line of stdout and stderr given to `on_line`; the exit code, 127 not found."""
    process = start(argv, env, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd=cwd, pass_fds=keep_open)
    if process is None:
        on_line(f"{argv[0]}: not found")
        return 127
    try:
        for raw in cast(IO[bytes], process.stdout):
            # A progress bar redraws its line with \r: only the last drawing is the line.
            on_line(raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2])
        return process.wait()
    except BaseException:
        kill_group(process.pid)
        raise
    finally:
        process.wait()
        cast(IO[bytes], process.stdout).close()
        ended(process)


def end_leftovers(run: str) -> int:
    """Kill what is still running of the killed run `run`; how many programs that were.

    They are known by the mark in their environment; programs of other users are not ours to end.
    """
    ended: set[int] = set()
    until = time.monotonic() + _PATIENCE
    # Looked for again until there is none: one may have started another meanwhile, and a killed one
    # still has its files open for a moment.
    while (found := _marked(f"{RUN_MARK}={run}".encode())) and time.monotonic() < until:
        ended |= {pid for pid in found if _kill(pid)}
        time.sleep(0.02)
    return len(ended)


def _marked(mark: bytes) -> list[int]:
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
