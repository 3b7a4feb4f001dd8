"""Fix 5: vLLM uses Triton's FP8 kernels if its CUTLASS kernels are for another GPU."""

from collections.abc import Iterable
from functools import lru_cache

from sparkinstall.assets import asset
from sparkinstall.facts.decisions import Fp8Fallback, recorded
from sparkinstall.fixes import FP8
from sparkinstall.node import Node
from sparkinstall.patches import PatchSet, load
from sparkinstall.probes import Finding, Probe, failed, passed
from sparkinstall.resources import Conflict, Ok, Resource, Unknown
from sparkinstall.resources.fp8 import Fp8Decision, PatchedFile
from sparkinstall.steps import Step
from sparkinstall.system import Reader


class Fp8(Step):
    name = "fp8"
    why = "FP8 kernels that run on this GPU"
    needs = ("environment",)
    phase = "build"
    impact = "FP8 models may end with `Error Internal`, or run slower than possible."
    fixes = (FP8,)

    def resources(self, node: Node) -> Iterable[Resource]:
        patch = cutlass_patch()
        kernels = patch.kernels_for(node.stack.vllm)
        yield Fp8Decision(node, kernels.disable if kernels else ())
        yield PatchedFile(node, patch)

    def probes(self, node: Node) -> Iterable[Probe]:
        yield Probe(
            "fp8-path", "vLLM's file as decided for FP8", lambda on: _path(node, on), "static",
            "FP8 models may end with `Error Internal`.", FP8,
        )  # fmt: skip


def _path(node: Node, on: Reader) -> Finding:
    decision = recorded(on, node.fp8_decision, Fp8Fallback)
    if decision is None:
        return failed("no decision is recorded", "run `sparkinstall all`")
    state, expected = PatchedFile(node, cutlass_patch()).check(on), "patched" if decision.fallback else "not patched"
    if isinstance(state, Conflict):
        return failed(state.message, state.hint, expected)
    if isinstance(state, Unknown):
        return failed(
            f"{cutlass_patch().target} is missing", "run `sparkinstall run environment fp8 --force`", expected
        )
    if not isinstance(state, Ok):
        return failed("vLLM's file is not as decided", "run `sparkinstall run fp8`", expected)
    kernels = "none of vLLM's CUTLASS kernels" if decision.fallback else "vLLM's CUTLASS kernels"
    return passed(f"{kernels} ({decision.why})")


@lru_cache(maxsize=1)
def cutlass_patch() -> PatchSet:
    return next(each for each in load(asset("patches")) if each.name == "cutlass-fp8")
