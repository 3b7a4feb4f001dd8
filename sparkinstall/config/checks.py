"""Checks of settings that a type cannot express: each returns what is wrong with a value, or None."""

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network

from sparkinstall.redaction import gives_secret, has_credential, is_secret_name

_PATH = re.compile(r"/[A-Za-z0-9._+@/-]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LINK = re.compile(r"(~?)(/[^/\0]+)+")
# The prefix is in the first line of the environment's scripts, of which the kernel reads 255 bytes.
_LONGEST_PATH = 200
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_IN_URL = "must not contain a user name, password or token"
_IN_ARGUMENT = "must not contain a secret: everyone can read the unit and the process list"
SECRETS = {
    _IN_URL: "download the file and set its path",
    _IN_ARGUMENT: "write it to a file that only root can read, and name that: `serving.key_file` for the API's key, "
    "`hub.token_file` for a token of the hub",
}
"""What to do about each complaint whose value must not be repeated."""


def safe_path(value: str) -> str | None:
    """Check a path that LD_PRELOAD can contain: it allows no space and no colon."""
    if "\n" in value or "\r" in value:
        return "must not contain a line break"
    if not _PATH.fullmatch(value):
        return "must be an absolute path of letters, digits and ._+@- (LD_PRELOAD allows no others)"
    if {"", ".", ".."} & set(value.split("/")[1:]):
        return "must be a plain path below /: no `.`, `..` or `//` in it, no `/` at its end"
    return None if len(value) <= _LONGEST_PATH else f"must be no longer than {_LONGEST_PATH} characters"


def link_path(value: str) -> str | None:
    """Check the path of a link: a relative one or `..` would leave the root of a rehearsal."""
    plain = _LINK.fullmatch(value) and not {".", ".."} & set(value.split("/"))
    return one_line(value) if plain else "must be an absolute path, or one that begins with ~/"


def private_address(value: str) -> str | None:
    """Check the IPv4 address of a node on its link."""
    try:
        found = IPv4Address(value)
        # Python counts these as private too.
        nobodys = found.is_loopback or found.is_reserved or found.packed[0] == 0
        return None if found.is_private and not nobodys else "must be a private IPv4 address"
    except ValueError:
        return "must be an IPv4 address such as 192.168.100.10"


def network(value: str) -> str | None:
    """Check a network in CIDR notation."""
    try:
        return None if IPv4Network(value).prefixlen else "must be a network, not all addresses"
    except ValueError:
        return "must be a network such as 192.168.1.0/24"


def one_line(value: str) -> str | None:
    """Check one line of printable text."""
    if has_credential(value):
        return _IN_URL
    return None if value and value.isprintable() else "must be one line of printable text"


def listens_elsewhere(arguments: Sequence[str]) -> bool:
    """Return whether arguments of `vllm serve` let it listen at another address than this machine's own.

    vLLM takes any beginning of an option that is no other's, and of several the last one.
    """
    for place, word in enumerate(arguments):
        option, given, value = word.partition("=")
        if option in ("--ho", "--hos", "--host"):
            address = value if given else "".join(arguments[place + 1 : place + 2])
            if address not in _LOOPBACK:
                return True
    return False


def argument(value: str) -> str | None:
    """Check an argument of `vllm serve`."""
    return _IN_ARGUMENT if gives_secret(value) else one_line(value)


def variable(value: str) -> str | None:
    """Check a variable of a unit."""
    name, equals, text = value.partition("=")
    if not equals or not _NAME.fullmatch(name):
        return "must be NAME=VALUE"
    if is_secret_name(name) or has_credential(text):
        return _IN_ARGUMENT
    return None if text.isprintable() else "must be one line of printable text"


def source(value: str) -> str | None:
    """Check a source of NCCL: a word, a path or an https URL."""
    return "must be an https URL" if value.lower().startswith("http://") else one_line(value)
