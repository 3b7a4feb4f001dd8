"""Whose program takes the connections to a port of this machine, by the kernel's tables of sockets."""

import os
import pwd

from sparkinstall.node import Node
from sparkinstall.system import Reader

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_LISTENS = "0A"
# Which of several sockets of a port takes a connection to 127.0.0.1: in the kernel's own notation of a machine with the
# low byte first, that address, then any; then both as addresses of IPv6.
_TAKES = ("0100007F", "00000000", "0000000000000000FFFF00000100007F", "0" * 32)
_ROOT = 0


def owner_of_port(on: Reader, port: int) -> int | None:
    """Return the number of the user at a port of 127.0.0.1; None: nothing listens there, or that is unknown."""
    found: dict[str, int] = {}
    for table in _TABLES:
        for line in (on.read(table) or b"").decode(errors="replace").splitlines()[1:]:
            words = line.split()
            if len(words) > 7 and words[3] == _LISTENS and words[1].endswith(f":{port:04X}"):
                found[words[1].partition(":")[0]] = int(words[7])
    return next((found[each] for each in _TAKES if each in found), None)


def stranger_at_the_api(node: Node, on: Reader) -> str:
    """Return who has the port of vLLM if that is neither root, nor this user, nor who has set up the node; else "".

    While vLLM does not run, its port is free for anybody on this machine.
    """
    uid, environment = owner_of_port(on, node.config.serving.port), on.entry(node.venv)
    known = {_ROOT, os.geteuid(), *([environment.uid] if environment else ())}
    if uid is None or uid in known:
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
