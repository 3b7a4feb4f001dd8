"""What each node answers, recorded once, and given again by a stand-in for the tool as if the node had its own cores.

`sparkinstall cluster` starts its tool on a node once to look and once to verify. The recorder lets the real one work
and keeps what it said and how long it took; the stand-in waits as long as it is told, and says the same again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.lab.fleet import FleetNode

VERBS = ("node", "verify")
_TOOL = "/home/spark/.local/share/sparkinstall/tool/bin/sparkinstall"
_REAL = f"{_TOOL}.real"
_KEPT = "/home/spark/recorded"
# The tool ends itself when its stdin ends, so the recorder holds its other end open.
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
_STAND_IN = f"""\
#!/bin/sh
IFS= read -r asked
case $asked in '{{"argv": ["verify"'*) verb=verify ;; *) verb=node ;; esac
sleep "$(cat {_KEPT}/$verb.pause)"
exec cat {_KEPT}/$verb
"""


@contextmanager
def recording(nodes: Sequence[FleetNode]) -> Iterator[None]:
    """Keep what the tool says while this lasts."""
    for node in nodes:
        node.run("mkdir", "-p", _KEPT, user="spark")
    with _in_its_place(nodes, _RECORDER):
        yield


def seconds(node: FleetNode) -> dict[str, float]:
    """How long each verb took when it was recorded."""
    return {verb: float(node.read(f"{_KEPT}/{verb}.seconds")) for verb in VERBS}


@contextmanager
def replaying(nodes: Sequence[FleetNode], pauses: Mapping[str, float]) -> Iterator[None]:
    """Give again what was recorded at each node, so many seconds after it was asked."""
    for node in nodes:
        for verb, pause in pauses.items():
            node.write(f"{_KEPT}/{verb}.pause", f"{pause:.3f}", user="spark")
    with _in_its_place(nodes, _STAND_IN):
        yield


@contextmanager
def _in_its_place(nodes: Sequence[FleetNode], script: str) -> Iterator[None]:
    for node in nodes:
        node.run("mv", _TOOL, _REAL)
        node.write(_TOOL, script, mode="0755", user="spark")
    try:
        yield
    finally:
        for node in nodes:
            node.run("mv", _REAL, _TOOL)
