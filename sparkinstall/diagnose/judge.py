"""Diagnose logs: tell which of the failures that were found in them caused the others."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Literal, get_args

from msgspec import Struct
from msgspec.structs import asdict, replace

from sparkinstall.diagnose.findings import TELLING_KEPT
from sparkinstall.diagnose.index import SignatureIndex
from sparkinstall.diagnose.programs import ELSEWHERE, PROGRAMS, for_any_program, of_a_script, rewritten
from sparkinstall.diagnose.search import Search
from sparkinstall.diagnose.sightings import SHOWN, Match, Place, Suspect
from sparkinstall.diagnose.signatures import OTHERS, KnownFailure, Signature, explains, steps
from sparkinstall.diagnose.sources import Log
from sparkinstall.diagnose.suspicion import SOME, STRONG

Role = Literal["cause", "consequence", "warning"]
_Suspicion = tuple[Suspect, Match | None]
"""A suspicious line, and what it means by its kind."""
_RELATED = 3600
"""Seconds: failures of different nodes that are further apart have nothing to do with each other."""
_REASONS = 12
"""Lines below an error in which its reasons stand."""
_LAST, _LAST_WEAK = 40, 5
"""Lines at the end of a log in which an error that is no exception has ended it; fewer for one that says little."""
# An option, a variable or a command.
_NAMED = re.compile(r"`([^`]+)`")
_MOST_PLACES = 100
"""Lines of one failure that are kept, of all logs."""


class ReadLog(Struct, frozen=True):
    """The name and size of a log that has been read."""

    name: str
    bytes: int
    lines: int


class Found(KnownFailure, frozen=True, kw_only=True):
    """A known failure found in the logs: its role, its number of lines, the names of its causes, and its first lines.

    A consequence whose cause is not known is explained by nothing. `where`: the code that raised it, if known.
    """

    role: Role
    count: int
    explained_by: tuple[str, ...]
    where: str
    lines: tuple[Place, ...]


class Telling(Place, frozen=True):
    """A suspicious line, how many similar lines there are, the code that raised it, if known, and what its own words
    advise."""

    count: int
    where: str
    advice: tuple[str, ...] = ()


class Diagnosis(Struct, frozen=True):
    """The result for all logs together.

    `found`: causes, consequences, then warnings, each in the order of the logs. `telling`: the most suspicious lines,
    if no cause was found, or only a general one. `shows_failure`: something has failed, whether its cause is known or
    not: a failure was found, or an error or a crash is among the suspicious lines.
    """

    logs: tuple[ReadLog, ...]
    found: tuple[Found, ...]
    telling: tuple[Telling, ...]
    shows_failure: bool

    @property
    def causes(self) -> list[Found]:
        return [each for each in self.found if each.role == "cause"]

    @property
    def consequences(self) -> list[Found]:
        return [each for each in self.found if each.role == "consequence"]

    @property
    def warnings(self) -> list[Found]:
        return [each for each in self.found if each.role == "warning"]


def read(log: Log, index: SignatureIndex) -> Search:
    """Search a whole log."""
    search = Search(index, log.name)
    for piece in log.pieces():
        search.feed(piece)
    search.end()
    return search


def judge(searches: Iterable[Search]) -> Diagnosis:
    """Combine the results of all logs: a cause may be in another log than its consequence.

    A search is not kept, so that many logs need little memory.
    """
    logs: list[ReadLog] = []
    seen: dict[str, Match] = {}
    suspects: list[_Suspicion] = []
    serving: set[str] = set()
    ended_by: dict[tuple[str, str], int] = {}
    for search in searches:
        logs.append(ReadLog(search.name, search.bytes, search.lines))
        for match in search.found.lasting:
            known = seen.setdefault(match.signature.name, replace(match, lines=(), count=0))
            known.count += match.count
            known.lines = (*known.lines, *match.lines)[:_MOST_PLACES]
            known.after |= match.after
            known.is_logged &= match.is_logged
            known.is_elsewhere &= match.is_elsewhere
        ended_by |= {(search.name, who): line for who, line in search.found.ended_by.items()}
        serving |= {search.name} if search.found.has_started else set()
        suspects = _most_telling(suspects, search)
    passed = {name for name, match in seen.items() if _is_passed(match, ended_by)}
    found = _judged(seen, passed)
    before = _before_the_causes(found, seen, suspects)
    named = {each.name for each in found if each.role == "cause"}
    if named and named <= passed:
        before = before or [each for each in suspects if _has_ended(each[0], ended_by)]
    if not any(each.role == "cause" for each in found) or before:
        general = _general(before or suspects)
        found = _judged({**seen, general.signature.name: general} if general else seen, passed, is_late=bool(before))
    found = [_in_its_name(each, seen) for each in found]
    is_explained = any(each.role == "cause" and not each.general and each.name not in passed for each in found)
    telling = () if is_explained else tuple(_telling(each, at == 0) for at, (each, _) in enumerate(suspects))
    ends = {each.name: each.lines for each in logs}
    is_proven = any(each.role != "warning" for each in found) or any(
        _ended(each, ends[each.place.log], each.place.log in serving) for each, _ in suspects
    )
    return Diagnosis(tuple(logs), tuple(found), telling, is_proven)


def _ended(suspect: Suspect, last: int, is_serving: bool) -> bool:
    """Return whether a suspicious line tells why a log of so many lines ended; `is_serving`: a server had started."""
    if suspect.weight >= SOME:
        return suspect.weight >= STRONG or suspect.place.line > last - _LAST
    return suspect.place.line > last - _LAST_WEAK and not is_serving


def _in_its_name(found: Found, seen: Mapping[str, Match]) -> Found:
    """Return what is told of a failure in the name of the program that the log is of."""
    its = next((each for each in PROGRAMS if each.event in seen or each.path in found.where), None)
    if its and "vllm/" not in found.where:
        return rewritten(found, its)
    match = seen.get(found.name)
    if match is None or not match.is_elsewhere or match.says or match.signature.of_the_server:
        return found
    return of_a_script(found)


def _is_passed(match: Match, ended_by: Mapping[tuple[str, str], int]) -> bool:
    """Return whether a program logged these exceptions and went on, until another one ended it."""
    return match.is_logged and all(place.line < ended_by.get((place.log, match.who), 0) for place in match.lines)


def _has_ended(suspect: Suspect, ended_by: Mapping[tuple[str, str], int]) -> bool:
    """Return whether a suspicious line is the exception that ended a program."""
    return suspect.is_raised and ended_by.get((suspect.place.log, suspect.who)) == suspect.place.line


def _before_the_causes(
    found: Iterable[Found], seen: Mapping[str, Match], suspects: Sequence[_Suspicion]
) -> list[_Suspicion]:
    """Return the exceptions before the first cause, of which no entry is known, if the causes follow from whatever
    else has failed."""
    causes = [seen[each.name] for each in found if each.role == "cause"]
    if not causes or not all(OTHERS in each.signature.consequence_of for each in causes):
        return []
    first: dict[str, int] = {}
    for each in causes:
        for place in each.lines:
            first[place.log] = min(place.line, first.get(place.log, place.line))
    return [
        (suspect, match)
        for suspect, match in suspects
        if suspect.is_raised and not suspect.says_nothing and suspect.place.line < first.get(suspect.place.log, 0)
    ]


def _judged(seen: Mapping[str, Match], passed: Container[str], is_late: bool = False) -> list[Found]:
    """Return what is told of all that was found: causes, consequences, then warnings.

    `passed`: after these a program went on, so that they come behind the other causes. `is_late`: what follows from
    whatever else has failed came after something that is not known.
    """
    met = {name: match for name, match in seen.items() if _is_met(match, seen)}
    seen = {name: match for name, match in met.items() if not _yields_to_a_kind(match, met)}
    kinds = {match.signature.family for match in seen.values() if not match.signature.is_warning}
    causes = {name: () if each.signature.is_warning else _causes(each, seen.values()) for name, each in seen.items()}
    explaining = {name for names in causes.values() for name in names}
    told = {
        name: each
        for name, each in seen.items()
        if name in explaining
        or (each.signature.severity != "event" and not (each.signature.is_warning and name in kinds))
    }
    return sorted(
        (
            _found(each, seen, causes[name], name in explaining, is_late and OTHERS in each.signature.consequence_of)
            for name, each in told.items()
        ),
        key=lambda each: (get_args(Role).index(each.role), each.name in passed),
    )


def _is_met(match: Match, seen: Mapping[str, Match]) -> bool:
    """Return whether there are as many lines, and such others, as a failure needs."""
    others = [seen[name] for name in match.signature.only_with if name in seen]
    is_accompanied = any(each.count >= each.signature.times for each in others) or not match.signature.only_with
    unwanted = (seen[name] for name in match.signature.unless_with if name in seen)
    is_other = any(each.count >= each.signature.times for each in unwanted)
    return match.count >= match.signature.times and is_accompanied and not is_other


def _yields_to_a_kind(match: Match, seen: Mapping[str, Match]) -> bool:
    """Return whether a family was found only in lines in which a kind of it was that needs others: that tells more."""
    kinds = (each for each in seen.values() if each.signature.family == match.signature.name)
    return any(each.signature.only_with and (each.lines, each.count) == (match.lines, match.count) for each in kinds)


def _most_telling(suspects: Iterable[_Suspicion], search: Search) -> list[_Suspicion]:
    """Return the most suspicious lines of all, with those of one more log; what a line means is asked of these only."""
    former = ((suspect, match, False) for suspect, match in suspects)
    new = ((suspect, None, True) for suspect in search.found.telling)
    most = sorted((*former, *new), key=lambda each: -each[0].weight)[:TELLING_KEPT]
    return [(suspect, search.general_of(suspect) if is_new else match) for suspect, match, is_new in most]


def _general(suspects: Sequence[_Suspicion]) -> Match | None:
    """Return what the most suspicious line means by its kind, with the others of that kind.

    What comes after a line of which the kind tells nothing may follow from it.
    """
    first = suspects[0][1] if suspects else None
    if first is None:
        return _last_reason(suspects)
    most = (match for suspect, match in suspects if match and suspect.weight == suspects[0][0].weight)
    same = [match for match in most if match.signature is first.signature]
    lines = tuple(place for match in same for place in match.lines)
    return replace(first, lines=lines[:SHOWN], count=sum(match.count for match in same))


def _last_reason(suspects: Sequence[_Suspicion]) -> Match | None:
    """Return what the last reason ("Caused by: ") below the most suspicious line means by its kind."""
    if not suspects:
        return None
    top = suspects[0][0].place
    reasons = [
        (suspect.place.line, match)
        for suspect, match in suspects
        if match
        and suspect.place.log == top.log
        and 0 < suspect.place.line - top.line <= _REASONS
        and suspect.message.lstrip().startswith("Caused by: ")
    ]
    return max(reasons, key=lambda each: each[0])[1] if reasons else None


def _telling(suspect: Suspect, is_first: bool) -> Telling:
    reports = suspect.reports if suspect.is_raised or is_first else ""
    searched = (f"look for reports with these words: {reports}",) if reports else ()
    return Telling(
        **asdict(suspect.place), count=suspect.count, where=suspect.where, advice=(*suspect.advice, *searched)
    )


def _found(
    match: Match, seen: Mapping[str, Match], causes: tuple[str, ...], explains_others: bool, is_late: bool
) -> Found:
    signature, told = match.signature, match.signature.told(match.words)
    beside = (seen[name] for name in signature.told_with if name in seen)
    told["why"] = " ".join([told["why"], *(each.signature.told(each.words)["why"] for each in beside)])
    if match.says:
        told |= _in_its_words(match, told)
    elif match.is_elsewhere:
        told |= signature.told_elsewhere(match.words)
    role: Role = "consequence" if causes or signature.ends_only or is_late else "cause"
    if signature.is_warning and not explains_others:
        role = "warning"
    return Found(
        **told,
        role=role,
        count=match.count,
        explained_by=causes,
        where=match.where,
        lines=match.lines,
    )


def _in_its_words(match: Match, told: dict[str, str]) -> dict[str, str | tuple[str, ...]]:
    """Return what is told of a failure of a general kind, with its own words, its part, and what follows from both."""
    signature, part = match.signature, match.part
    if match.is_elsewhere and not signature.of_the_server:
        told = told | _of_any_program(signature, told, match.words)
    its = _told_of(part, match.is_elsewhere) if part else None
    hint = told["hint"]
    # What the program itself advises is in the hint.
    is_advised = "advice" in match.words
    hints = [hint, *match.advice] if is_advised else [*match.advice, hint]
    if its and not is_advised:
        hints = [*match.advice, its["hint"], *(() if signature.vague or its["hint"] == hint else (hint,))]
    links = part.links if part else signature.links
    if match.reports:
        whose = f"in the reports of {match.project}" if match.project else "in the reports on GitHub"
        hints.append(f"look for these words {whose} (the last link)")
        links = (*links, match.reports)
    return {
        "title": f"{its['title']}: {told['title']}" if its else told["title"],
        "links": links,
        "why": f"{match.says}: {told['why']}",
        "hint": _joined([match.stage, *hints] if match.stage else hints),
    }


def _joined(hints: Iterable[str]) -> str:
    """Return the steps of several hints, without those that name nothing but what a hint before has named."""
    told: list[str] = []
    named: set[str] = set()
    for hint in hints:
        parts = [(each, set(_NAMED.findall(each))) for each in steps(hint)]
        told += [each for each, names in parts if each not in told and not (names and names <= named)]
        named.update(*(names for _, names in parts))
    return "; ".join(told)


def _told_of(part: Signature, is_elsewhere: bool) -> dict[str, str]:
    """Return what is told of a part of a program."""
    told = part.told({})
    return told | _of_any_program(part, told, {}) if is_elsewhere else told


def _of_any_program(signature: Signature, told: Mapping[str, str], words: Mapping[str, str]) -> dict[str, str]:
    """Return what is told otherwise of a general failure of a program that serves no models."""
    elsewhere = signature.told_elsewhere(words)
    elsewhere.setdefault("hint", "; ".join([*for_any_program(told["hint"]), ELSEWHERE]))
    return elsewhere


def _causes(match: Match, found: Iterable[Match]) -> tuple[str, ...]:
    """Return the names of the failures that caused this one; if none, of the warnings that it names as its causes."""
    others = [each for each in found if each is not match]
    failures = [each for each in others if not each.signature.is_warning and _caused(match, each)]
    warnings = (each for each in others if each.signature.is_warning)
    named = [each for each in warnings if each.signature.name in match.signature.consequence_of]
    return tuple(each.signature.name for each in failures or named)


def _caused(match: Match, other: Match) -> bool:
    """Return whether `other` is a cause: known to be one, or before it in a traceback or, in another log, in time."""
    if (device := match.words.get("device")) and device == other.words.get("device"):
        return _is_before(other, match)
    if explains(match.signature, other.signature):
        return False
    if explains(other.signature, match.signature):
        return True
    if other.signature.ends_only or match.signature.ends_only or other.signature.name == match.signature.name:
        return False
    if other.signature.name in match.after:
        return match.signature.name not in other.after
    logs = {each.log for each in match.lines} & {each.log for each in other.lines}
    if logs or match.when is None or other.when is None:
        return False
    return 0 < match.when - other.when < _RELATED


def _is_before(one: Match, other: Match) -> bool:
    """Return whether a failure of a device came before another of it, within the hour."""
    first, second = one.lines[0], other.lines[0]
    if first.log != second.log or one.when is None or other.when is None or one.when == other.when:
        return first.log == second.log and first.line < second.line
    return 0 < other.when - one.when < _RELATED
