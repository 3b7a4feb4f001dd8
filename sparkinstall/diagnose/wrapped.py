"""Messages that stand in several lines of a log: what was found in the first line is shown with the others."""

import re
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.diagnose import messages
from sparkinstall.diagnose.lines import KERNEL, Line
from sparkinstall.diagnose.sightings import WIDEST, Match, Place, Suspect

_RAGGED = 12
"""Characters by which the lines of a paragraph differ in length."""
_MOST_AFTER = 5
"""Lines that may continue a message."""
_MOST_BETWEEN = 20
"""Lines of other processes that may stand between a message and the rest of it."""
_MOST_CONTINUED = 2000
"""Lines of a log after which the next one is read for the rest of their message."""
_MOST_CUT = 200
"""Lines without their beginning of which the width is counted."""
# Who writes each message in one line.
_WHOLE = re.compile(r"\b(?:NCCL|UCX) +[A-Z]+ +$")


class _Unfinished(Struct):
    """A line of which the message may go on in the next line of the same process; `takers` want to know."""

    line: Line
    message: str
    text: str
    takers: Sequence[Match | Suspect]
    left: int = _MOST_AFTER
    others: int = _MOST_BETWEEN


class Wrapped:
    """Adds each line of a log that continues a message to what was found in that.

    `joined` are the known failures with such a message, each with the index of its line.
    """

    def __init__(self) -> None:
        self.joined: list[tuple[Match, int]] = []
        self._unfinished: _Unfinished | None = None
        self._continued = 0
        self._widths: dict[int, int] = {}

    @property
    def is_open(self) -> bool:
        """Whether the next line may continue a message of which `begin` was told."""
        return self._unfinished is not None

    def may_begin(self, line: Line) -> bool:
        """Return whether the line after this one is to be read for the rest of its message."""
        return self._continued < _MOST_CONTINUED and _may_go_on(line)

    def begin(self, line: Line, takers: Sequence[Match | Suspect]) -> None:
        """Take the line for one that may go on; what was found in it is told the rest."""
        if takers and _may_go_on(line):
            self._unfinished = _Unfinished(line, line.message, line.text, takers)

    def see(self, line: Line, before: Line, is_next: bool) -> None:
        """Read a line after the line `before`; `is_next`: none stands between them."""
        if is_next and _lacks_its_beginning(before, line) and len(self._widths) < _MOST_CUT:
            width = len(before.text) - len(line.prefix)
            self._widths[width] = self._widths.get(width, 0) + 1
        self._go_on(line, is_next)

    def _go_on(self, line: Line, is_next: bool) -> None:
        """Add a line to the message before, if it continues that; `is_next`: none stands between them."""
        if (before := self._unfinished) is None:
            return
        is_bare = is_next and _lacks_its_beginning(before.line, line)
        is_other = line.who != before.line.who or line.level not in ("", before.line.level)
        is_other |= _WHOLE.search(line.prefix) is not None
        if not is_bare and (is_other or line.message.strip() in ("", before.message.strip())):
            before.others -= 1
            self._unfinished = before if before.others else None
            return
        self._unfinished = None
        # The third line of a paragraph may begin with any word.
        is_block = before.left < _MOST_AFTER and abs(len(before.text) - len(before.line.text)) <= _RAGGED
        any_word = is_bare or is_block
        if not (messages.goes_on_bare(line.message) if any_word else messages.goes_on(before.message, line.message)):
            return
        self._continued += 1
        is_cut = is_bare and self._is_cut(before.text, line)
        for each in before.takers:
            _append(each, line.message.strip(), "" if is_cut else " ")
            if isinstance(each, Match) and before.left == _MOST_AFTER:
                self.joined.append((each, len(each.lines) - 1))
        before.left, before.message, before.text = before.left - 1, line.message, line.text
        is_within = is_bare and line.message[:1].strip() != "" and not line.message.rstrip().endswith(".")
        if before.left and (_may_go_on(line) or is_within):
            self._unfinished = before

    def _is_cut(self, text: str, rest: Line) -> bool:
        """Return whether a word goes on in the next line: lines were cut where a terminal ended."""
        is_full = self._widths.get(len(text) - len(rest.prefix), 0) > 1
        return is_full and text[-1:].isalnum() and rest.message[:1].isalnum()


def _lacks_its_beginning(before: Line, line: Line) -> bool:
    """Return whether a line has only the first part of what stands before the message above it: that was cut."""
    if not line.message.strip() or line.level or not before.who.startswith(line.who):
        return False
    return len(line.prefix) < len(before.prefix) and (line.who, line.level) != (before.who, before.level)


def _may_go_on(line: Line) -> bool:
    """Return whether the next line may continue a message. The kernel and systemd write each message in one line."""
    return not line.who.startswith("systemd") and line.who != KERNEL and messages.may_go_on(line.message, line.prefix)


def _append(taker: Match | Suspect, text: str, between: str) -> None:
    """Let a line be shown with the rest of its message, which may have the numbers that its beginning lacks."""
    if isinstance(taker, Suspect):
        taker.place, taker.message = _longer(taker.place, text, between), f"{taker.message}{between}{text}"
        taker.is_joined = True
        return
    taker.lines = (*taker.lines[:-1], _longer(taker.lines[-1], text, between))
    if len(taker.lines) == 1 and (found := taker.signature.regex.search(taker.lines[0].text)):
        taker.words = {**taker.words, **{name: word for name, word in found.groupdict().items() if word}}


def _longer(place: Place, text: str, between: str) -> Place:
    whole = f"{place.text}{between}{text}"
    return replace(place, text=whole if len(whole) <= WIDEST else f"{whole[:WIDEST]} ...")
