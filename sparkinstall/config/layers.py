"""Merge the values of settings from layers: files, remembered options, the command line."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from sparkinstall import given, safe_yaml, schema
from sparkinstall.config import checks
from sparkinstall.config.schema import Config, Setting, settings
from sparkinstall.errors import BadConfig
from sparkinstall.schema import Malformed, nearest, show

DEFAULT_FILES = ("/etc/sparkinstall.yaml", "~/.config/sparkinstall.yaml")

# Settings that may be a file, and the suffixes that distinguish a file from a name.
_PATHS = ("stack", "nccl.source", "nccl.cuda_home", "serving.key_file", "hub.token_file")
_FILES = (".yaml", ".yml", ".gz", ".xz", ".bz2", ".tgz", ".tar")


# Characters of one value; a path has no more.
_LONGEST = 4096


class Layer(Struct, frozen=True):
    """Values by dotted name, and the description of their source; `content` is its YAML text, if any."""

    source: str
    values: Mapping[str, Any]
    content: bytes = b""

    def place(self, name: str) -> str:
        """Return the source, with the line of a setting if it is known."""
        line = safe_yaml.line_of(self.content, name.split(".")) if self.content else 0
        return f"{self.source}, line {line}" if line else self.source


def read_layer(path: Path) -> Layer:
    """Read the values of a YAML file.

    Raises:
        BadConfig: it cannot be read, is not YAML, or has an unknown key.
    """
    try:
        lasts = given.lasts(str(path))
        content = given.read(path, safe_yaml.LARGEST) if lasts else _read_once(path)
    except IsADirectoryError as error:
        raise BadConfig(f"the config {path} is a folder", hint="name a YAML file with --config") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadConfig(f"the config {path} cannot be read: {why}", hint="name a YAML file") from error
    raw = _yaml(content, f"the config {path}")
    if raw is not None and not isinstance(raw, dict):
        raise BadConfig(f"the config {path} must be `key: value` lines, not a {type(raw).__name__}")
    values = dict(_flat(raw or {}, Layer(str(path), {}, content)))
    return Layer(str(path), anchored(values, os.path.dirname(path)), content)


@lru_cache
def _read_once(path: Path) -> bytes:
    """Read a pipe, which cannot be read again, once in this process."""
    return given.read(path, safe_yaml.LARGEST)


def _yaml(content: bytes, what: str) -> Any:
    try:
        return safe_yaml.load(content)
    except safe_yaml.TooMuch as error:
        raise BadConfig(
            f"{what} is larger or deeper nested than any config", hint="check that it is the right file"
        ) from error
    except safe_yaml.NotYaml as error:
        raise BadConfig(f"{what} is not YAML: {error}", hint=error.hint) from error


def _flat(raw: Mapping[Any, Any], of: Layer, under: str = "") -> Iterator[tuple[str, Any]]:
    known = {each.name for each in settings()}
    for key, value in raw.items():
        name = f"{under}{key}"
        if name in known:
            yield name, value
        elif any(each.startswith(name + ".") for each in known):
            if value is not None and not isinstance(value, dict):
                raise BadConfig(f"{of.place(name)}: `{name}` is a section: write its settings below it, one per line")
            yield from _flat(value or {}, of, name + ".")
        else:
            raise _unknown(name, of.place(name))


def _unknown(name: str, place: str) -> BadConfig:
    known = [each.name for each in settings()]
    name = ascii(name)[1:-1][:80]
    same_leaf = [f"did you mean `{each}`?" for each in known if each.rpartition(".")[2] == name.rpartition(".")[2]]
    near = nearest(name, [*known, *{each.split(".")[0] for each in known}]) or next(iter(sorted(same_leaf)), "")
    return BadConfig(
        f"{place}: unknown setting `{name}`", hint=near or "`sparkinstall settings show` lists the known ones"
    )


def anchored(values: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Return `values` with absolute paths: a later run reads them from another folder.

    Args:
        base: the folder that paths are relative to; "": the current one.

    Raises:
        BadConfig: a path cannot be used.
    """
    return {name: _anchored(name, value, base) if name in _PATHS else value for name, value in values.items()}


def _anchored(name: str, value: Any, base: str) -> Any:
    if not isinstance(value, str) or "://" in value or not ("/" in value or value.endswith(_FILES)):
        return value
    path = value if value.startswith("~") else os.path.join(base, value)
    # Another layer may replace it, so whether this user can read it is known later.
    return os.path.normpath(given.absolute(path, f"`{name}`", BadConfig, hidden=True))


def parse_assignment(text: str) -> tuple[str, Any]:
    """Parse `KEY=VALUE` of a command line; the value is YAML.

    Raises:
        BadConfig: it has no `=`, an unknown key, or an invalid value.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise BadConfig(f"--set {show(text)}: write it as KEY=VALUE")
    known = {each.name: each for each in settings()}
    if name not in known:
        raise _unknown(name, "--set")
    parsed = _yaml(value.encode(errors="replace"), f"--set {name}")
    # `--set nccl.arch=90` means text, although it is a number in YAML.
    meant = value if known[name].takes_text and parsed is not None else parsed
    # Checked here, where the option is known: `build` only knows the whole command line.
    _checked(known[name], meant, Layer("--set", {}))
    return name, meant


def build(layers: Sequence[Layer]) -> tuple[Config, dict[str, str]]:
    """Return the config of `layers` (later ones win) and the source of each setting.

    Raises:
        BadConfig: a value is invalid.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in settings():
        layer = next((each for each in reversed(layers) if setting.name in each.values), None)
        sources[setting.name] = layer.source if layer else "default"
        if layer:
            *sections, leaf = setting.name.split(".")
            section = values
            for each in sections:
                section = section.setdefault(each, {})
            section[leaf] = _checked(setting, layer.values[setting.name], layer)
    return msgspec.convert(values, Config), sources


def _checked(setting: Setting, value: Any, layer: Layer) -> Any:
    if isinstance(value, bool) and setting.takes_text:
        # `fallback: off` is a boolean in YAML, and meant as a word.
        value = "on" if value else "off"
    try:
        found = schema.read(setting.type, value, layer.source, content=layer.content, at=setting.name)
    except Malformed as error:
        numeric = isinstance(value, int | float) and setting.takes_text
        quote = f' (write it in quotes: "{show(value)}")' if numeric else ""
        raise BadConfig(f"{error.message}{quote}", hint=error.hint) from error
    if too_long := [each for each in (found if isinstance(found, tuple) else (found,)) if len(str(each)) > _LONGEST]:
        raise BadConfig(f"{layer.place(setting.name)}: `{setting.name}` is too long: {show(too_long[0])}")
    items = {f"[{at}]": each for at, each in enumerate(found)} if isinstance(found, tuple) else {"": found}
    for at, each in items.items():
        complaint = setting.check(each) if setting.check and each is not None else None
        if complaint:
            hint = checks.SECRETS.get(complaint, "")
            value = "" if hint else f", not {show(each)}"
            raise BadConfig(f"{layer.place(setting.name)}: `{setting.name}{at}` {complaint}{value}", hint=hint)
    return found
