"""The kernels that really run: what vLLM picks for FP8, whether their product is right, and whether Triton compiles."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sparkinstall import fixes
from sparkinstall.facts.decisions import recorded
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped
from sparkinstall.system import Reader

Answer = Mapping[str, Any]
# Rounding to FP8 (three bits behind the point) costs 3 to 4 per cent; a wrong kernel is off by about 1.
_OFF_BY = 0.1
# Python's words for a vLLM whose functions are not where they were.
_UNKNOWN = ("ImportError", "ModuleNotFoundError", "AttributeError", "TypeError", "KeyError")
_DECIDE_AGAIN = "`sparkinstall run fp8 --force` decides again; `--set fp8.fallback=on` avoids vLLM's CUTLASS kernels"


def probes(node: Node, asked: Callable[[Reader], Answer | Finding], needs_node: str) -> Iterable[Probe]:
    """The probes of what `asked` says of a process of the environment; a Finding: why there is none."""

    def told(judge: Callable[[Node, Reader, Answer], Finding]) -> Callable[[Reader], Finding]:
        def look(on: Reader) -> Finding:
            answer = asked(on)
            return answer if isinstance(answer, Finding) else judge(node, on, answer)

        return look

    yield Probe(
        "triton-compiles",
        "Triton compiles for this GPU",
        told(_triton),
        "gpu",
        "vLLM ends at its first kernel, or at the first one of another shape.",
        needs_node=needs_node,
    )
    yield Probe(
        "fp8-kernels",
        "the FP8 kernels that vLLM picks",
        told(_picked),
        "gpu",
        "FP8 models may end with `Error Internal`, or run slower than they could.",
        fixes.FP8,
        needs_node,
    )
    yield Probe(
        "fp8-product",
        "an FP8 product is right",
        told(_product),
        "gpu",
        "FP8 models answer wrongly, or end with `Error Internal`.",
        fixes.FP8,
        needs_node,
    )


def _triton(node: Node, on: Reader, answer: Answer) -> Finding:
    del node, on
    facts = answer["triton_kernel"]
    wanted = f"a kernel for sm_{facts['arch']}" if "arch" in facts else ""
    with_ptxas = f"ptxas {facts['ptxas_version']}, {facts['ptxas']}" if "ptxas" in facts else ""
    if complaint := _complaint(facts):
        return failed("; ".join(each for each in (complaint, with_ptxas) if each), _triton_hint(complaint), wanted)
    if not facts["target"].startswith(f"sm_{facts['arch']}"):
        return failed(f"a kernel for {facts['target'] or 'nothing'}; {with_ptxas}", _triton_hint(""), wanted)
    ran = f"compiled, not run: {facts['not_run']}" if facts["not_run"] else "compiled and run"
    return passed(f"{facts['target']}, {ran} ({with_ptxas})", wanted)


def _triton_hint(complaint: str) -> str:
    if "ptxas" in complaint.lower():
        return "unset TRITON_PTXAS_BLACKWELL_PATH (TRITON_PTXAS_PATH is not read), or name a ptxas that knows this GPU"
    if complaint.startswith(_UNKNOWN):
        return "`sparkinstall run environment`"
    return "`sparkinstall run packages environment`: Triton needs gcc and Python.h to start a kernel"


def _complaint(facts: Answer) -> str:
    return str(facts.get("error", "")) or (f"its process ended: {facts['ended']}" if "ended" in facts else "")


def _picked(node: Node, on: Reader, answer: Answer) -> Finding:
    facts, decision = answer["fp8"], recorded(on, node.fp8_decision)
    if "not_asked" in facts:
        return skipped(facts["not_asked"])
    if "fallback" not in decision:
        return failed("nothing was decided yet", "run `sparkinstall all`")
    if "picked" not in facts:
        return _unasked(facts)
    found = ", ".join(f"{name}: {kernel}" for name, kernel in facts["picked"].items())
    found += f" (for sm_{facts['given_arch']}; no GPU here)" if facts["given_arch"] else ""
    if not decision["fallback"]:
        return passed(found)
    wanted = f"none of vLLM's CUTLASS kernels: {decision['why']}"
    if any(is_cutlass(kernel) for kernel in facts["picked"].values()):
        return failed(found, "`sparkinstall run fp8 env-files`, and start vLLM with the env file", wanted)
    return passed(found, wanted)


def is_cutlass(kernel: str) -> bool:
    """Whether a kernel that vLLM names is its own CUTLASS one; FlashInfer's are not of vLLM's extension."""
    return "cutlass" in kernel.lower() and not kernel.startswith("FlashInfer")


def _unasked(facts: Answer) -> Finding:
    """vLLM's selection gave no answer: because it is not asked so any more, or because it found nothing."""
    complaint = _complaint(facts)
    if facts.get("given_arch"):
        return skipped(f"vLLM's selection cannot be asked without a GPU: {complaint}")
    if complaint.startswith(_UNKNOWN):
        return skipped(f"this vLLM chooses in another way than sparkinstall knows: {complaint}")
    return failed(complaint or "vLLM's selection gave no answer", _DECIDE_AGAIN)


def _product(node: Node, on: Reader, answer: Answer) -> Finding:
    del node, on
    facts = answer["fp8"]
    if why := facts.get("not_asked") or facts.get("not_run"):
        return skipped(why)
    if "picked" not in facts:
        return skipped("vLLM picked no kernels: see fp8-kernels")
    off_by = {name.split()[1]: value for name, value in facts.items() if name.startswith("off_by ")}
    found = ", ".join(f"{name}: {value:.1%} off" for name, value in off_by.items())
    wanted = f"less than {_OFF_BY:.0%} off the exact product"
    if complaint := _complaint(facts):
        return _broken(facts, complaint, wanted)
    # Not "off by more": what is no number is not less either.
    if not all(value < _OFF_BY for value in off_by.values()):
        return failed(found, _DECIDE_AGAIN, wanted)
    return passed(found, wanted)


def _broken(facts: Answer, complaint: str, wanted: str) -> Finding:
    name = facts.get("trying", "")
    if complaint.startswith(_UNKNOWN):
        return skipped(f"this vLLM multiplies in another way than sparkinstall knows: {complaint}")
    return failed(f"{name}, {facts['picked'].get(name, 'vLLM')}: {complaint}", _DECIDE_AGAIN, wanted)
