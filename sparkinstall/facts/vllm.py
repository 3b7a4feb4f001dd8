"""vLLM's internals that are read from files or referred to by name: paths, fields, parsers, an operator, metrics.

payloads/vllm_internals.py has what needs a running vLLM. tests/fast/test_vllm_internals.py compares both with the
wheels of every shipped stack.
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
"""Files that defined `class DeltaMessage` since vLLM 0.10, newest first."""
REASONING_PARSERS_FILE = "vllm/reasoning/__init__.py"
FP8_OPERATOR = b"cutlass_scaled_mm"
"""The operator of the CUTLASS FP8 kernels; which extension contains it differs between releases."""
METRICS_FILE = "vllm/v1/metrics/loggers.py"
GENERATED_TOKENS = "vllm:generation_tokens_total"
KV_CACHE_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
"""Names of the metric, newest first; the second was used before vLLM 0.10."""
_CUDART = re.compile(r"libcudart\.so\.(\d+)")


def extensions(on: Reader, site: str) -> tuple[Path, ...]:
    """Return the real paths of vLLM's compiled extensions."""
    names = on.names(f"{site}/vllm")
    return tuple(Path(on.real(f"{site}/vllm/{n}")) for n in names if n.startswith("_C") and n.endswith(".so"))


def cuda_majors(on: Reader, site: str) -> set[str]:
    """Return the major versions N of the libcudart.so.N that vLLM's extensions need."""
    needed = {name for path in extensions(on, site) for name in elf.needed(path)}
    return {match[1] for name in needed if (match := _CUDART.match(name))}


def reasoning_fields(node: Node, on: Reader) -> list[str]:
    """Return the fields of a delta that carry reasoning; [] without a vLLM that has them."""
    site = site_packages(node, on)
    for path in DELTA_MESSAGE_FILES:
        names = delta_fields(on.read(f"{site}/{path}") or b"")
        if found := [name for name in names if name.startswith("reasoning")]:
            return found
    return []


def delta_fields(source: bytes) -> list[str]:
    """Return the annotated fields of `class DeltaMessage` in a module's source, or []."""
    classes = [each for each in _body(source) if isinstance(each, ast.ClassDef) and each.name == "DeltaMessage"]
    fields = [field for each in classes for field in each.body if isinstance(field, ast.AnnAssign)]
    return [field.target.id for field in fields if isinstance(field.target, ast.Name)]


def reasoning_parsers(node: Node, on: Reader) -> list[str]:
    """Return the values that the installed vLLM accepts for `--reasoning-parser`; [] if unknown."""
    return parsers_in(on.read(f"{site_packages(node, on)}/{REASONING_PARSERS_FILE}") or b"")


def parsers_in(source: bytes) -> list[str]:
    """Return the keys of the parser tables in a module's source."""
    tables = [each.value for each in _body(source) if isinstance(each, ast.Assign) and isinstance(each.value, ast.Dict)]
    keys = [key.value for table in tables for key in table.keys if isinstance(key, ast.Constant)]
    return [key for key in keys if isinstance(key, str)]


def _body(source: bytes) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError):
        return []
