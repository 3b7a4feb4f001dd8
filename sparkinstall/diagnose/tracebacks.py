"""Read Python's tracebacks as units: of each only the exception counts, and of chained ones the first."""

import re
from collections import deque
from collections.abc import Iterable
from functools import lru_cache

from msgspec import Struct, field

from sparkinstall.diagnose.advice import NO_TEXT
from sparkinstall.diagnose.lines import Line

HEAD = "Traceback (most recent call last)"
"""What begins a traceback."""
_DUMPED = "(most recent call first)"
BEGINNINGS = (HEAD, ", line ", "During handling of the above", "The above exception was", _DUMPED)
"""Texts without which no line begins or chains a traceback."""

_PLACE = re.compile(r'File "(?P<path>[^"]*)", line \d+(?:, in (?P<function>\S+))?')
# The part of a path that tells nothing: where an environment is.
_ENVIRONMENT = re.compile(r".*/(?:site-packages|dist-packages|python3(?:\.\d+)?)/")
# Code through which every call passes.
_WRAPPERS = ("contextlib.py", "torch/nn/modules/module.py", "vllm/tracing/", "torch/utils/_contextlib.py", "<frozen ")
_FILE = re.compile(r'\s*File "[^"]*", line \d+')
# The same as IPython and notebooks write it, older and newer.
_NOTEBOOK = re.compile(r"(?:File )?(?P<path>[~/]\S+?\.py)(?::(?P<line>\d+),)? in (?P<function>\w+)\(")
# A notebook names the exception where a traceback begins, and tells it at the end.
_HEADED = re.compile(
    r"(?P<name>(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Failure|Interrupt)) {2,}Traceback \(most recent"
)
# What faulthandler prints of a thread when a program crashes: the innermost place first, and no exception.
_DUMP = re.compile(r"(?P<current>Current )?[Tt]hread 0x[0-9a-f]+ .*" + re.escape(_DUMPED))
_CHAIN = ("During handling of the above exception", "The above exception was the direct cause")
# Python's word for an exception that changed nothing, usually while it ends.
_IGNORED = "Exception ignored in"
REFUSING = re.compile(r"\[[\w/]*serving\w*\.py:\d+\]")
"""The logger of vLLM's front end, which logs each request that it refuses."""
REFUSED = re.compile(r"(?:[\w.]+\.)?(?:\w*ValidationError|ValueError|JSONDecodeError|TemplateError|BadRequestError)\b")
"""An exception by which it refuses one."""
# Functions that read a request, before the engine has it.
_READS_A_REQUEST = re.compile(r", in _?\w*(?:preprocess|tokeni[sz]e|validate|render|parse_chat|chat_template)\w*")
_BETWEEN = re.compile(r"\s*$|\s{2}|[\^~]+$|\.\.\.<|\[Previous line repeated|[|+] ")
# Code that looks like a name and a message, where a log has lost its indentation: an annotation, or `else:`.
_CODE = re.compile(r"[a-z_][\w.]*: [^=\"']{1,80} = |(?:try|else|finally):\s*$")
# Its name, of a class that a function defines with `<locals>` in it.
_EXCEPTION = re.compile(r"(?![a-z_]\w*:)[A-Za-z_](?:[\w.]|<locals>)*(?::(?: |$)|$)")
# One that stands as deep as the lines with `File`: a traceback that was pasted or is indented. Code is deeper.
_INDENTED = re.compile(r"\s+(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Failure|Interrupt|Exit)(?:: \S|$)")
# What the code of the last frame raises, and the texts in it.
_RAISE = re.compile(r"\braise (?:[a-z_]\w*\.)*(?P<name>[A-Z]\w*)\((?P<rest>.*)", re.DOTALL)
_ASSERT = re.compile(r"[^\n]*\n\s*assert (?P<what>\S[^\n]*)")
_TEXTS = re.compile(r"\"((?:[^\"\\\n]|\\.)*)\"|'((?:[^'\\\n]|\\.)*)'")
# The check of a library in C++, as the frame of its traceback shows it.
_CHECKED = re.compile(r"\b\w*CHECK\w*\((?P<what>.{1,200})\) << \"(?P<text>[^\"]+)\"")
# One that the end of the log has cut.
_BEGUN = re.compile(r"\s*f?[\"'](?P<text>[^\"'\n]{8,})\s*\Z")
# The exception itself, behind a beginning of its line that is not known.
_TOLD = re.compile(r"(?:^|[\s|\]])(?P<all>(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): \S.*)$", re.MULTILINE)
_PLAIN_NAMES = ("Exception", "RuntimeError", "ValueError", "TypeError", "OSError", "AssertionError")
_FROM_END = 40
"""Lines at the end of a log in which a traceback that has no exception is cut off."""
_MOST_FRAMES = 120
_MOST_LINES = 1000
_MOST_PROCESSES = 1000


class Role(Struct, frozen=True):
    """What a line is for the traceback around it.

    `kind`: "plain", "frame" (code, not a message) or "exception". Of an exception: `frames` are the lines of its
    traceback, `first` is the number of the line of the exception that the chain began with.
    """

    kind: str
    frames: str = ""
    first: int = 0


class Frame(Struct, frozen=True):
    """A place in a traceback: the path of the file as it stands there, and the function ("" if it is not told)."""

    path: str
    function: str

    @property
    def inner(self) -> str:
        """The path within the environment."""
        return _ENVIRONMENT.sub("", self.path)


class CutOff(Struct, frozen=True):
    """A traceback without its last line: the process, the level, the number of its last line, its lines, and what its
    code would have raised ("" if that does not tell)."""

    who: str
    level: str
    number: int
    frames: str
    raised: str


_PLAIN, _FRAME = Role("plain"), Role("frame")


class _Process(Struct):
    frames: deque[str] = field(default_factory=lambda: deque(maxlen=_MOST_FRAMES))
    is_open: bool = False
    has_head: bool = False
    is_dump: bool = False
    name: str = ""
    is_chained: bool = False
    is_ignored: bool = False
    is_of_request: bool = False
    first: int = 0
    lines: int = 0
    depth: int = 0
    last: int = 0


class Tracebacks:
    """The tracebacks of a log, whose processes may write in turns.

    `dumps`: for each process that crashed, where it was then.
    """

    def __init__(self) -> None:
        self.dumps: dict[str, deque[str]] = {}
        self._processes: dict[tuple[str, str], _Process] = {}
        self._open = 0

    @property
    def are_cut_off(self) -> bool:
        """Whether the log ends within a traceback, so that its exception is not known."""
        those = self._processes.items()
        return any(
            each.has_head
            and each.is_open
            and not (each.is_ignored or _is_refused(each))
            and each.lines < _MOST_FRAMES
            and key[1] not in ("info", "warning")
            for key, each in those
        )

    def cut_off(self, end: int) -> list[CutOff]:
        """Return the tracebacks that are cut off at the end of a log with so many lines."""
        those = (
            (key, each)
            for key, each in self._processes.items()
            if each.is_open
            and each.frames
            and not (each.is_ignored or each.is_dump or each.first or _is_refused(each))
            and key[1] not in ("info", "warning")
        )
        return [
            CutOff(*key, each.last, "\n".join(each.frames), _raised(each.frames) or each.name)
            for key, each in those
            if end - each.last <= _FROM_END
        ]

    @property
    def are_open(self) -> bool:
        """Whether a following line may end a traceback."""
        return self._open > 0

    def see(self, number: int, line: Line) -> Role:
        """Take the next line of the log."""
        key, message = (line.who, line.level), line.message
        if begun := self._begun_by(key, line):
            return begun
        process = self._processes.get(key)
        if _FILE.match(message):
            return self._place(process or self._begin(key), key, message, number)
        if process is None:
            return _PLAIN
        if message.lstrip().startswith(_CHAIN):
            process.is_chained = True
            return _FRAME
        if process.is_open and process.is_dump:
            process.is_open = False
            self._open -= 1
        return self._go_on(process, message, number) if process.is_open else _PLAIN

    def _begun_by(self, key: tuple[str, str], line: Line) -> Role | None:
        """Begin a traceback or a dump, if a line does so."""
        message = line.message
        if message.startswith(_IGNORED):
            self._begin(key).is_ignored = True
            return _FRAME
        if HEAD in message:
            begun = self._begin(key)
            headed = _HEADED.match(message)
            begun.is_of_request = REFUSING.search(line.prefix) is not None
            begun.name = f"{headed['name']}: {NO_TEXT}" if headed else ""
            begun.has_head = headed is not None or message.lstrip().startswith(HEAD)
            return _FRAME if begun.has_head else _PLAIN
        if dump := _DUMP.match(message):
            begun = self._begin(key)
            begun.is_dump = True
            if dump["current"]:
                self.dumps.setdefault(line.who, begun.frames)
            return _FRAME
        return None

    def _place(self, process: _Process, key: tuple[str, str], message: str, number: int) -> Role:
        """Take a place in a file; a path of Windows is kept as others are written."""
        message = message.replace("\\", "/")
        if not process.is_open:
            process = self._begin(key)
        if process.is_dump:
            process.frames.appendleft(message.replace(" in ", ", in ", 1))
            return _FRAME
        process.frames.append(message)
        process.depth, process.last = _depth(message), number
        return _FRAME

    def _go_on(self, process: _Process, message: str, number: int) -> Role:
        """Take a line below a place: code, or the exception."""
        process.lines += 1
        if place := _NOTEBOOK.match(message):
            process.frames.append(f'  File "{place["path"]}", line {place["line"] or 0}, in {place["function"]}')
            process.last = number
            return _FRAME
        is_exception = self._is_indented_exception(process, message)
        if not is_exception and self._is_code(process, message) and process.lines < _MOST_LINES:
            process.frames.append(message)
            process.last = number if message.strip() else process.last
            return _FRAME
        return self._end(process, number) if is_exception or _EXCEPTION.match(message) else _PLAIN

    def _is_indented_exception(self, process: _Process, message: str) -> bool:
        return _INDENTED.match(message) is not None and _depth(message) <= process.depth

    def _is_code(self, process: _Process, message: str) -> bool:
        """Whether a line belongs to the traceback. Who pastes a log may lose its indentation."""
        is_next = bool(process.frames) and _FILE.match(process.frames[-1]) is not None
        if _BETWEEN.match(message):
            return True
        return is_next and (_EXCEPTION.match(message) is None or _CODE.match(message) is not None)

    def _begin(self, key: tuple[str, str]) -> _Process:
        if len(self._processes) >= _MOST_PROCESSES:
            self._processes.clear()
            self._open = 0
        process = self._processes.setdefault(key, _Process())
        if not process.is_chained:
            process.first = 0
        self._open += not process.is_open
        process.is_open, process.is_chained, process.lines, process.depth = True, False, 0, 0
        process.has_head, process.is_of_request, process.is_dump, process.name = False, False, False, ""
        process.frames = deque(maxlen=_MOST_FRAMES)
        return process

    def _end(self, process: _Process, number: int) -> Role:
        process.is_open, process.first = False, process.first or number
        self._open -= 1
        if process.is_ignored:
            process.is_ignored = False
            return _FRAME
        return Role("exception", "\n".join(process.frames), process.first)


def _is_refused(process: _Process) -> bool:
    """Return whether a traceback without its exception is that of a request that the front end refuses: no failure of
    the server."""
    if not process.is_of_request or not _READS_A_REQUEST.search("\n".join(process.frames)):
        return False
    raised = _raised(process.frames)
    return not raised or REFUSED.match(raised) is not None


def _raised(frames: Iterable[str]) -> str:
    """Return the exception that the code of the last frame raises, as far as its texts tell; "" if they do not."""
    code = "\n".join(frames)
    places = list(_FILE.finditer(code))
    last = code[places[-1].end() if places else 0 :]
    if whole := _TOLD.search(last):
        return whole["all"]
    if found := _ASSERT.match(last):
        return f"AssertionError: {found['what'].strip()}"
    if found := _CHECKED.search(last):
        return f"RuntimeError: Check failed: ({found['what']}) is false: {found['text']}"
    found = _RAISE.search(last)
    if found is None:
        return ""
    told = "".join(one or other for one, other in _TEXTS.findall(found["rest"]))
    if not told and (begun := _BEGUN.match(found["rest"])):
        told = begun["text"]
    # Without a text the name says more than nothing, unless it is one for everything.
    name = "" if found["name"] in _PLAIN_NAMES else found["name"]
    return f"{found['name']}: {told}" if told.strip() else name and f"{name}: {NO_TEXT}"


@lru_cache(maxsize=8)
def frames_of(frames: str) -> tuple[Frame, ...]:
    """Return the places of a traceback, the outermost first. Several questions are asked of the same one in turn."""
    return tuple(Frame(found["path"], found["function"] or "") for found in _PLACE.finditer(frames))


def place_of(frames: str) -> str:
    """Return the file and the function that raised an exception, from its traceback; "" if that does not tell.

    Where that is torch or Python itself, what called it is told too.
    """
    told = [
        f"{each.inner}, {each.function}" if each.function else each.inner
        for each in frames_of(frames)
        if not each.inner.startswith(_WRAPPERS)
    ]
    if not told:
        return ""
    caller = next((each for each in reversed(told) if not each.startswith("torch/") and "/" in each), told[-1])
    return told[-1] if caller == told[-1] else f"{told[-1]}, called by {caller}"


def _depth(message: str) -> int:
    return len(message) - len(message.lstrip())
