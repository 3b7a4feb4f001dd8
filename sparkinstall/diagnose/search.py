"""Search a log of any size, read once as a stream, for known failures.

An automaton finds all literals at once, so that only lines with one of them are tried against a regex. The result
does not depend on how the stream is cut into blocks.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import itemgetter

from msgspec import Struct, field
from msgspec.structs import replace

from sparkinstall.diagnose import advice, ending, kinds, pastes, projects, sightings, suspicion
from sparkinstall.diagnose.ending import End
from sparkinstall.diagnose.findings import SERVER_STARTED, SUCCEEDED, TELLING_KEPT, Findings, shape_of
from sparkinstall.diagnose.index import SignatureIndex, automaton
from sparkinstall.diagnose.lines import Line, printable, take_apart
from sparkinstall.diagnose.sightings import SHOWN, WIDEST, Match, Place, Suspect, shown
from sparkinstall.diagnose.signatures import Signature
from sparkinstall.diagnose.tracebacks import BEGINNINGS, Role, Tracebacks, place_of
from sparkinstall.diagnose.wrapped import Wrapped

REACH = 2048
"""Bytes around a literal in which its regex is searched, within the line."""
LONG = 1 << 16
"""Bytes after which the beginning of a line is searched before its end has arrived."""
MOST = 2_000
"""Lines of one failure that are counted."""
MOST_WEIGHED = 200_000
"""What the suspicious lines of a log may cost: `_COST` each, and 1 for one whose shape was weighed `ALIKE` times."""
ALIKE = 500
"""Suspicious lines of one shape that are weighed, so that noise does not use up what the failure needs."""
_COST = 10
FELL_BACK = "fell-back"
"""The event that a program goes on another way after what failed just before."""
_MOST_AFTERMATH = 200
"""Lines after which an error that is no exception was none that ended the program."""
_FRUITLESS = 500
"""After so many lines that differ in numbers only, in which a regex found nothing, it is not tried in another one."""
_SHAPES = 10_000
"""Shapes of lines that are remembered."""
_NOWHERE = (1, 0)
"""The span of no bytes."""
_MOST_FRUITLESS = 50_000
"""A failure is not looked for any more after so many lines without it that hold its literal; one in which the regex was
tried counts as ten."""

# NCCL's source file, which names the part of it that reports something.
_NCCL_FILE = re.compile(r"[\w/]+\.(?:cc|h)(?=:\d+ )")
# The error of another process, which the message of one that only ended repeats.
_INNER = re.compile(
    r"\bfailed with error ['\"](?P<error>\w*(?:Error|Exception)\b.*?)(?:['\"], please check.*)?$"
    r"|<Future [^>]*\bexception=(?P<kind>\w+)\(['\"](?P<told>.{4,}?)['\"],?\)"
    r"|\bWorker failed with error ['\"](?P<words>[^'\"#].{8,}?)(?:['\"], please check.*|['\"]?\s*$)"
)

_BEGINNINGS = tuple(each.encode() for each in BEGINNINGS)
# The outermost code of a program: an exception that passes it ends the program.
_OF_MAIN = re.compile(r'File "[^"]*", line \d+, in (?:<module>|_bootstrap)$', re.MULTILINE)


class _Current(Struct):
    """The line that is being read, what it is for the traceback around it, and what was found in it.

    `missed`: failures that are not in the part of the line that was read, though it has a literal of theirs.
    """

    number: int
    line: Line
    role: Role
    is_suspect: bool
    weight: int | None = None
    matches: dict[str, tuple[Signature, Place, Mapping[str, str]]] = field(default_factory=dict)
    missed: set[str] = field(default_factory=set)

    @property
    def weighed(self) -> int:
        """How suspicious the line is."""
        if self.weight is None:
            self.weight = suspicion.weight(self.line, self.role, self.number)
        return self.weight

    @property
    def raised_by(self) -> str:
        """The code that raised an exception without a message, such as an `assert`; "" for any other line."""
        code = [each.strip() for each in self.role.frames.splitlines() if re.search(r"\w", each)]
        is_bare = self.role.kind == "exception" and ":" not in self.line.message
        return f" (raised by `{code[-1][:WIDEST]}`)" if is_bare and code else ""


class Search:
    """Search the log `name` fed in blocks. `found` is complete after `end()`."""

    def __init__(self, index: SignatureIndex, name: str) -> None:
        self.name = name
        self._index = index
        self._wrapped = Wrapped()
        self.found = Findings()
        self._tracebacks = Tracebacks()
        self._chains: dict[int, set[str]] = {}
        self._current = _Current(0, take_apart(""), Role("plain"), False)
        self._head = self._current.line
        self._clock: int | None = None
        self._weighed = 0
        self._alike: dict[bytes, int] = {}
        self._fruitless: dict[tuple[str, bytes], int] = {}
        self._in_vain: dict[str, int] = {}
        self._shape: tuple[int, bytes] = (0, b"")
        self._span = _NOWHERE
        self.bytes = self.lines = 0
        # The beginning of the log, its end, and the numbers of its known lines.
        self._beginning = self._ending = b""
        self._known_lines: set[int] = set()
        self._waiting = b""
        self._seen = 0
        self._number = 1
        self._meant: Sequence[Sequence[Signature | None]] = list(index.meanings.values())
        self._automaton = index.automaton
        self._enough = False

    def _build(self) -> None:
        """Build the automaton of the literals whose failures have not reached their limit yet."""
        self._enough = False
        wanted = {
            literal: signature
            for literal, signature in self._index.meanings.items()
            if not all(map(self._is_counted_enough, signature))
        }
        # Literals are only ever dropped; to build it costs as much as to search some MB.
        if len(wanted) < len(self._meant):
            self._meant = list(wanted.values())
            # Two at a time would need twice the memory.
            del self._automaton
            self._automaton = automaton(wanted)

    def _is_counted_enough(self, signature: Signature | None) -> bool:
        if signature is None:
            return self._weighed >= MOST_WEIGHED
        seen = self.found.sightings.get(signature.name)
        return bool(seen and seen.count >= MOST) or self._in_vain.get(signature.name, 0) >= _MOST_FRUITLESS

    def feed(self, data: bytes) -> list[Match]:
        """Search the next block; return the failures found for the first time."""
        self.bytes += len(data)
        if len(self._beginning) < pastes.BYTES:
            self._beginning = (self._beginning + data)[: pastes.BYTES]
        self._ending = (self._ending + data if len(data) < pastes.BYTES else data)[-pastes.BYTES :]
        self._waiting = self._waiting + data if self._waiting else data
        whole = self._waiting.rfind(b"\n") + 1
        if len(self._waiting) - whole > LONG:
            return self._look(len(self._waiting) - REACH - self._index.longest, REACH)
        return self._look(whole, 0) if whole else []

    def end(self) -> list[Match]:
        """Search the last line, which may lack a line end; return the failures found for the first time."""
        rest = self._waiting[self._seen :]
        known = len(self.found.sightings)
        self._look(len(self._waiting), 0)
        self.lines = self._number - 1 + bool(rest)
        self.found.is_cut_off = self._tracebacks.are_cut_off
        end = End(self.name, self.lines, self.bytes, self._ending, self._known_lines)
        ending.read_joined(self.found, self._wrapped, self._index)
        self._read_cut_off()
        ending.read_words(self.found, end)
        ending.place_crashes(self.found, {who: "\n".join(frames) for who, frames in self._tracebacks.dumps.items()})
        ending.note_last_word(self.found, end)
        return list(self.found.sightings.values())[known:]

    def _read_cut_off(self) -> None:
        """Read what a traceback without its last line would have raised, or at least where it ended."""
        cut = self._tracebacks.cut_off(self.lines)
        for each in sorted(cut, key=lambda each: each.number, reverse=True):
            if each.number <= self.found.last_of(SERVER_STARTED, SUCCEEDED):
                continue
            if not each.raised:
                if all(suspect.weight <= suspicion.WEAK for suspect in self.found.suspects.values()):
                    ending.keep_end_of(self.found, each, self.name)
                continue
            line = Line(each.raised, each.raised, each.who, each.level, len(each.raised), None)
            current = _Current(each.number, line, Role("exception", each.frames, each.number), is_suspect=True)
            for signature in self._index.signatures:
                if signature.general or not any(anchor in each.raised for anchor in signature.anchors):
                    continue
                if words := signature.found_in(line, each.frames):
                    place = Place(self.name, each.number, shown(each.raised, words.end()))
                    current.matches[signature.name] = (signature, place, words.groupdict(""))
            self._current = current
            self._finish_line()

    def general_of(self, suspect: Suspect) -> Match | None:
        """Return what a suspicious line means by its kind, if a general failure is of that kind.

        It did not end what has started later, nor, if it is no exception, what went on for long.
        """
        lasted = self._number - suspect.place.line
        ended_well = self.found.last_of(SERVER_STARTED, SUCCEEDED)
        is_passing = suspect.weight <= suspicion.SOME and (lasted > _MOST_AFTERMATH or suspect.place.line <= ended_well)
        if is_passing or suspect.place.line <= self.found.last_of(SERVER_STARTED):
            return None
        is_last = suspect.place.line >= self.lines
        is_elsewhere = suspect.is_elsewhere or not (suspect.frames or self._is_of_a_server)
        return kinds.meaning_of(suspect, self._index.general, is_last=is_last, is_elsewhere=is_elsewhere)

    @cached_property
    def _is_of_a_server(self) -> bool:
        """Whether the log's beginning or end tells that it is of a program that serves models; known at its end."""
        return any(projects.is_of_a_server(printable(each)) for each in (self._beginning, self._ending))

    def _look(self, upto: int, keep: int) -> list[Match]:
        """Search what begins before `upto`, and drop all but the last `keep` bytes before it."""
        known = len(self.found.sightings)
        self._span = _NOWHERE
        data, at, number = self._waiting, 0, self._number
        for which, start, end in self._matches(data):
            if not self._seen <= start < upto:
                continue
            if lines := data.count(b"\n", at, start):
                self._walk(data, at, number, data.rfind(b"\n", at, start) + 1)
            number, at = number + lines, start
            for signature in self._meant[which]:
                self._weigh(signature, data, start, end, number)
        self._walk(data, at, number, upto)
        if not keep:
            self._finish_line()
        self._see_ends(data, upto)
        self._remember_head(data, upto, keep)
        cut = max(0, upto - keep)
        self._number = number + data.count(b"\n", at, cut)
        self._waiting, self._seen = data[cut:], upto - cut
        if self._enough:
            self._build()
        return list(self.found.sightings.values())[known:]

    def _see_ends(self, data: bytes, upto: int) -> None:
        """Note the last text after which a failure that was seen is over: good logs pay nothing for it."""
        for seen in self.found.sightings.values():
            if (text := seen.signature.over_after) and (at := data.rfind(text.encode(), self._seen, upto)) >= 0:
                seen.over = self._number + data.count(b"\n", 0, at)

    def _matches(self, data: bytes) -> list[tuple[int, int, int]]:
        """Return (literal, start, end) of each match, ordered by start."""
        return sorted(self._automaton.find_matches_as_indexes(data, overlapping=True), key=itemgetter(1, 2))

    def _walk(self, data: bytes, at: int, number: int, upto: int) -> None:
        """Read each line before `upto` while a traceback is open: the exception that ends it may be any line."""
        while at < upto and (self._tracebacks.are_open or self._may_go_on):
            if number > self._current.number:
                if self._weighed >= MOST_WEIGHED:
                    return
                self._count_weighed(_COST)
                is_open = self._tracebacks.are_open
                self._begin_line(self._line(data, at, at, number), number, is_suspect=is_open)
            at, number = data.find(b"\n", at, upto) + 1 or upto, number + 1

    @property
    def _may_go_on(self) -> bool:
        """Whether the next line may continue a message that is shown."""
        if self._wrapped.is_open:
            return True
        current = self._current
        if not self._wrapped.may_begin(current.line):
            return False
        if any(
            name not in self.found.sightings or self.found.sightings[name].count < SHOWN for name in current.matches
        ):
            return True
        return current.is_suspect and current.weighed > 0

    def _line(self, data: bytes, start: int, end: int, number: int) -> Line:
        """Return the line around a match, the current one if it is in that. Who wrote a long line, and what it quotes,
        its beginning tells."""
        if number == self._current.number and self._span[0] <= start and end <= self._span[1]:
            return self._current.line
        text, is_whole, span = around(data, start, end)
        self._span = span if span[1] - span[0] < REACH else _NOWHERE
        line = take_apart(text)
        if is_whole:
            return line
        begin = data.rfind(b"\n", 0, start) + 1
        head = take_apart(printable(data[begin : begin + REACH])) if begin or not self._seen else self._head
        is_quoted = head.quoted < len(head.text)
        return replace(line, who=head.who, level=head.level, quoted=0 if is_quoted else line.quoted)

    def _remember_head(self, data: bytes, upto: int, keep: int) -> None:
        """Keep the beginning of a long line, of which the rest is searched later."""
        begin = data.rfind(b"\n", 0, upto) + 1
        if keep and (begin or not self._seen):
            self._head = take_apart(printable(data[begin : begin + REACH]))

    def _weigh(self, signature: Signature | None, data: bytes, start: int, end: int, number: int) -> None:
        if signature is None:
            self._weigh_suspicious(data, start, end, number)
            return
        seen = self.found.sightings.get(signature.name)
        if seen and (seen.count >= MOST or seen.last == number):
            return
        tried = (signature.name, self._shape_of(data, start, number))
        if self._fruitless.get(tried, 0) >= _FRUITLESS:
            self._count_in_vain(signature, 1)
            return
        current = self._begin_line(self._line(data, start, end, number), number, is_suspect=False)
        if signature.name in current.matches or signature.name in current.missed or current.role.kind == "frame":
            return
        if found := signature.found_in(current.line, current.role.frames):
            place = Place(self.name, number, shown(current.line.text, found.end()))
            current.matches[signature.name] = (signature, place, found.groupdict(""))
            return
        current.missed.add(signature.name)
        self._count_in_vain(signature, 10)
        # With `frames` the lines before count too.
        if not signature.frames and tried[1] and len(self._fruitless) < _SHAPES:
            self._fruitless[tried] = self._fruitless.get(tried, 0) + 1

    def _weigh_suspicious(self, data: bytes, start: int, end: int, number: int) -> None:
        """Read a line for its shape, unless enough lines like it were read. Of tracebacks, which are units, each is."""
        is_weighed = self._current.number == number and self._current.is_suspect
        if self._weighed >= MOST_WEIGHED or is_weighed:
            return
        shape = b"" if self._tracebacks.are_open else self._shape_of(data, start, number)
        alike = self._alike.get(shape, 0)
        if shape and alike >= ALIKE and not any(each in shape for each in _BEGINNINGS):
            self._count_weighed(1)
            return
        if shape and (alike or len(self._alike) < _SHAPES):
            self._alike[shape] = alike + 1
        self._count_weighed(_COST)
        self._begin_line(self._line(data, start, end, number), number, is_suspect=True)

    def _count_weighed(self, cost: int) -> None:
        self._weighed += cost
        self._enough |= self._weighed >= MOST_WEIGHED

    def _count_in_vain(self, signature: Signature, lines: int) -> None:
        count = self._in_vain[signature.name] = self._in_vain.get(signature.name, 0) + lines
        self._enough |= count - lines < _MOST_FRUITLESS <= count

    def _shape_of(self, data: bytes, start: int, number: int) -> bytes:
        """Return the line without its digits; b"" if it is long."""
        if self._shape[0] != number:
            first = data.rfind(b"\n", 0, start) + 1
            last = data.find(b"\n", start, first + REACH)
            self._shape = (number, data[first:last].translate(None, b"0123456789") if last > 0 else b"")
        return self._shape[1]

    def _begin_line(self, line: Line, number: int, is_suspect: bool) -> _Current:
        """Read a line, or another part of the line that is being read."""
        if number == self._current.number:
            if line is not self._current.line:
                self._current.missed.clear()
            self._current.line, self._current.weight = line, None
            self._current.is_suspect |= is_suspect
            return self._current
        self._finish_line()
        self._wrapped.see(line, self._current.line, is_next=number == self._current.number + 1)
        self._clock = self._clock if line.when is None else line.when
        self._current = _Current(number, line, self._tracebacks.see(number, line), is_suspect)
        return self._current

    def _finish_line(self) -> None:
        """Count the failures in the line, or take it for a suspicious one."""
        current = self._current
        if current.role.kind == "exception" and not current.line.level and _OF_MAIN.search(current.role.frames):
            self.found.ended_by[current.line.who] = current.role.first
        matches = [each for each, _, _ in current.matches.values()]
        if matches and current.number <= pastes.LINES:
            self._known_lines.add(current.number)
        takers: list[Match | Suspect] = []
        for signature, place, words in current.matches.values():
            if not any(self._tells_more(other, signature) for other in matches):
                seen = self._seen_now(signature, words)
                seen.is_logged &= current.role.kind == "exception" and current.line.level == "error"
                if seen.count < MOST:
                    seen.see(place)
                    takers += [seen] if seen.count <= SHOWN else []
                self._enough |= seen.count >= MOST
                self._chain(seen)
        # An exception in which only an event was found, such as the name of a program, tells more.
        is_raised = current.role.kind == "exception"
        is_known = any(not each.only_with and not (is_raised and each.severity == "event") for each in matches)
        if current.is_suspect and (not is_known or _INNER.search(current.line.message)):
            takers += self._suspect(current)
        self._wrapped.begin(current.line, takers)
        if FELL_BACK in current.matches:
            self.found.forgive(current.line, current.number)
        current.is_suspect, current.matches = False, {}

    def _seen_now(self, signature: Signature, words: Mapping[str, str]) -> Match:
        """Return the failure that was found in this line, perhaps for the first time."""
        if signature.name not in self.found.sightings:
            line, frames = self._current.line, self._current.role.frames
            seen = Match(
                signature, words=words, when=self._clock, who=line.who, where=place_of(frames),
                is_elsewhere=projects.is_elsewhere(frames),
            )  # fmt: skip
            if signature.own_words:
                suspect = Suspect(Place(self.name, self._current.number, line.text), 0, line.message, line.who)
                seen.says, seen.advice = f'"{advice.says(line.message)}"', suspect.advice
            self.found.sightings[signature.name] = seen
        return self.found.sightings[signature.name]

    def _tells_more(self, one: Signature, other: Signature) -> bool:
        """Return whether `other` is only the family of `one`, a broader kind of the same family, or any family beside a
        failure that is none; or whether the code that raised it makes a warning of it."""
        if one.is_warning and one.frames:
            return not other.is_warning
        if one.is_warning or one.ends_only or one.only_with:
            return False
        if one.name in other.consequence_of and one.family == other.family:
            return True
        if other.name in one.consequence_of and one.family == other.family:
            return False
        return one.family == other.name or (other.name in self._index.families and one.name not in self._index.families)

    def _chain(self, seen: Match) -> None:
        """Note which failures the traceback names as what came before."""
        if first := self._current.role.first:
            if len(self._chains) > MOST:
                self._chains.clear()
            names = self._chains.setdefault(first, set())
            seen.after |= names - {seen.signature.name}
            names.add(seen.signature.name)

    def _suspect(self, current: _Current) -> list[Suspect]:
        """Keep a suspicious line; return it if it is a new one."""
        line, frames = current.line, current.role.frames
        weight, kept = current.weighed, self.found.suspects
        if not weight and suspicion.is_set_aside(line, current.role):
            has_named = suspicion.named_within(line.message) is not None
            weight, kept = suspicion.SOME if has_named else suspicion.WEAK, self.found.set_aside
        if not weight:
            return []
        shape = shape_of(line.message)
        if known := kept.get(shape):
            known.count += 1
        elif len(kept) < TELLING_KEPT:
            place = Place(self.name, current.number, shown(line.text, 0) + current.raised_by)
            said = line.message[: max(0, line.quoted - len(line.text) + len(line.message))]
            inner = _INNER.search(said)
            if told := inner or (suspicion.named_within(said) if kept is self.found.set_aside else None):
                parts = told.groupdict("")
                said = parts["error"] or parts.get("words") or f"{parts['kind']}: {parts['told']}"
            elif "NCCL WARN" in line.prefix:
                # The word that tells NCCL's errors stands in what comes before the message.
                file = _NCCL_FILE.search(line.prefix)
                said = f"NCCL WARN {file[0]}: {said}" if file else f"NCCL WARN {said}"
            said += current.raised_by
            # The traceback of what another process has raised is that of who passes it on.
            kept[shape] = sightings.suspect(place, weight, said, line.who, "" if inner else frames)
            kept[shape].is_raised = current.role.kind == "exception"
            return [kept[shape]]
        return []


def around(data: bytes, start: int, end: int) -> tuple[str, bool, tuple[int, int]]:
    """Return the line around a match, at most `REACH` bytes to each side; whether it has the beginning; its span."""
    first, last = max(0, start - REACH), min(len(data), end + REACH)
    before = max(data.rfind(b"\n", first, start), data.rfind(b"\r", first, start)) + 1
    # A progress bar rewrites its line after each \r.
    after = min((at for at in (data.find(b"\n", end, last), data.find(b"\r", end, last)) if at >= 0), default=last)
    span = (max(first, before), after)
    return printable(data[span[0] : span[1]]), before > 0 or start < REACH, span
