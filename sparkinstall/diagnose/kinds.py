"""What a suspicious line means by its kind, where no known failure explains it."""

import re
from collections.abc import Mapping, Sequence

from sparkinstall.diagnose import advice
from sparkinstall.diagnose.sightings import Match, Suspect
from sparkinstall.diagnose.signatures import Signature

_ENDS = ".!?)]'\"`"
"""What ends a sentence, or something that it quotes."""
# The name of a model or a file in a message, which tells of no part of the program.
_NAME = re.compile(r"(['\"`])[\w.]+(?:[-/][\w.]+)+\1")
_FEW_WORDS = 2
"""Words of an advice that may be the beginning of a longer one."""

_Kind = tuple[Signature | None, Mapping[str, str], Signature | None]
"""A general failure, the words of the line in its regex, and the part of a program that is told beside it."""


def meaning_of(suspect: Suspect, general: Sequence[Signature], *, is_last: bool, is_elsewhere: bool) -> Match | None:
    """Return the general failure that a suspicious line is of, told in its own words.

    `is_last`: the log ends with this line. `is_elsewhere`: nothing shows that the line is of a program that serves
    models.
    """
    kind, words, part = _kind_of(suspect, general, is_last)
    if kind is None:
        return None
    told = list(suspect.advice)
    if "advice" not in words:
        told = [f'what it says: "{each}"' for each in _advised(suspect.message, general, is_last)] + told
    if suspect.message.endswith(advice.NO_TEXT):
        told.insert(0, "look at the whole log: the rest of this line tells what is wrong")
    says = suspect.message if suspect.is_cut_off else f'"{advice.says(suspect.message)}"'
    place = suspect.place
    return Match(
        kind, (place,), suspect.count, place.line, words,
        who=suspect.who, where=suspect.where, says=says, advice=tuple(told), part=part, stage=suspect.stage,
        project=suspect.project.name if suspect.project else "", reports=suspect.reports,
        is_elsewhere=is_elsewhere,
    )  # fmt: skip


def _kind_of(suspect: Suspect, general: Sequence[Signature], is_last: bool) -> _Kind:
    """Return the first general failure whose regex is in the message, or else the part of a program that it names."""
    part = _part_of(suspect, general)
    if suspect.is_cut_off:
        return part if part and not part.outer else None, {}, None
    for each in general:
        found = each.regex.search(suspect.message)
        if not found or (is_last and _is_cut(suspect.message, found)):
            continue
        if each.frames is None or each.frames.search(f"{suspect.frames}\n{suspect.message}"):
            kind = part if each.outer and part else each
            return kind, found.groupdict(""), part if each.by_part else None
    return part if part and part.regex.search(suspect.message) else None, {}, None


def _part_of(suspect: Suspect, general: Sequence[Signature]) -> Signature | None:
    """Return what tells of the part of a program that raised an exception, by its traceback or else its words."""
    parts = [each for each in general if each.part]
    by_frames = (each for each in parts if each.frames and each.frames.search(f"{suspect.frames}\n"))
    words = _NAME.sub(" ", suspect.message)
    by_words = (each for each in parts if each.about and each.about.search(words))
    named = next(by_frames, None)
    return next(by_words, named) if named is None or named.outer else named


def _advised(message: str, general: Sequence[Signature], is_last: bool) -> list[str]:
    """Return what a message itself advises."""
    found = (each.regex.search(message) for each in general if "advice" in each.regex.groupindex)
    return [each["advice"] for each in found if each and not (is_last and _is_cut(message, each))]


def _is_cut(message: str, found: re.Match[str]) -> bool:
    """Return whether a message that ends its log advises something without the end of the sentence."""
    advised = (found.groupdict().get("advice") or "").rstrip()
    if not advised or len(advised.split()) > _FEW_WORDS:
        return False
    return message.rstrip().endswith(advised) and advised[-1] not in _ENDS
