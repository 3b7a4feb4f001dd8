"""What a setting must be beyond its type: each check gives the complaint about a value, or None."""

import re
from ipaddress import IPv4Address, IPv4Network

_PATH = re.compile(r"/[A-Za-z0-9._+@/-]*")
_LINK = re.compile(r"(~?)(/[^/\0]+)+")
# The environment's scripts carry the prefix in their first line, of which the kernel reads 255 bytes.
_LONGEST_PATH = 200


def safe_path(value: str) -> str | None:
    """Why a path cannot be used, or None. LD_PRELOAD, which must carry it, takes no space and no colon."""
    if "\n" in value or "\r" in value:
        return "must not contain a line break"
    if not _PATH.fullmatch(value):
        return "must be an absolute path of letters, digits and ._+@- (LD_PRELOAD can carry no other)"
    if {"", ".", ".."} & set(value.split("/")[1:]):
        return "must be a plain path below /: no `.`, `..` or `//` in it, no `/` at its end"
    return None if len(value) <= _LONGEST_PATH else f"must be no longer than {_LONGEST_PATH} characters"


def link_path(value: str) -> str | None:
    """A link's path is looked for below the root of a rehearsal: a relative one or `..` would lead out of it."""
    plain = _LINK.fullmatch(value) and not {".", ".."} & set(value.split("/"))
    return one_line(value) if plain else "must be an absolute path, or one that begins with ~/"


def private_address(value: str) -> str | None:
    try:
        found = IPv4Address(value)
        # Python counts these among the private ones too.
        nobodys = found.is_loopback or found.is_reserved or found.packed[0] == 0
        return None if found.is_private and not nobodys else "must be a private IPv4 address"
    except ValueError:
        return "must be an IPv4 address such as 192.168.100.10"


def network(value: str) -> str | None:
    try:
        return None if IPv4Network(value).prefixlen else "must be a network and not the whole world"
    except ValueError:
        return "must be a network such as 192.168.1.0/24"


def one_line(value: str) -> str | None:
    return None if value and value.isprintable() else "must be one line of printable text"


def argument(value: str) -> str | None:
    if value.partition("=")[0] in ("--api-key", "--hf-token"):
        return "must carry no secret: the unit and the list of processes show it to everybody"
    return one_line(value)


def source(value: str) -> str | None:
    if value.startswith("http://"):
        return "must be an https URL"
    if "://" in value and "@" in value.split("://", 1)[1].split("/", 1)[0]:
        return "must not carry a name and password: download it yourself and name the file"
    return one_line(value)
