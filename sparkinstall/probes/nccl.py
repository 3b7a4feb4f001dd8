"""Which NCCL a process has, and whether it is the one that this node is to have."""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from sparkinstall import elf
from sparkinstall.node import Node, nccl_library
from sparkinstall.probes import Finding, failed, passed, skipped, warned
from sparkinstall.system import Reader

NO_BUILD_ID = "none"
REWRITE_ENV = "run `sparkinstall all`: it rewrites the env file, and rebuilds NCCL if it is missing"
MISMATCH = "Nodes with different NCCLs end at the first collective: `Message truncated`."
"""The impact of another NCCL than that of the other nodes."""
_FOR_THIS_GPU = "it works through PTX, if at all; `nccl.mode: source` builds one for this GPU"


class Loaded(Struct, frozen=True):
    """What a process says: the file that its NCCL symbols bind to (empty: none), that one's version as NCCL counts
    (22809 is 2.28.9), and every libnccl in its maps."""

    bound: str
    version: int
    mapped: Sequence[str]


def not_here(node: Node, on: Reader) -> Finding | None:
    """Why no process of the environment can be started here, as a skip or a fail; None: it can."""
    if on.entry(node.env_file) is None:
        return failed("there is no env file", "run `sparkinstall all`")
    if node.foreign:
        return skipped(f"these wheels are for {node.platform}: nothing of them runs here")
    return None


def library(node: Node, on: Reader) -> str | Finding:
    """The library that has to be loaded (a real path), or why there is none."""
    path = nccl_library(node, on)
    if path is not None and on.entry(path) is not None:
        return on.real(path)
    if on.rehearsal:
        return skipped("node only: no NCCL was built here")
    return failed("no NCCL was built", "run `sparkinstall all`")


def wanted(of_library: str) -> str:
    """The library in words, for what is expected."""
    return f"{of_library}, build-id {build_id(of_library)}"


def judged(node: Node, of_library: str, loaded: Loaded) -> Finding:
    """Whether `loaded`, which is bound to something, is `of_library`, of the right version, with code for this GPU."""
    bound, expected = loaded.bound, wanted(of_library)
    if not is_same_build(bound, of_library):
        return failed(wanted(bound), REWRITE_ENV, expected)
    version = in_words(loaded.version)
    if version != node.nccl_version.split("-")[0]:
        return failed(f"it says it is {version}", "run `sparkinstall run nccl`", node.nccl_version)
    code = sorted({each.arch for each in elf.gpu_code(Path(bound)) if each.kind == "cubin"})
    told = (
        f"{version}, {Path(bound).resolve()}, build-id {build_id(bound)[:12]}, code for {', '.join(code) or 'no GPU'}"
    )
    if f"sm_{node.config.nccl.arch}" not in code:
        return warned(told, _FOR_THIS_GPU, f"code for sm_{node.config.nccl.arch}")
    return passed(f"{told}{_beside(loaded)}", expected)


def _beside(loaded: Loaded) -> str:
    """What a reader of the process's maps may wonder about."""
    others = [each for each in loaded.mapped if not is_same_file(each, loaded.bound)]
    # torch from 2.11 opens the copy of its wheel by path as well; symbols are looked up in the preloaded one first.
    return f"; mapped besides, bound by nobody: {', '.join(others)}" if others else ""


def build_id(path: str) -> str:
    """In hex, as `file` shows it."""
    try:
        return elf.build_id(Path(path)) or NO_BUILD_ID
    except (OSError, elf.NotALibrary):
        return NO_BUILD_ID


def is_same_build(path: str, other: str) -> bool:
    """Whether they are one file, or two copies of one build."""
    return is_same_file(path, other) or build_id(path) == build_id(other) != NO_BUILD_ID


def is_same_file(one: str, other: str) -> bool:
    """Whether they are one file; what is gone is none."""
    try:
        return Path(one).samefile(other)
    except OSError:
        return False


def in_words(number: int) -> str:
    """22809 -> 2.28.9 (NCCL's NCCL_VERSION macro since 2.9)."""
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"
