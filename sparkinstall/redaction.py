"""Recognise credentials, and redact them and the serial number from everything that is printed or stored."""

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

HIDDEN = "[hidden]"

# Patterns are text: re compiles one when it is first used, and most runs use few of them.
_SECRET_NAME = r"(?i)TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL"

# The delimiter after a value must survive: the text may be JSON, or contain JSON in a string.
_QUOTE = r"\\?[\"']"
_BARE = r"[^\s\"'\\]+"
_QUOTED = (
    r"(?:\"(?:[^\"\\\n]|\\.)*(?:\"|$)|'(?:[^'\"\\\n]|\\.)*(?:'|$)|"
    r"\\\"(?:[^\"\\\n]|\\[^\"\n])*(?:\\\"|$))"
)
_PIECE = r"(?:\\[^\"']|[^\s,\"'\\])+"
_WORD = rf"(?:(?P<q>{_QUOTE})(?![\s,:}})\]])[^\"'\\\n]+(?:(?P=q))?|{_BARE})"
_USER = r"(?<![\w-])(?:-u|--user|--proxy-user)"
# vLLM's parser takes `_` for `-`, and any beginning of an option that is no other's.
_FLAG = r"--(?:api[_-]k(?:e(?:ys?)?)?|hf[_-]t(?:o(?:k(?:en?)?)?)?)"
_OPTIONS = ("--api-key", "--hf-token")
# A key within the JSON of an option: `-O.a.api_key`.
_DOTTED = (
    r"(?i:(?<![\w.-])--?[a-z][\w-]*\.(?:[\w-]+\.)*(?:[\w-]*[_-])?"
    r"(?:api[_-]?keys?|access[_-]?key|private[_-]?key|secret(?:[_-]?key)?|passw(?:or)?ds?|passphrase"
    r"|(?:api|hf|hub|auth|access|refresh|bearer|session|security)[_-]?token|(?<=\.)token))"
)
_SHORT_OPTION = r"^-[A-Za-z]+"
_SECRET_KEY = (
    r"(?:.*_)?(?:api_?keys?|access_?key(?:_id)?|private_?key|secret(?:_?key)?|passwords?|passwd|passphrase"
    r"|(?<!allow_)credentials?|(?:api|hf|hub|auth|access|refresh|bearer|session|security)_?token)|token|authorization"
)
_CAMEL = r"(?<=[a-z0-9])(?=[A-Z])"
_URL_KEYS = r"[\w-]*(?:token|signature|credential|api[_-]?key)|sig|key|policy|password"

LISTED = rf"{_QUOTE}?\s*[:=]\s*[\[(]\s*)((?:[\s,]*{_QUOTED})+)"
"""The rest of a pattern that begins with an open group and a key: matches a list of values, for `hide_in`."""

# What an instruction writes in place of a secret: a word in capitals, or the name of a variable.
_NO_PLACEHOLDER = r"(?!(?-i:KEY(?![\w.-])|USER:PASSWORD@|\$[A-Z_]+(?![\w.-])))"

# The pattern is tried only if the lower-case text contains one of the words. Group 1 is kept, group 2 is hidden.
_Shapes = tuple[tuple[tuple[str, ...], str], ...]
_WHOLE: _Shapes = (
    # A path that was made of a URL has one slash less.
    ((":/",), rf"(://|\bhttps?:/){_NO_PLACEHOLDER}([^/?#\s\"]+)(?=@)"),
    (
        ("token=", "secret=", "password=", "passwd=", "key=", "credential="),
        r"\b([A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL)=)([^\s\"'\\]+)",
    ),
    (("hf_",), r"()(\bhf_[A-Za-z0-9]{20,})"),
    (("gh", "glpat-", "xox"), r"()(\b(?:gh[pousr]_|github_pat_|glpat-|xox[abeprs]-)[A-Za-z0-9_-]{16,})"),
    (("akia", "asia"), r"()(\bA[KS]IA[A-Z0-9]{16}\b)"),
    (("hooks.slack.com/",), r"(hooks\.slack\.com/\w+/)([\w/-]+)"),
    (("serial_number=",), r"(SERIAL_NUMBER=)((?:\\?[\"'])?[^\s\"'\\]+)"),
    (
        ("authorization",),
        rf"(?i)(authorization{_QUOTE}?\s*[:=,]\s*b?{_QUOTE}?(?:bearer|basic|token)\s+){_NO_PLACEHOLDER}({_BARE})",
    ),
    (
        ("token=", "sig", "credential=", "key=", "policy=", "password="),
        rf"(?i)((?:[?&;]|\\u0026)(?:{_URL_KEYS})=)([^&\s\"'\\]+)",
    ),
)
_IN_PIECES: _Shapes = (
    (("--api", "--hf"), rf"({_FLAG}(?:=|[ \t]+(?!--)))({_WORD})"),
    # vLLM accepts several keys: all words up to the next option.
    (("--api",), rf"(--api[_-]k(?:e(?:ys?)?)?)((?:[ \t]+(?!{_QUOTE}?-){_WORD})+)"),
    (("--api", "--hf"), rf"({_FLAG}{_QUOTE})((?:\s*,\s*(?!{_QUOTE}-){_QUOTED}(?!\s*:))+)"),
    (("api_key", "api-key", "apikey"), rf"(?i)(api[_-]?keys?{LISTED}"),
    ((".",), rf"({_DOTTED}\+?(?:=|{_QUOTE}\s*,\s*|[ \t]+(?!-)))({_WORD}|{_QUOTED})"),
    (("curl",), rf"({_USER}(?:=|[ \t]*(?!-)))({_WORD})"),
    (("curl",), rf"({_USER}{_QUOTE}\s*,\s*)({_QUOTED})(?!\s*:)"),
)


def is_secret_name(name: str) -> bool:
    """Return whether an environment variable of this name holds a secret."""
    return bool(re.search(_SECRET_NAME, name))


def has_credential(text: str) -> bool:
    """Return whether a text contains what only a credential looks like, such as a password in a URL."""
    return any(re.search(shape, text) for _, shape in _WHOLE)


def gives_secret(argument: str) -> bool:
    """Return whether an argument of `vllm serve` would give it a secret, in any spelling that its parser takes.

    `--a.b.c=x` and `-O.a=x` are values within JSON, which `-O{...}` has too; in JSON the keys tell. Further options in
    the same word count too: vLLM refuses them, but they would be visible all the same.
    """
    if has_credential(argument) or any(map(_names_secret, argument.split())):
        return True
    return any(map(_holds_secret, (argument, argument.partition("=")[2], re.sub(_SHORT_OPTION, "", argument))))


def _names_secret(word: str) -> bool:
    if not word.startswith("-"):
        return False
    option, *keys = word.partition("=")[0].replace("_", "-").rstrip("+").split(".")
    is_ours = len(option) > 2 and any(each.startswith(option.lower()) for each in _OPTIONS)
    return is_ours or any(map(is_secret_key, (option.lstrip("-"), *keys)))


def is_secret_key(key: str) -> bool:
    """Return whether a value below a key of this name is a secret, such as `hf_token` or `secretKey`."""
    return bool(re.fullmatch(_SECRET_KEY, re.sub(_CAMEL, "_", key).replace("-", "_").lower()))


def _holds_secret(text: str) -> bool:
    """Return whether a text is JSON with a value under a secret's key."""
    try:
        return text.lstrip().startswith(("{", "[")) and _is_below_secret(json.loads(text), below=False)
    except (ValueError, RecursionError):
        return False


def _is_below_secret(value: Any, below: bool) -> bool:
    if isinstance(value, dict):
        return any(_is_below_secret(each, below or is_secret_key(key)) for key, each in value.items())
    if isinstance(value, list):
        return any(_is_below_secret(each, below) for each in value)
    return isinstance(value, str) and bool(value) and (below or has_credential(value))


def secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the secret values of the environment, longest first."""
    values = [value for name, value in environ.items() if is_secret_name(name)]
    # Output is redacted line by line, so each line of a multi-line key counts.
    found = {part for value in values for part in (value, *value.splitlines()) if len(part) >= 6}
    return tuple(sorted(found, key=len, reverse=True))


@lru_cache(maxsize=1)
def _own_secrets() -> tuple[str, ...]:
    return secrets_of(os.environ)


def hide_in(found: re.Match[str]) -> str:
    """Keep the first group; hide all of the second but quotes, commas and spaces."""
    return found[1] + re.sub(_PIECE, HIDDEN, found[2])


def redact(text: str) -> str:
    """Return `text` with credentials replaced by ``[hidden]``."""
    for secret in _own_secrets():
        text = text.replace(secret, HIDDEN)
    lower = text.lower()
    for words, shape in _WHOLE:
        if any(word in lower for word in words):
            text = re.sub(shape, rf"\1{HIDDEN}", text)
    for words, shape in _IN_PIECES:
        if any(word in lower for word in words):
            text = re.sub(shape, hide_in, text)
    return text
