"""What is read when a log has ended: messages of several lines, what its end has cut, and the words of a short one."""

import re
from collections.abc import Collection, Mapping

from msgspec import Struct

from sparkinstall.diagnose import advice, pastes, sightings, suspicion
from sparkinstall.diagnose.findings import TELLING_KEPT, Findings, shape_of
from sparkinstall.diagnose.index import SignatureIndex
from sparkinstall.diagnose.lines import Line, printable
from sparkinstall.diagnose.sightings import WIDEST, Match, Place, Suspect, shown
from sparkinstall.diagnose.signatures import Signature
from sparkinstall.diagnose.tracebacks import CutOff, place_of
from sparkinstall.diagnose.wrapped import Wrapped

_LONGEST_WORD = 200
"""Bytes of the end of a log that have its last word."""
_CRASHED = "Fatal Python error: "
"""How Python begins to tell of a crash."""
_CUT_OFF = "the log ends within this traceback, so its exception is missing"
# An exception of which the end of the log has left less than a word of text.
_CUT_TEXT = re.compile(r"(?P<name>[A-Za-z_][\w.]*): \w{1,8}\s*$")


def read_joined(found: Findings, wrapped: Wrapped, index: SignatureIndex) -> None:
    """Look for known failures in messages of several lines, of which no line has enough."""
    for key, suspect in list(found.suspects.items()):
        if suspect.is_joined and _is_known(found, suspect, index):
            del found.suspects[key]
    for match, at in wrapped.joined:
        place = match.lines[at]
        _is_known(found, Suspect(place, 0, place.text, match.who, match.where), index, match.signature.name)


def _is_known(found: Findings, suspect: Suspect, index: SignatureIndex, family: str = "") -> bool:
    """Note the first known failure (of a family) in a whole message, its kind rather than a family; return whether
    there is one."""
    message = suspect.message
    line = Line(message, message, suspect.who, "error", len(message), None)
    those: dict[str, tuple[Signature, re.Match[str]]] = {}
    for signature in index.signatures:
        # A kind that is told in the line's own words takes any.
        is_no_kind = family and (signature.family != family or signature.own_words)
        is_other = signature.general or signature.name in found.sightings or is_no_kind
        if is_other or not any(anchor in message for anchor in signature.anchors):
            continue
        if words := signature.found_in(line, suspect.frames):
            those[signature.name] = (signature, words)
    families = {signature.family for signature, _ in those.values()}
    for name, (signature, words) in those.items():
        if name in families:
            continue
        seen = Match(signature, words=words.groupdict(""), who=suspect.who, where=suspect.where)
        if signature.own_words:
            seen.says, seen.advice = f'"{advice.says(message)}"', suspect.advice
        seen.see(suspect.place)
        found.sightings[name] = seen
        return True
    return False


class End(Struct, frozen=True):
    """The end of a log, which has so many lines and bytes.

    `text`: its last bytes, all of one that is short enough to be a paste. `known`: the numbers of the lines in which
    something known was found.
    """

    log: str
    lines: int
    size: int
    text: bytes
    known: Collection[int]


def read_words(found: Findings, end: End) -> None:
    """Look through a short log, and the end of a longer one that tells nothing else, for any words of failure."""
    known = set(found.suspects)
    is_clear = not known and all(each.signature.severity == "event" for each in found.sightings.values())
    if end.lines <= pastes.LINES and end.size <= pastes.BYTES:
        seen = {*end.known, *(each.place.line for each in found.suspects.values())}
        read = pastes.suspects(end.text, seen, with_warnings=is_clear)
    elif is_clear and not found.has_started:
        read = pastes.last_words(end.text, end.lines)
    else:
        return
    joined = [each.place.text for each in found.suspects.values() if each.is_joined]
    least = suspicion.SOME if any(each.weight >= suspicion.SOME for each in found.suspects.values()) else 0
    for each, weight in read:
        shape = shape_of(each.line.message)
        if shape in known or any(each.line.message.strip() in text for text in joined):
            continue
        if same := found.suspects.get(shape):
            same.count += 1
        elif weight >= least and len(found.suspects) < TELLING_KEPT:
            place = Place(end.log, each.number, shown(each.line.text, 0))
            found.suspects[shape] = sightings.suspect(place, weight, suspicion.said(each.line), each.line.who)
            found.suspects[shape].is_by_words = True


def place_crashes(found: Findings, dumps: Mapping[str, str]) -> None:
    """Let Python's word for a crash have the place that it prints below; `dumps`: that of each process."""
    for each in found.suspects.values():
        if each.message.startswith(_CRASHED) and each.who in dumps:
            each.raised_within(dumps[each.who])
    for match in found.sightings.values():
        if _CRASHED in match.lines[0].text and not match.where:
            match.where = place_of(dumps.get(match.who, ""))


def note_last_word(found: Findings, end: End) -> None:
    """Note of which suspicious lines the last word may be half a one: the log's end may have cut it."""
    last = " ".join(printable(end.text[-_LONGEST_WORD:]).split()).rpartition(" ")[2]
    for suspect in found.suspects.values():
        suspect.may_end_cut = last[-1:].isalnum() and suspect.message.rstrip().endswith(last)
        if suspect.may_end_cut and (cut := _CUT_TEXT.match(suspect.message)):
            suspect.message = f"{cut['name']}: {advice.NO_TEXT}"


def keep_end_of(found: Findings, cut: CutOff, log: str) -> None:
    """Keep the last line of a traceback of which the exception is missing."""
    lines = [each.strip() for each in cut.frames.splitlines() if each.strip()]
    place = Place(log, cut.number, f"{lines[-1][:WIDEST]} ({_CUT_OFF})")
    suspect = sightings.suspect(place, suspicion.STRONG, _CUT_OFF, cut.who, cut.frames)
    suspect.is_cut_off = True
    found.suspects.setdefault(f"cut off {cut.who}", suspect)
