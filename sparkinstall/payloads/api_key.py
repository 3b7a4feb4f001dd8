"""For `vllm serve --middleware`: no route answers without the key, which is a credential of systemd.

vLLM's own `--api-key` guards some paths only, in every release. Run as a program with arguments of vLLM, this checks
that the middleware will be used and has a key, before vLLM loads a model for minutes.
"""

import hashlib
import hmac
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

Message = Mapping[str, Any]
Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CREDENTIAL = "api-key"
KEY = re.compile(rb"[!-~]{16,4096}")
VARIABLE, RUST = "VLLM_API_KEY", "VLLM_USE_RUST_FRONTEND"
SAID = {"message": "this API asks for a key: Authorization: Bearer KEY", "type": "Unauthorized", "code": 401}
BODY = json.dumps({"error": SAID}).encode()
HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(BODY)).encode()),
    (b"www-authenticate", b"Bearer"),
]
# "The request is against the policy", which servers answer with 403 before they accept a websocket.
POLICY = 1008


class Refused(RuntimeError):
    """The key is missing or would not be asked for. The message contains nothing of it."""


class RequireKey:
    """Passes on what carries the key: whatever the path, the method and the address of the client."""

    def __init__(self, app: App) -> None:
        # A digest: its comparison says nothing about the length of the key.
        self.app, self.digest = app, digest(key())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self.is_known(scope.get("headers", ())):
            await self.app(scope, receive, send)
            return
        # The server logs it with the answer: a key that was sent there by mistake.
        scope["query_string"] = b""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY, "reason": "no key"})
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": HEADERS})
            await send({"type": "http.response.body", "body": BODY})
        else:
            raise Refused(f"no request of the kind {scope['type']} is answered without the key")

    def is_known(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Return whether exactly one header has the key: of two, other programs could take the other one."""
        found = [value for name, value in headers if name.lower() == b"authorization"]
        scheme, _, given = (found[0] if len(found) == 1 else b"").partition(b" ")
        return hmac.compare_digest(digest(given.strip(b" ")), self.digest) and scheme.lower() == b"bearer"


def digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def key() -> bytes:
    """Return the key.

    Raises:
        Refused: there is none, or it is none that a header can have.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise Refused("systemd gives no credential: the unit has no LoadCredential=, or systemd is older than 247")
    try:
        with open(os.path.join(folder, CREDENTIAL), "rb") as file:
            found = file.read().strip()
    except OSError as error:
        raise Refused(f"the API's key cannot be read: {error.strerror}") from error
    if not KEY.fullmatch(found):
        raise Refused("the API's key is not one line of 16 to 4096 printable characters without spaces")
    return found


def check(arguments: Iterable[str]) -> None:
    """Return if vLLM will let nobody in without the key.

    Raises:
        Refused: it would, or could let nobody in at all.
    """
    other = os.environ.get(VARIABLE, "").encode(errors="surrogateescape")
    if not hmac.compare_digest(digest(other or key()), digest(key())):
        raise Refused(f"{VARIABLE} is another key than the API's, so that nobody could use /v1")
    # These servers load no middleware. vLLM's parser takes any beginning of an option that is no other's.
    if os.environ.get(RUST, "0") not in ("", "0"):
        raise Refused(f"with {RUST} the API's key would not be asked for")
    if any(each.startswith("--gr") for each in arguments):
        raise Refused("with --grpc the API's key would not be asked for")


def main() -> None:
    try:
        check(sys.argv[1:])
    except Refused as error:
        sys.exit(f"sparkinstall: {error}")


if __name__ == "__main__":
    main()
