"""Stacks: named sets of pins, each with a lock (versions and hashes) per architecture.

A stack is a YAML file; those beside this module are shipped and have a name, a user's own is given by path. A lock is
a requirements file with exact versions and sha256 hashes, and with URLs only for wheels that the stack itself names.
`tools/lock.py` generates the locks from the YAML files.

A leaf: PyYAML is imported only when a file is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import given, schema
from sparkinstall.errors import BadConfig, BadUsage
from sparkinstall.schema import either, like

DEFAULT = "0.29.0"

# Bytes; the largest lock has a hundredth of it.
_LARGEST = 16 << 20

_HERE = Path(__file__).resolve().parent

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_VERSION = r"[0-9](?:[A-Za-z0-9.!+]*[A-Za-z0-9])?"
_PIN = re.compile(rf"({_NAME}) ?==({_VERSION})((?: --hash=sha256:[0-9a-f]{{64}})*)")
_WHEEL_PIN = re.compile(rf"({_NAME}) @ (https://\S+)((?: --hash=sha256:[0-9a-f]{{64}})*)")
# https://packaging.python.org/en/latest/specifications/binary-distribution-format/#file-name-convention
_WHEEL_FILE = re.compile(rf"([A-Za-z0-9._]+)-({_VERSION})(?:-[^-]+){{3,4}}\.whl")


class StackError(BadConfig):
    """A stack or a lock is invalid: one sentence, with a hint."""


class Pin(Struct, frozen=True):
    """One package at one version; `url` only if the stack names the wheel by URL."""

    name: str
    version: str
    url: str | None = None
    hashes: tuple[str, ...] = ()  # each "sha256:" and 64 hexadecimal digits

    @property
    def requirement(self) -> str:
        """The pin in the syntax of pip and uv, without its hashes."""
        return f"{self.name} @ {self.url}" if self.url else f"{self.name}=={self.version}"


class NcclPin(Struct, frozen=True, forbid_unknown_fields=True):
    """The NCCL that a stack builds from source: upstream's tag and its expected commit."""

    version: Annotated[str, like(r"\d+\.\d+\.\d+", "a version like 2.28.9")]
    tag: Annotated[str, like(_NAME, "a tag such as v2.28.9-1")]
    commit: Annotated[str, like("[0-9a-f]{40}", "the 40 hexadecimal digits of a commit")]


class Platform(Struct, frozen=True):
    """A stack on one architecture.

    `requirements` are the stack's pins, with those replaced whose wheels have their own URL. `needs` are requirements
    of such wheels, known only from their metadata: `tools/lock.py` reads them, an install finds them in the lock.
    """

    arch: str
    requirements: tuple[Pin, ...]
    lock: Path | None = None
    wheels: tuple[Pin, ...] = ()
    needs: tuple[Pin, ...] = ()

    @property
    def unhashed(self) -> tuple[str, ...]:
        """Packages without a known hash, which is recorded at the first install."""
        return unhashed(self.wheels)

    @property
    def complete(self) -> bool:
        """Whether the shipped lock can be installed with `--require-hashes`."""
        return self.lock is not None and not self.unhashed

    @property
    def cuda(self) -> str:
        """The CUDA release of the lock's packages, such as 13.0; "" if there is no lock or it has no CUDA.

        Raises StackError if the lock cannot be read.
        """
        names = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")
        locked = self.locked() if self.lock else ()
        return next((pin.version.rpartition(".")[0] for pin in locked if pin.name in names), "")

    def lock_text(self) -> str:
        """Return the shipped lock. Raises StackError if it is missing or unreadable."""
        if self.lock is None:
            raise StackError(f"The stack has no lock for {self.arch}: generate it with tools/lock.py.")
        return _read(self.lock)

    def locked(self) -> tuple[Pin, ...]:
        """Return the pins of the shipped lock.

        Raises StackError if it is missing or unreadable, is no lock, or lacks a pin of the stack.
        """
        text = self.lock_text()
        try:
            pins = parse_lock(text)
        except StackError as error:
            raise StackError(f"{self.lock}: {error}") from error
        missing = {pin.name for pin in self.requirements} - {pin.name for pin in pins}
        if missing:
            names = ", ".join(sorted(missing))
            raise StackError(f"{self.lock} does not pin {names}: generate it with tools/lock.py.")
        return pins

    def open_text(self) -> str:
        """Return the input for uv's compile at the first install of an incomplete stack, without hashes.

        It includes the shipped lock, so that uv checks it against the metadata of wheels that could not be read before.
        Raises StackError if the lock cannot be read.
        """
        pins = self.locked() if self.lock else self.requirements
        return render_lock(replace(pin, hashes=()) for pin in pins)

    def close(self, compiled: str) -> str:
        """Return the lock to install: the shipped one, completed with what uv compiled from `open_text`.

        Shipped hashes always win: uv's compile ignores given hashes and prints those of the files it downloads, so its
        output alone would accept any file. Raises StackError if that output is not a lock, or lacks a hash.
        """
        pins = {pin.name: pin for pin in parse_lock(compiled)}
        for pin in self.locked() if self.lock else ():
            if pin.hashes or pin.name not in pins:
                pins[pin.name] = pin
        if missing := unhashed(pins.values()):
            raise StackError(f"No hash was recorded for {', '.join(missing)}: run the install again.")
        return render_lock(pins.values())


class Stack(Struct, frozen=True):
    """A named set of pins. Source of the numbers: the wheels' metadata, read by `tools/lock.py`."""

    name: str
    summary: str  # what it is, and for whom
    vllm: str
    python: str  # "3.12": major and minor
    requirements: tuple[Pin, ...]
    nccl: NcclPin
    platforms: Mapping[str, Platform]  # by architecture, as `uname -m` prints it
    source: Path
    evidence: str = ""  # who has run it on a Spark
    as_of: str | None = None  # "2026-04-30": unpinned packages are no newer than this date


# --- a stack's file


_Line = Annotated[str, like(r"[^\n]+", "one line of text")]
_PinText = Annotated[
    str,
    like(f"{_NAME} ?=={_VERSION}", "a pin like ray==2.60.0: name and version alone, an address belongs under wheels"),
]


class _Wheel(Struct, frozen=True, forbid_unknown_fields=True):
    url: Annotated[str, like(r"https://\S+", "an https address")]
    sha256: Annotated[str, like("[0-9a-f]{64}", "64 hexadecimal digits")] | None = None

    def __post_init__(self) -> None:
        if _pin_of_wheel(self.url) is None:
            raise ValueError("url must be the address of a wheel, ending in the wheel's file name")

    @property
    def pin(self) -> Pin:
        found = _pin_of_wheel(self.url)
        assert found, "checked when it was read"
        return replace(found, hashes=(f"sha256:{self.sha256}",)) if self.sha256 else found


class _Platform(Struct, frozen=True, forbid_unknown_fields=True):
    lock: Annotated[str, like(r"[^\x00\n]+", "a file's path")] | None = None
    wheels: tuple[_Wheel, ...] = ()
    needs: tuple[_PinText, ...] = ()


class _Platforms(Struct, frozen=True, forbid_unknown_fields=True):
    aarch64: _Platform | None = None
    x86_64: _Platform | None = None

    def __post_init__(self) -> None:
        if not self.aarch64 and not self.x86_64:
            raise ValueError("is empty: name aarch64 or x86_64")


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, like(_NAME, "letters, digits and ._-")]
    summary: _Line
    vllm: _Line
    python: Annotated[str, like(r"3\.\d+", 'a version like "3.12"')]
    requirements: tuple[_PinText, ...]
    nccl: NcclPin
    platforms: _Platforms
    evidence: _Line = ""
    as_of: Annotated[str, like(r"\d{4}-\d\d-\d\d", "a day like 2026-04-30")] | None = None

    def __post_init__(self) -> None:
        if not any(_parse_pin(pin, 0) == Pin("vllm", self.vllm) for pin in self.requirements):
            raise ValueError(f"vllm must be in requirements too, as vllm=={self.vllm}")


# --- stacks


def names() -> tuple[str, ...]:
    """Return the names of the shipped stacks, oldest vLLM first."""
    return tuple(sorted((path.stem for path in _HERE.glob("*.yaml")), key=_by_version))


def load(name_or_path: str) -> Stack:
    """Return the stack with that name, or in that YAML file.

    Raises StackError: no such stack or file, a directory, not YAML, an unknown, missing or invalid key, an invalid pin.
    """
    path = _HERE / f"{name_or_path}.yaml" if name_or_path in names() else _own(name_or_path)
    try:
        # Every scalar as text: 3.10 is not 3.1.
        return _stack(schema.read_yaml(_File, _read(path).encode(), path.name, only_text=True), path)
    except schema.Malformed as error:
        raise StackError(str(error)) from error


def _own(name_or_path: str) -> Path:
    if name_or_path:
        try:
            path = given.absolute(name_or_path, "the stack")
        except BadUsage as error:
            raise StackError(error.message) from error
        if path.is_dir():
            raise StackError(f"{name_or_path} is a directory: give the stack's YAML file itself.")
        if path.exists() and not path.is_file():
            raise StackError(f"{name_or_path} is not a regular file: later runs read the stack again.")
        if path.exists():
            return path.resolve()
    near = schema.nearest(name_or_path, names(), cutoff=0.5)
    known = f"{near and f' ({near})'}: use {either(names())}, or a YAML file's path."
    raise StackError(f"There is no stack {schema.show(name_or_path)}{known}")


def _stack(file: _File, path: Path) -> Stack:
    requirements = _pins(file.requirements, "requirements", path)
    platforms = {"aarch64": file.platforms.aarch64, "x86_64": file.platforms.x86_64}
    return Stack(
        name=file.name,
        summary=file.summary,
        vllm=file.vllm,
        python=file.python,
        requirements=requirements,
        nccl=file.nccl,
        platforms={arch: _platform(each, arch, requirements, path) for arch, each in platforms.items() if each},
        source=path,
        evidence=file.evidence,
        as_of=file.as_of,
    )


def _platform(given: _Platform, arch: str, requirements: tuple[Pin, ...], path: Path) -> Platform:
    wheels = tuple(each.pin for each in given.wheels)
    named = {wheel.name for wheel in wheels}
    return Platform(
        arch=arch,
        requirements=(*(pin for pin in requirements if pin.name not in named), *wheels),
        lock=path.parent / given.lock if given.lock else None,
        wheels=wheels,
        needs=_pins(given.needs, f"platforms.{arch}.needs", path),
    )


def _pins(pins: tuple[str, ...], key: str, path: Path) -> tuple[Pin, ...]:
    try:
        return parse_lock("\n".join(pins))
    except StackError as error:
        raise StackError(f"{path.name}: `{key}`: {error}") from error


# --- locks


@lru_cache(maxsize=4)
def parse_lock(text: str) -> tuple[Pin, ...]:
    """Parse a requirements file with hashes, as `uv pip compile --generate-hashes` writes it.

    Raises StackError at the first line that is not a pin, a wheel's https URL, a sha256 or a comment: markers, extras,
    options and index URLs are not allowed.
    """
    pins: dict[str, Pin] = {}
    for number, line in _logical_lines(text):
        pin = _parse_pin(line, number)
        if pin.name in pins:
            raise StackError(f"Line {number} of the lock pins {pin.name} a second time: remove one of the two.")
        pins[pin.name] = pin
    return tuple(pins.values())


def render_lock(pins: Iterable[Pin]) -> str:
    """Return the lock's text, sorted by name, for `parse_lock` and `uv pip install -r`."""
    ordered = sorted(pins, key=lambda pin: pin.name)
    entries = (" \\\n    ".join((pin.requirement, *(f"--hash={h}" for h in pin.hashes))) for pin in ordered)
    return "".join(f"{entry}\n" for entry in entries)


def unhashed(pins: Iterable[Pin]) -> tuple[str, ...]:
    """Return the names of the pins without a hash."""
    return tuple(pin.name for pin in pins if not pin.hashes)


def _logical_lines(text: str) -> Iterable[tuple[int, str]]:
    """Yield lines joined at backslashes, with the number of the first, without blank lines and comments."""
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
        raise StackError(f"Line {start} of the lock has no end: the file is truncated, download it again.")


def _parse_pin(line: str, number: int) -> Pin:
    if match := _PIN.fullmatch(line):
        return Pin(canonical(match[1]), match[2], hashes=_hashes(match[3]))
    if match := _WHEEL_PIN.fullmatch(line):
        pin = _pin_of_wheel(match[2])
        if pin and pin.name == canonical(match[1]):
            return replace(pin, hashes=_hashes(match[3]))
    raise StackError(f"Line {number} of the lock is not a pin with sha256 hashes: {line[:80]!r}; remake the lock.")


def _hashes(options: str) -> tuple[str, ...]:
    return tuple(option.removeprefix("--hash=") for option in options.split())


def _pin_of_wheel(url: str) -> Pin | None:
    """Return the package and version in a wheel's file name; None if the URL is not a wheel's."""
    match = _WHEEL_FILE.fullmatch(unquote(url.rsplit("/", 1)[-1]))
    return Pin(canonical(match[1]), match[2], url=url) if match else None


def canonical(name: str) -> str:
    """Return the normalized name of a package (PEP 503), so that two spellings compare equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


# --- files


def _read(path: Path) -> str:
    try:
        content = given.read(path, _LARGEST)
        if len(content) > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST >> 20} MiB")
        return content.decode()
    except FileNotFoundError as error:
        raise StackError(f"{path} does not exist: generate it with tools/lock.py, or omit `lock`.") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise StackError(f"{path} cannot be read ({why}): use a readable text file.") from error


def _by_version(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in name.split("."))
