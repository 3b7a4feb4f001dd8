"""What a log shows: its known failures and its suspicious lines, and which of them were not over at its end."""

import re
from collections.abc import Sequence

from msgspec.structs import replace

from sparkinstall.diagnose import messages, pastes, suspicion
from sparkinstall.diagnose.lines import Line
from sparkinstall.diagnose.sightings import Match, Place, Suspect

TELLING_KEPT = 100
"""Suspicious lines that are kept."""
SERVER_STARTED = "server-started"
"""The event that ends the start of a server."""
SUCCEEDED = "program-succeeded"
"""The event that a program says that all went well."""
NCCL_CONNECTED = "nccl-connected"
"""The event that NCCL has connected the ranks, whatever it warned of before."""
_BEFORE_FALLBACK = 12
"""Lines before a fallback in which the failure that it handles is looked for."""
_SOON = 3
"""Lines within which a program says that it tries again what failed."""
_VARIES = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+")


class Findings:
    """What was found in one log so far.

    `sightings`: the known failures and events by name. `suspects`: the suspicious lines by shape. `set_aside`: those
    that were handled or warned of. `ended_by`: for each process the line of the exception that nothing caught, or that
    such a chain began with. `is_cut_off`: the log ends within a traceback.
    """

    def __init__(self) -> None:
        self.sightings: dict[str, Match] = {}
        self.suspects: dict[str, Suspect] = {}
        self.set_aside: dict[str, Suspect] = {}
        self.ended_by: dict[str, int] = {}
        self.is_cut_off = False

    @property
    def lasting(self) -> list[Match]:
        """The failures that were not over when the log ended, by their first line."""
        seen = self.sightings.values()
        found = (each for each in seen if each.last > max(each.over, self.last_of(*each.signature.over_with)))
        return sorted(found, key=lambda each: each.lines[0].line)

    @property
    def telling(self) -> list[Suspect]:
        """The most suspicious lines, by weight. What was no exception has not kept a program from succeeding later.

        Where the log shows that something failed, and no such line tells what, it is what was handled or warned of.
        """
        passed = self.last_of(SERVER_STARTED, SUCCEEDED)
        those = list(self.suspects.values()) or (list(self.set_aside.values()) if self._has_failed else [])
        if those and all(each.weight <= suspicion.WEAK for each in those):
            those += [each for each in self.set_aside.values() if each.weight > suspicion.WEAK]
        connected = self.last_of(NCCL_CONNECTED)
        told = (
            each
            for each in those
            if (each.weight > suspicion.SOME or each.place.line > passed)
            and not (each.message.startswith("NCCL WARN") and each.place.line <= connected)
        )
        return sorted(_by_reason(list(told)), key=lambda each: (-each.weight, each.is_by_words, each.place.line))

    @property
    def has_started(self) -> bool:
        """Whether a server has started: what it reports afterwards need not end it."""
        return SERVER_STARTED in self.sightings

    @property
    def _has_failed(self) -> bool:
        """Whether the log ends within a traceback, or something in it only says that a process ended."""
        return self.is_cut_off or any(each.signature.ends_only for each in self.lasting)

    def last_of(self, *names: str) -> int:
        """Return the last line of these failures or events; 0 if there is none."""
        return max((self.sightings[name].last for name in names if name in self.sightings), default=0)

    def forgive(self, line: Line, number: int) -> None:
        """Forget what failed just before a line in which a program goes on another way, and what it goes on without."""
        first, words = number - _BEFORE_FALLBACK, messages.words(line.message)

        def is_handled(place: Place, by: str) -> bool:
            return place.line >= first and by == line.who and bool(words & messages.words(place.text))

        is_retry = "etrying" in line.message
        goes_on = re.match(r"\W*[Cc]ontinuing\b", line.message) is not None
        for name, match in list(self.sightings.items()):
            if not is_retry and not match.signature.is_warning and is_handled(match.lines[0], match.who):
                del self.sightings[name]
        for key, suspect in list(self.suspects.items()):
            is_soon = suspect.place.line >= number - _SOON and suspect.who == line.who
            is_tried_again = is_soon and (is_retry or (goes_on and suspect.weight <= suspicion.SOME))
            if is_tried_again or is_handled(suspect.place, suspect.who):
                del self.suspects[key]


def shape_of(message: str) -> str:
    """Return what a message has in common with those that differ from it in numbers only."""
    return _VARIES.sub("#", message)[:200]


def _by_reason(told: Sequence[Suspect]) -> list[Suspect]:
    """Return suspicious lines: those that tell no reason weigh little where others do."""
    is_bare = [each.says_nothing or (not each.is_raised and pastes.tells_no_reason(each.message)) for each in told]
    if all(is_bare):
        return list(told)
    return [
        replace(each, weight=min(each.weight, suspicion.WEAK)) if bare else each
        for each, bare in zip(told, is_bare, strict=True)
    ]
