"""A running vLLM as a client on the node sees it: few requests, each in a process with a time limit."""

import json
import os
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from msgspec import Struct

from sparkinstall.node import Node
from sparkinstall.system import Reader

# Seconds for a few tokens; on a node that computes at all they take less than one.
PATIENCE = 60
# Enough to see that tokens come, and enough to see where the first thoughts go.
TOKENS, STREAMED = 4, 64
KEY = "VLLM_API_KEY"
# A socket's time limit is for each answer of the system; the alarm is for the whole.
_CLIENT = """
import http.client, json, os, signal, sys, time, urllib.error, urllib.request
verb, port, patience, tokens, model = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
key, answer = os.environ.get("VLLM_API_KEY"), {}
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
few = {"max_tokens": tokens, "temperature": 0}
question = [{"role": "user", "content": "Count to three."}]
def too_late(*_):
    raise TimeoutError(f"no answer within {patience} s")
def ask(path, **body):
    headers = {"Content-Type": "application/json", **({"Authorization": "Bearer " + key} if key else {})}
    data = json.dumps(body).encode() if body else None
    return opener.open(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers))
def metrics():
    try:
        lines = ask("/metrics").read().decode().splitlines()
        answer["metrics"] = [line for line in lines if line.startswith("vllm:") and "_bucket" not in line]
    except urllib.error.HTTPError as error:
        answer["metrics_status"] = error.code
def complete():
    metrics()
    served = json.load(ask("/v1/models"))["data"]
    answer["model"] = asked = served[0]["id"]
    answer["roots"] = [each["root"] for each in served if each.get("root")]
    began = time.monotonic()
    try:
        said = json.load(ask("/v1/completions", model=asked, prompt="One, two,", **few))
    except urllib.error.HTTPError as error:
        if error.code not in (400, 404, 405):
            raise
        said = json.load(ask("/v1/chat/completions", model=asked, messages=question, **few))
    answer["tokens"] = said["usage"]["completion_tokens"]
    answer["seconds"] = time.monotonic() - began
def stream():
    began, prompt, said = time.monotonic(), [], answer.setdefault("said", {})
    how = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    for line in ask("/v1/chat/completions", model=model, messages=question, **few, **how):
        data = line.partition(b"data:")[2].strip()
        if data == b"[DONE]":
            answer["done"] = True
            break
        event = json.loads(data or b"{}")
        if event.get("error"):
            raise ValueError(event["error"]["message"])
        prompt = event.get("prompt_token_ids") or prompt
        for choice in event.get("choices", []):
            answer["finish"] = choice.get("finish_reason")
            for field, text in choice["delta"].items():
                if field != "role" and text and isinstance(text, str):
                    answer.setdefault("first", time.monotonic() - began)
                    said[field] = said.get(field, "") + text
                    answer["tokens"] = answer.get("tokens", 0) + 1
        if event.get("usage"):
            answer["tokens"] = event["usage"]["completion_tokens"]
    try:
        answer["prompt"] = json.load(ask("/detokenize", model=model, tokens=prompt[-16:]))["prompt"] if prompt else ""
    except (OSError, ValueError, LookupError):
        answer["prompt"] = ""
signal.signal(signal.SIGALRM, too_late)
signal.alarm(patience)
try:
    {"complete": complete, "stream": stream, "metrics": metrics}[verb]()
except urllib.error.HTTPError as error:
    answer.update(status=error.code, error=f"HTTP {error.code}: {error.read(300).decode(errors='replace')}")
except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
    why = getattr(error, "reason", error)
    late, refused = isinstance(why, TimeoutError), isinstance(why, ConnectionRefusedError)
    answer.update(error=str(why) or type(why).__name__, late=late, refused=refused)
print(json.dumps(answer))
"""
_HEALTH = """
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(opener.open(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=5).status)
"""


class Api(Struct, frozen=True, dict=True):
    """The API of this node's vLLM; asked once for all probes."""

    node: Node
    on: Reader

    @cached_property
    def completion(self) -> dict[str, Any]:
        """`tokens`, `seconds`, `model`, `roots`, `metrics` from before; or `error` and `status`, `late`, `refused`."""
        return self._asked("complete", TOKENS)

    @cached_property
    def stream(self) -> dict[str, Any]:
        """`said` by field, `first` in seconds, `tokens`, `finish`, `done`, the `prompt`'s end; or `error` besides."""
        return self._asked("stream", STREAMED, self.completion["model"])

    @property
    def made(self) -> int:
        """The tokens that were made for us so far."""
        streamed: dict[str, Any] = vars(self).get("stream", {})
        return int(self.completion["tokens"]) + int(streamed.get("tokens", 0))

    def metrics(self) -> dict[str, Any]:
        """The lines of /metrics that are vLLM's own, as they are now; or `error`, or `metrics_status`."""
        return self._asked("metrics")

    @property
    def healthy(self) -> bool:
        """What /health says, which is no more than that there is a process."""
        said = self.on.ask(self._python, "-I", "-c", _HEALTH, str(self.node.config.serving.port), timeout=10)
        return said.out.strip() == "200"

    @property
    def knows_key(self) -> bool:
        return bool(os.environ.get(KEY))

    def _asked(self, verb: str, tokens: int = 0, model: str = "") -> dict[str, Any]:
        words = (verb, str(self.node.config.serving.port), str(PATIENCE), str(tokens), model)
        answer = self.on.ask(self._python, "-I", "-c", _CLIENT, *words, timeout=PATIENCE + 5)
        if answer.code == 124:
            return {"error": "it did not answer", "late": True}
        try:
            return dict(json.loads(answer.out))
        except (ValueError, TypeError):
            return {"error": next(iter(answer.err.splitlines()[-1:]), f"it ended with code {answer.code}")}

    @property
    def _python(self) -> str:
        return self.on.real(self.node.python)


def sample(lines: Iterable[str], *names: str) -> float | None:
    """The sum of a metric over its labels, in Prometheus' text format; the first of `names` that is there."""
    for name in names:
        found = [line for line in lines if line.partition("{")[0].split(" ")[0] == name]
        if found:
            return sum(float(line.rpartition(" ")[2]) for line in found)
    return None
