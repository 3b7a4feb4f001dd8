"""Where vLLM puts a model's thinking in a stream, read from its own source."""

from sparkinstall.node import Node, site_packages
from sparkinstall.probes import Finding, failed, passed, wheels
from sparkinstall.system import Reader

# Where DeltaMessage has lived since vLLM 0.10, newest first.
_PROTOCOLS = (
    "vllm/entrypoints/generate/base/protocol.py",
    "vllm/entrypoints/openai/engine/protocol.py",
    "vllm/entrypoints/openai/protocol.py",
)


def reasoning_fields(node: Node, on: Reader) -> Finding:
    """Fix 8: the names of the field in which this vLLM streams its thinking, read from its own class."""
    if (site := site_packages(node, on)) is None:
        return failed("there is no environment", "run `sparkinstall all`")
    if not wheels.has_vllm(on, site):
        return failed("vllm is not installed", "run `sparkinstall all`")
    if found := reasoning_names(node, on):
        return passed("delta." + " and delta.".join(found))
    return failed(
        "vLLM's DeltaMessage has no field for reasoning",
        "report it: this vLLM is newer than sparkinstall knows",
    )


def reasoning_names(node: Node, on: Reader) -> list[str]:
    """The fields of a delta that carry thinking; none where no vLLM is installed that has them."""
    site = site_packages(node, on)
    for path in _PROTOCOLS:
        names = delta_fields(on.read(f"{site}/{path}") or b"")
        if found := [name for name in names if name.startswith("reasoning")]:
            return found
    return []


def delta_fields(source: bytes) -> list[str]:
    """The annotated fields of `class DeltaMessage` in a module's source; none where it has no such class."""
    import ast

    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return []
    classes = [each for each in body if isinstance(each, ast.ClassDef) and each.name == "DeltaMessage"]
    fields = [field for each in classes for field in each.body if isinstance(field, ast.AnnAssign)]
    return [field.target.id for field in fields if isinstance(field.target, ast.Name)]
