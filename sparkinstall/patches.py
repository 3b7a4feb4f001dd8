"""The patches in `patches/`: the files they change, and their hashes before and after.

A patch is bound to bytes, not to a version number: it applies only to a file whose sha256 is in the table, and only
with a result whose sha256 is in the table. Any other content (another release, a manual edit, half a patch) is
`UnknownContent` and is never patched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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
    """A file is neither original nor patched. Names the file and its sha256."""

    def __init__(self, path: str, found: str, wanted: str) -> None:
        super().__init__(f"{path}: sha256 {found} is not {wanted}; the file is left as it is")
        self.path, self.found = path, found


class Hunk(Struct, frozen=True):
    """Lines that replace other lines, with line ends; 1-based line numbers on each side."""

    before_line: int
    before: tuple[bytes, ...]
    after_line: int
    after: tuple[bytes, ...]

    def undone(self) -> Hunk:
        return Hunk(self.after_line, self.after, self.before_line, self.before)


class _VariantRow(Struct, frozen=True, forbid_unknown_fields=True):
    """A row of `variants` in the table."""

    releases: _Releases
    patch: str
    original: _Sha256
    patched: _Sha256


class Variant(_VariantRow, frozen=True):
    """One original content of the target file, and its patched content."""

    target: str
    hunks: tuple[Hunk, ...]


class KernelRange(Struct, frozen=True, forbid_unknown_fields=True):
    """Kernel classes for `VLLM_DISABLED_KERNELS` in releases from `since` to before `below`.

    `without_patch`: these names are the complete fix, even if the patch cannot be applied.
    """

    since: _Release
    disable: tuple[str, ...]
    without_patch: bool
    below: _Release | None = None

    def holds(self, release: str) -> bool:
        """Return whether `release` is in the range; suffixes such as `+cu130` or `rc1` are ignored."""
        at = _release_key(release)
        return _release_key(self.since) <= at and (self.below is None or at < _release_key(self.below))


class _PatchSetRow(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    fix: int
    target: str
    variants: tuple[_VariantRow, ...]
    kernels: tuple[KernelRange, ...]


class PatchSet(_PatchSetRow, frozen=True):
    """The patch of one file for all releases of the package: its variants, and the kernels to disable with it."""

    variants: tuple[Variant, ...]

    def known(self, content: bytes) -> Variant:
        """Return the variant with this original or patched content.

        Raises `UnknownContent` if there is none: another release, or a partly applied patch.
        """
        found = digest(content)
        for variant in self.variants:
            if found in (variant.original, variant.patched):
                return variant
        raise UnknownContent(self.target, found, f"known to the patch {self.name}")

    def kernels_for(self, release: str) -> KernelRange | None:
        """Return the kernels to disable for `release`; None for a release older than the table."""
        return next((k for k in self.kernels if k.holds(release)), None)


class _Table(Struct, frozen=True, forbid_unknown_fields=True):
    patches: tuple[_PatchSetRow, ...]


def digest(content: bytes) -> str:
    """Return the sha256 in hex, as in the table."""
    return sha256(content).hexdigest()


def apply(content: bytes, variant: Variant) -> bytes:
    """Return the patched content.

    Raises `UnknownContent` unless `content` is exactly the original and the result the table's.
    """
    return _turned(content, variant, variant.original, variant.patched, variant.hunks)


def revert(content: bytes, variant: Variant) -> bytes:
    """Return the original content. Raises `UnknownContent` unless `content` is exactly the patched one."""
    back = tuple(hunk.undone() for hunk in variant.hunks)
    return _turned(content, variant, variant.patched, variant.original, back)


def _turned(content: bytes, variant: Variant, source: str, result: str, hunks: Sequence[Hunk]) -> bytes:
    _require(variant.target, content, source)
    lines = content.splitlines(keepends=True)
    # From the end, so that the line numbers of earlier hunks stay valid.
    for hunk in reversed(hunks):
        start = hunk.before_line - 1
        lines[start : start + len(hunk.before)] = hunk.after
    turned = b"".join(lines)
    # Context lines need no comparison: the two digests prove more.
    _require(f"{variant.target} after {variant.patch}", turned, result)
    return turned


def _require(path: str, content: bytes, wanted: str) -> None:
    found = digest(content)
    if found != wanted:
        raise UnknownContent(path, found, wanted)


def load(directory: Path) -> tuple[PatchSet, ...]:
    """Return the patch sets of `directory/patches.yaml` with their patches.

    Raises `Malformed`: bad YAML, a missing, unknown or invalid entry, a patch that is missing or for another file, a
    sha256 that is invalid or repeated.
    """
    table = schema.read_file(_Table, directory / TABLE)
    sets = tuple(_with_patches(each, directory) for each in table.patches)
    _refuse_doubles(sets)
    return sets


def _with_patches(row: _PatchSetRow, directory: Path) -> PatchSet:
    variants = tuple(_with_patch(each, row.target, directory) for each in row.variants)
    return PatchSet(row.name, row.fix, row.target, variants, row.kernels)


def _with_patch(row: _VariantRow, target: str, directory: Path) -> Variant:
    try:
        hunks = tuple(parse((directory / row.patch).read_bytes(), target))
    except (OSError, ValueError) as failure:
        raise Malformed(TABLE, f"{row.patch}: {failure}") from failure
    return Variant(row.releases, row.patch, row.original, row.patched, target, hunks)


def _refuse_doubles(sets: Sequence[PatchSet]) -> None:
    seen: set[str] = set()
    for variant in (v for patch_set in sets for v in patch_set.variants):
        for known in (variant.original, variant.patched):
            if known in seen:
                raise Malformed(TABLE, f"sha256 {known} is repeated")
            seen.add(known)


def parse(patch: bytes, target: str) -> Iterator[Hunk]:
    """Yield the hunks of a unified diff of the single file `target` (`-p1` paths).

    Not a library: whatthepatch loses line ends and a missing newline at the end of the file.
    Raises ValueError for anything else.
    """
    head, *hunks = re.split(rb"^(?=@@ )", patch, flags=re.MULTILINE)
    if head.splitlines() != [f"--- a/{target}".encode(), f"+++ b/{target}".encode()]:
        raise ValueError(f"not a diff of {target} only")
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
    # A second file's "--- a/..." would look like a removed line; the counts reveal it.
    if (len(before), len(after)) != (before_count, after_count):
        raise ValueError(f"{len(before)} and {len(after)} lines under {head!r}")
    return Hunk(before_line, before, after_line, after)


def _hunk_lines(body: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    lines: list[tuple[bytes, bytes]] = []
    for line in body:
        mark, rest = line[:1], line[1:]
        # "\ No newline at end of file" refers to the line before it.
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
