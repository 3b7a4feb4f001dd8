"""Runs of a module in processes of their own that begin with the imports done: starting Python is most of a short run.

A program beside the tests has imported every verb and has called none. Each run is a fork of it, with variables and
streams of its own; it can be killed, and its end is the end of a process. Only a new Python obeys the variables that
are for Python itself, so runs with other ones of these are not for this program.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from sparkinstall.cli import app
from sparkinstall.diagnose.signatures import load as load_signatures

CHECKOUT = Path(__file__).parents[2]

# What verbs import only when they need it.
_LATER = ("jinja2", "plumbum.machines.local", "rich.live", "rich.markup", "rich.table", "yaml")

FOR_PYTHON = ("PYTHON", "LC_", "LANG", "TZ", "LD_")
"""How the names of variables begin that Python, or what starts it, reads at its start."""
_LONGEST_REQUEST = 1 << 20

_guard = threading.Lock()
_parent: Parent | None = None


def run(
    module: str,
    words: Sequence[str],
    env: Mapping[str, str],
    timeout: float,
    cwd: Path = CHECKOUT,
    stdin: bytes = b"",
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE WORDS` in the folder `cwd` to its end."""
    global _parent
    # Tests that run several at once do so in threads: all take one.
    with _guard:
        if _parent is None or _parent.owner != os.getpid() or _parent.for_python != _for_python(env):
            _parent = Parent(env)
        parent = _parent
    with tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        return parent.run(module, words, env, timeout, cwd, given.fileno())


def _for_python(env: Mapping[str, str]) -> Mapping[str, str]:
    return {name: value for name, value in env.items() if name.startswith(FOR_PYTHON)}


class Parent:
    """The program that is forked, as the tests see it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.owner, self.for_python = os.getpid(), _for_python(env)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST_REQUEST)
        with theirs:
            self._program = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                cwd=CHECKOUT, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        atexit.register(self._end)

    def _end(self) -> None:
        self._requests.close()
        if self.owner == os.getpid():
            self._program.wait()

    def run(
        self, module: str, words: Sequence[str], env: Mapping[str, str], timeout: float, cwd: Path, stdin: int
    ) -> subprocess.CompletedProcess[str]:
        """Let one fork run, and wait for its end.

        Raises:
            TimeoutExpired: it took longer, and was killed.
        """
        request = json.dumps({"module": module, "words": list(words), "env": dict(env), "cwd": str(cwd)}).encode()
        ends, their_ends = socket.socketpair()
        pipes = [os.pipe(), os.pipe()]
        with ends, ends.makefile() as lines:
            with their_ends:
                streams = (stdin, *(write for _, write in pipes))
                socket.send_fds(self._requests, [request], [their_ends.fileno(), *streams])
            for _, write in pipes:
                os.close(write)
            pid = int(lines.readline())
            texts = _read([read for read, _ in pipes], pid, timeout)
            return subprocess.CompletedProcess([module, *words], int(lines.readline()), *texts)


def _read(pipes: Sequence[int], pid: int, timeout: float) -> list[str]:
    """Read each pipe to its end and close it; kill `pid` if that takes longer than `timeout` seconds."""
    texts = {pipe: bytearray() for pipe in pipes}
    until = time.monotonic() + timeout
    with selectors.DefaultSelector() as open_ones:
        for pipe in pipes:
            open_ones.register(pipe, selectors.EVENT_READ)
        while open_ones.get_map():
            ready = open_ones.select(until - time.monotonic())
            if not ready:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(f"process {pid}", timeout)
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                texts[key.fd] += part
                if not part:
                    open_ones.unregister(key.fd)
                    os.close(key.fd)
    return [text.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n") for text in texts.values()]


# --- the program that is forked


def main() -> None:
    """Import every verb, read what diagnose knows; for each request, be a fork that runs what it names."""
    for place, _ in app.VERBS.values():
        app.imported(place)
    for name in _LATER:
        import_module(name)
    load_signatures()
    gc.collect()
    gc.freeze()
    request = _fork_for_each(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    # As `python -m` has it; until now, the folder of this file.
    sys.path[0] = request["cwd"]
    sys.argv[1:] = request["words"]
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        _leave(end.code)


def _leave(code: object) -> NoReturn:
    """End this process as Python does, but without freeing all that the imports have made."""
    threads: Any = threading
    threads._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _fork_for_each(requests: socket.socket) -> dict[str, Any]:
    """Return in a fork with its request; in this process never."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, _LONGEST_REQUEST, 4)
        if not request:
            sys.exit()
        if not os.fork():
            requests.close()
            _run_and_tell(*descriptors)
            return dict(json.loads(request))
        for each in descriptors:
            os.close(each)
        while _ended():
            pass


def _ended() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


def _run_and_tell(ends: int, *streams: int) -> None:
    """Return in the process that is to run; in this one, write its id, then its exit code, to `ends`."""
    pid = os.fork()
    if not pid:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            _reopen(number)
        for each in (ends, *streams):
            os.close(each)
        return
    for each in streams:
        os.close(each)
    os.write(ends, f"{pid}\n".encode())
    os.write(ends, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def _reopen(number: int) -> None:
    """Open a stream again as Python does at its start: the former one remembers what kind of file it was."""
    name = ("stdin", "stdout", "stderr")[number]
    former = getattr(sys, name)
    # Not the descriptor's owner, like Python's own: it stays open to the end of the process.
    stream = open(  # noqa: SIM115
        number, "w" if number else "r", 1 if name == "stderr" else -1, former.encoding, former.errors, closefd=False
    )
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    main()
