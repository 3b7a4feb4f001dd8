"""Requests to a served model, all at once, and what a client measures of them; run as a program on a node.

    python3 streamed_load.py URL MODEL REQUESTS TOKENS      prints JSON: seconds by `ttft`, `itl` and `e2e`

So many long prompts at once make latencies of seconds, beside which the client's own time does not count.
"""

import json
import secrets
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

PROMPT = 400


def streamed(url: str, model: str, tokens: int, number: int) -> Iterator[float]:
    """Yield when the request was sent, and when each token arrived."""
    # Of each run others: nothing of them is in the prefix cache.
    body = {"model": model, "prompt": f"{number} {secrets.token_hex(PROMPT // 2)}", "stream": True}
    body |= {"max_tokens": tokens, "ignore_eos": True}
    asked = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    yield time.monotonic()
    with urllib.request.urlopen(asked, timeout=300) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield time.monotonic()


def main(url: str, model: str, requests: str, tokens: str) -> None:
    found: dict[str, list[float]] = {"ttft": [], "itl": [], "e2e": []}
    one = partial(streamed, url, model, int(tokens))
    with ThreadPoolExecutor(int(requests)) as pool:
        for sent, *arrived in pool.map(lambda number: list(one(number)), range(int(requests))):
            found["ttft"].append(arrived[0] - sent)
            found["itl"] += [after - before for before, after in pairwise(arrived)]
            found["e2e"].append(arrived[-1] - sent)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
