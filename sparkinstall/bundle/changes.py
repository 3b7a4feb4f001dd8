"""What differs between two bundles."""

import re
from collections.abc import Iterable

from msgspec import Struct

from sparkinstall.bundle import contents
from sparkinstall.payloads.bundle_archive import Manifest, Member
from sparkinstall.stacks import canonical

_DEB = re.compile(r"([^_]+)_([^_]+)_[^_]+\.deb")


class Change(Struct, frozen=True):
    """A package or a file in one of two bundles or in both; sizes in bytes, "" and 0 where it is missing.

    `folder`: `wheels`, `tool` (what the tool itself needs), `debs`, `nccl`, `models` or `sparkinstall`.
    """

    folder: str
    name: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int


class Changes(Struct, frozen=True):
    """The changes, and the size of what only the newer bundle has."""

    stack_before: str
    stack_after: str
    changes: tuple[Change, ...]
    bytes_new: int


def changes(old: Manifest, new: Manifest) -> Changes:
    """Compare the contents of two bundles, with those of the bundles that they update."""
    before, after = _by_name(old.everything), _by_name(new.everything)
    found = [
        _change(key, before.get(key, []), after.get(key, []))
        for key in sorted({*before, *after})
        if _hashes(before.get(key, [])) != _hashes(after.get(key, []))
    ]
    there = _hashes(old.everything)
    size = _size(each for each in new.everything if each.sha256 not in there)
    return Changes(old.stack, new.stack, tuple(found), size)


def _hashes(members: Iterable[Member]) -> set[str]:
    return {each.sha256 for each in members}


_Key = tuple[str, str]


def _by_name(members: Iterable[Member]) -> dict[_Key, list[Member]]:
    """Group members by folder and package; a package of the tool has a wheel for each Python."""
    found: dict[_Key, list[Member]] = {}
    for each in members:
        found.setdefault((each.path.partition("/")[0], _package(each)[0]), []).append(each)
    return found


def _package(member: Member) -> tuple[str, str]:
    """Return name and version; of a file that is no package its path below the folder, and a part of its hash.

    The files of a model are one package, whose version is the commit.
    """
    folder, _, inner = member.path.partition("/")
    if folder == contents.MODELS:
        is_list = inner.endswith(".json")
        return inner.partition("/")[0].replace("--", "/"), member.name[:12] if is_list else ""
    if folder in (contents.WHEELS, contents.TOOL_WHEELS):
        name, version = member.name.split("-")[:2]
        return canonical(name), version
    if match := _DEB.fullmatch(member.name):
        return match[1], match[2]
    return inner, member.sha256[:12]


def _change(key: _Key, before: list[Member], after: list[Member]) -> Change:
    return Change(*key, _versions(before), _versions(after), _size(before), _size(after))


def _versions(members: list[Member]) -> str:
    return ", ".join(sorted({version for each in members if (version := _package(each)[1])}))


def _size(members: Iterable[Member]) -> int:
    return sum(each.size for each in members)
