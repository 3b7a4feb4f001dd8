"""Options of `vllm serve` as its parser understands them: spellings, values, which of two counts."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct

from sparkinstall.recipes import Option

# Short options of vLLM 0.18.1 to 0.33.0 that recipes use.
_SHORT = {
    "-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dcp": "--decode-context-parallel-size",
    "-dp": "--data-parallel-size", "-ep": "--enable-expert-parallel", "-n": "--nnodes", "-r": "--node-rank",
    "-q": "--quantization", "-cc": "--compilation-config", "-ac": "--attention-config", "-sc": "--speculative-config",
    "-dc": "--diffusion-config",
}  # fmt: skip
_SPECULATION = "--speculative-config"
_SEPARATORS = ";&|"
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_NUMBER = re.compile(r"-\d+(?:\.\d+)?")


def options(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[Option, ...]]:
    """Return the words before the first option, and the options: a word without `-` belongs to the one before it."""
    first: list[str] = []
    found: list[list[str]] = []
    for word in words:
        if is_option(word):
            found.append(list(_parts(word)))
        elif found:
            found[-1].append(word)
        else:
            first.append(word)
    return tuple(first), tuple(map(tuple, found))


def is_option(word: str) -> bool:
    """Whether a word is an option: not a negative number, nor a single `-`."""
    return len(word) > 1 and word.startswith("-") and not _NUMBER.fullmatch(word)


def _parts(word: str) -> tuple[str, ...]:
    name, equals, value = word.partition("=")
    # `-O3` and `-O{...}` are one word.
    if not name.startswith("--") and name.partition(".")[0] not in _SHORT:
        return (word,)
    return (full_name(name), value) if equals else (full_name(name),)


def full_name(name: str) -> str:
    """Return the long name, with `-` for `_`. What follows a dot is a key of JSON, and stays."""
    option, dot, key = name.partition(".")
    return _SHORT.get(option, option.replace("_", "-")) + dot + key


def key(option: Option) -> str:
    """Return what an option sets: `--x` and `--no-x` set the same."""
    return re.sub("^--no-", "--", option[0])


def last_of_each(given: Iterable[Option]) -> tuple[Option, ...]:
    """Return the options without those that a later one replaces."""
    every = tuple(given)
    last = {key(each): at for at, each in enumerate(every)}
    return tuple(each for at, each in enumerate(every) if last[key(each)] == at)


class Draft(Struct, frozen=True):
    """The model that drafts in speculative decoding; `revision`: what of it, if that is named."""

    model: str
    revision: str | None = None


def draft_of(args: Iterable[Option]) -> Draft | None:
    """Return the model that drafts, None if none does or the main model does. Of several the last one counts."""
    found: dict[str, Any] = {}
    for each in args:
        if key(each) == _SPECULATION and each[1:]:
            found = _object(each[1])
        elif key(each).startswith(f"{_SPECULATION}.") and each[1:]:
            found[key(each).rpartition(".")[2]] = each[1]
    model, revision = found.get("model"), found.get("revision")
    return Draft(str(model), str(revision) if revision else None) if model else None


def with_draft_at(words: Sequence[str], commit: str) -> list[str]:
    """Return the words of options with the model that drafts at this commit."""
    first, given = options(words)
    changed: list[str] = [*first]
    for each in given:
        if key(each) == _SPECULATION and "model" in (content := _object(each[1] if each[1:] else "")):
            each = (each[0], json.dumps({**content, "revision": commit}))
        elif key(each) == f"{_SPECULATION}.model":
            each = (*each, f"{_SPECULATION}.revision", commit)
        if key(each) != f"{_SPECULATION}.revision":
            changed += each
    return changed


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class ServeCall(Struct, frozen=True):
    """A command that calls `vllm serve`: its words, the variables set before it, and words of other programs."""

    words: tuple[str, ...]
    env: dict[str, str]
    other: tuple[str, ...]


def serve_call(command: str) -> ServeCall:
    """Find `vllm serve` in a command, which is split as a shell does. Nothing in it is expanded.

    Raises:
        ValueError: it does not call `vllm serve`, or a quote is not closed.
    """
    words = _shell_words(command)
    for at in range(len(words) - 1):
        if words[at].rpartition("/")[2] == "vllm" and words[at + 1] == "serve":
            ends = (each for each in range(at, len(words)) if words[each] and set(words[each]) <= set(_SEPARATORS))
            end = next(ends, len(words))
            pairs = [word.partition("=") for word in words[:at] if _ASSIGNMENT.match(word)]
            other = [word for word in words[:at] if not _ASSIGNMENT.match(word) and word not in ("exec", "env")]
            env = {name: value for name, _, value in pairs}
            return ServeCall(tuple(words[at + 2 : end]), env, (*other, *words[end:]))
    raise ValueError("it has no `vllm serve`")


def _shell_words(command: str) -> list[str]:
    # A backslash ends a line of a command even if blanks follow it.
    lines = re.sub(r"(?m)^[ \t]*#.*$", "", command)
    lexer = shlex.shlex(re.sub(r"\\[ \t]*\r?\n", " ", lines), posix=True, punctuation_chars=_SEPARATORS)
    lexer.whitespace_split, lexer.commenters = True, ""
    return list(lexer)
