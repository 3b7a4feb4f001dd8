"""Read data that crosses a border into a msgspec type, or report in one sentence what is wrong and where.

The `title` of a type's `Meta` describes a valid value in that sentence.
"""

import json
import pathlib
import re
import reprlib
import types
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct, ValidationError

from sparkinstall import safe_yaml
from sparkinstall.errors import BadUsage
from sparkinstall.redaction import HIDDEN, gives_secret, is_secret_key, redact

T = TypeVar("T")
_Steps = tuple[str | int, ...]

_PLACE = re.compile(r"(?P<why>.*?)(?: - at (?:`key` in )?`\$(?P<path>[^`]*)`)?", re.DOTALL)
_OPTION = re.compile(r"--[\w.+-]+")
_KEY = re.compile(r"[\"'](\w[\w-]*)\\*[\"']\s*:")
_LONG = reprlib.Repr()
_LONG.maxstring = 1 << 12
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_PLAIN = {str: "text", int: "a number", bool: "true or false", types.NoneType: "null", date: "a day like 2026-04-30"}


class Malformed(ValueError):
    """Data does not have the expected type. `message` says where and why, `complaint` only why."""

    def __init__(self, where: str, complaint: str, hint: str = "", line: int = 0) -> None:
        place = f"{where}, line {line}" if line else where
        self.message, self.complaint, self.hint = f"{place}: {complaint}", complaint, hint
        super().__init__(f"{self.message} ({hint})" if hint else self.message)


def read(kind: type[T], data: Any, where: str, *, content: bytes = b"", at: str = "") -> T:
    """Convert plain values to `kind`, a Struct or any other type that msgspec converts to.

    Args:
        where: the name of the source in an error, such as the file.
        content: the YAML text of `data`, to find the line of an error.
        at: the dotted name of `data` in its source, if it is a part of it.

    Raises:
        Malformed: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    try:
        return msgspec.convert(data, kind, dec_hook=_custom)
    except ValidationError as error:
        path, complaint, hint = _explained(kind, data, str(error), at)
        steps = (*filter(None, at.split(".")), *path)
        line = safe_yaml.line_of(content, steps) if steps and content else 0
        raise Malformed(where, complaint, hint, line) from error
    except UnicodeEncodeError as error:
        raise Malformed(where, "it contains half of a character (a lone surrogate)") from error


def read_yaml(kind: type[T], content: bytes, where: str, *, only_text: bool = False) -> T:
    """Convert a YAML text to `kind`; `only_text` as in `safe_yaml.load`.

    Raises:
        Malformed: it is not YAML, or does not match `kind`.
    """
    try:
        data = safe_yaml.load(content, only_text=only_text)
    except safe_yaml.NotYaml as error:
        raise Malformed(where, f"not YAML: {error}", error.hint) from error
    return read(kind, data, where, content=content)


def read_json(kind: type[T], content: bytes | str, where: str) -> T:
    """Convert a JSON text to `kind`. Unlike msgspec's decoder it accepts file names that are not UTF-8.

    Raises:
        Malformed: it is not JSON, or not as `kind` asks.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Malformed(where, f"not JSON: {error}") from error
    return read(kind, data, where)


def read_file(kind: type[T], path: pathlib.Path) -> T:
    """Convert a YAML file to `kind`; errors name the file without its folder.

    Raises:
        Malformed: it cannot be read, is not YAML, or does not match `kind`.
    """
    try:
        return read_yaml(kind, path.read_bytes(), path.name)
    except OSError as error:
        raise Malformed(path.name, str(error)) from error


def like(pattern: str, title: str) -> Meta:
    """Return the constraint that a whole text matches `pattern`; `title` describes such a text."""
    return Meta(pattern=rf"^(?:{pattern})\Z", title=title)


def show(value: Any) -> str:
    """Return a value for an error message: short, on one line, without secrets."""
    # Not str(): a few lines of YAML aliases can expand to more text than fits into memory.
    try:
        text = "null" if value is None else ascii(value[:80]) if isinstance(value, str) else reprlib.repr(value)
        # In more than what is shown, where the name of an option or a key may be cut.
        whole = _LONG.repr(value)
        if any(map(gives_secret, _OPTION.findall(whole))) or any(map(is_secret_key, _KEY.findall(whole))):
            return HIDDEN
    except ValueError:  # Python refuses to print numbers of more than 4300 digits
        text = f"such a {type(value).__name__}"
    text = redact(text)
    return text if len(text) < 80 else text[:76] + " ..."


def require_known(asked: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raise BadUsage for an unknown name, and suggest the nearest known one."""
    for name in asked:
        if name not in known:
            hint = nearest(name, known) or f"known: {', '.join(known)}"
            raise BadUsage(f"there is no {what} {name!r}", hint=hint)


def nearest(wrong: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """Return `did you mean ...?` if one of the known names resembles `wrong`, else ""."""
    near = get_close_matches(wrong[:80], known, n=1, cutoff=cutoff)
    return f"did you mean `{near[0]}`?" if near else ""


def either(choices: Sequence[str]) -> str:
    """Join as `a, b or c`."""
    *some, last = choices
    return f"{', '.join(some)} or {last}" if some else last


def _custom(kind: Any, value: Any) -> Any:
    """Convert what msgspec does not know: a regular expression, or a list of its alternatives."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        value = "|".join(value)
    if get_origin(kind) is not re.Pattern or not isinstance(value, str):
        raise ValueError(f"must be text or a list of text, not {show(value)}")
    try:
        return re.compile(value)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error


def _explained(kind: Any, data: Any, text: str, at: str) -> tuple[_Steps, str, str]:
    """Return the path of the value that msgspec's error `text` is about, what is wrong, and a hint."""
    match = _PLACE.fullmatch(text)
    why, raw = (match["why"], match["path"] or "") if match else (text, "")
    path: _Steps = tuple(int(index) if index else name for name, index in _STEP.findall(raw))
    wanted, found = _type_at(kind, path), _value_at(data, path)
    names = _keys(wanted)
    if why.startswith("Object missing"):
        key = why.split("`")[1]
        return path, f"`{_dotted((*path, key), at)}` is missing: it must be {words(_type_at(wanted, (key,)))}", ""
    if names and isinstance(found, Mapping) and (unknown := [key for key in found if key not in names]):
        key = ascii(str(unknown[0]))[1:-1][:80]
        complaint = f"unknown key `{_dotted((*path, key), at)}`: use {either(names)}"
        return (*path, str(unknown[0])), complaint, nearest(key, names)
    return path, *_about_value(wanted, found, why, _dotted(path, at))


def _about_value(wanted: Any, found: Any, why: str, name: str) -> tuple[str, str]:
    place = f"`{name}` " if name else "it "
    if not why.startswith(("Expected", "Invalid", "Integer")):
        return place + why.replace("Object contains unknown field", "has the unknown key"), ""
    choices = [str(each) for each in get_args(_bare(wanted)[0])] if _is_choice(wanted) else []
    hint = nearest(found.lower(), choices) if isinstance(found, str) else ""
    return f"{place}must be {words(wanted)}, not {show(found)}", hint


def words(kind: Any) -> str:
    """Describe a value of `kind`: its title, or the type in words."""
    bare, title = _bare(kind)
    if title:
        return title
    if _is_union(bare):
        titles = [each for each in map(words, get_args(bare)) if each != "null" or bare == str | None]
        return " or ".join(titles)
    if get_origin(bare) in (tuple, list):
        item = words(get_args(bare)[0])
        named = item if item == "text" else item.removeprefix("a ").replace("mapping", "mappings", 1)
        return f"a list of {named}" if item.startswith(("text", "a mapping")) else f"a list, each item {item}"
    if _is_choice(kind):
        return f"one of {', '.join(map(str, get_args(bare)))}"
    if names := _keys(bare):
        return f"a mapping with the key{'s' if names[1:] else ''} {either(names)}"
    return _PLAIN.get(bare, "a mapping")


def _bare(kind: Any) -> tuple[Any, str]:
    """Return a type without its annotations, and their title."""
    title = ""
    while get_origin(kind) is Annotated:
        kind, *extras = get_args(kind)
        title = title or next((each.title for each in extras if isinstance(each, Meta) and each.title), "")
    return kind, title


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _is_choice(kind: Any) -> bool:
    return get_origin(_bare(kind)[0]) is Literal


def _keys(kind: Any) -> tuple[str, ...]:
    bare = _bare(kind)[0]
    return bare.__struct_encode_fields__ if isinstance(bare, type) and issubclass(bare, Struct) else ()


def _type_at(kind: Any, path: _Steps) -> Any:
    for step in path:
        bare = _bare(kind)[0]
        members = get_args(bare) if _is_union(bare) else (bare,)
        fits = [each for each in members if (bool(_keys(each)) if isinstance(step, str) else get_args(each))]
        if not fits:
            return kind
        hints = get_type_hints(_bare(fits[0])[0], include_extras=True) if isinstance(step, str) else {}
        kind = hints.get(str(step)) if hints else get_args(_bare(fits[0])[0])[0]
    return kind


def _value_at(data: Any, path: _Steps) -> Any:
    for step in path:
        try:
            data = data[step]
        except (LookupError, TypeError):
            return None
    return data


def _dotted(path: _Steps, at: str) -> str:
    text = at
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text
