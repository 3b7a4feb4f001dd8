"""A log of any size, read once as a stream: which known failures are in it, in which lines.

An automaton looks for all literals at once, so that only lines with one of them are looked at any closer. What is
found does not depend on how the stream is cut into pieces.
"""

import re
from collections.abc import Sequence
from operator import itemgetter

from msgspec import Struct

from sparkinstall.diagnose.signatures import Signature

REACH = 2048
"""How far around a literal its pattern is looked for, in bytes; and never beyond the line."""
LONG = 1 << 16
"""From this size on, in bytes, a line's beginning is looked at before its end has come."""
MOST = 10_000
"""How many lines of one failure are counted."""
HEARD = 20_000
"""How many lines are weighed that nobody has explained."""
SHOWN = 3
"""How many lines of one failure are kept."""
_WIDEST = 400
_TELLING_KEPT = 100

_COLOURS = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
# What would move the cursor, ring, or turn the direction of a terminal's text.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
# Who writes: journald's and NCCL's lines begin with the name of the host.
_JOURNAL = re.compile(r"^(\w{3} [ \d]\d [\d:]{8}|\d{4}-\d\d-\d\dT[\d:.,+-]+Z?) \S+ (?=[\w.@/()-]+(?:\[\d+\])?:)")
_NCCL = re.compile(r"(?<![\w.-])[\w.-]+:(?=\d+:\d+ \[\d+\] )")

_TELLING_WORDS = (
    "Error", "ERROR", "Exception:", "FATAL", "Fatal", "fatal", "CRITICAL", "core dumped", "Segmentation fault", "panic",
    "NCCL WARN", "Main process exited", "Failed with result", "abort", "Abort", "cannot open shared object",
)  # fmt: skip
# The same words weigh less where a logger's level is all that there is to see.
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


class Line(Struct, frozen=True):
    """A line of a log: its number from 1, and its text as it can be shown."""

    number: int
    text: str


class Match(Struct):
    """One known failure in a log: the first lines, the number of the last one, and how many there are, up to `MOST`."""

    signature: Signature
    lines: tuple[Line, ...] = ()
    count: int = 0
    last: int = 0

    def see(self, line: Line) -> None:
        """One line more."""
        self.count, self.last = self.count + 1, line.number
        if len(self.lines) < SHOWN:
            self.lines = (*self.lines, line)


class Suspect(Struct):
    """A line that nobody has explained yet but that may say what is wrong, and how often its like came."""

    line: Line
    weight: int
    count: int = 1


class Search:
    """Reads a log in pieces. `sightings` and `telling` are complete after `end()`."""

    def __init__(self, signatures: Sequence[Signature]) -> None:
        self._meanings: dict[bytes, list[Signature | None]] = {}
        for each in signatures:
            for anchor in each.anchors:
                self._meanings.setdefault(anchor.encode(), []).append(each)
        for word in _TELLING_WORDS:
            self._meanings.setdefault(word.encode(), []).append(None)
        self.sightings: dict[str, Match] = {}
        self._telling: dict[str, Suspect] = {}
        self._heard = self._heard_at = 0
        self.bytes = self.lines = 0
        self._waiting = b""
        self._seen = 0
        self._number = 1
        self._longest = max(map(len, self._meanings))
        self._build()

    def _build(self) -> None:
        """Make the automaton of the literals that still matter: every line may have one that was counted enough."""
        from ahocorasick_rs import BytesAhoCorasick, Implementation

        self._enough = False
        wanted = {
            literal: meant for literal, meant in self._meanings.items() if not all(map(self._is_counted_enough, meant))
        }
        self._meant = list(wanted.values())
        self._automaton = BytesAhoCorasick(list(wanted), implementation=Implementation.DFA)

    def _is_counted_enough(self, meant: Signature | None) -> bool:
        if meant is None:
            return self._heard >= HEARD
        seen = self.sightings.get(meant.name)
        return seen is not None and seen.count >= MOST

    def feed(self, data: bytes) -> list[Match]:
        """The next piece; the failures that were not met before it."""
        self.bytes += len(data)
        self._waiting = self._waiting + data if self._waiting else data
        whole = self._waiting.rfind(b"\n") + 1
        if len(self._waiting) - whole > LONG:
            return self._look(len(self._waiting) - REACH - self._longest, REACH)
        return self._look(whole, 0) if whole else []

    def end(self) -> list[Match]:
        """No more is to come; the failures in a last line that has no end."""
        rest = self._waiting[self._seen :]
        found = self._look(len(self._waiting), 0)
        self.lines = self._number - 1 + bool(rest)
        return found

    @property
    def telling(self) -> list[Suspect]:
        """The most suspicious lines of a log without a known failure, the best first."""
        return sorted(self._telling.values(), key=lambda each: (-each.weight, each.line.number))

    def _look(self, upto: int, keep: int) -> list[Match]:
        """Look at what begins before `upto`, and forget all but the last `keep` bytes before that."""
        known = len(self.sightings)
        data, at, number = self._waiting, 0, self._number
        for which, start, end in self._matches(data):
            if not self._seen <= start < upto:
                continue
            number += data.count(b"\n", at, start)
            at = start
            for meant in self._meant[which]:
                self._weigh(meant, data, start, end, number)
        cut = max(0, upto - keep)
        self._number = number + data.count(b"\n", at, cut)
        self._waiting, self._seen = data[cut:], upto - cut
        if self._enough:
            self._build()
        return list(self.sightings.values())[known:]

    def _matches(self, data: bytes) -> list[tuple[int, int, int]]:
        """Which literal, and where it begins and ends; by their beginnings, as a stream meets them."""
        return sorted(self._automaton.find_matches_as_indexes(data, overlapping=True), key=itemgetter(1, 2))

    def _weigh(self, meant: Signature | None, data: bytes, start: int, end: int, number: int) -> None:
        if meant is None:
            if self._heard < HEARD and self._heard_at < number:
                self._hear(around(data, start, end), number)
            return
        seen = self.sightings.get(meant.name)
        if seen and (seen.count >= MOST or seen.last == number):
            return
        text = around(data, start, end)
        if found := meant.regex.search(text):
            if seen is None:
                seen = self.sightings[meant.name] = Match(meant)
            seen.see(Line(number, shown(text, found.end())))
            self._enough |= seen.count >= MOST

    def _hear(self, text: str, number: int) -> None:
        self._heard, self._heard_at = self._heard + 1, number
        self._enough |= self._heard >= HEARD
        text = text[:_WIDEST]
        said = _PREFIXES.sub("", _JOURNAL.sub("", text))
        if _NO_NEWS.match(said):
            return
        weight = next((weight for weight, pattern in _WEIGHTS if pattern.search(said)), 0)
        weight = weight or int(bool(_WEIGHTS[-1][1].search(text)))
        if not weight:
            return
        key = _VARIES.sub("#", said)[:200]
        if known := self._telling.get(key):
            known.count += 1
        elif len(self._telling) < _TELLING_KEPT:
            self._telling[key] = Suspect(Line(number, shown(text, 0)), weight)


def around(data: bytes, start: int, end: int) -> str:
    """The line around a place, at most `REACH` bytes to each side: no colours, nothing that a terminal obeys."""
    first, last = max(0, start - REACH), min(len(data), end + REACH)
    before = max(data.rfind(b"\n", first, start), data.rfind(b"\r", first, start)) + 1
    # A progress bar rewrites its line after each \r.
    after = min((at for at in (data.find(b"\n", end, last), data.find(b"\r", end, last)) if at >= 0), default=last)
    text = data[max(first, before) : after].decode("utf-8", "replace")
    return _CONTROL.sub("", _COLOURS.sub("", text)).replace("\t", " ")


def shown(text: str, at: int) -> str:
    """`text` as it is shown: without the host's name, and cut around the place `at` where it is long."""
    if len(text) > _WIDEST:
        first = max(0, min(at - _WIDEST * 3 // 4, len(text) - _WIDEST))
        text = f"{'... ' if first else ''}{text[first : first + _WIDEST]} ..."
    return _NCCL.sub("", _JOURNAL.sub(r"\1 ", text.rstrip()))
