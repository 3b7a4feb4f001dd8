"""Judge whether a process has loaded the NCCL that this node should use."""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from sparkinstall import elf
from sparkinstall.node import Node, nccl_library
from sparkinstall.probes import Finding, failed, passed, skipped, warned
from sparkinstall.system import Reader

NO_BUILD_ID = "none"
REWRITE_ENV = "run `sparkinstall all`: it rewrites the env file, and rebuilds NCCL if it is missing"
MISMATCH = "Nodes with different NCCL versions fail at the first collective: `Message truncated`."
"""The impact of an NCCL that differs from the other nodes'."""
_FOR_THIS_GPU = "it works through PTX, if at all; `nccl.mode: source` builds one for this GPU"


class Loaded(Struct, frozen=True):
    """A process's NCCL: the file that its symbols bind to (or ""), its version as NCCL counts (22809 is 2.28.9), and
    every libnccl in its maps."""

    bound: str
    version: int
    mapped: Sequence[str]


def not_here(node: Node, on: Reader) -> Finding | None:
    """Return the skip or fail if the environment cannot be started here, else None."""
    if on.entry(node.env_file) is None:
        return failed("there is no env file", "run `sparkinstall all`")
    if node.foreign:
        return skipped(f"these wheels are for {node.platform} and cannot run here")
    return None


def library(node: Node, on: Reader) -> str | Finding:
    """Return the real path of the library that should be loaded, or why there is none."""
    path = nccl_library(node, on)
    if path is not None and on.entry(path) is not None:
        return on.real(path)
    if on.rehearsal:
        return skipped("node only: no NCCL was built here")
    return failed("no NCCL was built", "run `sparkinstall all`")


def wanted(of_library: str) -> str:
    return f"{of_library}, build-id {build_id(of_library)}"


def judged(node: Node, of_library: str, loaded: Loaded) -> Finding:
    """Check that `loaded` is `of_library`, has the right version, and has code for this GPU."""
    bound, expected = loaded.bound, wanted(of_library)
    if not is_same_build(bound, of_library):
        return failed(wanted(bound), REWRITE_ENV, expected)
    version = in_words(loaded.version)
    if version != node.nccl_version.split("-")[0]:
        return failed(f"it reports version {version}", "run `sparkinstall run nccl`", node.nccl_version)
    code = sorted({each.arch for each in elf.gpu_code(Path(bound)) if each.kind == "cubin"})
    told = (
        f"{version}, {Path(bound).resolve()}, build-id {build_id(bound)[:12]}, code for {', '.join(code) or 'no GPU'}"
    )
    if f"sm_{node.config.nccl.arch}" not in code:
        return warned(told, _FOR_THIS_GPU, f"code for sm_{node.config.nccl.arch}")
    return passed(f"{told}{_beside(loaded)}", expected)


def _beside(loaded: Loaded) -> str:
    """Describe other mapped copies of NCCL, which are harmless."""
    others = [each for each in loaded.mapped if not is_same_file(each, loaded.bound)]
    # torch 2.11 and later also opens its wheel's copy by path; symbols resolve to the preloaded one first.
    return f"; also mapped, but unused: {', '.join(others)}" if others else ""


def build_id(path: str) -> str:
    """Return the build-id in hex, as `file` shows it."""
    try:
        return elf.build_id(Path(path)) or NO_BUILD_ID
    except (OSError, elf.NotALibrary):
        return NO_BUILD_ID


def is_same_build(path: str, other: str) -> bool:
    """Return whether both paths are the same file, or copies of the same build."""
    return is_same_file(path, other) or build_id(path) == build_id(other) != NO_BUILD_ID


def is_same_file(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:
        return False


def in_words(number: int) -> str:
    """Convert 22809 to 2.28.9 (NCCL's NCCL_VERSION macro since 2.9)."""
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"
