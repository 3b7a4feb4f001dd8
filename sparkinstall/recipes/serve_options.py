"""Options of `vllm serve` as its parser understands them: spellings, values, which of two counts."""

import re
import shlex
from collections.abc import Iterable, Sequence

from msgspec import Struct

from sparkinstall.recipes import Option

# Short options of vLLM 0.18.1 to 0.33.0 that recipes use.
_SHORT = {
    "-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dcp": "--decode-context-parallel-size",
    "-dp": "--data-parallel-size", "-ep": "--enable-expert-parallel", "-n": "--nnodes", "-r": "--node-rank",
    "-q": "--quantization", "-cc": "--compilation-config", "-ac": "--attention-config", "-sc": "--speculative-config",
    "-dc": "--diffusion-config",
}  # fmt: skip
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


def draft_of(args: Iterable[Option]) -> str:
    """Return the model that drafts in speculative decoding, "" if none does or the main model does."""
    for each in args:
        if key(each) == "--speculative-config.model" and each[1:]:
            return each[1]
        if key(each) == "--speculative-config" and each[1:]:
            found = re.search(r'"model"\s*:\s*"([^"]+)"', each[1])
            return found[1] if found else ""
    return ""


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
