"""vLLM's internals that are read or named from outside: files, a class's fields, a table, an operator, metrics.

What takes a running vLLM is in payloads/vllm_internals.py. tests/fast/test_vllm_internals.py holds both against the
wheel of every shipped stack.
"""

import ast
import re
from pathlib import Path

from sparkinstall import elf
from sparkinstall.node import Node, site_packages
from sparkinstall.system import Reader

DELTA_MESSAGE_FILES = (
    "vllm/entrypoints/generate/base/protocol.py",
    "vllm/entrypoints/openai/engine/protocol.py",
    "vllm/entrypoints/openai/protocol.py",
)
"""Where `class DeltaMessage` has lived since vLLM 0.10, newest first."""
REASONING_PARSERS_FILE = "vllm/reasoning/__init__.py"
FP8_OPERATOR = b"cutlass_scaled_mm"
"""The operator of the CUTLASS FP8 kernels; which extension holds it changes from release to release."""
METRICS_FILE = "vllm/v1/metrics/loggers.py"
GENERATED_TOKENS = "vllm:generation_tokens_total"
KV_CACHE_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
"""The metric, newest name first: the second is that of vLLM before 0.10."""
_CUDART = re.compile(r"libcudart\.so\.(\d+)")


def has_vllm(on: Reader, site: str) -> bool:
    """Whether vLLM is installed there, as its dist-info says: an installation that broke off has none."""
    return any(name.startswith("vllm-") and name.endswith(".dist-info") for name in on.names(site))


def extensions(on: Reader, site: str) -> tuple[Path, ...]:
    """vLLM's compiled extensions, as real paths."""
    names = on.names(f"{site}/vllm")
    return tuple(Path(on.real(f"{site}/vllm/{n}")) for n in names if n.startswith("_C") and n.endswith(".so"))


def cuda_majors(on: Reader, site: str) -> set[str]:
    """The majors N of the libcudart.so.N that vLLM's extensions need; empty where there is none."""
    needed = {name for path in extensions(on, site) for name in elf.needed(path)}
    return {match[1] for name in needed if (match := _CUDART.match(name))}


def reasoning_fields(node: Node, on: Reader) -> list[str]:
    """The fields of a delta that carry reasoning; none where no vLLM is installed that has them."""
    site = site_packages(node, on)
    for path in DELTA_MESSAGE_FILES:
        names = delta_fields(on.read(f"{site}/{path}") or b"")
        if found := [name for name in names if name.startswith("reasoning")]:
            return found
    return []


def delta_fields(source: bytes) -> list[str]:
    """The annotated fields of `class DeltaMessage` in a module's source; none where it has no such class."""
    classes = [each for each in _body(source) if isinstance(each, ast.ClassDef) and each.name == "DeltaMessage"]
    fields = [field for each in classes for field in each.body if isinstance(field, ast.AnnAssign)]
    return [field.target.id for field in fields if isinstance(field.target, ast.Name)]


def reasoning_parsers(node: Node, on: Reader) -> list[str]:
    """The names that the installed vLLM takes for `--reasoning-parser`; none where there is no such table."""
    return parsers_in(on.read(f"{site_packages(node, on)}/{REASONING_PARSERS_FILE}") or b"")


def parsers_in(source: bytes) -> list[str]:
    """The keys of the tables in a module's source."""
    tables = [each.value for each in _body(source) if isinstance(each, ast.Assign) and isinstance(each.value, ast.Dict)]
    keys = [key.value for table in tables for key in table.keys if isinstance(key, ast.Constant)]
    return [key for key in keys if isinstance(key, str)]


def _body(source: bytes) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError):
        return []
