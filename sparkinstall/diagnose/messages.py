"""Messages of several lines: where one goes on, and what two of them have in common."""

import re

_WRAPPED = range(56, 161)
"""Characters of a line that can be one that was wrapped."""
_OPEN_ENDS = (":", ",", "\u2500", "(", "[", "{")
_ENDS = tuple(".!?;)]}>\"'`|^~%")
_BEGINS = re.compile(r"\s*(?!\S+: |\[\w+ |\(\w+\) [A-Z]+ )(?:[a-z(\[`'\"]|--[a-z])")
# One that lost the beginning of its line: even a name may stand there.
_BEGINS_LATER = re.compile(r"(?!\w\S*: |\w*\[|\(\w+\) [A-Z]+ |[A-Z]{4,} )[\w(\[{`'\"./<-]")
# What pydantic writes on three lines: that something is not valid, the field, and what is wrong with it.
_VALIDATED = re.compile(r"\d+ validation errors? for \S+\s*$")
_FIELD = re.compile(r"\d+ validation errors? for \S+$|[a-z][\w-]*(?:\.[\w-]+)+$")
_NO_REST = re.compile(r"\s*(?:File \"|Traceback|During handling|The above exception|[|+^~]{2}|--(?!\w))")
_WORD = re.compile(r"[a-z][a-z_-]{4,}")
_COMMON = frozenset(
    {
        "error", "errors", "warning", "failed", "failure", "loading", "using", "which", "while", "after", "before",
        "instead", "falling", "cannot", "could", "unable", "found", "default", "other", "trying", "there", "where",
        "please", "python",
    }
)  # fmt: skip


def may_go_on(message: str, prefix: str = "") -> bool:
    """Return whether the next line may belong to a message: it announces something, or may have been wrapped."""
    end = message.rstrip()
    if _FIELD.match(end):
        return True
    is_wide = len(end) in _WRAPPED or (end[:1].strip() != "" and len(prefix) + len(end) in _WRAPPED)
    return end.endswith(_OPEN_ENDS) or (is_wide and not end.endswith(_ENDS))


def goes_on(before: str, message: str) -> bool:
    """Return whether a line continues the one before, of the same process."""
    if _NO_REST.match(message):
        return False
    if _FIELD.match(before.rstrip()) or _VALIDATED.search(before):
        return True
    return before.rstrip().endswith(_OPEN_ENDS) or _BEGINS.match(message) is not None


def goes_on_bare(message: str) -> bool:
    """Return whether a line without anything before its message is the rest of one that was wrapped."""
    return not _NO_REST.match(message) and _BEGINS_LATER.match(message.lstrip()) is not None


def words(message: str) -> frozenset[str]:
    """Return the words by which one tells what a message is about."""
    return frozenset(_WORD.findall(message.lower())) - _COMMON
