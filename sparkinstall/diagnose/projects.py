"""Whose code a failure is of, as its traceback or its message tells, and where reports of such failures are."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Literal
from urllib.parse import quote_plus

from msgspec import Struct

from sparkinstall import schema
from sparkinstall.assets import asset
from sparkinstall.diagnose.advice import NO_TEXT, says
from sparkinstall.diagnose.tracebacks import Frame, frames_of

FILE = "knowledge/projects.yaml"
_EVERYWHERE = "https://github.com/search?type=issues&q={words}"
"""A search in the reports of all projects on GitHub."""

OF_MODELS = (
    r"(?i:\b(?:models?|weights?|layers?|checkpoints?|tokeni[sz]er|experts?|lora|prompts?|(?<!auth )tokens|embeddings?"
    r"|attention|kv.?cache|quanti[sz]\w*|speculative|logits?|safetensors)\b)"
)
"""A regex of the words that only programs speak that serve or train models."""
_OF_A_SERVER = re.compile(rf"{OF_MODELS}|\b(?:EngineCore|APIServer|Worker_\w+)|(?i:eagle3)")
# Python's own library, and code without a file.
_PYTHON = re.compile(r".*/python3\.\d+/(?!(?:site|dist)-packages/)|<|[\w.]+\.py\Z")
_INSTALLED = re.compile(r"/(?:site|dist)-packages/")
# What differs from report to report, and what a search takes for more than a word.
_DIFFERS = re.compile(
    rf"\[type=.*|\(raised by `.*`\)$|https?://\S*|(?:/[\w.+@-]+){{2,}}/?|\b0x[0-9a-f]+\b|\b[0-9a-f]{{16,}}\b\.*|{NO_TEXT}"
    r"|<[^<>]*>|\{[^{}]*\}|\[[^\[\]]*\]|\([^()]*\)"
    # not the apostrophe of a word, but what draws a tree
    r"|(?<!\w)[\"'`]|[\"'`](?!\w)|[\u2500-\u25ff]"
    r"|(?<![\w.])[-+]?\d[\d.,]*\w*|[=|\\]"
)
_CLASS = re.compile(r"(?:[A-Za-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Failure|Exit|Unsupported))\b")
# The file, which the log has before these words; `Suspect` has it after them.
_OF_NCCL = re.compile(r"NCCL WARN (?P<file>(?:[\w.-]+/)*(?P<name>[\w-]+\.(?:cc|h)): )")
_NAMED = re.compile(r"['\"`]((?!str\b|int\b|dict\b|list\b|tuple\b|float\b|bool\b|None)[\w.-]{3,60})['\"`]")
# Others have functions called `forward` or `run` too.
_TELLING_NAME = re.compile(r"\A(?=.{8})_?[a-z]+_\w+\Z")
_FEWEST, _MOST = 3, 10
"""Words that are searched for as one text."""
_FEW, _LONG = 14, 40
"""Characters of a text that is worth a search, and of one that needs no names beside it."""

_Search = Annotated[str, schema.like(r"https://\S+\{words\}", "an https address that ends with {words}")]


class Project(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who makes a package or a program.

    `path` is found in the files of its code, `said` in its messages. `role`: a "server" serves models, so that the
    model's files, the options and the versions of the stack concern it, as they do a "library" that servers are made
    of; a "program" uses such libraries for something else, such as training. `is_called`: others call it, and what it
    raises is as a rule theirs. `reports` is the address of a search in its reports, with `{words}`.
    """

    name: Annotated[str, schema.like(r"[^\n]+", "one line of text")]
    path: re.Pattern[str] | None = None
    said: re.Pattern[str] | None = None
    role: Literal["server", "library", "program", ""] = ""
    is_called: bool = False
    reports: _Search | None = None


@lru_cache(maxsize=1)
def projects() -> tuple[Project, ...]:
    """Return the known projects.

    Raises:
        Malformed: an entry is invalid.
    """
    return schema.read_file(tuple[Project, ...], asset(FILE))


def raised_by(frames: str) -> Project | None:
    """Return whose code a traceback ends in; of packages that others call, who called them. None: not known."""
    called = None
    for frame in _frames(frames):
        project = _project_at(frame.inner)
        if project and not project.is_called:
            return project
        if project is None and not _INSTALLED.search(frame.path):
            # A script of the user, whatever started it.
            return called
        called = called or project
    return called


def is_elsewhere(frames: str) -> bool:
    """Return whether a traceback is of a program that serves no model, whatever libraries it calls."""
    passed = list(_frames(frames))
    found = [_project_at(each.inner) for each in passed]
    roles = {each.role for each in found if each}
    if not passed or "server" in roles:
        return False
    is_of_a_script = found[-1] is None and not _INSTALLED.search(passed[-1].path)
    return "program" in roles or "library" not in roles or is_of_a_script


def told_by(message: str) -> Project | None:
    """Return whose words a message is, if it says so."""
    return next((each for each in projects() if each.said and each.said.search(message)), None)


def is_of_a_server(text: str) -> bool:
    """Return whether a log names a server, or a library that servers are made of, or speaks of models."""
    return _named().search(text) is not None or _OF_A_SERVER.search(text) is not None


@lru_cache(maxsize=1)
def _named() -> re.Pattern[str]:
    """Return what finds the name of such a project, as it is written in text or in code."""
    names = (re.sub(r"\W", "[-_. ]?", each.name) for each in projects() if each.role in ("server", "library"))
    return re.compile(rf"(?i:{'|'.join(names)})")


def reports(project: Project | None, message: str, where: str, may_end_cut: bool = False) -> str:
    """Return the address that searches a project's reports, or all on GitHub, for the words of a message.

    It is "" if the message says too little. `where`: the file and the function that raised it, if known.
    `may_end_cut`: the last word may be half a one.
    """
    words = _searched(message, where, may_end_cut)
    if not words:
        return ""
    address = (project.reports if project else None) or _EVERYWHERE
    # Other trackers take a quotation mark for a part of the word.
    words = words if address.startswith("https://github.com/") else words.replace('"', "")
    return address.format(words=quote_plus(words))


def _frames(frames: str) -> Iterator[Frame]:
    """Yield the places of a traceback, the last one first, but for those in Python's own files."""
    return (each for each in reversed(frames_of(frames)) if not _PYTHON.match(each.path))


@lru_cache(maxsize=1000)
def _project_at(inner: str) -> Project | None:
    """Return whose file a path within an environment is."""
    return next((each for each in projects() if each.path and each.path.search(inner)), None)


def _searched(message: str, where: str, may_end_cut: bool = False) -> str:
    """Return the words of a message that other reports of the failure have too: its longest text that does not vary,
    and the names that it and the traceback give. A text of several words stands in the message as it is."""
    file = _OF_NCCL.match(message)
    told = says(message.replace(file["file"], "", 1) if file else message)
    texts = [" ".join(each.split()).strip(" .,:;!-") for each in _DIFFERS.split(told)]
    longest = max(texts, key=len, default="")
    words = longest.split()
    names = [file["name"]] if file else []
    if len(words) < _FEWEST and (kind := _CLASS.search(message)) and kind[1] not in words:
        # A bare name, as of a key that is missing. A search passes over the signs between both.
        if re.match(rf"\W*{re.escape(longest)}", message[kind.end() :]):
            words = [kind[1], *words]
        else:
            names = [kind[1], *names]
    function = where.split(", called by ")[0].rpartition(", ")[2]
    names += [] if len(longest) >= _LONG else [*_NAMED.findall(told)[:2], *_TELLING_NAME.findall(function)]
    text = " ".join(words[:_MOST])
    whole = " ".join(words[: min(_MOST, len(words) - 1)])
    if may_end_cut and told.endswith(text) and " " in whole and len(whole) >= _FEW:
        text = whole
    beside = [each for each in names if each not in text]
    is_enough = len(text) >= _FEW if " " in text else bool(beside)
    return " ".join([f'"{text}"' if " " in text else text, *beside]) if is_enough else ""
