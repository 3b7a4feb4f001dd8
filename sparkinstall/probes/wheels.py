"""The installed wheels: whether they fit together, whether their files are intact, how they name reasoning."""

from collections.abc import Sequence

from sparkinstall.facts import vllm, wheel_files
from sparkinstall.facts.wheels import OTHER_STACK, gate_of
from sparkinstall.node import Node, site_packages
from sparkinstall.probes import Finding, failed, passed, warned
from sparkinstall.stacks import Pin
from sparkinstall.system import Reader

_REINSTALL = "reinstall: `sparkinstall run environment fp8 --force`"
_SHOWN = 4


def gate(node: Node, pins: Sequence[Pin], on: Reader) -> Finding:
    """What every stack must pass before it counts as installed; `pins` is its lock."""
    if isinstance(site := _site(node, on), Finding):
        return site
    if not pins:
        return failed("there is no lock yet for these wheels", "run `sparkinstall all`")
    wheels = gate_of(node, pins)
    if complaint := wheels.complaint(on):
        return failed(complaint, OTHER_STACK, "a stack that fits together")
    cuda = f"CUDA {wheels.torch_major(on, site)} in torch ({wheels.seen}) and in vLLM's extension"
    return passed(f"{cuda}; triton, ray there")


def _site(node: Node, on: Reader) -> str | Finding:
    """The environment's site-packages, or that vLLM is not there."""
    site = site_packages(node, on)
    if site is None:
        return failed("there is no environment", "run `sparkinstall all`")
    return site if vllm.has_vllm(on, site) else failed("vllm is not installed", "run `sparkinstall all`")


def reasoning_fields(node: Node, on: Reader) -> Finding:
    """Fix 8: the names of the field in which this vLLM streams its reasoning, read from its own class."""
    if isinstance(site := _site(node, on), Finding):
        return site
    if found := vllm.reasoning_fields(node, on):
        return passed("delta." + " and delta.".join(found))
    return failed(
        "vLLM's DeltaMessage has no field for reasoning", "report it: this vLLM is newer than sparkinstall knows"
    )


def files(node: Node, on: Reader) -> Finding:
    """The installed files against their wheels: nothing is gone, changed, or put in from another wheel."""
    found = wheel_files.compare(node, on)
    if found is None:
        return failed("there is no environment", "run `sparkinstall all`")
    if not found.locked:
        return failed("it is not known what was installed: installed.lock is gone or empty", _REINSTALL)
    if found.wrong:
        return failed(_some(found.wrong), _REINSTALL, "every file as its wheel brought it")
    if found.since_installed:
        again = f"`rm -r {node.cache}/uv` and `sparkinstall run environment fp8 --force`"
        hint = f"if that stays after {again}, the wheel's own list of its files is wrong and nothing need be done"
        return warned(_some([f"{each}, since it was installed" for each in found.since_installed]), hint)
    many = f"{found.packages} packages, as their wheels brought them"
    return passed(many if found.packages != 1 else "1 package, as its wheel brought it")


def _some(said: Sequence[str]) -> str:
    more = f" and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    return "; ".join(said[:_SHOWN]) + more
