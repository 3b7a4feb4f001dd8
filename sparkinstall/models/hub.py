"""A model on Hugging Face's hub, or on a mirror of it: parts of its files, by range requests. Nothing is stored."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import msgspec
from msgspec import Struct

from sparkinstall import given
from sparkinstall.downloads import NotDownloaded, certificates, reason_of, sign
from sparkinstall.errors import BadUsage
from sparkinstall.models import ModelError
from sparkinstall.models.files import CONFIG, LARGEST_JSON, LocalFiles, Part, read_object
from sparkinstall.models.weights import INDEX
from sparkinstall.schema import show

if TYPE_CHECKING:
    import requests

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = (15, 30)
_WORKERS = 8
_CHUNK = 1 << 16
_LONGEST_TOKEN = 4096
_OFFLINE = ("1", "on", "yes", "true")
_TOKEN = re.compile(r"[!-~]{1,4096}")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _TOO_MANY, _SERVER_ERROR = 401, 403, 404, 429, 500


def is_name(text: str) -> bool:
    """Whether a text is the name of a model on the hub: ORG/NAME."""
    return bool(_NAME.fullmatch(text)) and ".." not in text


def cached(model: str, revision: str = "") -> LocalFiles | None:
    """Return the whole snapshot of a model in the user's cache of the hub, None if there is none."""
    folder = cache_folder() / f"models--{model.replace('/', '--')}"
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (folder / "refs" / (revision or "main")).read_text().strip()
        except (OSError, ValueError):
            return None
    snapshot = folder / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    files = LocalFiles(snapshot, commit)
    return files if _is_whole(files) else None


def _is_whole(files: LocalFiles) -> bool:
    """Whether a snapshot has config.json and all weights; one that is being downloaded does not yet."""
    try:
        names = files.names()
        shards = read_object(files, INDEX).get("weight_map") if INDEX in names else None
    except ModelError:
        return False
    wanted = set(shards.values()) if isinstance(shards, dict) else set()
    return CONFIG in names and any(each.endswith(".safetensors") for each in names) and wanted <= set(names)


def _home() -> Path:
    below = os.environ.get("XDG_CACHE_HOME") or str(given.home() / ".cache")
    return _absolute(os.environ.get("HF_HOME") or f"{below}/huggingface", "HF_HOME")


def _absolute(named: str, variable: str) -> Path:
    return given.absolute(os.path.expandvars(named), variable)


def cache_folder() -> Path:
    """Return the folder of the hub's cache, as the hub's own client finds it.

    Raises:
        BadUsage: a variable names a path that cannot be used, or the user has no home folder.
    """
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return _absolute(named, "HF_HUB_CACHE") if named else _home() / "hub"


def token() -> str:
    """Return the token of the variable HF_TOKEN, else that of the user's own login, or "" if there is none.

    Raises:
        BadUsage: what is there is no token, or HF_TOKEN_PATH names a file that cannot be read.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if found := os.environ.get(name, "").strip():
            if not _TOKEN.fullmatch(found):
                # A line break would end the header.
                raise BadUsage(f"the variable {name} has no token: it must be one word", hint="correct or unset it")
            return found
    return _token_of_login()


def _token_of_login() -> str:
    named = os.environ.get("HF_TOKEN_PATH")
    path = Path(os.path.expanduser(named)) if named else _home() / "token"
    hint = "log in again, or unset HF_TOKEN_PATH" if named else "log in again: `hf auth login`"
    try:
        found = given.read(path, _LONGEST_TOKEN).strip()
    except OSError as error:
        if not named:
            return ""
        raise BadUsage(f"the token's file {path} cannot be read: {error.strerror or error}", hint=hint) from error
    if not re.fullmatch(rb"[!-~]*", found) or len(found) > _LONGEST_TOKEN:
        raise BadUsage(f"{path} is not the file of a token: it must have one word", hint=hint)
    return found.decode()


def authorization() -> str:
    """Return the Authorization header for the hub, or "". A token never travels unencrypted to another machine."""
    address = urlsplit(endpoint())
    if address.scheme == "http" and address.hostname not in _LOOPBACK:
        return ""
    found = token()
    return f"Bearer {found}" if found else ""


def endpoint() -> str:
    """Return the address of the hub, without a slash at the end.

    Raises:
        BadUsage: HF_ENDPOINT is no address of a web server.
    """
    named = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        parts = urlsplit(named)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise BadUsage(f"HF_ENDPOINT is {show(named)}", hint="set it to an address such as https://huggingface.co")
    return named.rstrip("/")


class _Sibling(Struct):
    rfilename: str


class _Info(Struct):
    sha: str
    siblings: list[_Sibling]


class HubFiles:
    """The files of a model on the hub, at the commit that the revision is when they are first asked for."""

    workers = _WORKERS

    def __init__(self, model: str, revision: str = "") -> None:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in _OFFLINE:
            hint = "download the model first, name its folder, or unset HF_HUB_OFFLINE"
            raise ModelError(f"{model} is not in your cache, and HF_HUB_OFFLINE is set", hint=hint)
        self.model, self._wanted, self._hub = model, revision or "main", endpoint()
        self.place = f"{self._hub}/{model}"

    @property
    def revision(self) -> str:
        return self._info.sha

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(each.rfilename for each in self._info.siblings if "/" not in each.rfilename))

    @cached_property
    def _info(self) -> _Info:
        url = f"{self._hub}/api/models/{self.model}/revision/{quote(self._wanted, safe='')}"
        with self._answer(url, {}) as response:
            data = b"".join(_pieces(response, LARGEST_JSON))
        try:
            found = msgspec.json.decode(data, type=_Info)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _refused(f"{self._hub} does not answer like a hub: {error}", "check HF_ENDPOINT") from error
        if not _COMMIT.fullmatch(found.sha):
            raise _refused(f"{self._hub} names {show(found.sha)}, which is no commit", "check HF_ENDPOINT")
        return found

    def part(self, name: str, at: int, length: int) -> Part:
        url = f"{self._hub}/{self.model}/resolve/{self._info.sha}/{quote(name)}"
        with self._answer(url, {"Range": f"bytes={at}-{at + length - 1}"}) as response:
            size, begins = _whole_size(response, at)
            wanted = min(length, max(0, size - at))
            skipped = at - begins
            data = b"".join(_pieces(response, skipped + wanted))[skipped:]
        if len(data) < wanted:
            raise self._unreachable(f"the connection closed after {len(data)} of {wanted} bytes of {name}")
        return Part(data, size)

    @cached_property
    def _session(self) -> "requests.Session":
        import requests

        session = requests.Session()
        session.auth = sign(authorization())
        session.verify = certificates()
        return session

    @contextmanager
    def _answer(self, url: str, headers: dict[str, str]) -> Iterator["requests.Response"]:
        # A compressed transfer would have other bytes than those of the range.
        headers = {**headers, "Accept-Encoding": "identity"}
        try:
            with self._session.get(url, stream=True, timeout=_TIMEOUT, headers=headers) as response:
                self._require_good(response)
                yield response
        except OSError as error:  # as all errors of requests are
            raise self._unreachable(reason_of(error)) from error

    def _unreachable(self, why: str) -> NotDownloaded:
        hint = "check the network and HF_ENDPOINT, or name a folder that has the model"
        distrusted = "certificate" in why.lower()
        if distrusted:
            hint = "check the clock (`date`); behind a proxy, add its certificate to the system's"
        failure = NotDownloaded(f"the hub {self._hub} cannot be reached", cause=why, hint=hint)
        failure.url, failure.kind, failure.again = self._hub, "certificate" if distrusted else "network", not distrusted
        return failure

    def _require_good(self, response: "requests.Response") -> None:
        code = response.status_code
        if code in (200, 206):
            return
        known = {
            _UNAUTHORIZED: (
                f"the hub has no public model {self.model} (401)",
                "check the name; for a private or gated model log in with `hf auth login`, or set HF_TOKEN",
            ),
            _FORBIDDEN: (
                f"the hub does not let you read {self.model} (403)",
                f"accept the model's conditions at {self.place}, with the account that you are logged in with",
            ),
            _NOT_FOUND: (
                f"the hub has no model {self.model} with the revision {show(self._wanted)}, or a file of it (404)",
                "check the name and the revision",
            ),
        }
        message, hint = known.get(
            code, (f"the hub {self._hub} answers with {code}", "run the same command again later")
        )
        failure = _refused(message, hint)
        failure.again = code == _TOO_MANY or code >= _SERVER_ERROR
        raise failure


def _refused(message: str, hint: str) -> NotDownloaded:
    failure = NotDownloaded(message, hint=hint)
    failure.kind = "server"
    return failure


def _whole_size(response: "requests.Response", at: int) -> tuple[int, int]:
    """Return the size of the whole file, and where in it the answer begins."""
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18})", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) > at:
            raise _refused("the hub sends another range than the requested one", "check HF_ENDPOINT")
        return int(found[2]), int(found[1])
    length = response.headers.get("Content-Length", "")
    if not re.fullmatch(r"\d{1,18}", length):
        raise _refused("the hub neither takes ranges nor says how long a file is", "check HF_ENDPOINT")
    return int(length), 0


def _pieces(response: "requests.Response", most: int) -> Iterator[bytes]:
    """Yield the beginning of an answer; the rest is not received."""
    left = most
    for piece in response.iter_content(_CHUNK):
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return
