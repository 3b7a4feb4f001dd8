"""Read an ELF shared library: build id, needed libraries, symbols, GPU architectures.

Nothing is loaded or run, no CUDA toolkit is needed, and libraries of other architectures can be read too.
Only the requested tables are read, so a 1 GB file costs neither seconds nor memory.

Reads use pread, not mmap: if a linker or an installer truncates the library meanwhile, the result is
`NotALibrary`; a memory map would end this process with SIGBUS.

Sources: the ELF gABI for the tables. NVIDIA does not publish the fatbin container; its layout was derived from
output of the CUDA 12 and 13 compilers, and agrees with `cuobjdump` on the vLLM, PyTorch and NCCL wheels of
both architectures.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from msgspec import Struct

StrPath = str | os.PathLike[str]

_ELF_HEADER = struct.Struct("<4sBBBxxxxxxxxxHHIQQQIHHHHHH")
_ELF64, _LITTLE_ENDIAN, _SHARED_OBJECT = 2, 1, 3

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SHT_DYNAMIC, _SHT_NOTE, _SHT_DYNSYM = 6, 7, 11

_DYNAMIC_ENTRY = struct.Struct("<qQ")
_DT_NULL, _DT_NEEDED = 0, 1

_NOTE = struct.Struct("<III")
_NT_GNU_BUILD_ID = 3

_SYMBOL = struct.Struct("<IBBHQQ")
_STB_LOCAL, _STB_WEAK = 0, 2
_VISIBLE_OUTSIDE = frozenset({0, 3})  # STV_DEFAULT, STV_PROTECTED

_CONTAINER = struct.Struct("<IHHQ")
_CONTAINER_MAGIC = 0xBA55ED50
# kind, version, size of this header, size of the code after it, (its unpacked form), arch, (name), flags
_ENTRY = struct.Struct("<HHIQ12xI8xQ")
_ENTRY_KINDS: dict[int, Literal["ptx", "cubin"]] = {1: "ptx", 2: "cubin"}
# The suffix of sm_120a and sm_120f is in the flags, not in the code: nothing has to be decompressed.
_ARCH_SPECIFIC, _FAMILY_SPECIFIC = 1 << 20, 1 << 21


class NotALibrary(ValueError):
    """The file is not a 64-bit little-endian shared library, or is truncated or damaged. Names the file and why."""


class GpuCode(Struct, frozen=True):
    """One piece of GPU code: a `cubin` runs as it is; `ptx` is compiled when it is loaded.

    `arch` is nvcc's name: `sm_120`, `sm_120a` (12.0 only) or `sm_120f` (its family, including 12.1) for a cubin,
    `compute_120` and the like for PTX.
    """

    kind: Literal["cubin", "ptx"]
    arch: str


def build_id(path: StrPath) -> str | None:
    """Return the GNU build-id in hex, as `file` and `readelf -n` print it; None if the linker wrote none.

    Every function here raises `NotALibrary`, or `OSError` if the file cannot be opened.
    """
    with _opened(path) as library:
        for section in library.sections:
            if section.kind == _SHT_NOTE and (found := _build_id_in(library.content(section))):
                return found
    return None


def needed(path: StrPath) -> tuple[str, ...]:
    """Return the needed libraries (DT_NEEDED) in order, e.g. `libcudart.so.13`."""
    with _opened(path) as library:
        return tuple(_needed(library))


def undefined_symbols(path: StrPath, prefix: str) -> frozenset[str]:
    """Return the symbols beginning with `prefix` that other libraries must define for this one to load.

    Weak symbols are left out: the loader tolerates their absence.
    """
    return _symbols(path, prefix, lambda binding, _, section: not section and binding != _STB_WEAK)


def defined_symbols(path: StrPath, prefix: str) -> frozenset[str]:
    """Return the exported symbols beginning with `prefix`, without their versions."""
    return _symbols(path, prefix, lambda _, visibility, section: bool(section) and visibility in _VISIBLE_OUTSIDE)


def gpu_code(path: StrPath) -> tuple[GpuCode, ...]:
    """Return every cubin and PTX that the driver can load, in file order.

    These are the pieces that `cuobjdump` lists, without code for a later link (`__nv_relfatbin`, LTO).
    """
    with _opened(path) as library:
        return tuple(code for section in library.named(".nv_fatbin") for code in _fatbin(library, section))


class _Section(NamedTuple):
    name: int
    kind: int
    offset: int
    size: int
    link: int


class _Library:
    """An open ELF shared library: header, section table and bounds-checked reads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        header = self.unpack(_ELF_HEADER, 0)
        magic, elf_class, order, _, kind, _, _, _, _, table, _, _, _, _, entry, count, names = header
        if magic != b"\x7fELF":
            raise _DamageError("not an ELF file")
        if (elf_class, order, kind) != (_ELF64, _LITTLE_ENDIAN, _SHARED_OBJECT):
            raise _DamageError("not a 64-bit little-endian shared library")
        if not count or entry != _SECTION.size:
            raise _DamageError("no section table")
        rows = _SECTION.iter_unpack(self.read(table, entry * count))
        self.sections = tuple(_Section(row[0], row[1], row[4], row[5], row[6]) for row in rows)
        self._names = self.content(self.linked(names))

    def read(self, offset: int, size: int) -> bytes:
        # Check before the read: a damaged size must not become an allocation of that size.
        if offset + size > self._size:
            raise _DamageError(f"truncated: {size} bytes expected at {offset}, but the file has {self._size}")
        data = os.pread(self._descriptor, size, offset)
        if len(data) < size:
            raise _DamageError(f"truncated during the read: {len(data)} of {size} bytes at {offset}")
        return data

    def unpack(self, layout: struct.Struct, offset: int) -> tuple[Any, ...]:
        return layout.unpack(self.read(offset, layout.size))

    def content(self, section: _Section) -> bytes:
        return self.read(section.offset, section.size)

    def table(self, section: _Section, layout: struct.Struct) -> Iterator[tuple[Any, ...]]:
        if section.size % layout.size:
            raise _DamageError(f"a table of {section.size} bytes cannot hold rows of {layout.size}")
        return layout.iter_unpack(self.content(section))

    def linked(self, index: int) -> _Section:
        if index >= len(self.sections):
            raise _DamageError(f"section {index} is referenced, but there are only {len(self.sections)}")
        return self.sections[index]

    def of_kind(self, kind: int) -> Iterator[_Section]:
        return (section for section in self.sections if section.kind == kind)

    def named(self, name: str) -> Iterator[_Section]:
        wanted = name.encode() + b"\0"
        return (section for section in self.sections if self._names.startswith(wanted, section.name))


class _DamageError(Exception):
    """Why a file cannot be read as a library; becomes a `NotALibrary` with the file's name."""


@contextmanager
def _opened(path: StrPath) -> Iterator[_Library]:
    with open(path, "rb", buffering=0) as file:
        try:
            yield _Library(file.fileno())
        except _DamageError as damage:
            raise NotALibrary(f"{os.fspath(path)}: {damage}") from None


def _string(strings: bytes, offset: int) -> str:
    end = strings.find(b"\0", offset)
    if end < 0:
        raise _DamageError(f"the name at {offset} has no end")
    try:
        return strings[offset:end].decode()
    except UnicodeDecodeError:
        raise _DamageError(f"the name at {offset} is not UTF-8") from None


def _needed(library: _Library) -> Iterator[str]:
    for section in library.of_kind(_SHT_DYNAMIC):
        strings = library.content(library.linked(section.link))
        for tag, value in library.table(section, _DYNAMIC_ENTRY):
            if tag == _DT_NULL:
                break
            if tag == _DT_NEEDED:
                yield _string(strings, value)


def _build_id_in(notes: bytes) -> str | None:
    at = 0
    while at + _NOTE.size <= len(notes):
        name_size, size, kind = _NOTE.unpack_from(notes, at)
        name = at + _NOTE.size
        start = name + _padded(name_size)
        if kind == _NT_GNU_BUILD_ID and notes[name : name + name_size] == b"GNU\0":
            if start + size > len(notes):
                raise _DamageError("the build-id is truncated")
            return notes[start : start + size].hex()
        at = start + _padded(size)
    return None


def _padded(size: int) -> int:
    return (size + 3) & ~3


def _symbols(path: StrPath, prefix: str, wanted: Callable[[int, int, int], bool]) -> frozenset[str]:
    found, start = set(), prefix.encode()
    with _opened(path) as library:
        for table in library.of_kind(_SHT_DYNSYM):
            names = library.content(library.linked(table.link))
            for name, info, other, section, _, _ in library.table(table, _SYMBOL):
                # Compare the name first: only a few dozen of 100,000 symbols begin with the prefix.
                known = name and names.startswith(start, name) and info >> 4 != _STB_LOCAL
                if known and wanted(info >> 4, other & 3, section):
                    found.add(_string(names, name))
    return frozenset(found)


def _fatbin(library: _Library, section: _Section) -> Iterator[GpuCode]:
    for start, end in _containers(library, section.offset, section.offset + section.size):
        while start < end:
            kind, _, header, payload, arch, flags = library.unpack(_ENTRY, start)
            if header < _ENTRY.size or start + header + payload > end:
                raise _DamageError(f"the GPU code at {start} exceeds its container")
            if kind in _ENTRY_KINDS:
                suffix = "a" if flags & _ARCH_SPECIFIC else "f" if flags & _FAMILY_SPECIFIC else ""
                prefix = "sm" if _ENTRY_KINDS[kind] == "cubin" else "compute"
                yield GpuCode(_ENTRY_KINDS[kind], f"{prefix}_{arch}{suffix}")
            start += header + payload


def _containers(library: _Library, start: int, end: int) -> Iterator[tuple[int, int]]:
    while (start := _after_padding(library, start, end)) < end:
        magic, _, header, size = library.unpack(_CONTAINER, start)
        if magic != _CONTAINER_MAGIC or header < _CONTAINER.size or start + header + size > end:
            raise _DamageError(f"no container of GPU code at {start}")
        yield start + header, start + header + size
        start += header + size


def _after_padding(library: _Library, start: int, end: int) -> int:
    # The linker chooses the alignment of containers (128 bytes on aarch64) and fills the gap with zeros.
    while start < end:
        ahead = library.read(start, min(256, end - start))
        if rest := ahead.lstrip(b"\0"):
            return start + len(ahead) - len(rest)
        start += len(ahead)
    return end
