"""Keep secrets and the serial number out of everything that is printed or stored."""

import os
import re
from collections.abc import Mapping
from functools import lru_cache

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)
_SHAPES = (
    re.compile(r"(?<=://)[^/?#\s\"]+(?=@)"),
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    # What ends a value is not part of it: the text may be JSON, which must stay JSON.
    re.compile(r"(?<=SERIAL_NUMBER=)(?:\\?[\"'])?[^\s\"'\\]+"),
    re.compile(r"(?i)(?<=authorization: bearer )[^\s\"'\\]+"),
    re.compile(r"(?<=--api-key[= ])[^\s\"'\\]+"),
    re.compile(r"(?<=--hf-token[= ])[^\s\"'\\]+"),
)
HIDDEN = "[hidden]"


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds something that must not be shown."""
    return bool(_SECRET_NAME.search(name))


def secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Values of the environment that must not be shown, longest first."""
    values = [value for name, value in environ.items() if is_secret_name(name)]
    # Output is read line by line, so a key of many lines is met one line at a time.
    found = {part for value in values for part in (value, *value.splitlines()) if len(part) >= 6}
    return tuple(sorted(found, key=len, reverse=True))


@lru_cache(maxsize=1)
def _own_secrets() -> tuple[str, ...]:
    return secrets_of(os.environ)


def redact(text: str) -> str:
    """`text` with credentials replaced by ``[hidden]``."""
    for secret in _own_secrets():
        text = text.replace(secret, HIDDEN)
    for shape in _SHAPES:
        text = shape.sub(HIDDEN, text)
    return text
