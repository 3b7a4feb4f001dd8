"""Another machine over the user's own OpenSSH, with its keys, agent, config and jump hosts."""

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from msgspec import Struct, field

from sparkinstall.errors import Interrupted, Unreachable
from sparkinstall.system import Result, processes
from sparkinstall.system.processes import Process

# Nobody can answer a question; a node that is gone is noticed within a minute.
# A RemoteCommand in the user's config would conflict with ours.
_OPTIONS = (
    "BatchMode=yes",
    "RemoteCommand=none",
    "ConnectTimeout=15",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=4",
)
# The path of a socket is %C (40 characters), and 17 more while ssh creates it; the kernel allows 107 in all.
_LONGEST_FOLDER = 48
_FAILED = 255
_TAIL = 40
# Bytes of stdout, and of one line of stderr: more is no reply of ours.
_LONGEST_REPLY = 64 << 20
_LONGEST_LINE = 1 << 16


class Ssh(Struct):
    """One host, as the user would write it after `ssh`. `trips` counts the commands that ran there.

    `sockets` is a private folder (a real path) for the connection that all commands share; None: one per command.
    """

    host: str
    sockets: Path | None
    trips: int = 0
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def run(
        self,
        command: str,
        *,
        stdin: bytes = b"",
        keep_open: bool = False,
        on_line: Callable[[str], None] = lambda _: None,
        new_connection: bool = False,
    ) -> Result:
        """Run a command line in the remote shell.

        Args:
            stdin: what to write to its stdin first.
            keep_open: do not close its stdin then, so that it notices when this end is gone.
            on_line: called with each line of stderr.
            new_connection: use a new connection, which proves that the host can still be reached.

        Raises:
            Unreachable: ssh could not connect, or the connection was lost.
        """
        self.trips += 1
        argv = ("ssh", *self._options(new_connection), "--", self.host, command)
        process = processes.start(
            argv, self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if process is None:
            raise Unreachable("ssh is not installed here", hint="install it: `sudo apt-get install openssh-client`")
        code, out, err = _conversation(process, stdin, keep_open, on_line)
        processes.refuse_if_stopped()
        if code == _FAILED or code < 0:
            raise explained(self.host, err, connected=self.trips > 1 and not new_connection)
        return Result(argv, code, out.decode(errors="replace"), err)

    def _options(self, new_connection: bool) -> list[str]:
        shared = self.sockets is not None and not new_connection
        path = ["ControlMaster=auto", f"ControlPath={self.sockets}/%C", "ControlPersist=60"]
        chosen = [*_OPTIONS, *(path if shared else ["ControlMaster=no", "ControlPath=none"])]
        # -T: no terminal there, whatever the config says.
        return ["-T", *(word for option in chosen for word in ("-o", option))]

    def close(self) -> None:
        """End the shared connection, if there is one."""
        if self.sockets is None or not any(self.sockets.iterdir()):
            return
        # After Ctrl-C no program is started; the connection ends by itself in a minute.
        with suppress(Interrupted):
            path = f"ControlPath={self.sockets}/%C"
            processes.answer(("ssh", "-o", path, "-O", "exit", "--", self.host), self.environment, 5)


@contextmanager
def sockets() -> Iterator[Path]:
    """A private folder for shared connections, short enough for a socket's path."""
    folder = tempfile.gettempdir()
    made = Path(tempfile.mkdtemp(prefix="si-", dir=folder if len(folder) < _LONGEST_FOLDER - 12 else "/tmp"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _conversation(
    process: Process, stdin: bytes, keep_open: bool, on_line: Callable[[str], None]
) -> tuple[int, bytes, str]:
    """Exit code, stdout, and the last lines of stderr."""
    said: list[str] = []
    out: list[bytes] = []
    readers = [
        threading.Thread(target=_listen, args=(cast(IO[bytes], process.stderr), said, on_line), daemon=True),
        threading.Thread(target=_keep, args=(cast(IO[bytes], process.stdout), out), daemon=True),
        threading.Thread(target=_tell, args=(cast(IO[bytes], process.stdin), stdin, keep_open), daemon=True),
    ]
    try:
        for each in readers:
            each.start()
        code = process.wait()
        # The command has ended: a process that still holds the other end of these pipes is not waited for.
        readers[1].join()
        readers[0].join(timeout=2)
        return code, b"".join(out), "\n".join(said[-_TAIL:])
    except BaseException:
        processes.kill_group(process.pid)
        process.wait()
        raise
    finally:
        with suppress(OSError):
            cast(IO[bytes], process.stdin).close()
        processes.ended(process)


def _tell(to: IO[bytes], stdin: bytes, keep_open: bool) -> None:
    # A command that ended before it had read everything tells the rest by its exit code.
    with suppress(OSError, ValueError):
        to.write(stdin)
        to.flush()
        if not keep_open:
            to.close()


def _keep(stream: IO[bytes], out: list[bytes]) -> None:
    """Read the reply; of one that is too large only the begin, which is no reply then."""
    size = 0
    # In parts: `read` takes at once all the memory that it may need.
    while part := stream.read(1 << 16):
        if size < _LONGEST_REPLY:
            out.append(part)
        size += len(part)


def _listen(stream: IO[bytes], said: list[str], on_line: Callable[[str], None]) -> None:
    while raw := stream.readline(_LONGEST_LINE):
        line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
        said.append(line)
        del said[:-_TAIL]
        on_line(line)


class _Failure(Struct, frozen=True):
    """A failure of ssh: its output, and our message and hint. `{host}` is as given, `{name}` its bare name.

    `quoted`: the line with the sign is the cause.
    """

    signs: tuple[str, ...]
    message: str
    hint: str
    quoted: bool = False


_OFFENDING = re.compile(r"Offending \S+ key in (\S+)")
_CHANGED_KEY = _Failure(
    ("REMOTE HOST IDENTIFICATION HAS CHANGED",),
    "the host key of {host} has changed",
    "compare the fingerprint at the node itself (`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub`); "
    "only if it is the node's new key, remove the old one (`ssh-keygen -R {name}`) and connect once by hand",
)
_LOST = _Failure(
    ("Timeout, server", "Broken pipe", "Connection reset", "closed by remote host", "Connection to ", "closed by"),
    "the connection to {host} was lost: the node or its network went down",
    "when the node answers again, run the same command again: it resumes; "
    "the node itself rolls back a network change that was not confirmed",
    quoted=True,
)
_FAILURES = (
    _Failure(
        ("Host key verification failed",),
        "the host key of {host} is unknown here",
        "connect once by hand (`ssh {host}`), compare the fingerprint, and accept it",
    ),
    _Failure(
        ("Permission denied", "Too many authentication failures"),
        "{host} refuses your login",
        "`ssh {host} true` must work without a question: copy your key there (`ssh-copy-id {host}`), "
        "and add a key with a passphrase to your agent (`ssh-add`)",
        quoted=True,
    ),
    _Failure(
        ("Could not resolve hostname",),
        "the name of host {name} could not be resolved",
        "check the spelling, or give it an address or a `Host` entry in ~/.ssh/config",
    ),
    _Failure(
        ("Connection refused",),
        "{host} is up, but refuses ssh connections",
        "start sshd at the node: `sudo systemctl enable --now ssh`",
    ),
    _Failure(
        ("timed out", "No route to host", "Network is unreachable", "Host is down"),
        "{host} does not answer",
        "check that it is switched on and on this network (`ping`)",
    ),
    _LOST,
)


def explained(host: str, said: str, connected: bool = False) -> Unreachable:
    """What ssh printed, as an error with a hint.

    `connected`: there was a connection before; a shared one ends without any message.
    """
    lines = [line for line in said.splitlines() if line.strip()]
    if _CHANGED_KEY.signs[0] in said:
        place = _OFFENDING.search(said)
        where = f"the line {place[1]}" if place else "a line of your known_hosts file"
        cause = f"{where} holds its former key: the node was reinstalled, or another machine answers for it"
        return _unreachable(_CHANGED_KEY, host, cause)
    # The output of the remote program is in there too: ssh's own messages come last.
    for failure in _FAILURES:
        if quote := next((line for line in lines[:-5:-1] if any(sign in line for sign in failure.signs)), ""):
            return _unreachable(failure, host, quote.strip() if failure.quoted else "")
    if connected:
        return _unreachable(_LOST, host, "")
    return Unreachable(
        f"ssh to {host} failed: {lines[-1] if lines else 'it gave no reason'}",
        hint=f"`ssh {host} true` shows it; when that works, run the same command again",
        output=lines[-5:],
    )


def _unreachable(failure: _Failure, host: str, cause: str) -> Unreachable:
    names = {"host": host, "name": host.removeprefix("ssh://").rpartition("@")[2].split("/")[0]}
    return Unreachable(failure.message.format(**names), cause=cause, hint=failure.hint.format(**names))
