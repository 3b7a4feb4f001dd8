"""The archive of a bundle: a tar whose every byte follows from its manifest, so that any other byte is damage.

install.sh runs this file before the tool exists: it needs nothing but Python.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = 1
MANIFEST, DIGEST = "manifest.json", "manifest.sha256"
INSTALLER = "sparkinstall/install.sh"
LOCK = "sparkinstall/requirements.lock"
PLATFORMS = ("aarch64", "x86_64")

AGAIN = "copy the file again, or create it again with `sparkinstall bundle create`"
ANOTHER_TMPDIR = "free some space there, or set TMPDIR to a folder on another disk"
DAMAGED = "`sparkinstall cache verify` removes what is damaged; then run the same command again"
OWN_TOOL = "use the tool in it: `tar -xf FILE sparkinstall && ./sparkinstall/install.sh --bundle FILE`"

OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that reading a bundle does not give: they are of the place that its contents go to."""

_BLOCK, _PART = 512, 1 << 20
_LARGEST_MANIFEST = 16 << 20
_LARGEST_MEMBER = 1 << 50
# A file that is as large has its size in a record before its header.
_LARGE = 8**11
# 1980-01-02: the tool is packed as a zip when it is installed, and a zip knows no earlier year.
_TIME = 315619200
_PATH = re.compile(r"(?:debs|models|nccl|sparkinstall|tool|wheels)(?:/[A-Za-z0-9_][A-Za-z0-9._+!~=,@%-]*)+")
# Before the commit, a name of the hub: that of an organization and that of the model, or the latter alone.
_MODEL = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,95}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}@[0-9a-f]{40}")
_HEX = re.compile(r"[0-9a-f]{64}")
_BLOB = re.compile(r"(models/[^/]+)/blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})")
# What a manifest says is shown on terminals: no control characters.
_TEXT = re.compile(r"[A-Za-z0-9._+~: -]{0,100}")
_KINDS = {b"0": "the file", b"1": "the link", b"2": "the link", b"5": "the folder"}


class Refused(Exception):
    """The file is no bundle, is damaged, or does not fit."""

    def __init__(self, message: str, hint: str = AGAIN) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


@dataclass(frozen=True)
class Member:
    """A file in a bundle; `size` in bytes."""

    path: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Manifest:
    """What is in a bundle, and for which nodes it is.

    `python`: of the stack. `nodes`: 1, or more if it also has what only several nodes need. `packages`: the Debian
    packages that a node needs, with their versions; "" if they are not in the bundle. `system`: the distribution that
    those in it are for. `kept`: files that an update leaves out, because the bundle whose manifest has the sha256
    `base` has them. `models`: of the hub, as ORG/NAME@COMMIT.
    """

    tool: str
    stack: str
    platform: str
    python: str
    nodes: int
    members: tuple[Member, ...]
    packages: Mapping[str, str] = field(default_factory=dict)
    system: str = ""
    base: str = ""
    kept: tuple[Member, ...] = ()
    models: tuple[str, ...] = ()

    def encoded(self) -> bytes:
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n").encode()

    @property
    def digest(self) -> str:
        return sha256(self.encoded())

    @property
    def everything(self) -> tuple[Member, ...]:
        """The files of the bundle, and those of the bundle that it updates."""
        return (*self.members, *self.kept)

    def folder(self, name: str) -> list[Member]:
        """Return the files of one folder."""
        return [each for each in self.members if each.path.startswith(f"{name}/")]

    @property
    def size(self) -> int:
        """The size of the archive in bytes."""
        text = self.encoded()
        sizes = {MANIFEST: len(text), DIGEST: len(_digest_text(text))} | {each.path: each.size for each in self.members}
        return sum(len(header(path, size)) + size + _padding(size) for path, size in sizes.items()) + 2 * _BLOCK


def decoded(content: bytes) -> Manifest:
    """Return the manifest in a JSON text.

    Raises:
        Refused: it is of a newer format, damaged, or lists what no bundle has.
    """
    try:
        data = json.loads(content)
        version = data.pop("format")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise Refused("its manifest is damaged") from None
    if isinstance(version, int) and version > FORMAT:
        raise Refused(f"a newer sparkinstall made it (format {version}, this one reads {FORMAT})", OWN_TOOL)
    try:
        manifest = _manifest(data)
        if manifest.encoded() != content:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Refused("its manifest is damaged") from None
    _require_sound(manifest)
    return manifest


def _manifest(data: dict[str, Any]) -> Manifest:
    texts, lists = ("tool", "stack", "platform", "python", "system", "base"), ("members", "kept")
    shown = [*(data[name] for name in texts), *data["packages"], *data["packages"].values()]
    if not all(isinstance(text, str) and _TEXT.fullmatch(text) for text in shown):
        raise TypeError
    if not isinstance(data["nodes"], int) or data["nodes"] < 1:
        raise TypeError
    files = {name: tuple(Member(**each) for each in data[name]) for name in lists}
    for each in (*files["members"], *files["kept"]):
        if not isinstance(each.path, str) or not isinstance(each.size, int) or not _HEX.fullmatch(each.sha256):
            raise TypeError
    if not all(isinstance(each, str) and _MODEL.fullmatch(each) for each in data["models"]):
        raise TypeError
    return Manifest(**{**data, **files, "models": tuple(data["models"])})


def _require_sound(manifest: Manifest) -> None:
    """Refuse a manifest that lists what could not have been packed, whoever wrote it."""
    paths = [each.path for each in manifest.members]
    for path in (each.path for each in manifest.everything):
        if path.startswith("/") or ".." in path.split("/"):
            raise Refused(f"its manifest lists a path that leaves the folder: {path!a}", "do not use it")
        if not _PATH.fullmatch(path):
            raise Refused(f"its manifest lists a path that no bundle has: {path!a}", "do not use it")
    if twice := {path for path in paths if paths.count(path) > 1} if len(set(paths)) < len(paths) else set():
        raise Refused(f"its manifest lists {min(twice)} twice", "do not use it")
    if any(len(each.path) > 900 for each in manifest.everything):
        raise Refused("its manifest lists a path that is too long", "do not use it")
    if paths != sorted(paths) or not all(0 <= each.size < _LARGEST_MEMBER for each in manifest.everything):
        raise Refused("its manifest is damaged")
    if manifest.platform not in PLATFORMS:
        raise Refused(f"it is for an unknown architecture, {manifest.platform!a}")
    _require_sound_models(manifest)
    for each in (*manifest.folder("tool"), *manifest.folder("wheels")):
        if not _fits(each.name, manifest.platform):
            raise Refused(f"{each.path} is not a wheel for {manifest.platform}", "do not use it")


def _require_sound_models(manifest: Manifest) -> None:
    """Refuse files of models that no cache of the hub has, or whose name is another sha256 than theirs."""
    lists = {f"models/{_of_model(each)}.json" for each in manifest.models}
    folders = {each.rpartition("/")[0] for each in lists}
    found = [each for each in manifest.everything if each.path.startswith("models/")]
    if not lists <= {each.path for each in found}:
        raise Refused("its manifest lists a model without its files", "do not use it")
    for each in found:
        blob = _BLOB.fullmatch(each.path)
        if each.path not in lists and not (blob and blob[1] in folders):
            raise Refused(f"its manifest lists a path that no bundle has: {each.path!a}", "do not use it")
        if len(each.name) == len(each.sha256) and each.name != each.sha256:
            raise Refused(f"its manifest lists {each.path} with another hash than its name", "do not use it")


def _of_model(listed: str) -> str:
    name, _, commit = listed.partition("@")
    return f"{name.replace('/', '--')}/{commit}"


def _fits(wheel: str, machine: str) -> bool:
    tags = wheel.removesuffix(".whl").rpartition("-")[2].split(".")
    return wheel.endswith(".whl") and any(tag == "any" or tag.endswith(f"_{machine}") for tag in tags)


# --- writing

Content = Path | bytes
OnBytes = Callable[[int, int], None]


def write(out: BinaryIO, manifest: Manifest, contents: Mapping[str, Content], on_bytes: OnBytes) -> None:
    """Write a bundle; the same manifest gives the same bytes.

    Args:
        contents: the file or the bytes of each member, by its path.
        on_bytes: called with (bytes so far, total bytes).

    Raises:
        Refused: a file is no longer what the manifest says.
    """
    text, done, total = manifest.encoded(), 0, manifest.size
    own = {MANIFEST: text, DIGEST: _digest_text(text)}
    for path, content in own.items():
        out.write(header(path, len(content)) + content + bytes(_padding(len(content))))
    for member in manifest.members:
        out.write(header(member.path, member.size))
        found = hashlib.sha256()
        with _opened(contents[member.path]) as file:
            while part := file.read(_PART):
                found.update(part)
                out.write(part)
                done += len(part)
                on_bytes(done, total)
        if found.hexdigest() != member.sha256:
            raise Refused(f"{contents[member.path]!s:.200} does not have its hash any more", DAMAGED)
        out.write(bytes(_padding(member.size)))
    out.write(bytes(2 * _BLOCK))


def _opened(content: Content) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb")


def _digest_text(manifest: bytes) -> bytes:
    """Return what `sha256sum --check` reads."""
    return f"{sha256(manifest)}  {MANIFEST}\n".encode()


def header(path: str, size: int) -> bytes:
    """Return what is before a file, as POSIX's pax has it. Not by tarfile, whose bytes differ between versions."""
    mode = 0o755 if path == INSTALLER else 0o644
    records = {"path": path} if len(path) > 100 else {}
    if size >= _LARGE:
        records["size"] = str(size)
    own = _block(path[:100], 0 if "size" in records else size, mode)
    if not records:
        return own
    lines = "".join(_record(key, value) for key, value in records.items()).encode()
    return _block("long-name", len(lines), 0o644, b"x") + lines + bytes(_padding(len(lines))) + own


def _record(key: str, value: str) -> str:
    """Return a line that begins with its own length."""
    rest = f" {key}={value}\n"
    length = len(rest) + len(str(len(rest)))
    length = len(rest) + len(str(length))
    return f"{length}{rest}"


def _block(path: str, size: int, mode: int, kind: bytes = b"0") -> bytes:
    start = path.encode().ljust(100, b"\0") + b"%07o\0" % mode + b"0000000\0" * 2 + b"%011o\0%011o\0" % (size, _TIME)
    rest = kind + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2
    block = (start + b" " * 8 + rest).ljust(_BLOCK, b"\0")
    return start + b"%06o\0 " % sum(block) + block[156:]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _padding(size: int) -> int:
    return -size % _BLOCK


# --- reading

Take = Callable[[Member], "AbstractContextManager[BinaryIO] | None"]


def take_nothing(_: Member) -> None:
    return None


def silent(done: int, total: int) -> None:
    del done, total


def manifest_of(path: Path) -> Manifest:
    """Return the manifest of a bundle, and read no more of it.

    Raises:
        Refused: it is not a bundle, or the manifest is damaged or of a newer format.
        OSError: it cannot be read.
    """
    with _begun(path) as (_, manifest):
        return manifest


def read(path: Path, on_bytes: OnBytes = silent, take: Take = take_nothing) -> Manifest:
    """Read a whole bundle and compare every byte.

    Args:
        on_bytes: called with (bytes so far, total bytes).
        take: returns where to write a member, or None; its context ends well only if the member is whole.

    Raises:
        Refused: any byte is missing, too many or wrong.
        OSError: it cannot be read, or a member cannot be written.
    """
    with _begun(path) as (file, manifest):
        size = os.fstat(file.fileno()).st_size
        if size < manifest.size:
            raise Refused(f"it ends after {size} of {manifest.size} bytes: it was cut, or is still being copied")
        if size > manifest.size:
            raise Refused(f"it has {size - manifest.size} bytes more than its manifest lists")
        for member in manifest.members:
            _require_header(file, member)
            with take(member) or contextlib.nullcontext() as out:
                _copy(file, member, out, lambda: on_bytes(file.tell(), size))
        if file.read() != bytes(2 * _BLOCK):
            raise Refused("its end is damaged")
        return manifest


@contextmanager
def _begun(path: Path) -> Iterator[tuple[BinaryIO, Manifest]]:
    """Open a bundle behind its manifest, which was checked."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Refused("it is not a regular file", "name the archive itself")
        content = _own_member(file, MANIFEST)
        digest = _own_member(file, DIGEST)
        # A newer format may have another digest; what it says of itself is read first.
        manifest = decoded(content)
        if digest != _digest_text(content):
            raise Refused("its manifest is damaged")
        yield file, manifest


def _own_member(file: BinaryIO, path: str) -> bytes:
    block = file.read(_BLOCK)
    size = block[124:135]
    if not re.fullmatch(rb"[0-7]{11}", size) or block != header(path, int(size, 8)):
        raise Refused(
            "it is no bundle of sparkinstall, or its beginning is damaged",
            "name a file that `sparkinstall bundle create` made",
        )
    if int(size, 8) > _LARGEST_MANIFEST:
        raise Refused("its manifest is larger than that of any bundle", "do not use it")
    content = file.read(int(size, 8))
    padding = file.read(_padding(len(content)))
    if len(content) < int(size, 8) or padding != bytes(_padding(len(content))):
        raise Refused("it was cut or damaged in its manifest")
    return content


def _require_header(file: BinaryIO, member: Member) -> None:
    expected = header(member.path, member.size)
    block = file.read(len(expected))
    if block == expected:
        return
    what = _KINDS.get(block[156:157], "something")
    name = block[:100].rstrip(b"\0").decode("ascii", "backslashreplace")
    listed = f"{member.path} with {member.size} bytes"
    raise Refused(f"it has {what} {name!a} where its manifest lists {listed}: it is damaged, or was changed")


def _copy(file: BinaryIO, member: Member, out: BinaryIO | None, tell: Callable[[], None]) -> None:
    left, found = member.size, hashlib.sha256()
    while left:
        if not (part := file.read(min(left, _PART))):
            raise Refused(f"it was cut in {member.path}")
        found.update(part)
        if out is not None:
            out.write(part)
        left -= len(part)
        tell()
    if found.hexdigest() != member.sha256:
        raise Refused(f"{member.path} is damaged: it does not have its hash")
    if file.read(_padding(member.size)) != bytes(_padding(member.size)):
        raise Refused(f"it is damaged behind {member.path}")


def reading_hint(error: OSError) -> str:
    """Return what to do about a bundle that cannot be read."""
    return "make it readable for you: `chmod a+r FILE`" if error.errno in (errno.EACCES, errno.EPERM) else AGAIN


# --- for install.sh


def main(argv: Iterable[str]) -> int:
    """Check a bundle, and unpack the tool's wheels into a folder; `argv`: bundle, folder, requirements.lock."""
    bundle, into, lock = map(Path, argv)
    try:
        _unpack_tool(bundle, into, lock.read_bytes())
    except Refused as refused:
        return _failed(f"the bundle {bundle} cannot be used: {refused.message}", refused.hint)
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in OF_WRITING:
            return _failed(f"the bundle {bundle} cannot be unpacked to {into}: {why}", ANOTHER_TMPDIR)
        return _failed(f"the bundle {bundle} cannot be read: {why}", reading_hint(error))
    return 0


def _failed(message: str, hint: str) -> int:
    print(f"✗ {message}\n  do    {hint}", file=sys.stderr)
    return 1


def _unpack_tool(bundle: Path, into: Path, lock: bytes) -> None:
    manifest = manifest_of(bundle)
    require_machine(manifest, platform.machine())
    if [each.sha256 for each in manifest.members if each.path == LOCK] != [sha256(lock)]:
        raise Refused(f"it was made by another sparkinstall than this one ({manifest.tool})", OWN_TOOL)

    into.mkdir(exist_ok=True)

    def take(member: Member) -> AbstractContextManager[BinaryIO] | None:
        return open(into / member.name, "xb") if member.path.startswith("tool/") else None

    tool = read(bundle, take=take).folder("tool")
    # uv compares the others' hashes, but nothing its own before it runs.
    if not any(each.name.startswith("uv-") for each in tool):
        raise Refused("it has no uv")
    for each in tool:
        if f"sha256:{each.sha256}".encode() not in lock:
            raise Refused(f"{each.path} does not have a hash of requirements.lock", "do not use it")


def require_machine(manifest: Manifest, machine: str) -> None:
    """Refuse a bundle for another architecture.

    Raises:
        Refused: it is for another one.
    """
    if manifest.platform != machine:
        raise Refused(
            f"it is for {manifest.platform}, and this is {machine}",
            f"create one for it: `sparkinstall bundle create --platform {machine}`",
        )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
