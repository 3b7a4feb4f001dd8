"""Records each node's replies once, and replays them as if the node had its own cores.

`sparkinstall cluster` starts sparkinstall on a node once for `look` and once for `verify`. The recorder runs the real
one and stores its reply and its time; the replacement waits for a given time and prints the same reply.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.lab.fleet import FleetNode

VERBS = ("node", "verify")
_TOOL = "/home/spark/.local/share/sparkinstall/tool/bin/sparkinstall"
_REAL = f"{_TOOL}.real"
_KEPT = "/home/spark/recorded"
# sparkinstall ends with its stdin, so the recorder keeps the other end open.
_RECORDER = f"""\
#!/usr/bin/python3
import json, os, subprocess, sys, time
asked = b""
while not asked.endswith(b"\\n"):
    asked += os.read(0, 65536)
verb = json.loads(asked)["argv"][0]
reading, writing = os.pipe()
os.write(writing, asked)
began = time.monotonic()
done = subprocess.run(["{_REAL}", *sys.argv[1:]], stdin=reading, stdout=subprocess.PIPE)
with open(f"{_KEPT}/{{verb}}.seconds", "w") as kept:
    kept.write(str(time.monotonic() - began))
with open(f"{_KEPT}/{{verb}}", "wb") as kept:
    kept.write(done.stdout)
os.write(1, done.stdout)
sys.exit(done.returncode)
"""
_REPLACEMENT = f"""\
#!/bin/sh
IFS= read -r asked
case $asked in '{{"argv": ["verify"'*) verb=verify ;; *) verb=node ;; esac
sleep "$(cat {_KEPT}/$verb.pause)"
exec cat {_KEPT}/$verb
"""


@contextmanager
def recording(nodes: Sequence[FleetNode]) -> Iterator[None]:
    """Record the replies during the context."""
    for node in nodes:
        node.run("mkdir", "-p", _KEPT, user="spark")
    with _replaced(nodes, _RECORDER):
        yield


def seconds(node: FleetNode) -> dict[str, float]:
    """The time of each recorded verb."""
    return {verb: float(node.read(f"{_KEPT}/{verb}.seconds")) for verb in VERBS}


@contextmanager
def replaying(nodes: Sequence[FleetNode], pauses: Mapping[str, float]) -> Iterator[None]:
    """Replay each node's replies, with these seconds between request and reply."""
    for node in nodes:
        for verb, pause in pauses.items():
            node.write(f"{_KEPT}/{verb}.pause", f"{pause:.3f}", user="spark")
    with _replaced(nodes, _REPLACEMENT):
        yield


@contextmanager
def _replaced(nodes: Sequence[FleetNode], script: str) -> Iterator[None]:
    for node in nodes:
        node.run("mv", _TOOL, _REAL)
        node.write(_TOOL, script, mode="0755", user="spark")
    try:
        yield
    finally:
        for node in nodes:
            node.run("mv", _REAL, _TOOL)
