"""Another machine over the user's own OpenSSH: its keys, agent, config and jump hosts, as they stand."""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from msgspec import Struct, field

from sparkinstall.errors import Interrupted, Unreachable
from sparkinstall.system import Result, processes

if TYPE_CHECKING:
    from sparkinstall.system.processes import Process

# Nobody is there to answer a question, and a node that is gone is noticed within a minute.
# A RemoteCommand of the user's config would stand in the way of ours.
_OPTIONS = (
    "BatchMode=yes",
    "RemoteCommand=none",
    "ConnectTimeout=15",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=4",
)
# ssh names a socket %C (40 characters) and 17 more while it is made; the kernel takes 107 in all.
_LONGEST_FOLDER = 48
_FAILED = 255
_TAIL = 40


class Ssh(Struct):
    """One host, as the user would write it after `ssh`. `trips` counts the commands that went there.

    `sockets` is a private folder (a real path) for the connection that all commands share; None: each has its own.
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
        """Run a command line of the remote shell; its stdout is in the result, its stderr is told line by line too.

        Args:
            stdin: given to it first.
            keep_open: do not close its stdin then, so that it can tell when this end is gone.
            on_line: is given each line of stderr.
            new_connection: over a connection of its own, which shows that the host can still be reached.

        Raises:
            Unreachable: ssh could not connect, or the connection was lost.
        """
        self.trips += 1
        argv = ("ssh", *self._options(new_connection), "--", self.host, command)
        process = processes.start(
            argv, self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if process is None:
            raise Unreachable("there is no ssh here", hint="install it: `sudo apt-get install openssh-client`")
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
        """End the shared connection; there is none: fine."""
        if self.sockets is None or not any(self.sockets.iterdir()):
            return
        try:
            path = f"ControlPath={self.sockets}/%C"
            processes.answer(("ssh", "-o", path, "-O", "exit", "--", self.host), self.environment, 5)
        except Interrupted:
            # After Ctrl-C no program is started any more; the connection ends by itself in a minute.
            pass


@contextmanager
def sockets() -> Iterator[Path]:
    """A private folder for shared connections, short enough for a socket's path."""
    folder = tempfile.gettempdir()
    made = Path(tempfile.mkdtemp(prefix="si-", dir=folder if len(folder) < _LONGEST_FOLDER - 12 else "/tmp"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def quoted(*argv: str) -> str:
    """The words as the remote shell has to be given them."""
    return shlex.join(argv)


def _conversation(
    process: "Process", stdin: bytes, keep_open: bool, on_line: Callable[[str], None]
) -> tuple[int, bytes, str]:
    """Exit code, stdout, and the last lines of stderr."""
    said: list[str] = []
    out: list[bytes] = []
    readers = [
        threading.Thread(target=_listen, args=(cast(IO[bytes], process.stderr), said, on_line), daemon=True),
        threading.Thread(target=lambda: out.append(cast(IO[bytes], process.stdout).read()), daemon=True),
        threading.Thread(target=_tell, args=(cast(IO[bytes], process.stdin), stdin, keep_open), daemon=True),
    ]
    try:
        for each in readers:
            each.start()
        code = process.wait()
        # Whoever still holds the other end of these pipes is not the command: it has ended.
        readers[1].join()
        readers[0].join(timeout=2)
        return code, b"".join(out), "\n".join(said[-_TAIL:])
    except BaseException:
        processes.kill_group(process.pid)
        process.wait()
        raise
    finally:
        _shut(process)
        processes.ended(process)


def _shut(process: "Process") -> None:
    try:
        cast(IO[bytes], process.stdin).close()
    except OSError:
        pass


def _tell(to: IO[bytes], stdin: bytes, keep_open: bool) -> None:
    try:
        to.write(stdin)
        to.flush()
        if not keep_open:
            to.close()
    except (OSError, ValueError):
        # It ended before it had read everything: its exit code says what there is to say.
        pass


def _listen(stream: IO[bytes], said: list[str], on_line: Callable[[str], None]) -> None:
    for raw in stream:
        line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
        said.append(line)
        del said[:-_TAIL]
        on_line(line)


_OFFENDING = re.compile(r"Offending \S+ key in (\S+)")
_LOST = ("Timeout, server", "Broken pipe", "Connection reset", "closed by remote host", "Connection to ", "closed by")


def explained(host: str, said: str, connected: bool = False) -> Unreachable:
    """What ssh said, in words a person can act on.

    `connected`: there was a connection before; where commands share one, it dies without a word.
    """
    lines = [line for line in said.splitlines() if line.strip()]
    # What the remote program had said before is in there too: ssh's own words come last.
    own = "\n".join(lines[-4:])
    for signs, words in _WORDS:
        if any(sign in (said if words is _changed_key else own) for sign in signs):
            return words(host, said)
    if connected:
        return _cut(host, "")
    return Unreachable(
        f"ssh to {host} failed: {lines[-1] if lines else 'it gave no reason'}",
        hint=f"`ssh {host} true` shows it; when that works, run the same command again",
        output=lines[-5:],
    )


def _changed_key(host: str, said: str) -> Unreachable:
    place = _OFFENDING.search(said)
    where = f"the line {place[1]}" if place else "a line of your known_hosts file"
    return Unreachable(
        f"the host key of {host} has changed",
        cause=f"{where} holds its former key: the node was reinstalled, or another machine answers for it",
        hint=f"compare the fingerprint at the node itself (`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub`); "
        f"only if it is the node's new key, remove the old one (`ssh-keygen -R {_plain(host)}`) "
        "and connect once by hand",
    )


def _unknown_key(host: str, said: str) -> Unreachable:
    del said
    return Unreachable(
        f"the host key of {host} is not known here yet",
        hint=f"connect once by hand (`ssh {host}`), compare the fingerprint, and say yes",
    )


def _denied(host: str, said: str) -> Unreachable:
    line = next((each for each in said.splitlines() if "Permission denied" in each), "")
    return Unreachable(
        f"{host} does not let you in",
        cause=line.strip(),
        hint=f"`ssh {host} true` must work without a question: bring your key there (`ssh-copy-id {host}`), "
        "and have a key with a passphrase in your agent (`ssh-add`)",
    )


def _unresolved(host: str, said: str) -> Unreachable:
    del said
    return Unreachable(
        f"there is no host {_plain(host)}: its name could not be resolved",
        hint="look at the spelling, or give it an address or a `Host` entry in ~/.ssh/config",
    )


def _silent(host: str, said: str) -> Unreachable:
    del said
    return Unreachable(
        f"{host} does not answer", hint="is it switched on, and on this network? `ping` and the address will tell"
    )


def _refused(host: str, said: str) -> Unreachable:
    del said
    return Unreachable(
        f"{host} is there, but nothing answers ssh on it",
        hint="start it at the node: `sudo systemctl enable --now ssh`",
    )


def _cut(host: str, said: str) -> Unreachable:
    return Unreachable(
        f"the connection to {host} was lost: the node or its network went down",
        cause=next((line.strip() for line in reversed(said.splitlines()) if any(sign in line for sign in _LOST)), ""),
        hint="when the node answers again, run the same command again: it goes on; "
        "the node itself rolls back a network change that was not confirmed",
    )


def _plain(host: str) -> str:
    """The host's name without a user and what belongs to a URL."""
    return host.removeprefix("ssh://").rpartition("@")[2].split("/")[0]


_WORDS: tuple[tuple[tuple[str, ...], Callable[[str, str], Unreachable]], ...] = (
    (("REMOTE HOST IDENTIFICATION HAS CHANGED",), _changed_key),
    (("Host key verification failed",), _unknown_key),
    (("Permission denied", "Too many authentication failures"), _denied),
    (("Could not resolve hostname",), _unresolved),
    (("Connection refused",), _refused),
    (("timed out", "No route to host", "Network is unreachable", "Host is down"), _silent),
    (_LOST, _cut),
)
