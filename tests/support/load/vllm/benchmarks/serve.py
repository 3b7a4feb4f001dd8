"""Takes the place of `vllm bench serve` where vLLM cannot be installed: real requests, and a result of the same shape.

tests/nodes/test_serving.py measures with vLLM's own; tests/fast/test_vllm_internals.py compares the names with those of
each wheel. Like vLLM's it repeats nothing, and takes a request with a first chunk for a success.
"""

import http.client
import json
import os
import time
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit


def get_samples(*_: object) -> list[Any]:
    """What the payload replaces."""
    raise NotImplementedError


def add_cli_args(parser: ArgumentParser) -> None:
    for name in ("--backend", "--endpoint", "--base-url", "--model", "--dataset-name", "--temperature"):
        parser.add_argument(name)
    for name in ("--num-prompts", "--max-concurrency", "--num-warmups", "--ready-check-timeout-sec"):
        parser.add_argument(name, type=int)
    for name in ("--skip-tokenizer-init", "--ignore-eos", "--disable-tqdm", "--save-detailed"):
        parser.add_argument(name, action="store_true")
    for name in ("--percentile-metrics", "--metric-percentiles"):
        parser.add_argument(name)
    parser.add_argument("--goodput", nargs="+")


def main(args: Namespace) -> dict[str, Any]:
    print("vLLM prints much here")
    began, samples = time.perf_counter(), get_samples(args, None)
    assert len(samples) == args.num_prompts
    with ThreadPoolExecutor(args.max_concurrency) as pool:
        found = list(pool.map(lambda each: one(args, each), samples))
    good = [each for each in found if each["success"]]
    return {
        "duration": time.perf_counter() - began,
        "completed": len(good),
        "failed": len(found) - len(good),
        "request_goodput": None,
        "output_throughput": 0.0,
        "total_token_throughput": 0.0,
        "input_lens": [each.prompt_len for each in samples],
        "output_lens": [each["tokens"] if each["success"] else 0 for each in found],
        "ttfts": [each["ttft"] for each in found],
        "itls": [each["itl"] for each in found],
        "start_times": [began for _ in found],
        "errors": [each["error"] for each in found],
    }


def one(args: Namespace, sample: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"success": False, "ttft": 0.0, "itl": [], "tokens": 0, "error": ""}
    body = {"model": args.model, "prompt": sample.prompt, "max_tokens": sample.expected_output_len, "stream": True}
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    began = last = time.perf_counter()
    try:
        connection = http.client.HTTPConnection(str(urlsplit(args.base_url).netloc))
        connection.request("POST", args.endpoint, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            return {**found, "error": response.reason}
        for line in response:
            data = json.loads(line[6:]) if line.startswith(b"data: {") else {}
            if data.get("choices"):
                now = time.perf_counter()
                if found["success"]:
                    found["itl"].append(now - last)
                else:
                    found.update(success=True, ttft=now - began)
                last = now
            elif data.get("usage"):
                found["tokens"] = data["usage"]["completion_tokens"]
    except (OSError, http.client.HTTPException) as error:
        return {**found, "success": False, "error": f"Traceback\n{type(error).__name__}: {error}"}
    return found
