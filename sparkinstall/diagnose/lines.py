"""One line of a log without what other programs put around it: who wrote it, at which level, when, and what it says."""

import re

from msgspec import Struct

_COLOURS = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
# Colours that have lost the escape character when they were pasted, or of which it was written in letters (rsyslog and
# others: #033, \x1b, ^[), and what ends them.
_BARE_COLOURS = re.compile(r"(?:#033|\\033|\\x1[bB]|\\u001[bB]|\\e|\^\[)?\[\d{1,2}(?:;\d{1,2})*m")
_BARE_ENDS = ("[0m", "[0;0m")
# Characters that would move the cursor, ring the bell or change the text direction of a terminal.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")

_TIME = r"\d\d:\d\d:\d\d(?:[.,]\d+)?"
_DATES = (
    r"\d{4}[-/](?P<m1>\d\d)[-/](?P<d1>\d\d)[T ]",
    r"(?:[A-Z][a-z]{2} )?(?P<name>Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) +(?P<d2>\d{1,2}) ",
    r"(?<![\d-])(?P<m3>\d\d)-(?P<d3>\d\d) ",
    r"\b[IWEF](?P<m4>\d\d)(?P<d4>\d\d) ",
)
_WHEN = re.compile(rf"(?:{'|'.join(_DATES)})(?P<h>\d\d):(?P<min>\d\d):(?P<s>\d\d)")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DAY = 24 * 3600

# What stands before a message. `who` tells the processes of one log apart, `level` how bad the program says it is.
PROGRAM = r"(?:[\w.@/:()-]+\[\d+\]|kernel|systemd|sudo)"
"""What writes to the journal, as its lines name it."""
_LEVEL = r"(?:TRACE|DEBUG|INFO|NOTICE|WARNING|WARN|ERROR|CRITICAL|FATAL)"
_PREFIXES = (
    # pytest, before the lines of an exception
    r"E {3,}(?=\S)",
    # its summary, and the logs of Buildkite
    r"(?:FAILED|ERROR) \S+\.py::\S.* - (?=(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)\b)",
    r" {2}\| (?=\[?\d{4}-\d\d-\d\d)",
    # a quotation in a mail or an issue
    r"(?:> ?)+(?=\S| {2})",
    # docker compose, kubectl --prefix, containerd
    r"(?P<who>[\w.-]+) +\| ",
    r"(?P<who>\[pod/[^\]]+\]) ",
    r"(?:std(?:out|err)) [FP] ",
    # docker build
    r"(?P<who>#\d+) \d+\.\d+ ",
    # the same in what it repeats of the step that failed: seconds with four digits
    r"(?:0\.\d{3}|[1-9]\.\d{3}|[1-9]\d\.\d\d|[1-9]\d{2,4}\.\d) (?=\s*\S)",
    # Ray's own logger
    rf"\[\d{{4}}-\d\d-\d\d {_TIME} (?P<ray>[IWECF]) \d+ \d+\] (?:\(\w+\) )?[\w./]+:\d+: +",
    # UCX: the time, the process and the place
    r"\[\d+\.\d+\] \[[\w.-]+:\d+ *:\d+\] +[\w./]+:\d+ +UCX +(?P<level>ERROR|WARN|FATAL|DIAG|INFO|DEBUG) +",
    # Open MPI: the host and the process
    r"(?P<who>\[[\w.-]+:\d+\]) (?=\*\*\* |\w+\.c:\d+ )",
    # SGLang: the time and the rank
    rf"\[\d{{4}}-\d\d-\d\d {_TIME} (?P<who>(?:[A-Z_]{{2,10}}\d+ ?)+)\] ",
    # ISO time, of docker, kubectl, journald and many programs; journald goes on with the host and the program
    rf"\[?\d{{4}}[-/]\d\d[-/]\d\d[T ]{_TIME}(?:Z|[+-]\d\d:?\d\d)?\]? ?(?=\s*\S)"
    rf"(?:\| +(?!{_LEVEL} |std(?:out|err) )|(?: ?[\w.-]+ (?={PROGRAM}: )))?",
    # the names of months are those of the user's language
    rf"(?:[A-Z][a-z]{{2}} )?(?:[A-Za-zà-ž]{{3,5}}\.?|\d{{1,2}}月) [ \d]?\d {_TIME}(?: \d{{4}})? "
    rf"(?:[\w.-]+ )?(?={PROGRAM}: )",
    # journald's program, the kernel's clock
    r"(?P<who>[\w.@/:()-]+\[\d+\]): ?",
    r"(?P<kernel>kernel): ?(?:\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ?)?",
    rf"(?P<kernel>\[(?: *\+?\d+\.\d+ ?|[A-Z][a-z]{{2}} [A-Z][a-z]{{2}} [ \d]\d {_TIME} \d{{4}})\])(?:\[ *[TC]\d+\])? ",
    # `dmesg --decode`
    rf"(?:[\w.-]+: )?(?P<kernel>kern)(?:el)? *: ?\w+ *: "
    rf"(?:\[[^\]]{{1,40}}\]:? *|\d{{4}}-\d\d-\d\dT{_TIME}[+-]\d\d:?\d\d )?",
    # the time alone
    rf"\[{_TIME}\] (?=\S)",
    # vLLM and Ray name the process
    r" {0,16}(?P<who>\([\w.:-]+(?: [\w.:]+)?(?: (?:pid|rank|ip)=[^)]*|, ?ip=[^)]*)\)) ?",
    r"(?P<who>\((?:EngineCore|APIServer|Worker)\w*\)) (?=\S)",
    r"(?P<who>\(pid=[\w-]+, ip=[\w.:]+\)) ",
    # pasted in bold
    r" *\*\*(?P<who>\([\w.:-]+(?: [\w.:]+)? (?:pid|rank|ip)=[^)]*\))\*\* ?",
    r"(?P<who>\((?:raylet|autoscaler|gcs_server)\)) ?",
    r"(?P<who>\[(?:rank|default)\d+\]):? ?",
    # launchers put the rank before each line of a process, perhaps twice
    r"(?P<who>\[\d{1,5}\]) (?=[\[ A-Za-z])",
    # loggers: of vLLM, uvicorn, Python, Ray, glog
    rf"(?P<level>{_LEVEL}) \d\d-\d\d {_TIME} (?:\[[^\]]*:\d+\]|[\w./]+:\d+\]) ?",
    rf"(?P<level>{_LEVEL}) \[[\w./]+\.py:\d+\] ",
    # the same of which only the file is left
    r" {0,2}\[[a-z_]\w+\.py:\d+\] (?=\s*\S)",
    rf"(?P<level>{_LEVEL}) +(?:\[[a-z_]\w*(?:\.\w+)+\]|\([a-z_]\w*(?:\.\w+)+\):) ",
    rf"(?P<level>{_LEVEL}) [\w./]+\.py:\d+ -- ",
    # what a program printed, passed on by its logger under a level of its own; loguru
    rf"\| {_LEVEL} +\| std(?:out|err) \|(?: |$)",
    rf"\| (?P<level>{_LEVEL}) +\| [\w.<>]+:[\w.<>]+:\d+ - ",
    r"\[?(?P<glog>[IWEF])\d{4} [\d:.]+ +(?:\d+ +){0,2}[\w./-]+:\d+\] ",
    r"\[(?P<c10d>[IWEF]) [\w./]+:\d+\] ",
    # llama.cpp: minutes, seconds, their parts and the level
    r"\d+\.\d\d\.\d{3}\.\d{3} (?P<llama>[DIWE]) (?=\S)",
    rf"-? ?\[?(?P<level>{_LEVEL})\]? ?(?:- |:[\w.]+: ?|: *|\| |  +)",
    rf"\[(?P<level>{_LEVEL})\] ",
    rf"\[[\w.-]+\] (?P<level>{_LEVEL}): (?=\S)",
    # Chromium, and with it programs of Electron
    r"\[\d+:\d{4}/\d{6}\.\d+:(?P<level>FATAL|ERROR|WARNING|INFO|VERBOSE\d*):[\w./-]+(?:\(|:)\d+[\])]+ ",
    # nginx
    r"\[(?P<level>emerg|alert|crit|error|warn|notice)\] \d+#\d+: (?:\*\d+ )?",
    # a library that names itself
    r"[\w.-]+: (?P<level>[Ww]arning): (?=\S)",
    # logfmt, of programs in Go
    r"(?:time|ts)=(?:\"[^\"]*\"|\S+) (?=level=)",
    r"level=(?P<level>\w+) (?:(?:source|caller)=\S+ )?(?:msg=)?",
    r"(?:- )?[\w.]+ - (?=(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) - )",
    # what CMake found, which is no error
    r" {0,8}(?P<cmake>-- )(?=\S)",
    # the result of a test or a benchmark, and advice for what may come
    r" *(?P<test>FAIL|PASS)  +",
    r"(?P<advice>If you) (?:get|see|encounter|have|want|need|are) ",
    # programs in Go
    r"(?P<go>INFO|WARN|ERRO|FATA|DEBU)\[\d+\] +",
    # NCCL
    r"[\w.-]+:\d+:\d+ \[\d+\] (?:[\w./]+:\d+ )?(?:NCCL )?(?P<nccl>INFO|WARN|TRACE) ",
    r"[\w./]+:\d+ NCCL (?P<nccl>INFO|WARN) ",
    r"NCCL (?P<nccl>INFO|WARN|TRACE) ",
)
# One of them, with the name of its group and its number, because a name may be used only once.
_PREFIX = re.compile("|".join(each.replace("(?P<", f"(?P<n{at}_") for at, each in enumerate(_PREFIXES)))
_LETTERS = {"D": "info", "I": "info", "W": "warning", "E": "error", "F": "error", "C": "error"}
_LEVELS = {
    **dict.fromkeys(("trace", "debug", "debu", "info", "notice"), "info"),
    **dict.fromkeys(("warning", "warn"), "warning"),
    **dict.fromkeys(("error", "critical", "fatal", "err", "erro", "fata", "emerg", "alert", "crit"), "error"),
}
_NO_ERRORS = ("cmake", "test", "advice")
"""Kinds of prefixes of which no line reports an error."""
_JSON_LEVEL = re.compile(r'"(?:level|severity|levelname)"\s*:\s*"(\w+)"')
# {"log":"text\n","stream":"stderr","time":"..."}
_DOCKER = re.compile(r'\{"log": ?"((?:[^"\\]|\\.)*)')
_ESCAPED = re.compile(r"\\(u[0-9a-f]{4}|.)")
_MOST_PREFIXES = 12
# A whole line that was pasted in bold.
_BOLD = re.compile(r"\*\*(\S.*[^\s*])\*\*\s*$")
# What torch prints of kernels that it tries and drops, although at level error.
_TRIED = re.compile(r"_inductor/select_algorithm\.py:\d+\]")
# A command as a shell repeats it (`set -x`) or as it stands after a prompt, a line of its options, a comment.
_COMMAND = re.compile(
    r"(?:\++|\$|[\w.-]+@[\w.-]+:\S*[$#]) (?=\S)|#+ (?=[A-Za-z])"
    r"|\s*--?(?![A-Z]-)[A-Za-z][\w-]*(?:(?:[ =][^\s\\]+){0,2}|.* \\)$"
)
KERNEL = "kernel"
"""The name of the kernel in `who`."""

# Where the text of a request or of an answer begins: whatever follows are the words of a user, a tool or a model.
_QUOTED = re.compile(
    r"[Rr]eceived request \S|[Gg]enerated response \S|\b(?<!decoding )(?<!reading )(?:request|response) body\b"
    r"|(?<!-)\bprompt(?:_token_ids)?['\"]?\s*[:=]"
    r"|\\?['\"](?:messages|content|arguments|tool_calls|prompt|input|text|reasoning(?:_content)?|query|output)\\?['\"]"
    r"\s*:\s*(?:\\?['\"]|\[|f')|\b(?:content|arguments|prompt|text)=(?:['\"]|\[)|(?<!['\"`])</?(?:tool_response|tool_result|think)>"
    r"|<\|(?:im_start|user|assistant|start)"
)
_QUOTING = (
    "eceived request", "enerated response", "request body", "response body", "prompt", "messages", "content",
    "arguments", "tool_calls", "input", "text", "reasoning", "query", "output", "<|", "tool_response", "tool_result",
    "think>",
)  # fmt: skip


class Line(Struct, frozen=True):
    """A line taken apart.

    `text`: the whole line, printable. `message`: without what stands before it. `who`: the process, as far as the line
    names it. `level`: "info", "warning", "error" or "" (not told). `quoted`: where in `text` the words of a request or
    a command begin. `when`: seconds since the beginning of a year, or None.
    """

    text: str
    message: str
    who: str
    level: str
    quoted: int
    when: int | None

    @property
    def prefix(self) -> str:
        """What stands before the message."""
        return self.text[: len(self.text) - len(self.message)]

    @property
    def said(self) -> str:
        """The part of `text` that the program itself says."""
        return self.text[: self.quoted]


def printable(data: bytes) -> str:
    """Return a line without colours, control characters and tabs."""
    return _plain(data.decode("utf-8", "replace"))


def _plain(text: str) -> str:
    text = _COLOURS.sub("", text)
    if any(each in text for each in _BARE_ENDS):
        text = _BARE_COLOURS.sub("", text)
    return _CONTROL.sub("", text).replace("\t", " ")


def take_apart(text: str) -> Line:
    """Return who says what in a printable line."""
    text = _unpacked(text) if text.startswith("{") else text
    text = _BOLD.sub(r"\1", text) if text.startswith("**") else text
    at, who, level = 0, [], ""
    for _ in range(_MOST_PREFIXES):
        found = _PREFIX.match(text, at)
        if found is None or found.end() == at:
            break
        at, kind = found.end(), (found.lastgroup or "_").split("_")[1]
        word = found[found.lastgroup] if found.lastgroup else ""
        if kind == "kernel":
            # The rest is the kernel's own, even if it begins like the prefix of a logger ("INFO: task ...").
            who.append(KERNEL)
            break
        if kind == "who":
            who.append(word)
        elif kind:
            level = "info" if kind in _NO_ERRORS else _LETTERS.get(word) or _LEVELS.get(word.lower(), "")
            # What NCCL calls a warning is an error.
            level = "error" if (kind, level) == ("nccl", "warning") else level
    if not level and (told := _JSON_LEVEL.search(text, 0, 400)):
        level = _LEVELS.get(told[1].lower(), "")
    if _TRIED.search(text, 0, at):
        level = "info"
    quoted = at if _COMMAND.match(text, at) else _quoted(text)
    return Line(text, text[at:], " ".join(who), level, quoted, _when(text, at))


def _quoted(text: str) -> int:
    """Return where the words of a request begin, or the length of the text.

    The regex is tried only where a word of its own stands, at most two characters before it: a search would try it at
    each character of a line of some kB.
    """
    lower = text.lower() if text.isascii() else text
    first = len(text)
    for word in _QUOTING:
        at = lower.find(word, 0, first + len(word))
        while 0 <= at < first + 2:
            starts = (start for start in (at - 2, at - 1, at) if 0 <= start < first)
            found = next((start for start in starts if _QUOTED.match(lower, start)), None)
            if found is not None:
                first = found
                break
            at = lower.find(word, at + 1, first + len(word))
    return first


def _unpacked(text: str) -> str:
    """Return the message of a line in docker's own files, which are JSON; a long one may lack its end."""
    found = _DOCKER.match(text)
    if found is None:
        return text
    return _plain(_ESCAPED.sub(_unescaped, found[1])).rstrip()


def _unescaped(found: re.Match[str]) -> str:
    letter = found[1]
    return chr(int(letter[1:], 16)) if len(letter) > 1 else " " if letter in "nrt" else letter


def _when(text: str, at: int) -> int | None:
    """Return the time of a line whose message begins at `at`: the program's own, not that of who passed the line on."""
    found = max(_WHEN.finditer(text, 0, at or 60), key=lambda each: each.start(), default=None)
    if found is None:
        return None
    month = next((int(found[each]) for each in ("m1", "m3", "m4") if found[each]), None)
    if month is None:
        month = _MONTHS.index(found["name"]) + 1
    day = next(int(found[each]) for each in ("d1", "d2", "d3", "d4") if found[each])
    if not (month and day):
        # The logger has not been told the date yet.
        return None
    seconds = int(found["h"]) * 3600 + int(found["min"]) * 60 + int(found["s"])
    return (month * 31 + day) * _DAY + seconds
