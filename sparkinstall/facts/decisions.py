"""Recorded decisions that are expensive to make: JSON files that include their inputs."""

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from msgspec import Struct, to_builtins

from sparkinstall import schema
from sparkinstall.errors import Problem
from sparkinstall.system import Reader

T = TypeVar("T")
_LARGEST = 16 << 20


class Fp8Fallback(Struct, frozen=True):
    """Whether vLLM uses Triton's FP8 kernels instead of CUTLASS, and why; `how` it was determined: config, gpu or code.

    `about`: what the decision depends on.
    """

    fallback: bool
    why: str
    how: str = ""
    disabled_kernels: tuple[str, ...] = ()
    about: Mapping[str, Any] = {}


class NcclTransport(Struct, frozen=True):
    """NCCL's transport between nodes, and why; its interface, and the RDMA devices of both halves."""

    transport: Literal["roce", "socket"]
    why: str = ""
    interface: str = ""
    hcas: tuple[str, ...] = ()


class SymbolCheck(Struct, frozen=True):
    """The number of symbols that torch needs from NCCL; `about`: build-ids of both."""

    about: Mapping[str, str]
    symbols: int


class VenvStamp(Struct, frozen=True):
    """What an environment was made from; `lock`: sha256 of the lock; `part`: what was installed, `all` or `vllm`.

    `place`: its folder below the prefix, so that services restart if an equal environment replaces it.
    """

    lock: str
    stack: str = ""
    platform: str = ""
    python: str = ""
    part: str = ""
    place: str = ""


class RecordDamaged(Problem):
    """A file of ours is not what was written. `path`: on the node. The next run removes it and determines it again."""

    code = "state"

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} is damaged: {why}", hint="`sparkinstall all` removes it and determines it again")
        self.path = path


def recorded(on: Reader, path: str, kind: type[T]) -> T | None:
    """Return the decision in the file `path`; None if there is none.

    Raises:
        RecordDamaged: it cannot be read.
    """
    entry = on.entry(path)
    if entry is None:
        return None
    if entry.kind != "file" or entry.size > _LARGEST:
        raise RecordDamaged(path, f"it is {entry.words}" if entry.kind != "file" else f"it has {entry.size} bytes")
    try:
        return schema.read_json(kind, on.read(path) or b"", path)
    except schema.Malformed as error:
        raise RecordDamaged(path, error.complaint) from error


def installed_stack(on: Reader, stamp: str) -> str:
    """Return the stack of the environment with that stamp; "" if there is none, or the stamp is damaged."""
    try:
        found = recorded(on, stamp, VenvStamp)
    except RecordDamaged:
        return ""
    return found.stack if found else ""


def as_text(decision: object) -> str:
    """A decision as the lines that it is stored and compared in; nothing for None."""
    return json.dumps(to_builtins(decision), indent=2, sort_keys=True) + "\n" if decision else ""
