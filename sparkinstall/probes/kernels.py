"""Probes of GPU kernels: does Triton compile, which FP8 kernels does vLLM pick, are their results right?"""

from collections.abc import Callable, Iterable, Mapping

from msgspec import Struct

from sparkinstall import fixes
from sparkinstall.facts.decisions import Fp8Fallback, recorded
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped
from sparkinstall.system import Reader

# Rounding to FP8 (three mantissa bits) costs 3 to 4 per cent; a wrong kernel has a relative error of about 1.
_OFF_BY = 0.1
# Python's errors if vLLM has moved or renamed these functions.
_UNKNOWN = ("ImportError", "ModuleNotFoundError", "AttributeError", "TypeError", "KeyError")
_DECIDE_AGAIN = "`sparkinstall run fp8 --force` measures again; `--set fp8.fallback=on` avoids vLLM's CUTLASS kernels"


class Child(Struct, frozen=True):
    """Common fields of the children of payloads/inspect_env.py. `ended`: the signal or timeout that ended one."""

    error: str = ""
    ended: str = ""

    @property
    def complaint(self) -> str:
        return self.error or (f"its process ended: {self.ended}" if self.ended else "")


class Triton(Child, frozen=True):
    """A compiled Triton kernel: the requested `arch` (121), the ptxas used, and the resulting `target` (sm_121a).

    `not_run`: why it was only compiled.
    """

    arch: int = 0
    ptxas: str = ""
    ptxas_version: str = ""
    target: str = ""
    not_run: str = ""


class Fp8(Child, frozen=True):
    """vLLM's FP8 kernels: those `picked` by kind of scaling, and the relative error of a product, `off_by`.

    `given_arch`: the architecture used for the selection if there is no GPU. `trying`: the product started last.
    """

    not_asked: str = ""
    not_run: str = ""
    given_arch: str = ""
    picked: Mapping[str, str] = {}
    trying: str = ""
    off_by: Mapping[str, float] = {}


class Answer(Struct, frozen=True):
    """The replies of the children."""

    triton_kernel: Triton = Triton()
    fp8: Fp8 = Fp8()


def probes(node: Node, asked: Callable[[Reader], Answer | Finding], needs_node: str) -> Iterable[Probe]:
    """Yield FP8 and Triton probes. `asked(on)` returns the process's reply, or a Finding if it could not run."""

    def told(judge: Callable[[Node, Reader, Answer], Finding]) -> Callable[[Reader], Finding]:
        def look(on: Reader) -> Finding:
            answer = asked(on)
            return answer if isinstance(answer, Finding) else judge(node, on, answer)

        return look

    yield Probe(
        "triton-compiles", "Triton compiles for this GPU", told(_triton), "gpu",
        "vLLM ends at its first kernel, or at the first one with a new shape.", needs_node=needs_node,
    )  # fmt: skip
    yield Probe(
        "fp8-kernels", "FP8 kernels picked by vLLM", told(_picked), "gpu",
        "FP8 models may end with `Error Internal`, or run slower than possible.", fixes.FP8, needs_node,
    )  # fmt: skip
    yield Probe(
        "fp8-product", "result of an FP8 product", told(_product), "gpu",
        "FP8 models return wrong answers, or end with `Error Internal`.", fixes.FP8, needs_node,
    )  # fmt: skip


def _triton(_node: Node, _on: Reader, answer: Answer) -> Finding:
    said = answer.triton_kernel
    wanted = f"a kernel for sm_{said.arch}" if said.arch else ""
    with_ptxas = f"ptxas {said.ptxas_version}, {said.ptxas}" if said.ptxas else ""
    if complaint := said.complaint:
        return failed("; ".join(each for each in (complaint, with_ptxas) if each), _triton_hint(complaint), wanted)
    if not said.target.startswith(f"sm_{said.arch}"):
        return failed(f"a kernel for {said.target or 'nothing'}; {with_ptxas}", _triton_hint(""), wanted)
    ran = f"compiled, not run: {said.not_run}" if said.not_run else "compiled and run"
    return passed(f"{said.target}, {ran} ({with_ptxas})", wanted)


def _triton_hint(complaint: str) -> str:
    if "ptxas" in complaint.lower():
        return "unset TRITON_PTXAS_BLACKWELL_PATH (TRITON_PTXAS_PATH is not read), or set it to a newer ptxas"
    if complaint.startswith(_UNKNOWN):
        return "`sparkinstall run environment`"
    return "`sparkinstall run packages environment`: Triton needs gcc and Python.h to start a kernel"


def _picked(node: Node, on: Reader, answer: Answer) -> Finding:
    said, decision = answer.fp8, recorded(on, node.fp8_decision, Fp8Fallback)
    if said.not_asked:
        return skipped(said.not_asked)
    if decision is None:
        return failed("no decision is recorded", "run `sparkinstall all`")
    if not said.picked:
        return _unasked(said)
    found = ", ".join(f"{name}: {kernel}" for name, kernel in said.picked.items())
    found += f" (for sm_{said.given_arch}; no GPU here)" if said.given_arch else ""
    if not decision.fallback:
        return passed(found)
    wanted = f"none of vLLM's CUTLASS kernels: {decision.why}"
    if any(is_cutlass(kernel) for kernel in said.picked.values()):
        return failed(found, "`sparkinstall run fp8 env-files`, and start vLLM with the env file", wanted)
    return passed(found, wanted)


def is_cutlass(kernel: str) -> bool:
    """Return whether a kernel name is one of vLLM's CUTLASS kernels; FlashInfer's are not in vLLM's extension."""
    return "cutlass" in kernel.lower() and not kernel.startswith("FlashInfer")


def _unasked(said: Fp8) -> Finding:
    """Return the finding for a selection without result: it has another interface, or found no kernel."""
    complaint = said.complaint
    if said.given_arch:
        return skipped(f"vLLM's selection does not work without a GPU: {complaint}")
    if complaint.startswith(_UNKNOWN):
        return skipped(f"this vLLM selects kernels in a way that sparkinstall does not know: {complaint}")
    return failed(complaint or "vLLM's selection returned nothing", _DECIDE_AGAIN)


def _product(_node: Node, _on: Reader, answer: Answer) -> Finding:
    said = answer.fp8
    if why := said.not_asked or said.not_run:
        return skipped(why)
    if not said.picked:
        return skipped("vLLM picked no kernels: see fp8-kernels")
    found = ", ".join(f"{name}: {value:.1%} off" for name, value in said.off_by.items())
    wanted = f"less than {_OFF_BY:.0%} off the exact product"
    if (complaint := said.complaint).startswith(_UNKNOWN):
        return skipped(f"this vLLM multiplies in a way that sparkinstall does not know: {complaint}")
    if complaint:
        return failed(f"{said.trying}, {said.picked.get(said.trying, 'vLLM')}: {complaint}", _DECIDE_AGAIN, wanted)
    # Not `>`: NaN must fail too.
    if not all(value < _OFF_BY for value in said.off_by.values()):
        return failed(found, _DECIDE_AGAIN, wanted)
    return passed(found, wanted)
