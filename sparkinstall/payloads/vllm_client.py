"""Send one request to the vLLM on this node and print the result as JSON: `Reply` in probes/vllm_client.py.

The API's key, if any, is on stdin.
argv[1] is JSON: `verb` (complete, stream, first, warm, metrics, health), `port`, `patience` in seconds, `tokens`,
`model`. `warm` takes `words` of the prompt, and whether it is a `chat` with `tools`, too.
"""

import http.client
import json
import signal
import sys
import time
import urllib.error
import urllib.request
from typing import Any

Answer = dict[str, Any]
QUESTION = [{"role": "user", "content": "Count to three."}]
TOOLS = [{"type": "function", "function": {"name": "now", "description": "Tell the time.", "parameters": {}}}]
# Bytes of an answer, or of a line of a stream.
MOST = 8 << 20
# Characters of the prompt that show whether the chat template opens the reasoning.
PROMPT_END = 16


class Client:
    """Collects results in `answer`, so that what arrived before an error is kept."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.port, self.model, self.asked = asked["port"], asked["model"], asked
        self.few = {"max_tokens": asked["tokens"], "temperature": 0}
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.key = sys.stdin.read().strip()
        self.answer: Answer = {}

    def ask(self, path: str, **body: Any) -> Any:
        own = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers = {"Content-Type": "application/json", **own}
        data = json.dumps(body).encode() if body else None
        return self.opener.open(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers))

    def read(self, path: str, **body: Any) -> bytes:
        """Return a whole answer; other programs than vLLM may have the port, and send without end."""
        content: bytes = self.ask(path, **body).read(MOST + 1)
        if len(content) > MOST:
            raise ValueError(f"it sends more than {MOST >> 20} MiB")
        return content

    def health(self) -> None:
        self.answer["status"] = self.ask("/health").status

    def metrics(self) -> None:
        try:
            lines = self.read("/metrics").decode().splitlines()
            self.answer["metrics"] = [each for each in lines if each.startswith("vllm:") and "_bucket" not in each]
        except urllib.error.HTTPError as error:
            self.answer["metrics_status"] = error.code

    def complete(self) -> None:
        self.metrics()
        served = json.loads(self.read("/v1/models"))["data"]
        self.answer["model"] = model = served[0]["id"]
        self.answer["roots"] = [each["root"] for each in served if each.get("root")]
        began = time.monotonic()
        try:
            said = json.loads(self.read("/v1/completions", model=model, prompt="One, two,", **self.few))
        except urllib.error.HTTPError as error:
            if error.code not in (400, 404, 405):
                raise
            said = json.loads(self.read("/v1/chat/completions", model=model, messages=QUESTION, **self.few))
        self.answer["tokens"] = said["usage"]["completion_tokens"]
        self.answer["seconds"] = time.monotonic() - began

    def first(self) -> None:
        self.answer["model"] = self.model = json.loads(self.read("/v1/models"))["data"][0]["id"]
        try:
            self.stream()
        except urllib.error.HTTPError as error:
            if error.code not in (400, 404, 405):
                raise
            # Without a chat template nobody can chat with it.
            self.streamed("/v1/completions", prompt=QUESTION[0]["content"])

    def warm(self) -> None:
        words = self.asked["words"]
        while True:
            try:
                json.loads(self.read(**self.long(words), model=self.model, **self.few))
                return
            except urllib.error.HTTPError as error:
                # A word may be several tokens, so that it does not fit.
                if error.code != 400 or words < 2:
                    raise
                words //= 2

    def long(self, words: int) -> dict[str, Any]:
        text = "word " * words
        if not self.asked["chat"]:
            return {"path": "/v1/completions", "prompt": text}
        tools = {"tools": TOOLS} if self.asked["tools"] else {}
        return {"path": "/v1/chat/completions", "messages": [{**QUESTION[0], "content": text}], **tools}

    def stream(self) -> None:
        self.streamed("/v1/chat/completions", messages=QUESTION)

    def streamed(self, path: str, **question: Any) -> None:
        began, prompt = time.monotonic(), list[int]()
        how = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        answer = self.ask(path, model=self.model, **question, **self.few, **how)
        while line := answer.readline(MOST):
            data = line.partition(b"data:")[2].strip()
            if data == b"[DONE]":
                self.answer["done"] = True
                break
            event = json.loads(data or b"{}")
            if event.get("error"):
                raise ValueError(event["error"]["message"])
            prompt = event.get("prompt_token_ids") or prompt
            self.take(event, began)
        self.answer["prompt"] = self.text_of(prompt[-PROMPT_END:])

    def take(self, event: dict[str, Any], began: float) -> None:
        said, answer = self.answer.setdefault("said", {}), self.answer
        for choice in event.get("choices", []):
            answer["finish"] = choice.get("finish_reason")
            for field, text in choice.get("delta", {"text": choice.get("text")}).items():
                if field != "role" and text and isinstance(text, str):
                    answer.setdefault("first", time.monotonic() - began)
                    said[field] = said.get(field, "") + text
                    answer["tokens"] = answer.get("tokens", 0) + 1
        if event.get("usage"):
            answer["tokens"] = event["usage"]["completion_tokens"]

    def text_of(self, tokens: list[int]) -> str:
        try:
            return (
                str(json.loads(self.read("/detokenize", model=self.model, tokens=tokens))["prompt"]) if tokens else ""
            )
        except (OSError, ValueError, LookupError):
            return ""


def main() -> None:
    asked = json.loads(sys.argv[1])
    client, patience = Client(asked), asked["patience"]

    def too_late(*_: object) -> None:
        raise TimeoutError(f"no answer within {patience} s")

    # The socket's timeout limits a single read, the alarm the whole request.
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(patience)
    try:
        getattr(client, asked["verb"])()
    except urllib.error.HTTPError as error:
        said = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
        client.answer.update(status=error.code, error=said)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        late, refused = isinstance(why, TimeoutError), isinstance(why, ConnectionRefusedError)
        client.answer.update(error=str(why) or type(why).__name__, late=late, refused=refused)
    print(json.dumps(client.answer))


if __name__ == "__main__":
    main()
