"""The secret shared by all nodes of a cluster. It never appears in an argument, log, plan or error."""

import os
import re
import secrets
from functools import lru_cache

from msgspec import Struct

from sparkinstall import given as files
from sparkinstall.errors import BadUsage, Problem
from sparkinstall.node import Node
from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok, State
from sparkinstall.system import Reader, System

MODE = 0o600
_TOKEN = re.compile(rb"[!-~]{16,1024}")
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_PATIENCE = 40.0
_LARGEST = 4096
# What writes to our stdin may ask for a password first.
_STDIN_PATIENCE = 300.0


@lru_cache(maxsize=4)
def given(file: str) -> bytes:
    """Return the token in the file of `--token-file`; `-` is standard input, read once.

    Raises:
        BadUsage: the file cannot be read or contains no token.
    """
    try:
        content = files.read_stdin(_LARGEST, _STDIN_PATIENCE) if file == "-" else files.read(file, _LARGEST)
        token = content.strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", "") or "it cannot be"
        raise BadUsage(
            # It may be the token itself.
            f"the file of --token-file cannot be read: {why}",
            hint="name a file that contains the token, or - and pipe it in",
        ) from error
    if not _TOKEN.fullmatch(token):
        raise BadUsage(
            f"--token-file {file} contains no token: one line of 16 to 1024 printable characters without spaces",
            hint="the head's token is in its file `ray-token` below the prefix; a head without Ray has and needs none",
        )
    return token


class RayToken(Struct, frozen=True):
    """The token is on this node and only its owner can read it. The head creates it; workers receive it."""

    node: Node

    @property
    def key(self) -> str:
        return f"token:{self.node.ray_token}"

    def check(self, on: Reader) -> State:
        path, entry = self.node.ray_token, on.entry(self.node.ray_token)
        if entry and entry.kind != "file":
            return Conflict(f"{on.real(path)} is {entry.words}, where the token belongs", hint="move it away")
        now = self._now(on)
        if now is None or (self.node.token_file and now != given(self.node.token_file)):
            return self._missing(on)
        assert entry is not None, "what was read is there"
        if entry.mode != MODE or entry.uid != os.geteuid():
            return Drift(f"let nobody but {self.node.user} read {path} (its mode is {entry.mode:o})")
        return Ok("0600")

    def _now(self, on: Reader) -> bytes | None:
        """Return the current token, if it is valid."""
        found = (on.read(self.node.ray_token) or b"").strip()
        return found if _TOKEN.fullmatch(found) else None

    def _missing(self, on: Reader) -> State:
        if self.node.token_file:
            return Drift(f"install the token of --token-file as {self.node.ray_token}")
        if self.node.role == "head":
            damaged = " (the file contains no token)" if on.entry(self.node.ray_token) else ""
            return Drift(f"create the token that all nodes share, {self.node.ray_token}{damaged}")
        if on.rehearsal:
            return NodeOnly(f"fetching the token of the head {self.node.config.cluster.head}")
        return Drift(f"fetch the token of the head {self.node.config.cluster.head} over ssh")

    def apply(self, on: System) -> None:
        # A valid token is never replaced: the other nodes have it too.
        on.write(self.node.ray_token, self._wanted(on), MODE)

    def _wanted(self, on: Reader) -> bytes:
        if self.node.token_file:
            return given(self.node.token_file)
        return self._now(on) or self._new(on)

    def _new(self, on: Reader) -> bytes:
        if self.node.role == "head":
            return secrets.token_hex(32).encode()
        head = self.node.config.cluster.head
        answer = on.ask(*_SSH, head, f"cat {self.node.ray_token}", timeout=_PATIENCE)
        token = answer.out.strip().encode()
        if answer.ok and _TOKEN.fullmatch(token):
            return token
        late = "ssh ran past its time limit" if answer.code == 124 else ""
        why = late or answer.last_line or "the head's file contains no token"
        raise Problem(f"the token of the head {head} could not be fetched", cause=why, hint=by_hand(self.node))


def by_hand(node: Node) -> str:
    """Return the command that installs the head's token on a worker."""
    head = node.config.cluster.head
    join = f"sparkinstall multi-node --role worker --head {head} --token-file - --yes"
    return (
        f"set up the head first, then run on this node: `ssh {head} cat {node.ray_token} | {join}`; "
        "a head that `--serve` has set up without Ray has no token: then add `--serve` here too, as on the head, or "
        "`--set cluster.executor=mp`"
    )
