"""Client of the vLLM on this node: few requests, each in a process with a time limit."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import msgspec
from msgspec import Struct

from sparkinstall import payloads
from sparkinstall.facts.listening import stranger_at_the_api
from sparkinstall.node import Node
from sparkinstall.system import Reader

# Seconds for a few tokens; a working node needs less than one.
PATIENCE = 60
# Enough tokens to see an answer, and enough to see which field carries reasoning.
TOKENS, STREAMED = 4, 64
KEY = "VLLM_API_KEY"
_HEALTH_PATIENCE = 5
# Seconds for Python to start where the model has left little memory.
_START = 30


class Reply(Struct, frozen=True):
    """The reply of payloads/vllm_client.py to one request; other fields keep their defaults.

    `error`: why there is no answer, with `status` (HTTP), `late` or `refused` as the reason. `metrics`: vLLM's lines of
    /metrics, or `metrics_status`. `roots`: paths or names of the served models. `seconds` of a completion; `first`:
    seconds to a stream's first token. `said`: a stream's text by field; `prompt`: the end of the model's prompt.
    """

    error: str = ""
    status: int = 0
    late: bool = False
    refused: bool = False
    stranger: bool = False
    metrics: Sequence[str] = ()
    metrics_status: int = 0
    model: str = ""
    roots: Sequence[str] = ()
    tokens: int = 0
    seconds: float = 0.0
    first: float = 0.0
    said: Mapping[str, str] = {}
    finish: str | None = None
    done: bool = False
    prompt: str = ""


class Api(Struct, frozen=True, dict=True):
    """The API of this node's vLLM; each request is sent once for all probes."""

    node: Node
    on: Reader

    @cached_property
    def completion(self) -> Reply:
        """A completion, and the metrics before it."""
        return self.ask("complete", TOKENS)

    @cached_property
    def stream(self) -> Reply:
        """A stream, possibly incomplete."""
        return self.ask("stream", STREAMED, self.completion.model)

    @cached_property
    def key(self) -> str:
        """The key: from the variable, else from its file; "" if the API asks for none."""
        return key_of(self.node, self.on)[0]

    @property
    def made(self) -> int:
        """The number of tokens generated for us so far."""
        streamed: Reply = vars(self).get("stream", Reply())
        return self.completion.tokens + streamed.tokens

    def metrics(self) -> Reply:
        return self.ask("metrics")

    @property
    def healthy(self) -> bool:
        """Whether /health succeeds, which only proves that there is a process."""
        return self.ask("health", patience=_HEALTH_PATIENCE).status == 200

    def ask(self, verb: str, tokens: int = 0, model: str = "", patience: int = 0, **how: int) -> Reply:
        """Send one request; `how`: what only this verb of the payload takes."""
        seconds, port = patience or PATIENCE, self.node.config.serving.port
        asked = {"verb": verb, "port": port, "patience": seconds, "tokens": tokens, "model": model, **how}
        command = (self.on.real(self.node.python), "-I", "-c", payloads.source("vllm_client"), json.dumps(asked))
        if self.key and (who := stranger_at_the_api(self.node, self.on)):
            return Reply(error=strange(who, port), stranger=True)
        answer = self.on.ask(*command, timeout=seconds + _START, stdin=self.key)
        if answer.code == 124:
            return Reply(error="it did not answer", late=True)
        try:
            return msgspec.json.decode(answer.out, type=Reply)
        except msgspec.DecodeError:
            return Reply(error=answer.last_line or f"it ended with code {answer.code}")


def strange(who: str, port: int) -> str:
    """Return the sentence about a user who has the port of vLLM."""
    return f"a program of {who} listens at 127.0.0.1:{port} instead of vLLM, and gets no key"


def whose(port: int) -> str:
    """Return the hint to that sentence."""
    return f"`sudo ss -ltnp 'sport = :{port}'` shows the program; end it, or choose another `serving.port`"


def key_of(node: Node, on: Reader) -> tuple[str, str]:
    """Return the key of this node's API and where it is from: the user's variable, else its file; "" if there is none.

    Raises:
        NeedsRoot: only root may read the file, and sudo asks for a password.
    """
    if found := os.environ.get(KEY, ""):
        return found.strip(), KEY
    content = on.read(node.api_key) if node.api_key else None
    return (content or b"").decode(errors="replace").strip(), node.api_key or ""


def sample(lines: Iterable[str], *names: str) -> float | None:
    """Return the sum of a metric over its labels, in Prometheus' text format; the first existing one of `names`."""
    for name in names:
        found = [line for line in lines if line.partition("{")[0].split(" ")[0] == name]
        if found:
            return sum(float(line.rpartition(" ")[2]) for line in found)
    return None
