"""Decisions that are expensive to make and cheap to keep: JSON files with what each was made from."""

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from msgspec import Struct, to_builtins

from sparkinstall import schema
from sparkinstall.system import Reader

T = TypeVar("T")


class Fp8Fallback(Struct, frozen=True):
    """Whether vLLM takes Triton's FP8 kernels instead of CUTLASS, and why; `how` it was found out: config, gpu or code.

    `about` is what the decision depends on.
    """

    fallback: bool
    why: str
    how: str = ""
    disabled_kernels: tuple[str, ...] = ()
    about: Mapping[str, Any] = {}


class NcclTransport(Struct, frozen=True):
    """How NCCL talks between nodes, and why; over which interface, and its halves' RDMA devices."""

    transport: Literal["roce", "socket"]
    why: str = ""
    interface: str = ""
    hcas: tuple[str, ...] = ()


class SymbolCheck(Struct, frozen=True):
    """How many symbols torch takes from NCCL; `about`: build-ids of the two."""

    about: Mapping[str, str]
    symbols: int


class VenvStamp(Struct, frozen=True):
    """What an environment was made from; `lock` is the sha256 of its lock, `part` what of it: `all` or `vllm`."""

    lock: str
    stack: str = ""
    platform: str = ""
    python: str = ""
    part: str = ""


def recorded(on: Reader, path: str, kind: type[T]) -> T | None:
    """What was decided and written to `path`; None where there is nothing, or nothing whole."""
    try:
        return schema.read(kind, json.loads(on.read(path) or b"null"), path)
    except ValueError:
        return None


def as_text(decision: object) -> str:
    """A decision as the lines that it is stored and compared in; nothing for None."""
    return json.dumps(to_builtins(decision), indent=2, sort_keys=True) + "\n" if decision else ""
