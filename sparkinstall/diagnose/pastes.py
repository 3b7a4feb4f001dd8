"""Short logs, as a person pastes them: any line that tells of a failure counts, whatever its shape.

Nobody pastes a few lines of a log that went well, so words are enough here. In a long log they stand in too many lines.
"""

import re
from collections.abc import Collection, Sequence

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.diagnose import messages, suspicion
from sparkinstall.diagnose.lines import KERNEL, Line, printable, take_apart
from sparkinstall.diagnose.tracebacks import Role, Tracebacks

LINES = 60
"""Lines of a log that is read as a paste."""
BYTES = 1 << 15
"""Bytes of such a log."""
LAST = 8
"""Lines at the end of a longer log that are read so, if nothing else was found in it."""

# Paths and addresses, options, and names in which a word of failure is a part.
_NAMES = re.compile(r"\S*(?:/\S*){2,}|(?<!\S)--?[A-Za-z]\S*|\S*_(?:error|fail|invalid|missing|denied)\S*")
_STATUS = (
    r"\b(?i:rc|returncode|return(?:_| )code|exit(?:ed)?(?: with)?(?: code| status|_?code)|exit(?:ed|(?: status)?:?)"
    r"|(?:exit |exit_|status )(?:status|code)|status|errno)(?:=| ?\(|: ?| )-?"
    r"(?!(?:20\d|30\d)\b)[1-9]\d{0,2}\b(?![-:./])"
)
# It has failed, in the words of whoever says it.
_FAILED = re.compile(
    r"(?i:(?<![\w./=-])(?:failed|failure|fails|fatal|errors?|err|emerg|crit|panic|crash(?:ed|es)?|abort(?:ed|ing)?"
    r"|killed|segfault|unable to|could ?(?:not|n't)|can(?:not|'t| not)|refused|denied|forbidden|unauthorized"
    r"|tim(?:ed|e) ?out|timeout|no such|out of (?:memory|resources?|range)|no space left|oom-kill\w*|died|dead"
    r"|but (?:it )?is not (?:going|install\w+)|gave up|giving up"
    r"|hung|fallen off|unresolvable|unmet|incompatible|bad exit status)(?![\w/=-]))"
    # an exception by its name, what a program returned, a word in capitals
    r"|\b[A-Z]\w*(?:Error|Exception|Failure)\b|\bException: \S"
    rf"|{_STATUS}"
    r"|\b[A-Z][A-Z_]*(?:FAILED|FAILURE|ERROR|TIMEOUT|DENIED|REFUSED|INVALID|UNAVAILABLE)\b(?!=)|\[E\]|<err(?:or)?>"
)
# Something is not as it must be; whether it mattered is not told.
_AMISS = re.compile(
    r"(?i:(?<![\w./=-])(?:invalid|illegal|missing|mismatch(?:ed)?|(?:does|do|did) ?(?:not|n't)"
    r"|(?:is|are|was|were|has|have) not|(?:is|are|was|were)n't|not (?:found|supported|allowed|permitted|enough"
    r"|available|installed|compatible|implemented|valid|detected|defined|visible|recognized|authorized)"
    r"|no \w+(?: \w+){0,3} (?:found|available|detected|image)|insufficient|unsupported|unknown|unrecogni[sz]ed"
    r"|unexpected(?:ly)?|undefined|unavailable|unreachable|exceed(?:s|ed)|too (?:large|small|long|many|old|new|few|low)"
    r"|(?:larger|greater|less|smaller|older|newer|more) than|expected .{1,60}\b(?:got|but|found)\b|but got"
    r"|corrupt(?:ed)?|broken|conflict(?:s|ing)?|stuck|requires?|must(?: be| not)?|restricted|lost|only supported"
    r"|(?:is|are) going to be|is to be installed|held back|not (?:yet )?(?:ready|healthy|running|up|responding)"
    r" (?:after|within|in) \d)(?![\w/=-]))"
)
# What is said of no failure that happened: of none, of a number of them that is 0, of what may come.
_NOT_SO = re.compile(
    r"(?i:['\"][\w-]*(?:timeout|error|fail)[\w-]*['\"]: ?(?:\d|None|null|True|true|False|false)"
    r"|(?<![\w.])(?:0|no|zero|without|any) (?:\w+ )?"
    r"(?:errors?|failures?|failed|problems?|conflicts?|issues?|warnings?|faults?)\b(?: (?:was |were )?found)?"
    r"|\b(?:errors?|fail(?:ed|ures?)?|unreachable|dropped|timeouts?)(?: \w+){0,2}"
    r"(?: *[:=]\W*|[ |]{2,})(?:0\b(?!x)|none\b|false\b)"
    r"|\\?\"(?:error|errors|exception|failure|stderr)\\?\": ?(?:null|false|0|\\?\"\\?\"|\[\]|\{\})"
    r"|\b(?:if|when|unless|until|in case|whether|should|would|may|might|to avoid|to prevent|on) "
    r"[^.;]{0,60}\b(?:error|fail|cannot|can't|missing|invalid|not |unable|timeout|killed|crash)[^.;]*"
    r"|\b(?:timeout|time out|code|status)\W{1,4}(?:set|is|of|after|none|null|0)\b|\btimeout[=:]? ?\d)"
)
# Lines that are advice, notes or noise.
_NONE = re.compile(
    r"(?i:^\s*(?:note|hint|tip|info|usage)\b|--help\b|severity=correct|\bcorrect(?:ed|able)\b|\btainting kernel"
    r"|direct firmware load|\becho \"|\bapparmor\b|\bgkr-pam|\bstack trace\b|\bbacktrace\b|\bframe #\d"
    # what torch says of any GPU with few multiprocessors
    r"|\bmay mean that\b|^debconf:|^not enough sms to use max_autotune|^\s*\u2502 exit code: \d+$"
    # notes of pip and apt
    r"|requires .* but you have |^(?:Err|Ign|Hit|Get):\d|\[IP: |^No (?:services|containers|user sessions|VM guests) )"
)
# Commands, columns and rows of tables, counters, states of parts.
_OTHER_TEXT = re.compile(
    r".*\|\s*$|(?:[^|]* \| ){3}|(?:[^>]* -> ){2}"
    r"|\s*[\u2500-\u257f][\u2500-\u257f ]*[\w.]+(?: \(.*\))?$"
    r"|\s*(?:[$>#|+]|(?:echo|printf|print|if|then|fi|raise|return|assert|logger\.\w+|set|export)\b|=====)"
    r"|\s*[\w .()/-]{1,60}[:=]\s*[\d.,]+\s*(?:[a-zA-Z%/]{0,8})?$|.*\}\s+[\d.e+]+$"
    r"|\s*[\w /()-]{1,40}\s*: (?i:not supported|unsupported|n/a|not (?:available|active|present)|unknown|none)$"
    r"|\s+\w+ = "
)
# Programs whose lines are noise in good logs too: the kernel's, but for those of the parts that count here.
_OF_A_PART = re.compile(r"(?:NVRM|nvidia\b|nvidia-\w+|mlx5_core|infiniband|oom\b|\S+ invoked oom)")
_LIKE_THE_KERNEL = re.compile(r"[\w-]+ (?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.\d: |(?:audit|ACPI|EFI|usb|pci)\b")
# All went right, after whatever was before.
_WENT_RIGHT = re.compile(
    r"(?i:(?<!not )(?<!not yet )\b"
    r"(?:success(?:ful(?:ly)?)?|succeeded|complete(?:d|ly)?|done|ready|healthy|passed|finished"
    r"|recovered|resumed|reconnected|established)\b|\bis (?:now )?(?:running|up|active|serving)\b|active \(running\)"
    r"|\b(?:server|service|application|container|node) (?:is )?(?:started|running|up)\b|\blistening on\b|\b200 OK\b"
    r"|\bok\b *(?:[:=\]]|$)|: started\b|\bstarted \w|^fetched \d)"
)
_RESUMES = re.compile(
    r"(?i)\bretrying\b|\b(?:trying|attempting) to (?:resume|reconnect)\b|\bnext one in\b"
    r"|[.,;] (?:using|defaulting to|setting (?:it )?to|switching to|stopping|generating) \w"
)
# What a person is to do is nothing that the program does.
_ADVISES = re.compile(r"(?i)\b(?:you (?:can|may|must|should|need)|please|try|must be) .{0,60}\binstead\b")
# It goes on without knowing whether that is good.
_ANYWAY = re.compile(r"(?i)\b(?:continu\w+|proceed\w*|going on|carrying on) anyway\b")
# A level in a form that no logger here is known for.
_QUIET = re.compile(r".{0,80}?(?<![\w-])(?:INFO|DEBUG|TRACE|NOTICE|VERBOSE|I|D)(?=[\]:| ])(?!: task)")
_WARNING = re.compile(r".{0,80}?(?:(?<![\w-])(?:WARN(?:ING)?|[Ww]arning)(?=[\]:| ])|\[W[: ])")
# Only that something ended or that a step failed, without a reason.
_ENDED_ONLY = re.compile(
    r"(?i:\b(?:exit(?:ed|ing)?|stopp(?:ed|ing)|shut(?:ting)? ?down|terminat(?:ed|ing)|quit(?:ting)?|abort(?:ed|ing)?"
    r"|errors? occurred|clean(?:ing)? ?up|see (?:the )?(?:log|above|stack|root))\b)|^(?:\S+ ){0,2}\S+\W*$"
)
# A step of a build or a host of a play, of which the reason is told elsewhere.
_STEP = re.compile(r"\s*(?:=> ERROR \[|fatal: \[[\w.-]+\]: FAILED!|Main process exited|\S+: Main process exited)")
# The last of a tree of reasons.
_LAST_REASON = re.compile(r"\s*\u2570\u2500\u25b6 ")
# Where an exception of torch in C++ comes from, below its message.
_RAISED = re.compile(r"\s*Exception raised from \S+ at \S+:\d+")
_ANNOUNCES = re.compile(r".{0,60}:\s*$")
# What gives a reason: a colon with words behind it, "because", a value of a key.
_REASONED = re.compile(r": \S|(?i:\b(?:because|due to|since)\b)|\w=\w")
_SENTENCES = 160
"""Characters of a message that is long enough to say why something ended."""
_SOON = 3
"""Lines after which a program says that it goes on without what failed."""


class Read(Struct, frozen=True):
    """A line of a paste: its number, and what it is for the traceback around it."""

    number: int
    line: Line
    role: Role


def suspects(data: bytes, known: Collection[int], with_warnings: bool) -> list[tuple[Read, int]]:
    """Return the suspicious lines of a short log and how suspicious they are, except the known ones.

    Lines before a sign that all went well are none. `with_warnings`: a last line that is a warning counts, if no other
    line does.
    """
    lines = _read(data)
    well = max((each.number for each in lines if _went_right(each.line)), default=0)
    forgiven = _handled(lines)
    later = [each for each in lines if each.number > well and each.number not in forgiven | set(known)]
    raised = _raised(lines)
    found = [(each, weight) for each in later if (weight := _weight(each, each.number in raised))]
    if found or not with_warnings:
        return found
    return [(each, suspicion.WEAK) for each in later if _is_warned_of(each, lines[-1].number)]


def last_words(data: bytes, lines: int) -> list[tuple[Read, int]]:
    """Return the suspicious ones of the last lines of a longer log, which has so many; `data` has its end."""
    # The first may lack its beginning, which tells whose words they are.
    last = data.removesuffix(b"\n").split(b"\n")[1:][-LAST:]
    found = suspects(b"\n".join(last), (), with_warnings=False)
    ended = lines - len(last)
    return [(replace(each, number=ended + each.number), suspicion.WEAK) for each, w in found if w >= suspicion.SOME]


def _raised(lines: Sequence[Read]) -> set[int]:
    """Return the numbers of the lines below which the same process says where their exception comes from."""
    before: dict[str, int] = {}
    raised: set[int] = set()
    last: Read | None = None
    for each in lines:
        if _RAISED.match(each.line.message):
            # What begins such a message is taken for its process at times.
            is_told = last is not None and _level(last.line) in ("", "error")
            number = last.number if last and is_told else before.get(each.line.who, 0)
            raised.add(number)
        before[each.line.who], last = each.number, each
    return raised


def _handled(lines: Sequence[Read]) -> set[int]:
    """Return the numbers of the lines soon after which the same process says that it goes on."""
    numbers: dict[str, list[int]] = {}
    handled: set[int] = set()
    for each in lines:
        own = numbers.setdefault(each.line.who, [])
        own.append(each.number)
        if _goes_on(each.line):
            handled.update(own[-_SOON - 1 :])
    return handled


def _read(data: bytes) -> list[Read]:
    """Return the lines without what all of them are indented by."""
    texts = [printable(each) for each in data.split(b"\n")]
    indent = min((len(each) - len(each.lstrip()) for each in texts if each.strip()), default=0)
    lines = [(number, take_apart(each[indent:])) for number, each in enumerate(texts, 1) if each.strip()]
    tracebacks = Tracebacks()
    found = [Read(number, line, tracebacks.see(number, line)) for number, line in lines]
    return _with_levels(_without_first_code(found))


def _with_levels(lines: list[Read]) -> list[Read]:
    """Return the lines; one that continues a warning or less of the same process, which has its level, has it too."""
    found: list[Read] = []
    last: dict[str, Line] = {}
    for each in lines:
        line, before = each.line, last.get(each.line.who)
        if before and not line.level and each.role.kind == "plain" and _level(before) in ("info", "warning"):
            is_rest = messages.may_go_on(before.message, before.prefix) and messages.goes_on(
                before.message, line.message
            )
            line = replace(line, level=_level(before)) if is_rest else line
        last[line.who] = line
        found.append(replace(each, line=line))
    return found


def _without_first_code(lines: list[Read]) -> list[Read]:
    """Return the lines, with code before the first place of a traceback of which the paste lacks the beginning."""
    first = next((at for at, each in enumerate(lines) if each.role.kind == "frame"), 0)
    is_begun = first and lines[first].line.message.lstrip().startswith("File ")
    if not is_begun or any(not each.line.message.startswith("    ") for each in lines[:first]):
        return lines
    return [replace(each, role=Role("frame")) for each in lines[:first]] + lines[first:]


def _went_right(line: Line) -> bool:
    return line.level != "error" and bool(_WENT_RIGHT.search(line.message)) and not _FAILED.search(line.message)


def _goes_on(line: Line) -> bool:
    if _ADVISES.search(line.message) or _ANYWAY.search(line.message):
        return False
    return suspicion.goes_on(line.message) or _RESUMES.search(line.message) is not None


def _weight(read: Read, is_raised: bool) -> int:
    """Return how suspicious a line is that no program calls a warning or less; `is_raised`: it is an exception."""
    if _level(read.line) not in ("", "error") or _RAISED.match(read.line.message):
        return 0
    if is_raised and not suspicion.is_harmless(read.line):
        return suspicion.STRONG
    # Without the dot or dash of a list. What a logger indents below the first line of an error is code.
    is_code = read.line.level == "error" and read.line.message.startswith("  ")
    line = read.line if is_code else replace(read.line, message=read.line.message.lstrip(" \t-*•"))
    if weight := suspicion.weight(line, read.role, read.number):
        return weight
    message = _said(read)
    if _LAST_REASON.match(read.line.message) and (_FAILED.search(message) or _AMISS.search(message)):
        return suspicion.STRONG
    if _FAILED.search(message):
        is_reason = not tells_no_reason(message)
        return suspicion.SOME if is_reason else suspicion.WEAK
    return suspicion.WEAK if _AMISS.search(message) and KERNEL not in read.line.who.split() else 0


def tells_no_reason(message: str) -> bool:
    """Return whether a message only says that something ended or that a step failed."""
    is_bare = len(message) < _SENTENCES and _ENDED_ONLY.search(message) and not _REASONED.search(message)
    return bool(_STEP.match(message) or is_bare)


def _is_warned_of(read: Read, last: int) -> bool:
    """Return whether a paste ends with a line in which a program only warns of a failure, or with what it returned."""
    message = _said(read)
    if _level(read.line) == "info":
        return re.search(_STATUS, message) is not None
    return read.number == last and _FAILED.search(message) is not None


def _level(line: Line) -> str:
    """Return the level of a line, also one in an unknown form."""
    if line.level:
        return line.level
    return "info" if _QUIET.match(line.message) else "warning" if _WARNING.match(line.message) else ""


def _said(read: Read) -> str:
    """Return the words of a line that may tell of a failure: without names and addresses."""
    line, message = read.line, suspicion.said(read.line)
    if read.role.kind == "frame" or suspicion.is_harmless(line) or _ANNOUNCES.match(message):
        return ""
    is_kernel = KERNEL in line.who.split() or _LIKE_THE_KERNEL.match(message)
    if (is_kernel and not _OF_A_PART.match(message)) or _NONE.search(message) or _OTHER_TEXT.match(message):
        return ""
    return _NAMES.sub(" ", _NOT_SO.sub(" ", message))
