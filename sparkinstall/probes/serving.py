"""vLLM as a client sees it: a completion that comes, within a time limit. /health alone proves nothing."""

import json
import time
from collections.abc import Iterable

from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped, warned
from sparkinstall.system import Reader

UNIT = "vllm.service"
# Seconds for a few tokens; on a node that computes at all they take less than one.
_PATIENCE = 60
# Seconds in which a large model has been loaded, or never will be.
_LOADING = 1800
_TOKENS = 4
# In a process of its own: a socket's time limit is for each answer of the system, this one is for the whole.
_COMPLETE = """
import json, sys, urllib.error, urllib.request
base, patience, tokens = f"http://127.0.0.1:{sys.argv[1]}", float(sys.argv[2]), int(sys.argv[3])
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
def get(path, body=None, within=patience):
    headers = {"Content-Type": "application/json"}
    data = json.dumps(body).encode() if body else None
    return opener.open(urllib.request.Request(base + path, data, headers), timeout=within)
def complete():
    model = json.load(get("/v1/models", within=10))["data"][0]["id"]
    asked = {"model": model, "max_tokens": tokens, "temperature": 0}
    try:
        answer = json.load(get("/v1/completions", {**asked, "prompt": "One, two,"}))
    except urllib.error.HTTPError as error:
        if error.code not in (400, 404, 405):
            raise
        message = {"role": "user", "content": "Count to three."}
        answer = json.load(get("/v1/chat/completions", {**asked, "messages": [message]}))
    return model, answer["usage"]["completion_tokens"]
try:
    model, made = complete()
    print(json.dumps({"model": model, "tokens": made}))
except urllib.error.HTTPError as error:
    print(json.dumps({"error": f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"}))
except (OSError, ValueError, LookupError, TypeError) as error:
    why = getattr(error, "reason", error)
    late, refused = isinstance(why, TimeoutError), isinstance(why, ConnectionRefusedError)
    print(json.dumps({"error": str(why) or type(why).__name__, "late": late, "refused": refused}))
"""
_HEALTH = """
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(opener.open(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=5).status)
"""


def serves(node: Node) -> bool:
    """Whether the API is on this node: workers only compute."""
    return node.role != "worker"


def probes(node: Node) -> Iterable[Probe]:
    """What shows that vLLM serves."""
    yield Probe("serving", "a completion, within a time limit", lambda on: _serving(node, on), "serving")


def _serving(node: Node, on: Reader) -> Finding:
    if on.rehearsal:
        return skipped("a rehearsal starts no services")
    if not serves(node):
        return skipped(f"the API is on the head, {node.config.cluster.head}")
    began = time.monotonic()
    answer = _asked(node, on)
    if "tokens" in answer:
        took = f"{time.monotonic() - began:.1f} s"
        return passed(f"{answer['tokens']} tokens of {answer['model']} in {took}", f"within {_PATIENCE} s")
    if answer.get("late"):
        return _late(node, on)
    if answer.get("refused"):
        return _not_up(node, on)
    return failed(str(answer["error"]), f"read `journalctl -u {UNIT}`", f"a completion within {_PATIENCE} s")


def _asked(node: Node, on: Reader) -> dict[str, object]:
    words = (_COMPLETE, str(node.config.serving.port), str(_PATIENCE), str(_TOKENS))
    answer = on.query(_python(node, on), "-I", "-c", *words, timeout=_PATIENCE + 5)
    if answer.code == 124:
        return {"late": True}
    try:
        return dict(json.loads(answer.out))
    except (ValueError, TypeError):
        return {"error": next(iter(answer.err.splitlines()[-1:]), f"it ended with code {answer.code}")}


def _python(node: Node, on: Reader) -> str:
    return on.real(f"{node.venv}/bin/python")


def _late(node: Node, on: Reader) -> Finding:
    health = on.query(_python(node, on), "-I", "-c", _HEALTH, str(node.config.serving.port), timeout=10)
    besides = ", though /health says 200" if health.out.strip() == "200" else ""
    mend = f"restart it: `sudo systemctl restart {UNIT}`"
    if node.several:
        nodes = "--only peers --only ray-nodes" if node.config.cluster.executor == "ray" else "--only peers"
        mend = f"see that every node is there (`sparkinstall verify {nodes}`), then {mend}"
    return failed(f"no completion within {_PATIENCE} s{besides}", mend, f"{_TOKENS} tokens within {_PATIENCE} s")


def _not_up(node: Node, on: Reader) -> Finding:
    """Nothing listens: it is still loading, or it has ended."""
    asked = on.query("systemctl", "show", UNIT, "--property=ActiveState,ExecMainStartTimestampMonotonic").out
    state = dict(line.split("=", 1) for line in asked.splitlines() if "=" in line)
    since = time.clock_gettime(time.CLOCK_MONOTONIC) - int(state.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
    where = f"nothing answers at 127.0.0.1:{node.config.serving.port}"
    if state.get("ActiveState") == "active" and since < _LOADING:
        return warned(
            f"{where}: it was started {since:.0f} s ago and still loads",
            f"follow it with `journalctl -fu {UNIT}`, then run `sparkinstall verify --only serving`",
        )
    return failed(
        f"{where}; {UNIT} is {state.get('ActiveState') or 'unknown'}",
        f"read `journalctl -u {UNIT}`, mend the cause, then `sparkinstall run serving`",
    )
