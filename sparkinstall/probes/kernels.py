"""The kernels that really run: what vLLM picks for FP8, whether their product is right, and whether Triton compiles."""

from collections.abc import Callable, Iterable, Mapping

from msgspec import Struct

from sparkinstall import fixes
from sparkinstall.facts.decisions import Fp8Fallback, recorded
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped
from sparkinstall.system import Reader

# Rounding to FP8 (three bits behind the point) costs 3 to 4 per cent; a wrong kernel is off by about 1.
_OFF_BY = 0.1
# Python's words for a vLLM whose functions are not where they were.
_UNKNOWN = ("ImportError", "ModuleNotFoundError", "AttributeError", "TypeError", "KeyError")
_DECIDE_AGAIN = "`sparkinstall run fp8 --force` decides again; `--set fp8.fallback=on` avoids vLLM's CUTLASS kernels"


class Child(Struct, frozen=True):
    """What every child of payloads/inspect_env.py may say: `error` in words; `ended`: what ended it before its time."""

    error: str = ""
    ended: str = ""

    @property
    def complaint(self) -> str:
        return self.error or (f"its process ended: {self.ended}" if self.ended else "")


class Triton(Child, frozen=True):
    """A Triton kernel: for which `arch` (121), with which ptxas, and the `target` that came out (sm_121a).

    `not_run`: why it was compiled only.
    """

    arch: int = 0
    ptxas: str = ""
    ptxas_version: str = ""
    target: str = ""
    not_run: str = ""


class Fp8(Child, frozen=True):
    """vLLM's FP8 kernels: those it `picked` by way of scaling, and how far a product is `off_by`.

    `given_arch`: the architecture that it chose for, where there is no GPU. `trying`: the product that was begun last.
    """

    not_asked: str = ""
    not_run: str = ""
    given_arch: str = ""
    picked: Mapping[str, str] = {}
    trying: str = ""
    off_by: Mapping[str, float] = {}


class Answer(Struct, frozen=True):
    """What the children of the process say."""

    triton_kernel: Triton = Triton()
    fp8: Fp8 = Fp8()


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
        return "unset TRITON_PTXAS_BLACKWELL_PATH (TRITON_PTXAS_PATH is not read), or name a ptxas that knows this GPU"
    if complaint.startswith(_UNKNOWN):
        return "`sparkinstall run environment`"
    return "`sparkinstall run packages environment`: Triton needs gcc and Python.h to start a kernel"


def _picked(node: Node, on: Reader, answer: Answer) -> Finding:
    said, decision = answer.fp8, recorded(on, node.fp8_decision, Fp8Fallback)
    if said.not_asked:
        return skipped(said.not_asked)
    if decision is None:
        return failed("nothing was decided yet", "run `sparkinstall all`")
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
    """Whether a kernel that vLLM names is its own CUTLASS one; FlashInfer's are not of vLLM's extension."""
    return "cutlass" in kernel.lower() and not kernel.startswith("FlashInfer")


def _unasked(said: Fp8) -> Finding:
    """vLLM's selection gave no answer: because it is not asked so any more, or because it found nothing."""
    complaint = said.complaint
    if said.given_arch:
        return skipped(f"vLLM's selection cannot be asked without a GPU: {complaint}")
    if complaint.startswith(_UNKNOWN):
        return skipped(f"this vLLM chooses in another way than sparkinstall knows: {complaint}")
    return failed(complaint or "vLLM's selection gave no answer", _DECIDE_AGAIN)


def _product(node: Node, on: Reader, answer: Answer) -> Finding:
    del node, on
    said = answer.fp8
    if why := said.not_asked or said.not_run:
        return skipped(why)
    if not said.picked:
        return skipped("vLLM picked no kernels: see fp8-kernels")
    found = ", ".join(f"{name}: {value:.1%} off" for name, value in said.off_by.items())
    wanted = f"less than {_OFF_BY:.0%} off the exact product"
    if said.complaint:
        return _broken(said, wanted)
    # Not "off by more": what is no number is not less either.
    if not all(value < _OFF_BY for value in said.off_by.values()):
        return failed(found, _DECIDE_AGAIN, wanted)
    return passed(found, wanted)


def _broken(said: Fp8, wanted: str) -> Finding:
    complaint = said.complaint
    if complaint.startswith(_UNKNOWN):
        return skipped(f"this vLLM multiplies in another way than sparkinstall knows: {complaint}")
    return failed(f"{said.trying}, {said.picked.get(said.trying, 'vLLM')}: {complaint}", _DECIDE_AGAIN, wanted)
