"""Ask a served model one question, and receive its answer while it is made."""

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import requests
import urllib3
from msgspec import Struct, field

from sparkinstall import given
from sparkinstall.core.reasoning import Kind, Piece, Separator
from sparkinstall.core.session import Session
from sparkinstall.downloads import certificates, reason_of, sign
from sparkinstall.errors import BadUsage, NeedsRoot, Problem
from sparkinstall.facts.listening import stranger_at_the_api
from sparkinstall.payloads.vllm_client import PROMPT_END
from sparkinstall.probes.serving import not_up
from sparkinstall.probes.vllm_client import KEY, key_of, strange, whose
from sparkinstall.redaction import has_credential
from sparkinstall.schema import nearest, show

_CHAT = "/v1/chat/completions"
# Seconds until a server must accept the connection, and between two parts of an answer: a long prompt takes minutes,
# all else is known at once.
_TIMEOUT, _SHORT = (5, 900), (5, 60)
_PIECE = 1 << 16
_LONGEST_EVENT = 1 << 26
_LONGEST_ANSWER = 1 << 22
_LONGEST_KEY = 4096
_LONGEST_SAID = 2000
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine itself."""
_UNAUTHORIZED, _NOT_FOUND, _SERVER_ERROR, _UNAVAILABLE = (401, 403), 404, 500, 503


class NoAnswer(Problem):
    """No answer came, or not all of it."""

    code = "no-answer"


class Question(Struct, frozen=True):
    """What is asked. `model`: "" is what the server serves. `max_tokens`: None is the rest of the context."""

    prompt: str
    system: str = ""
    model: str = ""
    max_tokens: int | None = None


class Server(Struct, frozen=True):
    """An API. `key_from`: where its key is from, in words, "" without one. `model`: its name by the settings."""

    url: str
    key: str = ""
    key_from: str = ""
    model: str = ""


class Answer(Struct, frozen=True):
    """Result of `ask`; on an error what had arrived. Seconds count from the request."""

    url: str
    model: str
    content: str
    reasoning: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    first_token_seconds: float | None
    seconds: float


def server_of(session: Session, url: str | None, key_file: Path | None) -> Server:
    """Return the API of this node by its settings, or the one at `url`.

    Raises:
        BadUsage: the address or the key's file cannot be used, or this node has no API.
        NoAnswer: another user's program has the port of this node's API, and must not get its key.
        NeedsRoot: the key is in a file that only root may read, and sudo asks for a password.
    """
    if url is not None:
        return Server(_address(url), *_key(key_file))
    node = session.node
    if node.rehearsal:
        raise BadUsage("a rehearsal starts no services", hint="name a server: `--url http://HOST:8000`")
    if node.role == "worker":
        head = f"http://{node.config.cluster.head}:{node.config.serving.port}"
        raise BadUsage(
            "a worker has no API", hint=f"ask on the head; or, if its API is open to this node: --url {head}"
        )
    key, key_from = _key(key_file)
    if not key and node.api_key:
        key, key_from = own_key(session)
    if key and (who := stranger_at_the_api(node, session.system)):
        port = node.config.serving.port
        raise NoAnswer(strange(who, port), hint=whose(port))
    return Server(f"http://127.0.0.1:{node.config.serving.port}", key, key_from, node.config.serving.model or "")


def own_key(session: Session) -> tuple[str, str]:
    """Return the key of this node's API, and its file; on a terminal, ask for the password of sudo if that needs it."""
    try:
        return key_of(session.node, session.system)
    except NeedsRoot:
        if not sys.stdin.isatty():
            raise
        session.system.ask_for_sudo()
        return key_of(session.node, session.system)


def _address(url: str) -> str:
    if has_credential(url):
        raise BadUsage("--url must not contain a password", hint=f"name the key's file with --key-file, or set {KEY}")
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not whole.isprintable() or " " in whole:
        raise BadUsage(f"--url {show(url)} is no address of a server", hint="use one such as http://192.168.1.20:8000")
    return re.sub(r"(/v1)?/*$", "", whole.partition("?")[0])


def _key(file: Path | None) -> tuple[str, str]:
    """Return the key, and where it is from."""
    if file is None:
        found = os.environ.get(KEY, "")
        return (_sound_key(found.encode(errors="replace"), KEY), KEY) if found else ("", "")
    path = given.absolute(file, "--key-file")
    try:
        content = given.read(path, _LONGEST_KEY)
    except OSError as error:
        why = error.strerror or str(error)
        raise BadUsage(f"the key's file {path} cannot be read: {why}", hint="name a file that you may read") from error
    return _sound_key(content, str(path)), str(path)


def _sound_key(content: bytes, source: str) -> str:
    key = content.strip()
    if not re.fullmatch(rb"[!-~]+", key) or len(key) > _LONGEST_KEY:
        raise BadUsage(f"{source} contains no key", hint="a key is one line of printable characters without spaces")
    return key.decode()


class _Delta(Struct):
    """A part of the answer. vLLM sends the reasoning as `reasoning`; until 0.14 as `reasoning_content`, too or only."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(Struct):
    delta: _Delta = field(default_factory=_Delta)
    finish_reason: str | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(Struct):
    choices: list[_Choice] = field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None
    prompt_token_ids: list[int] | None = None


class _Model(Struct):
    id: str


class _Models(Struct):
    data: list[_Model]


class _Text(Struct):
    prompt: str


_Part = TypeVar("_Part", _Event, _Models, _Text)


class Conversation:
    """One question and its answer. After an error `answer` has what had arrived."""

    def __init__(self, session: Session, server: Server, question: Question) -> None:
        self._node, self._on, self._server, self._question = session.node, session.system, server, question
        self._model = question.model
        self._said: dict[Kind, str] = {}
        self._separator: Separator | None = None
        self._prompt_end: list[int] = []
        self._finish: str | None = None
        self._usage = _Usage()
        self._began = time.monotonic()
        self._first: float | None = None
        self._patience = _TIMEOUT[1]
        self._http = requests.Session()
        self._http.auth = sign(f"Bearer {server.key}" if server.key else "")
        self._http.verify = certificates()
        if urlsplit(server.url).hostname in LOOPBACK:
            # No proxy has a way to this machine's own address.
            self._http.trust_env = False

    @property
    def answer(self) -> Answer:
        """What has arrived so far; the reasoning and the content without the line breaks around them."""
        unsure = self._said.get("unsure", "")
        closed = self._separator is not None and self._separator.closed
        reasoning = self._said.get("reasoning", "") + (unsure if closed else "")
        content = ("" if closed else unsure) + self._said.get("content", "")
        return Answer(
            url=self._server.url,
            model=self._model,
            content=content.strip("\n"),
            reasoning=reasoning.strip("\n"),
            finish_reason=self._finish,
            prompt_tokens=self._usage.prompt_tokens,
            completion_tokens=self._usage.completion_tokens,
            first_token_seconds=self._first and round(self._first - self._began, 3),
            seconds=round(time.monotonic() - self._began, 3),
        )

    def pieces(self) -> Iterator[Piece]:
        """Yield the answer while it is made.

        Raises:
            NoAnswer: there is none, or it was cut.
        """
        with self._reaching():
            self._model = self._model or self._served()
            with self._post(_CHAT, self._body()) as response:
                self._require_good(response, _CHAT)
                for piece in self._separated(events(response)):
                    self._said[piece.kind] = self._said.get(piece.kind, "") + piece.text
                    yield piece
        if self._finish is None:
            raise self._cut()

    def served(self) -> str:
        """Return the name that is asked for: the given one, else that of the settings if it is served, else the first.

        Raises:
            NoAnswer: there is none.
        """
        with self._reaching():
            self._model = self._model or self._served()
            return self._model

    def content(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """Return what one of the server's other interfaces answers.

        Raises:
            NoAnswer: there is none.
        """
        data = None if body is None else msgspec.json.encode(body)
        with self._reaching(), self._request("GET" if body is None else "POST", path, data) as response:
            self._require_good(response, path)
            return _content(response)

    def _cut(self, why: str = "") -> Problem:
        length = sum(map(len, self._said.values()))
        return NoAnswer(f"the stream was cut after {length:,} characters", cause=why, hint=_READ_LOG)

    def _body(self) -> dict[str, Any]:
        question = self._question
        messages = [{"role": "user", "content": _text(question.prompt)}]
        if question.system:
            messages.insert(0, {"role": "system", "content": _text(question.system)})
        body: dict[str, Any] = {"model": self._model, "messages": messages, "stream": True}
        # The end of the prompt shows whether the chat template opens the reasoning.
        body |= {"stream_options": {"include_usage": True}, "return_token_ids": True}
        return body | ({"max_tokens": question.max_tokens} if question.max_tokens else {})

    def _separated(self, events: Iterator[_Event]) -> Iterator[Piece]:
        for event in events:
            if event.error:
                raise NoAnswer("the server interrupted its answer", cause=_said_of(event.error), hint=_READ_LOG)
            self._prompt_end = (event.prompt_token_ids or self._prompt_end)[-PROMPT_END:]
            self._usage = event.usage or self._usage
            for choice in event.choices[:1]:
                self._finish = choice.finish_reason or self._finish
                yield from self._of(choice.delta)
        if self._separator:
            yield from self._separator.end()

    def _of(self, delta: _Delta) -> Iterator[Piece]:
        reasoning = delta.reasoning or delta.reasoning_content
        if reasoning or delta.content:
            self._first = self._first or time.monotonic()
        if reasoning:
            yield Piece("reasoning", reasoning)
        if delta.content:
            self._separator = self._separator or Separator(self._opened())
            yield from self._separator.feed(delta.content)

    def _opened(self) -> bool | None:
        """Return whether the chat template has opened the reasoning, None if this server does not tell."""
        if "reasoning" in self._said:
            # The server has a parser, which separates it.
            return False
        if not self._prompt_end:
            return None
        with self._post("/detokenize", {"model": self._model, "tokens": self._prompt_end}) as response:
            if response.status_code != 200:
                return None
            try:
                text = _decoded(_content(response), _Text).prompt
            except NoAnswer:
                return None
        return text.rfind("<think>") > text.rfind("</think>")

    # --- the server

    def _served(self) -> str:
        """Return the name to ask for: that of the settings if it is served, else the first."""
        names = self._names()
        if not names:
            raise NoAnswer(f"the server at {self._server.url} serves no model", hint=_READ_LOG)
        return self._server.model if self._server.model in names else names[0]

    def _names(self) -> list[str]:
        with self._request("GET", "/v1/models") as response:
            self._require_good(response, "/v1/models")
            return [each.id for each in _decoded(_content(response), _Models).data]

    def _post(self, path: str, body: dict[str, Any]) -> requests.Response:
        return self._request("POST", path, msgspec.json.encode(body))

    def _request(self, method: str, path: str, data: bytes | None = None) -> requests.Response:
        # What is compressed arrives in larger pieces, and may be far larger than it seems.
        headers = {"Accept-Encoding": "identity", **({"Content-Type": "application/json"} if data else {})}
        url = self._server.url + path
        timeout = _TIMEOUT if path == _CHAT else _SHORT
        self._patience = timeout[1]
        return self._http.request(
            method, url, data=data, headers=headers, stream=True, timeout=timeout, allow_redirects=False
        )

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn the errors of the connection into problems."""
        try:
            yield
        except (OSError, urllib3.exceptions.HTTPError) as error:  # all errors of requests are OSErrors
            if isinstance(error, requests.exceptions.ConnectTimeout) or _is_refused(error):
                raise self._not_there(error) from error
            if isinstance(error, requests.exceptions.ReadTimeout | urllib3.exceptions.ReadTimeoutError):
                raise NoAnswer(f"nothing has come for {self._patience} s", hint=_READ_LOG) from error
            if self._said:
                raise self._cut(_why(error)) from error
            hint = "check the address, and the log of the server"
            raise NoAnswer(f"the server at {self._server.url} does not answer", cause=_why(error), hint=hint) from error

    def _not_there(self, error: Exception) -> Problem:
        if not self._server.model:
            hint = "serve a model first: `sparkinstall serve RECIPE|MODEL`"
            elsewhere = "check the address, and that the server's firewall lets this machine in"
            is_ours = self._server.url == f"http://127.0.0.1:{self._node.config.serving.port}"
            where = f"nothing answers at {self._server.url}"
            return NoAnswer(where, cause=reason_of(error), hint=hint if is_ours else elsewhere)
        found = not_up(self._node, self._on)
        return NoAnswer(found.found, hint=found.hint.replace("sparkinstall verify --only serving", "sparkinstall ask"))

    def _require_good(self, response: requests.Response, path: str) -> None:
        code = response.status_code
        if code == 200:
            return
        said = _said_of(_begin(response, _PIECE))
        if code in _UNAUTHORIZED:
            raise self._locked(code)
        if code == _NOT_FOUND and response.request.method == "POST" and self._question.model:
            raise self._unknown_model(said)
        if code == _NOT_FOUND:
            hint = "the address must be that of vLLM, or of a server with the same API: http://HOST:PORT"
            lacks = "API for a chat" if path.startswith("/v1") else path
            raise NoAnswer(f"{self._server.url} has no {lacks} (404)", cause=said, hint=hint)
        if code == _UNAVAILABLE:
            raise NoAnswer("the server is not ready (503)", cause=said, hint="it may still be loading: ask again later")
        failed, asked = code >= _SERVER_ERROR, path == _CHAT
        refused = "shorten the question, or change what the server says" if asked else _OTHER_SERVER
        hint = _READ_LOG if failed else refused
        if "chat template" in said:
            hint = (
                "this model is not made for a chat: serve one that is, or set `--chat-template` in `serving.arguments`"
            )
        did = "failed at" if failed else "refuses"
        raise NoAnswer(f"the server {did} {'the question' if asked else path} ({code})", cause=said, hint=hint)

    def _locked(self, code: int) -> Problem:
        server = self._server
        if server.key:
            hint = "name the file with the key that the server was started with: --key-file FILE"
            if server.key_from == self._node.api_key:
                hint = "it was changed since the last start: `sudo systemctl restart vllm`"
            return NoAnswer(f"the API at {server.url} rejects the key in {server.key_from} ({code})", hint=hint)
        hint = f"name its file: --key-file FILE; or set {KEY} without showing it: `read -rs {KEY}; export {KEY}`"
        return NoAnswer(f"the API at {server.url} asks for a key ({code})", hint=hint)

    def _unknown_model(self, said: str) -> Problem:
        asked, names = self._question.model, self._names()
        hint = nearest(asked, names) or "omit --model, or use one of these names"
        served = f"it serves {', '.join(names)}"
        return NoAnswer(f"the server has no model {show(asked)} (404)", cause=served if names else said, hint=hint)


_OTHER_SERVER = "the address must be that of vLLM, or of a server with the same API"
_READ_LOG = "read the server's log: `journalctl -u vllm`, or `sparkinstall diagnose --unit vllm`"


def _text(text: str) -> str:
    """Return a text that JSON can have: words of the command line may be any bytes."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def events(response: requests.Response) -> Iterator[_Event]:
    """Yield each event of the stream as soon as it is there, until `[DONE]` or the end of the connection."""
    for line in _lines(response):
        event = line.partition(b"data:")[2].strip() if line.startswith(b"data:") else b""
        if event == b"[DONE]":
            return
        if event:
            yield _decoded(event, _Event)


def _lines(response: requests.Response) -> Iterator[bytes]:
    held, size = list[bytes](), 0
    while data := response.raw.read1(_PIECE):
        first, *lines = data.split(b"\n")
        held.append(first)
        size += len(first)
        if size > _LONGEST_EVENT:
            raise NoAnswer("an event of the stream has no end", hint=_OTHER_SERVER)
        for line in lines:
            yield b"".join(held)
            held, size = [line], len(line)


def _content(response: requests.Response) -> bytes:
    """Return an answer that is no stream.

    Raises:
        NoAnswer: it does not end.
    """
    found = _begin(response, _LONGEST_ANSWER + 1)
    if len(found) > _LONGEST_ANSWER:
        raise NoAnswer(f"the server sends more than {_LONGEST_ANSWER >> 20} MiB", hint=_OTHER_SERVER)
    return found


def _begin(response: requests.Response, most: int) -> bytes:
    """Return what an answer begins with; the rest is not received."""
    found = bytearray()
    while len(found) < most and (data := response.raw.read1(min(_PIECE, most - len(found)))):
        found += data
    return bytes(found)


def _decoded(data: bytes, kind: type[_Part]) -> _Part:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NoAnswer("the server does not answer like vLLM", cause=str(error), hint=_OTHER_SERVER) from error


def _said_of(error: Any) -> str:
    """Return the message of an error in any of the shapes of vLLM, or the begin of the text."""
    if isinstance(error, bytes):
        try:
            return _said_of(msgspec.json.decode(error))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return error[:_LONGEST_SAID].decode(errors="replace").strip()
    if isinstance(error, dict):
        return _said_of(next((error[name] for name in ("error", "message", "detail") if error.get(name)), ""))
    return str(error)[:_LONGEST_SAID]


def _is_refused(error: BaseException) -> bool:
    return (
        isinstance(error, requests.exceptions.ConnectionError)
        and re.search("(NewConnection|NameResolution)Error", repr(error)) is not None
    )


def _why(error: BaseException) -> str:
    """Return the last words of an error of requests, which has those of all that it wraps."""
    while inner := next((each for each in reversed(error.args) if isinstance(each, BaseException)), None):
        error = inner
    return str(error).rsplit(": ", 1)[-1].strip(" )'\"")[:_LONGEST_SAID]
