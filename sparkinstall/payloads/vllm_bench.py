"""Run `vllm bench serve` of this environment several times in one process, with prompts of an exact length.

argv[1] is JSON: `Job` in measure/rounds.py. The API's key, if any, is in OPENAI_API_KEY. Prints `MARK` and one JSON
object, on several lines if it is long: a round has begun, ended (with what vLLM would have saved) or failed. No request
is repeated: after the first round in which none was answered it ends.

tests/fast/test_vllm_internals.py compares every name used here with the wheels of the shipped stacks.
"""

# These imports exist in the node's environment only.
# mypy: disable-error-code="import-not-found, misc"

import http.client
import io
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from contextlib import redirect_stdout
from typing import Any

from vllm.benchmarks import serve
from vllm.benchmarks.datasets import SampleRequest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from sparkinstall.payloads.bench_marks import MARK, MORE
from sparkinstall.payloads.bench_prompts import name_of, text

PIECE = 3000
# What vLLM saves of each request, but for the texts.
BY_REQUEST = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "latencies")
WHOLE = ("duration", "completed", "failed", "request_goodput", "output_throughput", "total_token_throughput")
# Tokens are rarely longer; where they are, the text is made longer.
CHARACTERS = 8
LONGEST_ERROR = 300
MOST_BYTES = 64 << 20
# More characters for each token than any text has.
MOST_CHARACTERS = 64 * CHARACTERS
# Seconds until the server's counters include what it has sent.
COUNTED = 2.0


def tell(event: str, **what: Any) -> None:
    """Print an object in pieces that no other output can cut; each but the last begins with MORE."""
    text = json.dumps({"event": event, "at": time.perf_counter(), **what})
    while text:
        piece, text = text[:PIECE], text[PIECE:]
        # What vLLM prints is caught, also when the alarm comes in the middle.
        print((MORE if text else MARK) + piece, file=sys.__stdout__, flush=True)


class SameServer(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would be sent along."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """The server's other interfaces."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.tokens = job, dict[str, list[int]]()
        key = os.environ.get("OPENAI_API_KEY")
        self.headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self.opener = urllib.request.build_opener(
            SameServer, *([urllib.request.ProxyHandler({})] if job["direct"] else [])
        )

    def read(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.job["url"] + path, data, self.headers)
        answer: bytes = self.opener.open(request, timeout=60).read(MOST_BYTES)
        return answer

    def prompt(self, kind: str, number: int, length: int) -> list[int]:
        """Return a prompt of exactly so many tokens."""
        name, characters = name_of(self.job["seed"], number), length * CHARACTERS
        while characters <= length * MOST_CHARACTERS:
            body = {"model": self.job["model"], "prompt": text(kind, name, characters)}
            found: list[int] = json.loads(self.read("/tokenize", body))["tokens"]
            if len(found) >= length:
                return found[:length]
            characters *= 2
        raise ValueError(f"/tokenize makes {len(found)} tokens of {characters // 2} characters")

    def counters(self) -> dict[str, float]:
        """Return the wanted metrics, each summed over its labels; {} if the server does not tell."""
        found: dict[str, float] = {}
        try:
            for line in self.read("/metrics").decode().splitlines():
                name = line.partition("{")[0].partition(" ")[0]
                if name in self.job["metrics"]:
                    found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
        except (OSError, ValueError, http.client.HTTPException):
            return {}
        return found

    def counted(self, before: dict[str, float], made: int) -> dict[str, float]:
        """Return the metrics once they include what was made."""
        until, name = time.monotonic() + COUNTED, self.job["generated"]
        while True:
            found = self.counters()
            if found.get(name, 0.0) - before.get(name, 0.0) >= made or time.monotonic() > until:
                return found
            time.sleep(0.1)


def words(job: dict[str, Any], of: dict[str, Any]) -> list[str]:
    """Return the arguments of `vllm bench serve` for a round."""
    goodput = [f"{name}:{value}" for name, value in job["goodput"].items()]
    return [
        *("--backend", "openai", "--endpoint", "/v1/completions", "--base-url", job["url"], "--model", job["model"]),
        *("--dataset-name", "custom", "--skip-tokenizer-init", "--ignore-eos", "--temperature", "0"),
        *("--num-prompts", str(of["requests"]), "--max-concurrency", str(of["concurrency"]), "--num-warmups", "0"),
        *("--ready-check-timeout-sec", "0", "--disable-tqdm", "--save-detailed"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,95,99"),
        *(["--goodput", *goodput] if goodput else []),
    ]


def measured(job: dict[str, Any], client: Client, of: dict[str, Any]) -> dict[str, Any]:
    """Run one round; return what vLLM found."""
    numbers = range(of["first_prompt"], of["first_prompt"] + of["requests"])
    shared = client.prompt(of["text"], of["shared"], of["depth"]) if of["depth"] else []
    own = of["prompt_tokens"] - len(shared)
    prompts = [[*shared, *client.prompt(of["text"], number, own)] for number in numbers]
    before, began = client.counters(), time.perf_counter()
    tell("began", round=of["name"])
    result = generated(words(job, of), prompts, of["tokens"])
    ended = time.perf_counter()
    after = client.counted(before, sum(result.get("output_lens", ())))
    kept = {name: result[name] for name in (*WHOLE, *BY_REQUEST) if result.get(name) is not None}
    errors = [each.strip().rpartition("\n")[2][:LONGEST_ERROR] for each in result["errors"]]
    return {**kept, "errors": errors, "began": began, "ended": ended, "before": before, "after": after}


def generated(arguments: list[str], prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Let vLLM send these prompts; what it prints is not needed."""
    samples = [SampleRequest(prompt=each, prompt_len=len(each), expected_output_len=tokens) for each in prompts]
    # All of its data sets either approximate the length, or need packages that are not installed with vLLM.
    serve.get_samples = lambda *_: samples
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    with redirect_stdout(io.StringIO()):
        found: dict[str, Any] = serve.main(parser.parse_args(arguments))
    return found


def main() -> None:
    job = json.loads(sys.argv[1])
    client, running = Client(job), [""]

    def too_late(*_: object) -> None:
        tell("failed", round=running[0], error=f"it has not ended within {job['limit']} s", late=True)
        os._exit(3)

    signal.signal(signal.SIGALRM, too_late)
    for each in job["rounds"]:
        running[0] = each["name"]
        signal.alarm(job["limit"])
        try:
            found = measured(job, client, each)
        except Exception as error:
            said = str(getattr(error, "reason", "") or error) or type(error).__name__
            tell("failed", round=each["name"], error=said[:LONGEST_ERROR], kind=type(error).__name__)
            sys.exit(1)
        tell("ended", round=each["name"], result=found)
        if not found["completed"]:
            sys.exit(1)


if __name__ == "__main__":
    main()
