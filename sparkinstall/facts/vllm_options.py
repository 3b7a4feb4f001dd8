"""Check arguments and variables of `vllm serve` with what a vLLM declares, by the rules of its parser.

That parser is argparse with more spellings: `_` for `-`, `--option.key value` for a key in JSON, `-O3`. facts/vllm.py
reads what a vLLM declares; facts/vllm_releases.py has it for the shipped stacks.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

from msgspec import Struct

from sparkinstall.redaction import redact
from sparkinstall.schema import either, nearest

Kind = Literal["value", "optional", "several", "switch", "flag", "inverse"]
"""How many values an option takes: one; one or none; one or more; none. A `switch` has a `--no-` too, and an `inverse`
(`--disable-x` of `--enable-x`) is the other name of that."""
Fold = Literal["", "case", "dash"]
"""How a value is changed before it is compared: not at all; the case does not matter; nor does `-` or `_`."""
OPTIMIZATION = "--optimization-level"
_NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")
_BEFORE_DOT = re.compile(r"(?<=--)[^.]*")
_IN_TEMPLATE = re.compile(r"[{}\n]")
_LISTED = 12
_SHOWN = 60


class Option(Struct, frozen=True):
    """An option. `choices`: its only values; () if any are allowed, or the source does not tell.

    `keys`: those that it takes in JSON, with a dot before those within another, and `KEY=VALUE` for each value of one
    that takes no other; () if any are allowed.
    """

    kind: Kind = "value"
    choices: tuple[str, ...] = ()
    fold: Fold = ""
    keys: tuple[str, ...] = ()

    def takes(self, value: str) -> bool:
        """Whether it accepts `value`, as far as the source tells."""
        return not self.choices or self._folded(value) in map(self._folded, self.choices)

    def _folded(self, value: str) -> str:
        # argparse converts a number before it compares it.
        plain = str(int(value)) if re.fullmatch(r"\s*[+-]?\d{1,9}\s*", value) else value
        return plain if not self.fold else plain.lower().replace("-", "_") if self.fold == "dash" else plain.lower()


class Declared(Struct, frozen=True, dict=True):
    """What a vLLM takes: options by each of their names, and its variables.

    `files`: options whose value is a file. `paths`: those whose value may be a path or something else. `opened_by`: by
    the name of an option, those that may add values to its choices.
    """

    release: str
    options: Mapping[str, Option]
    variables: frozenset[str]
    files: frozenset[str] = frozenset()
    paths: frozenset[str] = frozenset()
    opened_by: Mapping[str, tuple[str, ...]] = {}

    @cached_property
    def spelled(self) -> dict[str, Option]:
        """Every name that the parser knows, with those that it makes of a switch, and its help."""
        switches = (name for name, each in self.options.items() if each.kind == "switch" and name.startswith("--"))
        no = {f"--no-{name[2:]}": Option("flag") for name in switches}
        return {"-h": Option("flag"), "--help": Option("flag"), **self.options, **no}


class Refusal(Struct, frozen=True):
    """Something that a vLLM does not take, or a file that is missing: one sentence, and what to do."""

    message: str
    hint: str


class Given(Struct, frozen=True):
    """An option as it was given: its name, or what was given for a name that is unknown; its values."""

    name: str
    known: Option | None
    values: tuple[str, ...] = ()
    complaint: str = ""


def refusals(
    argv: Sequence[str],
    variables: Iterable[str],
    declared: Declared,
    elsewhere: Sequence[Declared] = (),
    exists: Callable[[str], bool] | None = None,
) -> list[Refusal]:
    """Return what the vLLM that declares `declared` does not take.

    Args:
        argv: the arguments after `vllm serve MODEL`.
        variables: names of variables; those without the prefix VLLM_ are not vLLM's.
        elsewhere: other releases, oldest first, to name one that has what is missing.
        exists: whether a path exists on the node; None: files are not checked.
    """
    given = list(options_of(argv, declared))
    named = {each.name for each in given}
    found = [_about_option(each, declared, elsewhere) for each in given]
    found += [_about_choice(each, declared, elsewhere) for each in given if _is_closed(each, named, declared)]
    found += [refusal for each in given for refusal in _about_keys(each, declared, elsewhere)]
    found += [_about_variable(name, declared, elsewhere) for name in variables]
    missing = [_missing(each, declared, exists) for each in given] if exists else []
    return [each for each in (*found, *missing) if each]


# --- the parser's rules


def options_of(argv: Sequence[str], declared: Declared) -> Iterator[Given]:
    """Yield the options of a command line, and words that belong to none."""
    words = list(_respelled(argv))
    while words:
        word = words.pop(0)
        if not _is_option(word, declared.spelled):
            yield Given(word, None, complaint="stray")
            continue
        name, value, complaint = _looked_up(word, declared.spelled)
        known = declared.spelled.get(name)
        following = list(takewhile(lambda each: not _is_option(each, declared.spelled), words))
        if known is None:
            # Its values are not known either: they are no errors of their own.
            del words[: len(following)]
            yield Given(name, None, complaint=complaint)
            continue
        values = (value,) if value is not None else tuple(following[: _most(known.kind)])
        del words[: 0 if value is not None else len(values)]
        yield Given(name, known, values, _wrong_number(known.kind, values))


def _respelled(argv: Sequence[str]) -> Iterator[str]:
    """Yield the words as vLLM hands them to argparse: keys after a dot become one JSON for each option, at the end."""
    words, in_json = list(argv), dict[str, dict[str, Any] | None]()
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            name = _BEFORE_DOT.sub(lambda found: found[0].replace("_", "-"), name, count=1)
        elif word.startswith("-O") and word != "-O":
            # Its rest is split in turn, as a dot in it is no key of JSON.
            yield from (OPTIMIZATION, word[3:] if word[2] == "=" else word[2:])
            continue
        elif word == "-O" and words and words[0] in ("0", "1", "2", "3"):
            name = OPTIMIZATION
        if name.startswith("-") and "." in name:
            option, *keys = name.removesuffix("+").split(".")
            text = value if equals else words.pop(0) if words else None
            in_json[option] = _with_key(in_json.get(option) or {}, keys, text) if text is not None else None
        else:
            yield name + equals + value
    for name, keyed in in_json.items():
        # A word with a space would not be an option.
        text = json.dumps(keyed, separators=(",", ":")).replace(" ", "\\u0020")
        # As one word where it can be: an option without a value then is what is wrong, not a word that follows it.
        joined = (f"{name}={text}",) if name.startswith("--") else (name, text)
        yield from (name,) if keyed is None else joined


def _with_key(of: dict[str, Any], keys: Sequence[str], text: str) -> dict[str, Any]:
    """Put the value of a key after a dot, and of those within it, into what the option has so far."""
    inner = of
    for key in keys[:-1]:
        if not isinstance(inner.get(key), dict):
            inner[key] = {}
        inner = inner[key]
    inner[keys[-1]] = _json(text, text)
    return of


def _json(text: str, otherwise: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise


def _is_option(word: str, spelled: Collection[str]) -> bool:
    """As argparse decides it: a word with a space is a value, unless it begins with a known name and `=`."""
    if not word.startswith("-") or word in ("-", "--") or _NEGATIVE.fullmatch(word):
        return False
    return word.partition("=")[0] in spelled or " " not in word or bool(_beginnings(word, spelled))


def _looked_up(word: str, spelled: Collection[str]) -> tuple[str, str | None, str]:
    """Return the option's whole name, the value within the word, and what is wrong with the name."""
    name, equals, value = word.partition("=")
    if word in spelled:
        return word, None, ""
    if equals and name in spelled:
        return name, value, ""
    found = _beginnings(word, spelled)
    if len(found) == 1:
        return (*found[0], "")
    several = [f"`{each}`" for each, _ in found]
    return name, None, f"is the beginning of {either(several[:_LISTED])}" if several else "unknown"


def _beginnings(word: str, spelled: Collection[str]) -> list[tuple[str, str | None]]:
    """Return the options that a word abbreviates, each with the value within the word."""
    name, equals, value = word.partition("=")
    if word.startswith("--"):
        return [(each, value if equals else None) for each in spelled if each.startswith(name)]
    short = [(word[:2], word[2:])] if word[:2] in spelled else []
    return [*short, *((each, None) for each in spelled if each.startswith(word))]


def _most(kind: Kind) -> int | None:
    """Return how many values an option takes at most."""
    return {"value": 1, "optional": 1, "several": None}.get(kind, 0)


def _wrong_number(kind: Kind, values: Sequence[str]) -> str:
    if kind in ("value", "several") and not values:
        return "empty"
    return "full" if kind in ("flag", "inverse", "switch") and values else ""


# --- what is wrong


def _about_option(given: Given, declared: Declared, elsewhere: Sequence[Declared]) -> Refusal | None:
    name = _shown(given.name)
    if given.complaint == "stray":
        return Refusal(f"`{name}` belongs to no option", _one_word_each(given.name))
    if given.complaint == "empty":
        return Refusal(f"`{name}` has no value", "add the value as a word of its own")
    if given.complaint == "full":
        return Refusal(f"`{name}` takes no value, and has `{_shown(given.values[0])}`", f"write `{name}` alone")
    if given.complaint == "unknown":
        also = _elsewhere(declared, elsewhere, lambda other: given.name in other.spelled)
        near = nearest(given.name, list(declared.spelled), 0.7)
        return Refusal(f"vLLM {declared.release} has no option `{name}`", _hint(near, also))
    return Refusal(f"`{name}` {given.complaint}", "write the whole name") if given.complaint else None


def _one_word_each(word: str) -> str:
    first = word.split()[0] if word.split() else ""
    if first.startswith("-"):
        return f"write `{_shown(first)}` and its value as two words of the list"
    return "each option takes the words that follow it: remove this one, or name its option"


def _is_closed(given: Given, named: Collection[str], declared: Declared) -> bool:
    return given.known is not None and not any(each in named for each in declared.opened_by.get(given.name, ()))


def _about_choice(given: Given, declared: Declared, elsewhere: Sequence[Declared]) -> Refusal | None:
    known = given.known
    if known is None or given.complaint or all(map(known.takes, given.values)):
        return None
    wrong = next(value for value in given.values if not known.takes(value))

    def has(other: Declared) -> bool:
        option = other.spelled.get(given.name)
        return option is not None and bool(option.choices) and option.takes(wrong)

    near = nearest(wrong if not known.fold else _like(wrong, known.choices), known.choices)
    also = _elsewhere(declared, elsewhere, has)
    listed = f"it takes {either(known.choices)}" if len(known.choices) <= _LISTED else ""
    return Refusal(
        f"`{given.name}` of vLLM {declared.release} does not take `{_shown(wrong)}`",
        _hint(near or listed, also) if near or also else listed or _many(known.choices),
    )


def _like(wrong: str, choices: Sequence[str]) -> str:
    return wrong.upper() if choices[0].isupper() else wrong.lower()


def _many(choices: Sequence[str]) -> str:
    return f"it takes one of {len(choices)}, such as {either(choices[:_LISTED])}"


def _about_keys(given: Given, declared: Declared, elsewhere: Sequence[Declared]) -> Iterator[Refusal]:
    """Yield what is wrong with the JSON of an option whose keys are known."""
    known = given.known
    if known is None or given.complaint or not known.keys:
        return
    for value in given.values:
        found = _json(value, None)
        if found is None and value.lstrip().startswith("{"):
            hint = "write it as one word, with double quotes within: '{\"key\": 1}'"
            yield Refusal(f"the value of `{given.name}` is no JSON: {_shown(value)}", hint)
        elif isinstance(found, dict):
            for path, wrong in _not_taken(found, known.keys):
                yield _about_key(given.name, known, path, wrong, declared, elsewhere)


def _not_taken(found: Mapping[str, Any], keys: Collection[str], within: str = "") -> Iterator[tuple[str, str | None]]:
    """Yield keys that are not among those of an option, and keys with a value that they do not take."""
    for name, value in found.items():
        # In newer releases a key of speculative decoding may have `-`.
        path = within + name.replace("-", "_")
        values = [each.partition("=")[2] for each in keys if each.startswith(f"{path}=")]
        if path not in keys:
            yield path, None
        elif values and isinstance(value, str) and value not in values:
            yield path, value
        elif isinstance(value, dict) and any(each.startswith(f"{path}.") for each in keys):
            yield from _not_taken(value, keys, f"{path}.")


def _about_key(
    option: str, known: Option, path: str, wrong: str | None, declared: Declared, elsewhere: Sequence[Declared]
) -> Refusal:
    wanted = path if wrong is None else f"{path}={wrong}"

    def has(other: Declared) -> bool:
        there = other.spelled.get(option)
        return there is not None and wanted in there.keys

    also, of = _elsewhere(declared, elsewhere, has), f"`{option}` of vLLM {declared.release}"
    if wrong is not None:
        values = [each.partition("=")[2] for each in known.keys if each.startswith(f"{path}=")]
        near = nearest(wrong, values)
        told = (
            _hint(near, also)
            if near or also
            else _many(values)
            if len(values) > _LISTED
            else f"it takes {either(values)}"
        )
        return Refusal(f"`{_shown(path)}` in {of} does not take `{_shown(wrong)}`", told)
    within, _, last = path.rpartition(".")
    beside = [each.rpartition(".")[2] for each in known.keys if each.rpartition(".")[0] == within and "=" not in each]
    return Refusal(f"{of} has no key `{_shown(path)}`", _hint(nearest(last, beside, 0.7), also))


def _about_variable(name: str, declared: Declared, elsewhere: Sequence[Declared]) -> Refusal | None:
    if not name.startswith("VLLM_") or name in declared.variables:
        return None
    near = nearest(name, sorted(declared.variables), 0.8)
    also = _elsewhere(declared, elsewhere, lambda other: name in other.variables)
    return Refusal(f"vLLM {declared.release} does not read the variable `{_shown(name)}`", _hint(near, also))


def _missing(given: Given, declared: Declared, exists: Callable[[str], bool]) -> Refusal | None:
    for value in given.values if given.known and not given.complaint else ():
        path = value.rpartition("=")[2] if given.name == "--lora-modules" else value
        if given.name in declared.paths and not path.startswith("/"):
            continue
        if given.name not in declared.files | declared.paths or _IN_TEMPLATE.search(path) or not path:
            continue
        if not path.startswith("/"):
            hint = "the service is started in /: write the whole path, which begins with /"
            return Refusal(f"`{given.name}` names `{_shown(path)}` without its folder", hint)
        if not exists(path):
            return Refusal(f"`{given.name}` names {_shown(path)}, which is not on this node", "copy it there")
    return None


def _elsewhere(declared: Declared, others: Sequence[Declared], has: Callable[[Declared], bool]) -> str:
    """Say which release has it: the first newer one, else the last older one."""
    own = _order(declared.release)
    newer = next((each.release for each in others if _order(each.release) > own and has(each)), "")
    older = next((each.release for each in reversed(others) if _order(each.release) < own and has(each)), "")
    if newer:
        return f"the first stack that has it is {newer}"
    return f"the last stack that has it is {older}" if older else ""


def _order(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release)[:3])


def _hint(near: str, also: str) -> str:
    return "; ".join(filter(None, (also, near))) or "remove it: no stack of sparkinstall has it"


def _shown(word: str) -> str:
    text = redact(word)
    return ascii(text[:_SHOWN])[1:-1] + (" ..." if len(text) > _SHOWN else "")
