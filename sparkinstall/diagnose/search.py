"""Search a log of any size, read once as a stream, for known failures.

An automaton finds all literals at once, so that only lines with one of them are tried against a regex. The result
does not depend on how the stream is cut into blocks.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter

from ahocorasick_rs import BytesAhoCorasick, Implementation
from msgspec import Struct

from sparkinstall.diagnose.signatures import Signature

REACH = 2048
"""Bytes around a literal in which its regex is searched, within the line."""
LONG = 1 << 16
"""Bytes after which the beginning of a line is searched before its end has arrived."""
MOST = 10_000
"""Lines of one failure that are counted."""
MOST_WEIGHED = 20_000
"""Suspicious lines that are weighed."""
SHOWN = 3
"""Lines of one failure that are kept."""
TELLING_KEPT = 100
"""Suspicious lines that are kept."""
_WIDEST = 400

_COLOURS = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
# Characters that would move the cursor, ring the bell or change the text direction of a terminal.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
# Lines of journald and NCCL begin with the host name.
_JOURNAL = re.compile(r"^(\w{3} [ \d]\d [\d:]{8}|\d{4}-\d\d-\d\dT[\d:.,+-]+Z?) \S+ (?=[\w.@/()-]+(?:\[\d+\])?:)")
_NCCL = re.compile(r"(?<![\w.-])[\w.-]+:(?=\d+:\d+ \[\d+\] )")

_TELLING_WORDS = (
    "Error", "ERROR", "Exception:", "FATAL", "Fatal", "fatal", "CRITICAL", "core dumped", "Segmentation fault", "panic",
    "NCCL WARN", "Main process exited", "Failed with result", "abort", "Abort", "cannot open shared object",
)  # fmt: skip
# The level of a logger alone weighs least.
_WEIGHTS = (
    (3, re.compile(r"^(?:[\w.]*\.)?[A-Z]\w*(?:Error|Exception|Exit)\b: \S|^(?:E\d{4}|F\d{4}) ")),
    (3, re.compile(r"Segmentation fault|core dumped|\bFATAL\b|\b[Ff]atal error\b|\bpanic\b|cannot open shared object")),
    (2, re.compile(r"NCCL WARN|Main process exited|Failed with result|\bCRITICAL\b|\bAborted\b|\bterminate called\b")),
    (1, re.compile(r"\bERROR\b|\b\w*Error: \S|\b[Ee]rror: \S|\b\w*Exception: \S")),
)
_PREFIXES = re.compile(
    r"^(?:\s|\([\w.]+(?: [\w.]+)? (?:pid|rank)=[^)]*\)|\[rank\d+\]:|(?:ERROR|CRITICAL|FATAL) +\d\d-\d\d [\d:.]+"
    r"|\[[\w./]+\.\w+:\d+\]|\d{4}-\d\d-\d\d[ T][\d:.,]+|(?:ERROR|CRITICAL)\b:?|[\w./]+\.py:\d+ --"
    r"|[\w./@()-]+\[\d+\]:|\w{3} [ \d]\d [\d:]{8})+"
)
_NO_NEWS = re.compile(r"^(?:Traceback \(most recent|File \"|During handling of|The above exception|[\^~ ]*$|\.\.\.<)")
_VARIES = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+")


class Place(Struct, frozen=True):
    """A line of a log: its 1-based number and its printable text."""

    log: str
    line: int
    text: str


class Match(Struct):
    """One known failure in a log: its first lines, number of its last line, and count of lines up to `MOST`."""

    signature: Signature
    lines: tuple[Place, ...] = ()
    count: int = 0
    last: int = 0

    def see(self, place: Place) -> None:
        """Count another line."""
        self.count, self.last = self.count + 1, place.line
        if len(self.lines) < SHOWN:
            self.lines = (*self.lines, place)


class Suspect(Struct):
    """A suspicious line that matches no known failure, and how many similar lines there are."""

    place: Place
    weight: int
    count: int = 1


@lru_cache(maxsize=4)
def _automaton(literals: tuple[bytes, ...]) -> BytesAhoCorasick:
    """Return what finds these literals; many logs share one, which has 2 MB."""
    return BytesAhoCorasick(list(literals), implementation=Implementation.DFA)


class Search:
    """Search the log `name` fed in blocks. `sightings` and `telling` are complete after `end()`."""

    def __init__(self, signatures: Sequence[Signature], name: str) -> None:
        self.name = name
        self._meanings: dict[bytes, list[Signature | None]] = {}
        for each in signatures:
            for anchor in each.anchors:
                self._meanings.setdefault(anchor.encode(), []).append(each)
        for word in _TELLING_WORDS:
            self._meanings.setdefault(word.encode(), []).append(None)
        self.sightings: dict[str, Match] = {}
        self._telling: dict[str, Suspect] = {}
        self._weighed = self._weighed_at = 0
        self.bytes = self.lines = 0
        self._waiting = b""
        self._seen = 0
        self._number = 1
        self._longest = max(map(len, self._meanings))
        self._build()

    def _build(self) -> None:
        """Build the automaton of the literals whose failures have not reached their limit yet."""
        self._enough = False
        wanted = {
            literal: signature
            for literal, signature in self._meanings.items()
            if not all(map(self._is_counted_enough, signature))
        }
        self._meant = list(wanted.values())
        self._automaton = _automaton(tuple(wanted))

    def _is_counted_enough(self, signature: Signature | None) -> bool:
        if signature is None:
            return self._weighed >= MOST_WEIGHED
        seen = self.sightings.get(signature.name)
        return seen is not None and seen.count >= MOST

    def feed(self, data: bytes) -> list[Match]:
        """Search the next block; return the failures found for the first time."""
        self.bytes += len(data)
        self._waiting = self._waiting + data if self._waiting else data
        whole = self._waiting.rfind(b"\n") + 1
        if len(self._waiting) - whole > LONG:
            return self._look(len(self._waiting) - REACH - self._longest, REACH)
        return self._look(whole, 0) if whole else []

    def end(self) -> list[Match]:
        """Search the last line, which may lack a line end; return the failures found for the first time."""
        rest = self._waiting[self._seen :]
        found = self._look(len(self._waiting), 0)
        self.lines = self._number - 1 + bool(rest)
        return found

    @property
    def telling(self) -> list[Suspect]:
        """The most suspicious lines, by weight."""
        return sorted(self._telling.values(), key=lambda each: (-each.weight, each.place.line))

    def _look(self, upto: int, keep: int) -> list[Match]:
        """Search what begins before `upto`, and drop all but the last `keep` bytes before it."""
        known = len(self.sightings)
        data, at, number = self._waiting, 0, self._number
        for which, start, end in self._matches(data):
            if not self._seen <= start < upto:
                continue
            number += data.count(b"\n", at, start)
            at = start
            for signature in self._meant[which]:
                self._weigh(signature, data, start, end, number)
        cut = max(0, upto - keep)
        self._number = number + data.count(b"\n", at, cut)
        self._waiting, self._seen = data[cut:], upto - cut
        if self._enough:
            self._build()
        return list(self.sightings.values())[known:]

    def _matches(self, data: bytes) -> list[tuple[int, int, int]]:
        """Return (literal, start, end) of each match, ordered by start."""
        return sorted(self._automaton.find_matches_as_indexes(data, overlapping=True), key=itemgetter(1, 2))

    def _weigh(self, signature: Signature | None, data: bytes, start: int, end: int, number: int) -> None:
        if signature is None:
            if self._weighed < MOST_WEIGHED and self._weighed_at < number:
                self._weigh_suspect(around(data, start, end), number)
            return
        seen = self.sightings.get(signature.name)
        if seen and (seen.count >= MOST or seen.last == number):
            return
        text = around(data, start, end)
        if found := signature.regex.search(text):
            if seen is None:
                seen = self.sightings[signature.name] = Match(signature)
            seen.see(Place(self.name, number, shown(text, found.end())))
            self._enough |= seen.count >= MOST

    def _weigh_suspect(self, text: str, number: int) -> None:
        self._weighed, self._weighed_at = self._weighed + 1, number
        self._enough |= self._weighed >= MOST_WEIGHED
        text = text[:_WIDEST]
        message = _PREFIXES.sub("", _JOURNAL.sub("", text))
        if _NO_NEWS.match(message):
            return
        weight = next((weight for weight, pattern in _WEIGHTS if pattern.search(message)), 0)
        weight = weight or int(bool(_WEIGHTS[-1][1].search(text)))
        if not weight:
            return
        key = _VARIES.sub("#", message)[:200]
        if known := self._telling.get(key):
            known.count += 1
        elif len(self._telling) < TELLING_KEPT:
            self._telling[key] = Suspect(Place(self.name, number, shown(text, 0)), weight)


def around(data: bytes, start: int, end: int) -> str:
    """Return the line around a match, at most `REACH` bytes to each side, without colours and control characters."""
    first, last = max(0, start - REACH), min(len(data), end + REACH)
    before = max(data.rfind(b"\n", first, start), data.rfind(b"\r", first, start)) + 1
    # A progress bar rewrites its line after each \r.
    after = min((at for at in (data.find(b"\n", end, last), data.find(b"\r", end, last)) if at >= 0), default=last)
    text = data[max(first, before) : after].decode("utf-8", "replace")
    return _CONTROL.sub("", _COLOURS.sub("", text)).replace("\t", " ")


def shown(text: str, at: int) -> str:
    """Return `text` for display: without the host name, and cut around the position `at` if it is long."""
    if len(text) > _WIDEST:
        first = max(0, min(at - _WIDEST * 3 // 4, len(text) - _WIDEST))
        text = f"{'... ' if first else ''}{text[first : first + _WIDEST]} ..."
    return _NCCL.sub("", _JOURNAL.sub(r"\1 ", text.rstrip()))
