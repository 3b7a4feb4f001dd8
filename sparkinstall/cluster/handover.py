"""The copy of wheels and NCCL from the head to the workers, as the terminal leads it.

The terminal only introduces them: both are told one token through ssh, and the workers the digest of what the head
has listed. What does not arrive is a warning and never a failure: the worker downloads and builds it then.
"""

import json
import secrets
import threading
from collections.abc import Callable, Sequence

from msgspec import Struct, field, to_builtins

from sparkinstall.cluster.artifacts import Offered
from sparkinstall.cluster.remote import OnLine, RemoteNode, Reply, repeated
from sparkinstall.errors import Interrupted, Problem
from sparkinstall.system import processes

_OFFER = "offer"


def announcement(offered: Offered) -> str:
    """The line of stderr in which the head says where its list is."""
    return json.dumps({_OFFER: to_builtins(offered)})


def _announced(line: str) -> Offered | None:
    try:
        said = json.loads(line)[_OFFER]
        return Offered(int(said["port"]), str(said["digest"]))
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def introduction(offered: Offered, token: str) -> str:
    """What a worker is told on its stdin."""
    return json.dumps({"token": token, **to_builtins(offered)})


def introduced(said: str) -> tuple[Offered, str]:
    """The other end of `introduction`: the offer and the token."""
    known = json.loads(said)
    return Offered(int(known["port"]), str(known["digest"])), str(known["token"])


class Secret(str):
    """32 random bytes in hex, which no `repr` shows."""

    def __new__(cls) -> "Secret":
        return super().__new__(cls, secrets.token_hex(32))

    def __repr__(self) -> str:
        return "Secret()"


class Handover(Struct):
    """`steps` of the head's work for `workers`; `words` are the settings of a node as options of a verb."""

    head: RemoteNode
    workers: Sequence[RemoteNode]
    steps: Sequence[str]
    words: Callable[[RemoteNode], list[str]]
    _token: Secret = field(default_factory=Secret)
    _offered: Offered | None = None
    _settled: threading.Event = field(default_factory=threading.Event)

    def work(self, far: RemoteNode, on_line: OnLine) -> Reply:
        """This node's part."""
        try:
            return self._offer(on_line) if far is self.head else self._fetch(far, on_line)
        except Interrupted:
            raise
        except Problem as problem:
            return _warned(f"{problem.message}{f' ({problem.cause})' if problem.cause else ''}")
        finally:
            if far is self.head:
                self._settled.set()

    def _offer(self, on_line: OnLine) -> Reply:
        def listen(line: str) -> None:
            if found := _announced(line):
                self._offered = found
                self._settled.set()
            else:
                on_line(line)

        peers = [each.member.address for each in self.workers]
        argv = ("node", "offer", *peers, *self.words(self.head), *repeated("--only", self.steps))
        return _forgiven(self.head.call(*argv, on_line=listen, given=self._token))

    def _fetch(self, far: RemoteNode, on_line: OnLine) -> Reply:
        while not self._settled.wait(1):
            processes.refuse_if_stopped()
        if self._offered is None:
            return _warned(f"{self.head.host} offers nothing: what is missing is downloaded and built here")
        argv = ("node", "fetch", *self.words(far), *repeated("--only", self.steps))
        given = introduction(self._offered, self._token)
        return _forgiven(far.call(*argv, on_line=on_line, given=given))


def _forgiven(said: Reply) -> Reply:
    return _warned(said.problems[0].message) if said.problems else Reply(0, said.data, ())


def _warned(why: str) -> Reply:
    return Reply(0, {"changed": False, "warning": why}, ())
