"""The text of a log as UTF-8, whatever its encoding and packing. What is no text is refused: nothing would be found."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import IO, Any

from sparkinstall.diagnose.lines import printable, take_apart
from sparkinstall.errors import BadUsage

BLOCK = 1 << 20
"""Bytes per read."""
_SAMPLE = 4096
_PASTED = 1 << 18
"""Bytes of the longest log that a person may have pasted."""
_LONG_LINE = 200
"""Bytes of a line that may be several."""
_COLOURS = re.compile(rb"\x1b\[[\d;]*m")
_MOST_IN_LINE = 3
"""How often the beginnings of vLLM's lines, or the frames of a traceback, may stand within a line."""
# How a line of vLLM, a frame and an exception begin, with a space before them.
_LEVEL = rb"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d "
_JOINED = re.compile(
    rb"[ \t]+(\((?:\w+ )?\w+ pid=\d+[^)]{0,40}\) (?:" + _LEVEL + rb")?|" + _LEVEL + rb"|\[rank\d+\]: "
    rb'|File \\?"[^"\n]+", line \d+(?=, in |\s)|(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception): )'
)

_PACKED: tuple[tuple[bytes, Callable[..., Any]], ...] = (
    (rb"\x1f\x8b\x08", gzip.open),
    (rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", bz2.open),
    (rb"\xfd7zXZ\x00", lzma.open),
)
# What else holds logs, and the program that prints them.
_FOREIGN = (
    (b"\x28\xb5\x2f\xfd", "zstdcat"),
    (b"\x04\x22\x4d\x18", "lz4cat"),
    (b"PK\x03\x04", "unzip -p"),
    (b"LPKSHHRH", "journalctl --file"),
)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Where the NUL bytes of mostly Latin text are: (width of a character, place of its only other byte).
_WIDE = (("utf-32-le", 4, 0), ("utf-32-be", 4, 3), ("utf-16-le", 2, 0), ("utf-16-be", 2, 1))
# Without what terminals and progress bars use: \a, \b, shifts, escape.
_CONTROL = bytes([*range(1, 7), *range(16, 27), *range(28, 32), 127])


def is_packed(head: bytes) -> bool:
    """Return whether a file that begins so is one that `text_of` unpacks."""
    return any(re.match(magic, head) for magic, _ in _PACKED)


def text_of(name: str, pieces: Iterator[bytes], *, unpacked: bool = False) -> Iterator[bytes]:
    """Yield a log as UTF-8. NUL bytes are left out: a hole in the file, or lines that were appended in UTF-16.

    Raises:
        BadUsage: it is no text, or a damaged archive.
    """
    head = _head(pieces)
    _refuse_foreign(name, head)
    whole = chain([head], pieces)
    for magic, unpack in _PACKED:
        if not unpacked and re.match(magic, head):
            yield from text_of(name, _unpacked(name, unpack(io.BufferedReader(_Stream(whole)))), unpacked=True)
            return
    encoding, bom = _encoding(head)
    if encoding:
        decoder = codecs.getincrementaldecoder(encoding)("replace")
        for piece in chain([head[bom:]], pieces):
            yield decoder.decode(piece).replace("\0", "").encode()
        yield decoder.decode(b"", True).encode()
        return
    checked = _checked(name, whole)
    # What was pasted is small: one piece.
    yield _with_line_ends(next(checked, b""))
    yield from checked


def _with_line_ends(piece: bytes) -> bytes:
    """Return a piece of a log in which each line of vLLM is a line again: who pastes a log may lose the line ends."""
    if len(piece) > _PASTED:
        return piece
    return b"\n".join(_parted(line) for line in piece.split(b"\n"))


def _parted(line: bytes) -> bytes:
    if len(line) < _LONG_LINE:
        return line
    bare = _COLOURS.sub(b"", line) if b"\x1b" in line else line
    if len(_JOINED.findall(bare)) < _MOST_IN_LINE:
        return line
    known = take_apart(printable(bare))
    # The words of a request stay in its line.
    if known.quoted < len(known.text):
        return line
    # Several beginnings may stand before one message.
    head = bare[: len(known.prefix.encode())]
    rest = bare[len(head) :]
    return head + _JOINED.sub(rb"\n\1", rest) if len(_JOINED.findall(rest)) >= _MOST_IN_LINE else line


def _head(pieces: Iterator[bytes]) -> bytes:
    head = b""
    for piece in pieces:
        head += piece
        # Not until a whole sample is there: a log that is followed may stay short.
        if b"\n" in head[8:] or len(head) >= _SAMPLE:
            break
    return head


def _refuse_foreign(name: str, head: bytes) -> None:
    for magic, program in _FOREIGN:
        if head.startswith(magic):
            file = "FILE" if name == "stdin" else shlex.quote(name)
            raise BadUsage(f"{name} is not text", hint=f"unpack it: `{program} {file} | sparkinstall diagnose -`")


def _checked(name: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield what is no NUL byte; refuse what is no text."""
    # None: there was no byte yet; False: only NUL bytes so far.
    is_known: bool | None = None
    for piece in pieces:
        if piece and not is_known:
            sample = piece.lstrip(b"\0")[:_SAMPLE].replace(b"\0", b"")
            is_known = bool(sample)
            if not _is_text(sample):
                raise BadUsage(
                    f"{name} is not text, so no failure could be found in it",
                    hint="name a log; unpack it first, unless gzip, bzip2 or xz has packed it",
                )
        yield piece.replace(b"\0", b"") if b"\0" in piece else piece
    if is_known is False:
        raise BadUsage(f"{name} is not text: it has only NUL bytes", hint="check that it is the right file")


def _encoding(head: bytes) -> tuple[str, int]:
    """Return the encoding that the byte order mark or the NUL bytes tell, and the size of the mark.

    "": an encoding with a byte per Latin letter.
    """
    for bom, encoding in _BOMS:
        if head.startswith(bom):
            return encoding, len(bom)
    for encoding, width, place in _WIDE:
        sample = head[: min(len(head), _SAMPLE) // width * width]
        zeros = [sample[at::width].count(0) * width / max(1, len(sample)) for at in range(width)]
        # A hole in a file has NUL bytes in every place.
        if sample and zeros[place] < 0.1 and min(zeros[:place] + zeros[place + 1 :]) > 0.5:
            return encoding, 0
    return "", 0


def _is_text(sample: bytes) -> bool:
    return len(sample) - len(sample.translate(None, _CONTROL)) <= max(2, 0.04 * len(sample))


class _Stream(io.RawIOBase):
    """Pieces as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview[int] | bytearray") -> int:  # type: ignore[override]
        while not self._rest:
            try:
                self._rest = memoryview(next(self._pieces))
            except StopIteration:
                return 0
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _unpacked(name: str, file: IO[bytes]) -> Iterator[bytes]:
    try:
        while data := file.read(BLOCK):
            yield data
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise BadUsage(f"{name} is damaged: {error}", hint="unpack the readable part: `zcat FILE | ...`") from error
