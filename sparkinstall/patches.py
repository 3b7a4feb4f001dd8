"""The patches of `patches/`: which file they change, and proof that the change is the one meant.

A patch here is bound to bytes, not to a version number: it goes only onto a file whose sha256 the table has,
and only to a result whose sha256 the table has. Whatever else stands on the disk (another release, an edit by
hand, a patch that was cut half way) is `UnknownContent`, never something to try.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from sparkinstall import schema
from sparkinstall.schema import Malformed

TABLE = "patches.yaml"

_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
_Release = Annotated[str, schema.like(_RELEASE.pattern, "a release such as 0.18.1")]
_Releases = Annotated[tuple[_Release, ...], Meta(min_length=1, title="a list of releases such as 0.18.1, at least one")]
_Sha256 = Annotated[str, schema.like("[0-9a-f]{64}", "64 hexadecimal digits")]
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class UnknownContent(Exception):
    """A file is neither of the two contents that its patch knows. Names the file and its sha256."""

    def __init__(self, path: str, found: str, wanted: str) -> None:
        super().__init__(f"{path}: sha256 {found} is not {wanted}; the file is left as it is")
        self.path, self.found = path, found


class State(Enum):
    """What a file's content is to a patch."""

    ORIGINAL = "original"
    PATCHED = "patched"
    UNKNOWN = "unknown"


class Hunk(Struct, frozen=True):
    """Lines that replace lines, with their ends; line numbers count from 1 on each side."""

    before_line: int
    before: tuple[bytes, ...]
    after_line: int
    after: tuple[bytes, ...]

    def undone(self) -> Hunk:
        """The hunk that takes this one back."""
        return Hunk(self.after_line, self.after, self.before_line, self.before)


class Variant(Struct, frozen=True):
    """One content of the target as releases ship it, and what the patch makes of it."""

    target: str
    patch: str
    original: str
    patched: str
    releases: tuple[str, ...]
    hunks: tuple[Hunk, ...]

    def state_of(self, content: bytes) -> State:
        """`UNKNOWN` means: not this variant, or a part of the patch only."""
        known = {self.original: State.ORIGINAL, self.patched: State.PATCHED}
        return known.get(digest(content), State.UNKNOWN)


class KernelRange(Struct, frozen=True, forbid_unknown_fields=True):
    """Kernel classes to name in `VLLM_DISABLED_KERNELS` for releases from `since` on and before `below`.

    `without_patch`: these names are the whole fix by themselves, even where the patch cannot be applied.
    """

    since: _Release
    disable: tuple[str, ...]
    without_patch: bool
    below: _Release | None = None

    def holds(self, release: str) -> bool:
        """Whether `release` lies in the range; suffixes such as `+cu130` or `rc1` do not count."""
        at = _release_key(release)
        return _release_key(self.since) <= at and (self.below is None or at < _release_key(self.below))


class PatchSet(Struct, frozen=True):
    """One fix of a file over all releases of the package: its variants, and what goes with the patch."""

    name: str
    fix: int
    target: str
    variants: tuple[Variant, ...]
    kernels: tuple[KernelRange, ...]

    def variant_of(self, content: bytes) -> Variant | None:
        """The variant whose original or patched content this is; `variant.state_of(content)` says which."""
        return next((v for v in self.variants if v.state_of(content) is not State.UNKNOWN), None)

    def state_of(self, content: bytes) -> State:
        """The state of a file that any release may have shipped."""
        variant = self.variant_of(content)
        return variant.state_of(content) if variant else State.UNKNOWN

    def known(self, content: bytes) -> Variant:
        """As `variant_of`, but raises `UnknownContent` where there is none."""
        variant = self.variant_of(content)
        if variant is None:
            raise UnknownContent(self.target, digest(content), f"known to the patch {self.name}")
        return variant

    def kernels_for(self, release: str) -> KernelRange | None:
        """What `VLLM_DISABLED_KERNELS` must name for `release`; None for a release older than the table."""
        return next((k for k in self.kernels if k.holds(release)), None)


class _Variant(Struct, frozen=True, forbid_unknown_fields=True):
    """A row of `variants` in the table."""

    releases: _Releases
    patch: str
    original: _Sha256
    patched: _Sha256


class _PatchSet(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    fix: int
    target: str
    variants: tuple[_Variant, ...]
    kernels: tuple[KernelRange, ...]


class _Table(Struct, frozen=True, forbid_unknown_fields=True):
    patches: tuple[_PatchSet, ...]


def digest(content: bytes) -> str:
    """The sha256 that the table speaks of, in hex."""
    return sha256(content).hexdigest()


def apply(content: bytes, variant: Variant) -> bytes:
    """The patched content.

    Raises `UnknownContent` unless `content` is exactly the original and the result the table's.
    """
    return _turned(content, variant, variant.original, variant.patched, variant.hunks)


def revert(content: bytes, variant: Variant) -> bytes:
    """The original, byte for byte. Raises `UnknownContent` unless `content` is exactly the patched one."""
    back = tuple(hunk.undone() for hunk in variant.hunks)
    return _turned(content, variant, variant.patched, variant.original, back)


def _turned(content: bytes, variant: Variant, source: str, result: str, hunks: Sequence[Hunk]) -> bytes:
    _require(variant.target, content, source)
    lines = content.splitlines(keepends=True)
    # From the end, so that the line numbers of the hunks before stay true.
    for hunk in reversed(hunks):
        start = hunk.before_line - 1
        lines[start : start + len(hunk.before)] = hunk.after
    turned = b"".join(lines)
    # Context is not compared line by line: these two digests say more than any context could.
    _require(f"{variant.target} after {variant.patch}", turned, result)
    return turned


def _require(path: str, content: bytes, wanted: str) -> None:
    found = digest(content)
    if found != wanted:
        raise UnknownContent(path, found, wanted)


def load(directory: Path) -> tuple[PatchSet, ...]:
    """The patch sets of `directory/patches.yaml` with their patches read.

    Raises `Malformed`: bad YAML, a missing, unknown or ill-typed entry, a patch that is absent or is for
    another file, a sha256 that is none or that stands in the table twice.
    """
    table = schema.read_file(_Table, directory / TABLE)
    sets = tuple(
        PatchSet(each.name, each.fix, each.target, _variants(each, directory), each.kernels) for each in table.patches
    )
    _refuse_doubles(sets)
    return sets


def _variants(given: _PatchSet, directory: Path) -> tuple[Variant, ...]:
    return tuple(_variant(each, given.target, directory) for each in given.variants)


def _variant(given: _Variant, target: str, directory: Path) -> Variant:
    try:
        hunks = tuple(parse((directory / given.patch).read_bytes(), target))
    except (OSError, ValueError) as failure:
        raise Malformed(TABLE, f"{given.patch}: {failure}") from failure
    return Variant(target, given.patch, given.original, given.patched, given.releases, hunks)


def _refuse_doubles(sets: Sequence[PatchSet]) -> None:
    seen: set[str] = set()
    for variant in (v for patch_set in sets for v in patch_set.variants):
        for known in (variant.original, variant.patched):
            if known in seen:
                raise Malformed(TABLE, f"sha256 {known} stands there twice")
            seen.add(known)


def parse(patch: bytes, target: str) -> Iterator[Hunk]:
    """The hunks of a unified diff of the one file `target` (`-p1` paths).

    Own lines rather than a library's: whatthepatch loses line ends and a missing newline at the file's end.
    Raises ValueError where it is not such a diff.
    """
    head, *hunks = re.split(rb"^(?=@@ )", patch, flags=re.MULTILINE)
    if head.splitlines() != [f"--- a/{target}".encode(), f"+++ b/{target}".encode()]:
        raise ValueError(f"not a diff of {target} alone")
    if not hunks:
        raise ValueError("no hunk")
    return map(_hunk, hunks)


def _hunk(text: bytes) -> Hunk:
    head, *body = text.splitlines(keepends=True)
    numbers = _HUNK.match(head)
    if not numbers:
        raise ValueError(f"not a hunk: {head!r}")
    lines = _hunk_lines(body)
    before = tuple(rest for mark, rest in lines if mark != b"+")
    after = tuple(rest for mark, rest in lines if mark != b"-")
    before_line, before_count, after_line, after_count = map(int, numbers.groups(default=b"1"))
    # A second file's "--- a/..." would pass for a removed line; the counts tell.
    if (len(before), len(after)) != (before_count, after_count):
        raise ValueError(f"{len(before)} and {len(after)} lines under {head!r}")
    return Hunk(before_line, before, after_line, after)


def _hunk_lines(body: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    lines: list[tuple[bytes, bytes]] = []
    for line in body:
        mark, rest = line[:1], line[1:]
        # "\ No newline at end of file" is about the line before it.
        if mark == b"\\" and lines:
            mark, rest = lines.pop()
            rest = rest.removesuffix(b"\n")
        elif mark not in (b" ", b"-", b"+"):
            raise ValueError(f"not a line of a hunk: {line!r}")
        lines.append((mark, rest))
    return lines


def _release_key(release: str) -> tuple[int, int, int]:
    numbers = _RELEASE.match(release)
    if not numbers:
        raise ValueError(f"{release!r} is not a release such as 0.18.1")
    major, minor, patch = numbers.groups(default="0")
    return int(major), int(minor), int(patch)
