"""A node over ssh, as the terminal sees it: the tool is installed there, runs a verb, and replies in JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct, field

from sparkinstall.cluster import bootstrap, protocol
from sparkinstall.cluster.ssh import Ssh, quoted
from sparkinstall.cluster.uploads import Carried
from sparkinstall.errors import PreflightFailed, Problem
from sparkinstall.redaction import redact
from sparkinstall.system import Result

OnLine = Callable[[str], None]


class Member(Struct, frozen=True):
    """A node of the cluster: how ssh finds it, and what it is there. `address` is the one on the QSFP link."""

    host: str
    role: str
    rank: int
    address: str


class Reply(Struct, frozen=True):
    """What a verb replied on the remote node: its JSON object."""

    code: int
    data: Mapping[str, Any]
    problems: tuple[Problem, ...]


class NoTool(Problem):
    """Nothing of sparkinstall is on the node."""


class RemoteNode(Struct):
    """A node and what is known of it.

    `carried`: what settings name and has to be there. `changed`: a phase of this run has changed something there.
    """

    member: Member
    ssh: Ssh
    verbose: bool = False
    carried: tuple[Carried, ...] = ()
    brought: bool = False
    changed: bool = False
    look: protocol.Look = field(default_factory=protocol.Look)

    @property
    def host(self) -> str:
        return self.member.host

    def call(
        self,
        *argv: str,
        on_line: OnLine,
        given: str = "",
        new_connection: bool = False,
        bring: bool = True,
    ) -> Reply:
        """Run a verb of the tool there, with `--json`.

        The words go through stdin, as does what is `given` to the verb's own stdin: command lines can be seen
        by every user of a machine. That stdin stays open; when this end is gone, the remote run ends itself.

        Args:
            new_connection: use a connection of its own.
            bring: install this very version first where it is missing; False: whichever is there will do.

        Raises:
            Unreachable: ssh could not connect, or the connection was lost.
            NoTool: there is none, and none is to be brought.
            Problem: the tool cannot run there.
        """
        whole = [*argv, "--json", *(["-v"] if self.verbose else [])]
        preface = msgspec.json.encode(protocol.Request(tuple(whole), str(given))) + b"\n"
        result = self._run(preface, on_line, new_connection, bring)
        if result.code == bootstrap.MISSING:
            if not bring:
                raise NoTool(f"nothing of sparkinstall is on {self.host}")
            self._bring(result.out, on_line)
            result = self._run(preface, on_line, new_connection, bring)
        if result.code == bootstrap.LACKING:
            for each in self.carried:
                self._carry(each, on_line)
            result = self._run(preface, on_line, new_connection, bring)
        return self._understood(result)

    def _run(self, preface: bytes, on_line: OnLine, new_connection: bool, bring: bool) -> Result:
        wanted = bootstrap.digest() if bring else "any"
        needed = " ".join(each.digest for each in self.carried)
        command = quoted("sh", "-c", bootstrap.run_line(), "sparkinstall", wanted, needed, "node", "attend")
        return self.ssh.run(command, stdin=preface, keep_open=True, on_line=on_line, new_connection=new_connection)

    def _bring(self, said: str, on_line: OnLine) -> None:
        place = bootstrap.place(said)
        if place is None or place.python is None:
            raise PreflightFailed(
                f"{self.host} has no Python 3.11 or newer, which sparkinstall needs",
                hint=f"at the node: `sudo apt-get install python3` ({self.host})",
            )
        on_line("bringing sparkinstall to the node")
        tar = bootstrap.archive(bootstrap.wheelhouse(place))
        command = quoted("sh", "-c", bootstrap.unpack_line(), "sparkinstall", bootstrap.digest())
        result = self.ssh.run(command, stdin=tar, on_line=on_line)
        if not result.ok:
            raise _not_installed(self.host, result)
        self.brought = True

    def _carry(self, what: Carried, on_line: OnLine) -> None:
        on_line(f"bringing {', '.join(what.files)} to the node")
        command = quoted("sh", "-c", bootstrap.unpack_carried_line(), "sparkinstall", what.digest)
        result = self.ssh.run(command, stdin=bootstrap.packed(what.files), on_line=on_line)
        if not result.ok:
            said = [line for line in result.err.splitlines() if line.strip()][-6:]
            raise Problem(
                f"files that the settings name could not be brought to {self.host}",
                cause="".join(said[-1:]),
                hint=f"fix it at the node ({self.host}), then run the same command again",
                output=said,
            )

    def _understood(self, result: Result) -> Reply:
        try:
            envelope = protocol.decode(result.out.strip().splitlines()[-1].encode())
        except (msgspec.MsgspecError, IndexError) as error:
            raise Problem(
                f"sparkinstall gave no answer on {self.host} (exit {result.code})",
                hint=f"look there: `ssh {self.host}`, then `sparkinstall status`",
                output=[redact(line) for line in result.err.splitlines()[-8:]],
            ) from error
        problems = tuple(each.problem(self.host) for each in envelope.errors)
        return Reply(envelope.exit_code, envelope.data, problems)


def _not_installed(host: str, result: Result) -> Problem:
    said = [line for line in result.err.splitlines() if line.strip()]
    reason = next((line.removeprefix("✗ ") for line in said if line.startswith("✗")), said[-1] if said else "")
    hint = next((line.strip().removeprefix("do").strip() for line in said if line.startswith("  do ")), "")
    return Problem(
        f"sparkinstall could not be installed on {host}",
        cause=reason,
        hint=hint or f"fix it at the node ({host}), then run the same command again",
        output=said[-6:],
    )


def assignments(values: Mapping[str, Any]) -> list[str]:
    """The settings as options of a verb."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={_as_yaml(value)}")]


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(list(value) if isinstance(value, tuple) else value)


def repeated(option: str, names: Sequence[str]) -> list[str]:
    """`--ignore os --ignore arch`."""
    return [word for name in names for word in (option, name)]
