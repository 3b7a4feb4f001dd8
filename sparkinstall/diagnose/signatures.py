"""Load the signatures of known failures from `knowledge/logs/*.yaml`, and those that follow from the rules for hosts.

search.py finds them in a log; knowledge/README.md explains how to add one.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from sparkinstall import schema
from sparkinstall.assets import asset
from sparkinstall.core.fixes import FIXES
from sparkinstall.diagnose.lines import Line
from sparkinstall.diagnose.literals import required_literals
from sparkinstall.probes import known_hosts
from sparkinstall.probes.host_detectors import KernelLogLimits
from sparkinstall.probes.known_hosts import Rule
from sparkinstall.schema import Malformed

FOLDER = "knowledge/logs"
ANY, OTHERS = "any", "others"
"""In `consequence_of`: whatever else was found is a cause of this one. With `ANY` it is no cause even if alone: it says
only that something ended. With `OTHERS` it is one."""
# A semicolon in parentheses or in code ends no step.
_STEP_ENDS = re.compile(r"; (?=(?:[^`]*`[^`]*`)*[^`]*\Z)(?![^()]*\))")

_SHORTEST = 3
# A number of the line in a text: `{free}`, or what two of them give.
_PLACE = re.compile(r"\{([a-z_]+)(?: ([-/]) ([a-z_]+))?\}")
# What a hint says for some releases of vLLM only.
_RANGE = re.compile(r"\{(from|before) (\d+\.\d+\.\d+): ([^{}]+)\}")
_Line = Annotated[str, schema.like(r"[^\n]+", "one line of text")]
_Some = Annotated[tuple[_Line, ...], Meta(min_length=1, title="a list of text, at least one")]
_Anchor = Annotated[str, schema.like(rf"[^\n]{{{_SHORTEST},}}", f"text of at least {_SHORTEST} characters")]
_Name = Annotated[str, schema.like("[a-z0-9]+(-[a-z0-9]+)*", "words in lower case, joined by `-`")]


class KnownFailure(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a user is told about a known failure.

    `fix` is the number of a fix, or None. `family` names the broader failure that this one is a kind of. An "event" is
    told only as the cause of a failure that names it. A `general` one tells what a kind of exception or error means,
    and is told only where nothing else is the cause.
    """

    name: _Name
    title: _Line
    severity: Literal["failure", "warning", "event"] = "failure"
    fix: Annotated[int, Meta(ge=1, le=FIXES[-1].number, title="the number of a fix")] | None = None
    why: _Line
    hint: _Line
    concerns: str = ""
    family: str = ""
    general: bool = False
    links: _Some

    @property
    def is_warning(self) -> bool:
        """Whether it is no failure by itself: a warning or an event."""
        return self.severity != "failure"

    @property
    def note(self) -> str:
        """What a list says beside the title of what is no failure by itself."""
        return {"failure": "", "warning": " (a warning)", "event": " (an event)"}[self.severity]

    def told(self, words: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return these fields alone, with the numbers of a line in place of `{name}`, `{a - b}` and `{a / b}`."""
        fields = {name: getattr(self, name) for name in KnownFailure.__struct_fields__}
        return (
            fields if words is None else {**fields, **{each: _filled(fields[each], words) for each in ("why", "hint")}}
        )


class Signature(KnownFailure, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to find a known failure. A line matches if it contains one of the `anchors` and `regex` matches around it.

    Where an entry gives no `anchors`, `load` derives them from the regex. `consequence_of` names the failures that
    cause this one, or contains `ANY` or `OTHERS`. `frames` must match too, in the traceback that ends with the line.
    `also_in` names where the regex is searched besides what programs report as an error. Fewer lines than `times` are
    no failure, nor are those before a line of one of `over_with` or with the text `over_after`, nor, where `only_with`
    names others, those without one of these, nor those of which `unless_with` names another that was found.
    `told_with` names events whose `why` is told too, where they were found. `harmless` are similar lines that must not
    match.

    A `general` one is searched only in suspicious lines in which no other is found, the first that matches counts, and
    it needs no `anchors`; what the line says is quoted, and so it is with `own_words`. A `part` names a part of a
    program by its `frames`, or by the words that its messages are `about`; its title and hint are told with a kind that
    is general `by_part`, the latter in place of the hint of a `vague` one. An `outer` part calls the others, so that it
    tells nothing of a traceback without its exception. `elsewhere`, `elsewhere_title` and `elsewhere_hint` are `why`,
    `title` and `hint` where the program serves no models; one `of_the_server` is told alike there, since such a program
    only asked the server.
    """

    regex: re.Pattern[str]
    frames: re.Pattern[str] | None = None
    also_in: tuple[Literal["info", "warning", "answers"], ...] = ()
    times: Annotated[int, Meta(ge=1, title="a number of lines")] = 1
    example: tuple[_Line, ...] = ()
    anchors: tuple[_Anchor, ...] = ()
    consequence_of: tuple[_Line, ...] = ()
    over_with: tuple[_Line, ...] = ()
    over_after: str = ""
    only_with: tuple[_Line, ...] = ()
    unless_with: tuple[_Line, ...] = ()
    told_with: tuple[_Line, ...] = ()
    harmless: tuple[_Line, ...] = ()
    own_words: bool = False
    part: bool = False
    outer: bool = False
    elsewhere: str = ""
    elsewhere_title: str = ""
    elsewhere_hint: str = ""
    of_the_server: bool = False
    about: re.Pattern[str] | None = None
    by_part: bool = False
    vague: bool = False

    def told_elsewhere(self, words: Mapping[str, str]) -> dict[str, str]:
        """Return title, why and hint as far as a program that serves no models has its own."""
        own = {"title": self.elsewhere_title, "why": self.elsewhere, "hint": self.elsewhere_hint}
        return {name: _filled(text, words) for name, text in own.items() if text}

    @property
    def ends_only(self) -> bool:
        """Whether it says only that something ended, not why."""
        return ANY in self.consequence_of

    def found_in(self, line: Line, frames: str) -> re.Match[str] | None:
        """Return where it is in a line; `frames`: the traceback that ends with this line."""
        if line.level in ("info", "warning") and line.level not in (*self.also_in, self.severity):
            return None
        found = self.regex.search(line.text if "answers" in self.also_in else line.said)
        if found and self.frames and not self.frames.search(f"{frames}\n{line.said}"):
            return None
        return found


def load(folder: Path | None = None, release: str = "") -> tuple[Signature, ...]:
    """Return every signature of the folder, in the order of files and entries, with hints for a release of vLLM.

    Without a release the hints name the releases that each part is for. By default the signatures are the shipped ones
    and those of the rules for the kernel's log in `knowledge/hosts.yaml`.

    Raises:
        Malformed: an entry is invalid, or two have the same name.
    """
    return tuple(replace(each, hint=hint_for(each.hint, release)) for each in _read(folder))


@lru_cache(maxsize=1)
def _read(folder: Path | None) -> tuple[Signature, ...]:
    files = sorted((folder or asset(FOLDER)).glob("*.yaml"))
    found = [each for file in files for each in schema.read_file(tuple[Signature, ...], file)]
    if folder is None:
        found = _with_rules(found)
    found = [replace(each, anchors=each.anchors or _anchors(each)) for each in found]
    _refuse_bad_references(found)
    return tuple(found)


def steps(hint: str) -> list[str]:
    """Return the things to do that a hint names."""
    return _STEP_ENDS.split(hint)


def hint_for(hint: str, release: str) -> str:
    """Return what a hint says for a release of vLLM; "" (not known): all of it, with the releases of each part."""

    def told(part: re.Match[str]) -> str:
        side, border, text = part.groups()
        if not release:
            which = f"vLLM {border} and later" if side == "from" else f"before vLLM {border}"
            # What other releases take instead follows.
            return f" {text} ({which})" + ("," if hint[part.end() :].startswith("{") else "")
        return f" {text}" if (_numbers(release) >= _numbers(border)) == (side == "from") else ""

    return _RANGE.sub(told, hint)


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(each) for each in re.findall(r"\d+", release)[:3])


def _with_rules(signatures: Sequence[Signature]) -> list[Signature]:
    """Let each rule for the kernel's log be a signature; one of the same name knows more wordings, and the rule's."""
    rules = {each.name: each for each in known_hosts.rules() if isinstance(each.limits, KernelLogLimits)}
    named = [each.name for each in signatures]
    return [
        *(_widened(each, rules[each.name]) if each.name in rules else each for each in signatures),
        *(_of_rule(each) for name, each in rules.items() if each.signature and name not in named),
    ]


def _widened(signature: Signature, rule: Rule) -> Signature:
    return replace(signature, regex=re.compile(f"{signature.regex.pattern}|{rule.limits.pattern.pattern}"))


def _of_rule(rule: Rule) -> Signature:
    return Signature(
        name=rule.name,
        title=rule.title,
        severity="failure" if rule.verdict == "fail" else "warning",
        regex=rule.limits.pattern,
        why=f"{rule.why}.",
        hint=rule.hint,
        concerns=rule.concerns,
        links=tuple(each.link for each in rule.evidence),
    )


def _anchors(signature: Signature) -> tuple[str, ...]:
    if signature.general:
        return ()
    # Not over a quotation mark: JSON writes a backslash before it.
    found = tuple(max(each.split('"'), key=len) for each in required_literals(signature.regex.pattern))
    if not found or min(map(len, found)) < _SHORTEST:
        raise Malformed(FOLDER, f"{signature.name}: no literal text follows from the regex: give `anchors`")
    return found


def _filled(text: str, words: Mapping[str, str]) -> str:
    def fill(found: re.Match[str]) -> str:
        first, sign, second = found.groups()
        if not sign:
            return words[first]
        one, other = float(words[first]), float(words[second])
        # Rounded down: a share that is a little too large fails again.
        return f"{one - other:.2f}" if sign == "-" else f"{math.floor(one / other * 100) / 100:.2f}"

    # A part of the regex that did not match leaves no empty parentheses.
    return _PLACE.sub(fill, text).replace(" ()", "")


def _refuse_bad_references(signatures: Sequence[Signature]) -> None:
    names = Counter(each.name for each in signatures)
    if twice := [name for name, times in names.items() if times > 1]:
        raise Malformed(FOLDER, f"two signatures are called {', '.join(sorted(twice))}")
    for each in signatures:
        if unknown := set(each.consequence_of) - names.keys() - {ANY, OTHERS}:
            raise Malformed(FOLDER, f"{each.name}: consequence_of names {', '.join(sorted(unknown))}")
        for field in ("over_with", "only_with", "unless_with", "told_with"):
            if unknown := set(getattr(each, field)) - names.keys():
                raise Malformed(FOLDER, f"{each.name}: {field} names {', '.join(sorted(unknown))}")
        if each.family and each.family not in names:
            raise Malformed(FOLDER, f"{each.name}: there is no family {each.family}")
        _refuse_bad_kind(each)
        texts = (each.why, each.hint, each.elsewhere, each.elsewhere_title, each.elsewhere_hint)
        used = {name for place in _PLACE.findall("".join(texts)) for name in (place[0], place[2]) if name}
        if unknown := used - set(each.regex.groupindex):
            raise Malformed(FOLDER, f"{each.name}: the regex has no group {', '.join(sorted(unknown))}")
    _refuse_circles(signatures)


def _refuse_bad_kind(each: Signature) -> None:
    if each.general and (each.ends_only or each.is_warning):
        raise Malformed(FOLDER, f"{each.name}: what is general is a failure, and a cause if alone")
    if ((each.part or each.by_part) and not each.general) or (each.part and not each.frames):
        raise Malformed(FOLDER, f"{each.name}: a part is general and has `frames`; by_part needs general")
    if ((each.about or each.outer) and not each.part) or (each.vague and not each.by_part):
        raise Malformed(FOLDER, f"{each.name}: `about` and outer need part; vague needs by_part")


def _refuse_circles(signatures: Iterable[Signature]) -> None:
    """Raise Malformed if failures explain each other: none would remain as the cause.

    It follows what `explains` says. What follows from `ANY` or `OTHERS` follows from most others, so that these two
    stand in the graph between both, in place of a million pairs.
    """
    after: dict[str, set[str]] = {each.name: set(each.consequence_of) for each in signatures}
    after[ANY] = {each.name for each in signatures if not each.ends_only}
    after[OTHERS] = {each.name for each in signatures if not each.ends_only and OTHERS not in each.consequence_of}
    for each in signatures:
        if each.family:
            after[each.family].add(each.name)
    try:
        TopologicalSorter(after).prepare()
    except CycleError as circle:
        raise Malformed(FOLDER, f"these explain each other in a circle: {', '.join(circle.args[1])}") from circle


def explains(cause: Signature, other: Signature) -> bool:
    """Return whether `cause` explains `other` where both are found."""
    if cause.name in other.consequence_of or cause.family == other.name:
        return True
    if cause.ends_only or cause.name == other.name:
        return False
    return other.ends_only or (OTHERS in other.consequence_of and OTHERS not in cause.consequence_of)
