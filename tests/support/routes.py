"""Try every route of an API without its key, with a wrong one and with the right one: `routes.py ADDRESS`.

The key is on stdin. Prints one JSON object: the status of each request. It runs in a node and uses only the standard
library.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

PORT = 8000
SECONDS = 300.0
# After an answer: a connection that is kept is not waited for.
PAUSE = 8.0
METHODS = ("get", "put", "post", "delete", "patch", "head", "options")
# Routes that the API's own document does not have.
OTHERS = (
    *("/", "/nowhere", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/metrics", "/metrics/", "/health"),
    *("/ping", "/invocations", "/tokenize", "/detokenize", "/version", "/load", "/v1", "/v1/", "/v2/rerank"),
    *("//v1/models", "/v1//models", "/./v1/models", "/%76%31/models", "/v1/models?key=x", "/server_info"),
)
UPGRADE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: c3BhcmtpbnN0YWxsLXRlcw==\r\n"
)
LARGE = 5_000_000


class Api:
    """One address of the API, and its key."""

    def __init__(self, address: str, key: str) -> None:
        self.address, self.key = address, key

    def tried(self) -> dict[str, dict[str, Any]]:
        """Status by request: without a key, with a wrong one, and with the right one."""
        document = json.loads(self.open("GET", "/openapi.json", self.right).read())
        routes = [*documented(document), *(("GET", path) for path in OTHERS), *(("POST", path) for path in OTHERS)]
        keys = {"none": {}, "wrong": {"Authorization": f"Bearer {'f' * len(self.key)}"}, "right": self.right}
        return {
            name: {f"{method} {path}": self.status(method, path, headers) for method, path in routes}
            for name, headers in keys.items()
        }

    @property
    def right(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def status(self, method: str, path: str, headers: dict[str, str]) -> int:
        try:
            return int(self.open(method, path, headers).status)
        except urllib.error.HTTPError as error:
            return error.code

    def open(self, method: str, path: str, headers: dict[str, str]) -> Any:
        # No route takes this body, so none does anything.
        body = b"{" if method in ("POST", "PUT", "PATCH") else None
        headers = {"Content-Type": "application/json", **headers}
        url = f"http://{self.address}:{PORT}{path}"
        return urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=SECONDS)

    def strange(self) -> dict[str, list[int]]:
        """The statuses of what only a raw connection can send: all answers on it, in order."""
        right, wrong = f"Authorization: Bearer {self.key}\r\n", "Authorization: Bearer x\r\n"
        get, host = "GET /v1/models HTTP/1.1\r\n", "Host: x\r\n"
        post = "POST /v1/completions HTTP/1.1\r\n" + host
        last = "Connection: close\r\n\r\n"
        requests = {
            "right": get + host + right + last,
            "odd case": get + host + f"aUTHORIZATION: bEARER {self.key}\r\n" + last,
            "spaces": get + host + f"Authorization:    Bearer   {self.key}   \r\n" + last,
            "HTTP/1.0": f"GET /v1/models HTTP/1.0\r\n{right}\r\n",
            "HTTP/1.0 without": "GET /v1/models HTTP/1.0\r\n\r\n",
            "two keys": get + host + right + wrong + last,
            "two keys, wrong first": get + host + wrong + right + last,
            "no space": get + host + f"Authorization: Bearer{self.key}\r\n" + last,
            "continued line": get + host + f"Authorization: Bearer\r\n {self.key}\r\n" + last,
            "key in the query": f"GET /v1/models?api_key={self.key} HTTP/1.1\r\n" + host + last,
            "other header": get + host + f"X-Api-Key: {self.key}\r\n" + last,
            "whole address": "GET http://127.0.0.1/v1/models HTTP/1.1\r\n" + host + last,
            "asterisk": "OPTIONS * HTTP/1.1\r\n" + host + last,
            "preflight": "OPTIONS /v1/models HTTP/1.1\r\nOrigin: http://x\r\nAccess-Control-Request-Method: GET\r\n"
            + host + last,
            "trace": "TRACE /v1/models HTTP/1.1\r\n" + host + last,
            "unknown method": "BREW /v1/models HTTP/1.1\r\n" + host + last,
            "forwarded": get + host + "X-Forwarded-For: 127.0.0.1\r\nX-Original-URL: /health\r\n" + last,
            "kept connection": get + host + right + "\r\n" + get + host + last,
            "pipelined": (get + host + "\r\n") * 2 + get + host + right + last,
            "large body": f"{post}Content-Length: {LARGE}\r\n\r\n" + " " * LARGE,
            "waits for 100": f"{post}Content-Length: 9\r\nExpect: 100-continue\r\n{last}",
            "websocket": "GET /v1/realtime HTTP/1.1\r\n" + host + UPGRADE + "\r\n",
            "websocket, wrong": "GET /v1/realtime HTTP/1.1\r\n" + host + wrong + UPGRADE + "\r\n",
            "websocket elsewhere": "GET /v1/models HTTP/1.1\r\n" + host + UPGRADE + "\r\n",
        }  # fmt: skip
        return {name: list(self.answers(text)) for name, text in requests.items()}

    def answers(self, text: str) -> Iterator[int]:
        with socket.create_connection((self.address, PORT), timeout=SECONDS) as connection:
            try:
                connection.sendall(text.encode())
            except OSError:
                pass
            received = b""
            try:
                while data := connection.recv(65536):
                    received += data
                    connection.settimeout(PAUSE)
                    if b"101 Switching" in received:
                        break
            except OSError:
                pass
        # An answer may follow the body of the last one without a line break.
        yield from map(int, re.findall(rb"HTTP/1\.[01] (\d{3}) ", received))


def documented(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Method and path of each operation, with a value for each parameter of a path."""
    return [
        (method.upper(), path.replace("{", "").replace("}", ""))
        for path, operations in document["paths"].items()
        for method in operations
        if method in METHODS
    ]


if __name__ == "__main__":
    api = Api(sys.argv[1], sys.stdin.readline().strip())
    print(json.dumps({"routes": api.tried(), "strange": api.strange()}))
