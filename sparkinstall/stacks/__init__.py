"""Stacks: named sets of pins, each with a lock (versions and hashes) per architecture.

A stack is a YAML file; those beside this module are shipped and known by name, a user's own is given by
path. A lock is a requirements file that holds exact versions and sha256 hashes, and no address other than
the wheels that a stack names itself. `tools/lock.py` makes the locks from the YAML files.

A leaf: PyYAML is imported only when a file is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import safe_yaml

DEFAULT = "0.18.1"

_HERE = Path(__file__).resolve().parent
_STACK_KEYS = ("name", "summary", "vllm", "python", "as_of", "requirements", "nccl", "platforms")
_NCCL_KEYS = ("version", "tag", "commit")
_ARCHITECTURES = ("aarch64", "x86_64")
_PLATFORM_KEYS = ("lock", "wheels", "needs")
_WHEEL_KEYS = ("url", "sha256")

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_VERSION = r"[0-9](?:[A-Za-z0-9.!+]*[A-Za-z0-9])?"
_PIN = re.compile(rf"({_NAME}) ?==({_VERSION})((?: --hash=sha256:[0-9a-f]{{64}})*)")
_WHEEL_PIN = re.compile(rf"({_NAME}) @ (https://\S+)((?: --hash=sha256:[0-9a-f]{{64}})*)")
# https://packaging.python.org/en/latest/specifications/binary-distribution-format/#file-name-convention
_WHEEL_FILE = re.compile(rf"([A-Za-z0-9._]+)-({_VERSION})(?:-[^-]+){{3,4}}\.whl")


class StackError(ValueError):
    """A stack or a lock that cannot be used: one sentence, with what to do about it."""


class Pin(Struct, frozen=True):
    """One package at one version; `url` only where the wheel is named by address."""

    name: str
    version: str
    url: str | None = None
    hashes: tuple[str, ...] = ()  # each "sha256:" and 64 hexadecimal digits

    @property
    def requirement(self) -> str:
        """The pin as pip and uv read it, without its hashes."""
        return f"{self.name} @ {self.url}" if self.url else f"{self.name}=={self.version}"


class NcclPin(Struct, frozen=True):
    """The NCCL that a stack builds from source: upstream's tag, and the commit that it must be."""

    version: str
    tag: str
    commit: str


class Platform(Struct, frozen=True):
    """What a stack is on one architecture.

    `requirements` are the stack's pins, those replaced whose wheels come from an address of their own.
    `needs` are the pins that such wheels ask for and that only their own metadata tells: `tools/lock.py`
    reads them, an install finds them in the lock.
    """

    arch: str
    requirements: tuple[Pin, ...]
    lock: Path | None = None
    wheels: tuple[Pin, ...] = ()
    needs: tuple[Pin, ...] = ()

    @property
    def unhashed(self) -> tuple[str, ...]:
        """The packages whose hash nobody could know beforehand: recorded at the first install."""
        return unhashed(self.wheels)

    @property
    def complete(self) -> bool:
        """The shipped lock can be installed from as it is, with `--require-hashes`."""
        return self.lock is not None and not self.unhashed

    def lock_text(self) -> str:
        """The shipped lock. Raises StackError when there is none, or it cannot be read."""
        if self.lock is None:
            raise StackError(f"The stack has no lock for {self.arch}: make it with tools/lock.py.")
        return _read(self.lock)

    def open_text(self) -> str:
        """What uv has to compile at the first install of a stack that is not complete, without hashes.

        The whole of a shipped lock goes in, so that uv also holds it against the metadata of the wheels
        that could not be read before. Raises StackError when the lock cannot be read.
        """
        pins = parse_lock(self.lock_text()) if self.lock else self.requirements
        return render_lock(replace(pin, hashes=()) for pin in pins)

    def close(self, compiled: str) -> str:
        """The lock to install from: the shipped one, completed by what uv compiled from `open_text`.

        A shipped hash stays, whatever uv found: its compile ignores the hashes that it reads and prints those
        of the files that it meets, so its output alone would take any file for good. Raises StackError when
        that output is not a lock, or leaves a pin without a hash.
        """
        pins = {pin.name: pin for pin in parse_lock(compiled)}
        for pin in parse_lock(self.lock_text()) if self.lock else ():
            if pin.hashes or pin.name not in pins:
                pins[pin.name] = pin
        if missing := unhashed(pins.values()):
            raise StackError(f"No hash was recorded for {', '.join(missing)}: run the install again.")
        return render_lock(pins.values())


class Stack(Struct, frozen=True):
    """A named set of pins. Source of the numbers: the wheels' own metadata, through `tools/lock.py`."""

    name: str
    summary: str
    vllm: str
    python: str  # "3.12": major and minor
    requirements: tuple[Pin, ...]
    nccl: NcclPin
    platforms: Mapping[str, Platform]  # by what `uname -m` says
    source: Path
    as_of: str | None = None  # "2026-04-30": what nothing pins is no newer than this day

    def version_of(self, package: str) -> str | None:
        """The version that the stack pins a package to, None where it leaves it to the lock."""
        return next((pin.version for pin in self.requirements if pin.name == package), None)


# --- stacks


def names() -> tuple[str, ...]:
    """The shipped stacks, oldest vLLM first."""
    return tuple(sorted((path.stem for path in _HERE.glob("*.yaml")), key=_by_version))


def load(name_or_path: str) -> Stack:
    """The stack of that name, or of that YAML file.

    Raises StackError: no such stack or file, a directory, not YAML, a key that is unknown, missing or of the
    wrong type, a pin that is none.
    """
    path = _HERE / f"{name_or_path}.yaml" if name_or_path in names() else _own(name_or_path)
    return _stack(_Table(path.name, _parse_yaml(_read(path), path), _STACK_KEYS), path)


def _own(name_or_path: str) -> Path:
    try:
        path = Path(name_or_path).expanduser()
        if name_or_path and path.is_dir():
            raise StackError(f"{name_or_path} is a directory: give the stack's YAML file itself.")
        if path.is_file():
            return path.resolve()
    except (OSError, RuntimeError) as error:
        raise StackError(f"The stack {name_or_path!r} cannot be looked at ({error}): check its path.") from error
    near = _nearest(name_or_path, names())
    raise StackError(f"There is no stack {name_or_path!r}{near}: use {_either(names())}, or a YAML file's path.")


def _stack(table: _Table, path: Path) -> Stack:
    requirements = _pins(table, "requirements")
    stack = Stack(
        name=table.text("name", _NAME, "letters, digits and ._-"),
        summary=table.text("summary"),
        vllm=table.text("vllm"),
        python=table.text("python", r"3\.\d+", 'a version like "3.12"'),
        requirements=requirements,
        nccl=_nccl(table.table("nccl", _NCCL_KEYS)),
        platforms=_platforms(table.table("platforms", _ARCHITECTURES), requirements, path.parent),
        source=path,
        as_of=table.text("as_of", r"\d{4}-\d\d-\d\d", "a day like 2026-04-30") if "as_of" in table.values else None,
    )
    if stack.version_of("vllm") != stack.vllm:
        raise table.error("vllm", f"must be in requirements too, as vllm=={stack.vllm}")
    return stack


def _nccl(table: _Table) -> NcclPin:
    return NcclPin(
        version=table.text("version", r"\d+\.\d+\.\d+", "a version like 2.28.9"),
        tag=table.text("tag", _NAME, "a tag such as v2.28.9-1"),
        commit=table.text("commit", r"[0-9a-f]{40}", "the 40 hexadecimal digits of a commit"),
    )


def _platforms(table: _Table, requirements: tuple[Pin, ...], folder: Path) -> dict[str, Platform]:
    if not table.values:
        raise StackError(f"{table.where} is empty: name {_either(_ARCHITECTURES)}.")
    return {arch: _platform(table.table(arch, _PLATFORM_KEYS), arch, requirements, folder) for arch in table.values}


def _platform(table: _Table, arch: str, requirements: tuple[Pin, ...], folder: Path) -> Platform:
    wheels = tuple(_wheel(wheel) for wheel in table.tables("wheels", _WHEEL_KEYS))
    named = {wheel.name for wheel in wheels}
    return Platform(
        arch=arch,
        requirements=(*(pin for pin in requirements if pin.name not in named), *wheels),
        lock=folder / table.text("lock", r"[^\x00\n]+", "a file's path") if "lock" in table.values else None,
        wheels=wheels,
        needs=_pins(table, "needs") if "needs" in table.values else (),
    )


def _wheel(table: _Table) -> Pin:
    url = table.text("url", r"https://\S+", "an https address")
    pin = _pin_of_wheel(url)
    if pin is None:
        raise table.error("url", "must be the address of a wheel, ending in the wheel's file name")
    if "sha256" not in table.values:
        return pin
    digest = table.text("sha256", r"[0-9a-f]{64}", "64 hexadecimal digits")
    return replace(pin, hashes=(f"sha256:{digest}",))


def _pins(table: _Table, key: str) -> tuple[Pin, ...]:
    try:
        pins = parse_lock("\n".join(table.texts(key)))
    except StackError as error:
        raise table.error(key, f"must be a list of pins like ray==2.60.0 ({error})") from error
    if any(pin.url or pin.hashes for pin in pins):
        raise table.error(key, "must be names and versions alone: an address belongs under wheels")
    return pins


# --- locks


@lru_cache(maxsize=4)
def parse_lock(text: str) -> tuple[Pin, ...]:
    """The pins of a requirements file with hashes, as `uv pip compile --generate-hashes` writes it.

    Raises StackError at the first line that is not a pin, a wheel's https address, a sha256 or a comment:
    markers, extras, options and the addresses of indexes are none of these.
    """
    pins: dict[str, Pin] = {}
    for number, line in _logical_lines(text):
        pin = _parse_pin(line, number)
        if pin.name in pins:
            raise StackError(f"Line {number} of the lock pins {pin.name} a second time: remove one of the two.")
        pins[pin.name] = pin
    return tuple(pins.values())


def render_lock(pins: Iterable[Pin]) -> str:
    """The lock's text, sorted by name: what `parse_lock` reads and `uv pip install -r` takes."""
    ordered = sorted(pins, key=lambda pin: pin.name)
    entries = (" \\\n    ".join((pin.requirement, *(f"--hash={h}" for h in pin.hashes))) for pin in ordered)
    return "".join(f"{entry}\n" for entry in entries)


def unhashed(pins: Iterable[Pin]) -> tuple[str, ...]:
    """The names of the pins that have no hash."""
    return tuple(pin.name for pin in pins if not pin.hashes)


def _logical_lines(text: str) -> Iterable[tuple[int, str]]:
    """Lines joined at their backslashes, with the number of the first; blank lines and comments left out."""
    joined, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not joined and (not line.strip() or line.lstrip().startswith("#")):
            continue
        start = start if joined else number
        joined += line.removesuffix("\\") + " "
        if not line.endswith("\\"):
            yield start, " ".join(joined.split())
            joined = ""
    if joined:
        raise StackError(f"Line {start} of the lock has no end: the file was cut off, fetch it again.")


def _parse_pin(line: str, number: int) -> Pin:
    if match := _PIN.fullmatch(line):
        return Pin(_canonical(match[1]), match[2], hashes=_hashes(match[3]))
    if match := _WHEEL_PIN.fullmatch(line):
        pin = _pin_of_wheel(match[2])
        if pin and pin.name == _canonical(match[1]):
            return replace(pin, hashes=_hashes(match[3]))
    raise StackError(f"Line {number} of the lock is not a pin with sha256 hashes: {line[:80]!r}; remake the lock.")


def _hashes(options: str) -> tuple[str, ...]:
    return tuple(option.removeprefix("--hash=") for option in options.split())


def _pin_of_wheel(url: str) -> Pin | None:
    """What a wheel says it is in its file name; None where the address is not a wheel's."""
    match = _WHEEL_FILE.fullmatch(unquote(url.rsplit("/", 1)[-1]))
    return Pin(_canonical(match[1]), match[2], url=url) if match else None


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- YAML


class _Table(Struct, frozen=True):
    """A mapping of the file: says where it stands when a value in it is wrong."""

    where: str
    values: Mapping[str, object]
    known: tuple[str, ...]

    def __post_init__(self) -> None:
        for key in self.values:
            if key not in self.known:
                near = _nearest(key, self.known)
                raise StackError(f"{self.where} has the unknown key {key[:80]!r}{near}: use {_either(self.known)}.")

    def error(self, key: str, message: str) -> StackError:
        return StackError(f"{self.where}: {key} {message}.")

    def text(self, key: str, pattern: str = r"[^\n]+", meaning: str = "one line of text") -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise self.error(key, f"{'must be' if key in self.values else 'is missing: it is'} {meaning}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "must be a list of texts" if key in self.values else "is missing: it is a list")
        return tuple(value)

    def table(self, key: str, known: tuple[str, ...]) -> _Table:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, f"must be a mapping with the keys {_either(known)}")
        return _Table(f"{self.where}, {key}", value, known)

    def tables(self, key: str, known: tuple[str, ...]) -> tuple[_Table, ...]:
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(key, f"must be a list of mappings with the keys {_either(known)}")
        return tuple(_Table(f"{self.where}, {key}[{n}]", item, known) for n, item in enumerate(value))


def _parse_yaml(text: str, path: Path) -> dict[str, object]:
    try:
        values = safe_yaml.load_table(text.encode(), only_text=True)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise StackError(f"{path.name} is not YAML ({reason}): correct it there.") from error
    if not isinstance(values, dict):
        raise StackError(f"{path.name} is not a stack: it must be a mapping with the keys {_either(_STACK_KEYS)}.")
    return values


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise StackError(f"{path} does not exist: make it with tools/lock.py, or leave `lock` out.") from error
    except (OSError, ValueError) as error:
        raise StackError(f"{path} cannot be read ({error}): give a text file that you may read.") from error


def _nearest(wrong: str, known: Iterable[str]) -> str:
    near = get_close_matches(wrong[:80], tuple(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def _either(choices: Iterable[str]) -> str:
    *some, last = choices
    return f"{', '.join(some)} or {last}" if some else last


def _by_version(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in name.split("."))
