"""What was found in a log: the lines of known failures, and suspicious lines."""

import re
from collections.abc import Mapping

from msgspec import Struct, field

from sparkinstall.diagnose import advice, projects
from sparkinstall.diagnose.lines import PROGRAM
from sparkinstall.diagnose.projects import Project
from sparkinstall.diagnose.signatures import Signature
from sparkinstall.diagnose.stages import stage_of
from sparkinstall.diagnose.tracebacks import place_of

SHOWN = 3
"""Lines of one failure that are kept."""
WIDEST = 400
"""Characters of a line that are shown."""
_FRAMES_KEPT = 2000
"""Characters of a suspicious line's traceback that are kept."""

# Lines of journald and NCCL begin with the host name.
_JOURNAL = re.compile(rf"^(\w{{3}} [ \d]\d [\d:]{{8}}|\d{{4}}-\d\d-\d\dT[\d:.,+-]+Z?) \S+ (?={PROGRAM}:)")
_NCCL = re.compile(r"(?<![\w.-])[\w.-]+:(?=\d+:\d+ \[\d+\] )")

# What names vLLM: its processes, its folder, its name.
_OF_VLLM = re.compile(r"(?i:vllm)|\b(?:EngineCore|APIServer|Worker_|WorkerProc)")


class Place(Struct, frozen=True):
    """A line of a log: its 1-based number and its printable text."""

    log: str
    line: int
    text: str


class Match(Struct):
    """One known failure in a log: its first lines, number of its last line, and count of lines up to `MOST`; `over` is
    the last line with the text after which it is over.

    `words` are the named groups of the regex in the first line, `when` is the time of that line in seconds, `who` wrote
    it, and `where` is the code that raised it. `after` are the names of failures that a traceback names as what came
    before. `is_logged`: each line ends a traceback that the program logged, so that it caught the exception. Of a
    general one, `says` are the line's own words, `advice` is what follows from them, `part` tells of the part of a
    program that it is about, `stage` what to do about what the engine did then, and `reports` the address of the
    reports of `project` like it; `is_elsewhere`: neither its traceback nor the log shows that a program that serves
    models has a part in it.
    """

    signature: Signature
    lines: tuple[Place, ...] = ()
    count: int = 0
    last: int = 0
    words: Mapping[str, str] = field(default_factory=dict)
    when: int | None = None
    after: frozenset[str] = frozenset()
    who: str = ""
    where: str = ""
    says: str = ""
    advice: tuple[str, ...] = ()
    part: Signature | None = None
    stage: str = ""
    project: str = ""
    reports: str = ""
    is_elsewhere: bool = False
    over: int = 0
    is_logged: bool = True

    def see(self, place: Place) -> None:
        """Count another line."""
        self.count, self.last = self.count + 1, place.line
        if len(self.lines) < SHOWN:
            self.lines = (*self.lines, place)


class Suspect(Struct):
    """A suspicious line that matches no known failure, and how many similar lines there are.

    `message` is what it says, `who` wrote it, `where` is the code that raised it, `frames` is its traceback, and
    `stage` is what to do about what the engine did then. `project` is whose code or message it is, if known, and
    `is_elsewhere`: the traceback passes no code that has a part in serving a model.
    `is_cut_off`: it is the end of a traceback of which the log lacks the exception. `is_raised`: a traceback ends with
    it. `is_joined`: its message stood in several lines. `is_by_words`: only words of a short log make it suspicious.
    `may_end_cut`: its last word is the log's, and may be half a one.
    """

    place: Place
    weight: int
    message: str = ""
    who: str = ""
    where: str = ""
    frames: str = ""
    stage: str = ""
    project: Project | None = None
    is_elsewhere: bool = False
    count: int = 1
    is_cut_off: bool = False
    is_raised: bool = False
    is_joined: bool = False
    is_by_words: bool = False
    may_end_cut: bool = False

    def raised_within(self, frames: str) -> None:
        """Take a traceback for the one of this line, with what that tells of where the line comes from."""
        self.frames, self.where, self.stage = frames[-_FRAMES_KEPT:], place_of(frames), stage_of(frames)
        self.project = projects.raised_by(frames) or projects.told_by(self.message)
        self.is_elsewhere = projects.is_elsewhere(frames)

    @property
    def says_nothing(self) -> bool:
        """Whether an exception is missing, or only announces what follows, such as the traceback of another process."""
        return self.is_cut_off or (self.is_raised and self.message.rstrip().endswith(":"))

    @property
    def is_of_vllm(self) -> bool:
        """Whether vLLM's own code raised or logged it."""
        return _OF_VLLM.search(f"{self.who} {self.place.text} {self.frames}") is not None

    @property
    def reports(self) -> str:
        """The address of a search for reports of it; "" if it says too little."""
        if self.is_cut_off:
            return ""
        return projects.reports(self.project, self.message, self.where, self.may_end_cut)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do that follows from its own words."""
        return advice.advice(self.message, self.is_of_vllm)


def suspect(place: Place, weight: int, message: str, who: str, frames: str = "") -> Suspect:
    """Return a suspicious line with what its traceback, if it has one, and its words tell of where it comes from."""
    found = Suspect(place, weight, message, who)
    found.raised_within(frames)
    return found


def shown(text: str, at: int) -> str:
    """Return `text` for display: without the host name, and cut around the position `at` if it is long."""
    if len(text) > WIDEST:
        first = max(0, min(at - WIDEST * 3 // 4, len(text) - WIDEST))
        text = f"{'... ' if first else ''}{text[first : first + WIDEST]} ..."
    return _NCCL.sub("", _JOURNAL.sub(r"\1 ", text.rstrip()))
