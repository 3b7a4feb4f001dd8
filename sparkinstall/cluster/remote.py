"""A node over ssh, as the terminal sees it: sparkinstall is installed there, runs a verb, and replies in JSON."""

import json
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct, field

from sparkinstall.assets import user_cache
from sparkinstall.cluster import bootstrap, protocol
from sparkinstall.cluster.protocol import Reply
from sparkinstall.cluster.ssh import Ssh
from sparkinstall.cluster.uploads import Upload
from sparkinstall.errors import PreflightFailed, Problem, storage_errors
from sparkinstall.node import DEBIAN_PACKAGES
from sparkinstall.redaction import redact
from sparkinstall.system import Result, processes

OnLine = Callable[[str], None]
_Message = TypeVar("_Message")


class Member(Struct, frozen=True):
    """A node of the cluster: its ssh host and role. `address` is the one on the QSFP link."""

    host: str
    role: str
    rank: int
    address: str


class Announcement(Generic[_Message]):
    """What the verb of one node announces while it runs, and the work of another node waits for."""

    def __init__(self, message: type[_Message]) -> None:
        self._message = message
        self._found: _Message | None = None
        self._over = threading.Event()

    def listen(self, on_line: OnLine) -> OnLine:
        """`on_line` for the verb that announces: every other line is passed on."""

        def take(line: str) -> None:
            if found := protocol.announced(line, self._message):
                self._found = found
                self._over.set()
            else:
                on_line(line)

        return take

    def end(self) -> None:
        """Note that the verb has ended: it announces nothing more."""
        self._over.set()

    def wait(self) -> _Message | None:
        """The announcement; None: the verb ended without one.

        Raises:
            Interrupted: the run was interrupted.
        """
        while not self._over.wait(1):
            processes.refuse_if_stopped()
        return self._found


class NoTool(Problem):
    """sparkinstall is not on the node."""


class RemoteNode(Struct):
    """A node and its known state.

    `words`: its settings as options. `uploads`: files of this machine that settings name. `brought`: this run installed
    sparkinstall there. `changed`: a phase of this run changed something there.
    """

    member: Member
    ssh: Ssh
    verbose: bool = False
    words: Sequence[str] = ()
    uploads: tuple[Upload, ...] = ()
    brought: bool = False
    changed: bool = False
    look: protocol.Look = field(default_factory=protocol.Look)

    @property
    def host(self) -> str:
        return self.member.host

    def call(
        self,
        message: type[_Message],
        *argv: str,
        on_line: OnLine,
        stdin: str = "",
        new_connection: bool = False,
        bring: bool = True,
    ) -> Reply[_Message]:
        """Run a verb there with `--json`, which replies with a `message`.

        The words of the verb and its stdin go through the stdin of ssh: every user of a machine can see command lines.
        That stdin stays open; when this end is gone, the remote run ends itself.

        Args:
            new_connection: use a new connection.
            bring: install exactly this version first where it is missing; False: any version will do.

        Raises:
            Unreachable: ssh could not connect, or the connection was lost.
            NoTool: sparkinstall is not there, and `bring` is False.
            Problem: sparkinstall cannot run there, or its reply cannot be read.
        """
        whole = [*argv, "--json", *(["-v"] if self.verbose else [])]
        preface = msgspec.json.encode(protocol.Request(tuple(whole), str(stdin))) + b"\n"
        result = self._run(preface, on_line, new_connection, bring)
        if result.code == bootstrap.MISSING:
            if not bring:
                raise NoTool(f"sparkinstall is not installed on {self.host}")
            self._bring(result.out, on_line)
            result = self._run(preface, on_line, new_connection, bring)
        if result.code == bootstrap.LACKING:
            for each in self.uploads:
                self._upload(each, on_line)
            result = self._run(preface, on_line, new_connection, bring)
        return self._decoded(result, message)

    def _run(self, preface: bytes, on_line: OnLine, new_connection: bool, bring: bool) -> Result:
        wanted = bootstrap.digest() if bring else "any"
        needed = " ".join(each.digest for each in self.uploads)
        command = shlex.join(("sh", "-c", bootstrap.RUN, "sparkinstall", wanted, needed, "node", "attend"))
        return self.ssh.run(command, stdin=preface, keep_open=True, on_line=on_line, new_connection=new_connection)

    def _unpack(self, script: str, digest: str, tar: bytes, on_line: OnLine) -> Result:
        return self.ssh.run(shlex.join(("sh", "-c", script, "sparkinstall", digest)), stdin=tar, on_line=on_line)

    def _bring(self, out: str, on_line: OnLine) -> None:
        place = bootstrap.place(out)
        if place is None or place.python is None:
            raise PreflightFailed(
                f"{self.host} has no Python 3.11 or newer, which sparkinstall needs",
                hint=f"at the node: `sudo apt-get install python3` ({self.host})",
            )
        on_line("installing sparkinstall on the node")
        tar = bootstrap.archive(bootstrap.own_packages(place))
        result = self._unpack(bootstrap.INSTALL, bootstrap.digest(), tar, on_line)
        if not result.ok:
            raise _not_installed(self.host, result)
        self.brought = True

    def bring_debian_packages(self, on_line: OnLine) -> None:
        """Copy the Debian packages that a bundle has brought to this machine into the node's cache.

        Raises:
            Unreachable: as `call`.
            Problem: they cannot be unpacked there.
            Storage: they cannot be read here.
        """
        folder = user_cache() / DEBIAN_PACKAGES
        if folder.is_dir():
            on_line("copying Debian packages to the node")
            with storage_errors(f"reading {folder}"):
                files = {each.name: each.read_bytes() for each in sorted(folder.iterdir())}
            self._copy("Debian packages", bootstrap.UNPACK_DEBIAN, "", files, on_line)

    def _upload(self, upload: Upload, on_line: OnLine) -> None:
        on_line(f"copying {', '.join(upload.files)} to the node")
        self._copy("files that the settings name", bootstrap.UNPACK, upload.digest, upload.files, on_line)

    def _copy(self, what: str, script: str, digest: str, files: Mapping[str, bytes], on_line: OnLine) -> None:
        result = self._unpack(script, digest, bootstrap.packed(files), on_line)
        if not result.ok:
            output = [line for line in result.err.splitlines() if line.strip()][-6:]
            raise Problem(
                f"{what} could not be copied to {self.host}",
                cause="".join(output[-1:]),
                hint=f"fix it at the node ({self.host}), then run the same command again",
                output=output,
            )

    def _decoded(self, result: Result, message: type[_Message]) -> Reply[_Message]:
        try:
            return protocol.decode(result.out.strip().splitlines()[-1].encode(), message, self.host)
        except (msgspec.MsgspecError, IndexError, RecursionError) as error:
            raise Problem(
                f"sparkinstall gave no reply on {self.host} (exit {result.code})",
                hint=f"see why at the node: `ssh {self.host}`, then `sparkinstall status`",
                output=[redact(line) for line in result.err.splitlines()[-8:]],
            ) from error


def _not_installed(host: str, result: Result) -> Problem:
    lines = [line for line in result.err.splitlines() if line.strip()]
    reason = next((line.removeprefix("✗ ") for line in lines if line.startswith("✗")), lines[-1] if lines else "")
    hint = next((line.strip().removeprefix("do").strip() for line in lines if line.startswith("  do ")), "")
    return Problem(
        f"sparkinstall could not be installed on {host}",
        cause=reason,
        hint=hint or f"fix it at the node ({host}), then run the same command again",
        output=lines[-6:],
    )


def assignments(values: Mapping[str, Any]) -> list[str]:
    """The settings as options of a verb."""
    as_yaml = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return repeated("--set", [f"{name}={value}" for name, value in as_yaml.items()])


def repeated(option: str, names: Sequence[str]) -> list[str]:
    """`--ignore os --ignore arch`."""
    return [word for name in names for word in (option, name)]
