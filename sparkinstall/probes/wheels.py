"""Probes of the installed wheels: compatibility, intact files, the reasoning field."""

from collections.abc import Sequence

from sparkinstall.facts import vllm, wheel_files, wheels
from sparkinstall.node import Node, site_packages
from sparkinstall.probes import Finding, failed, passed, warned
from sparkinstall.stacks import Pin
from sparkinstall.system import Reader

_REINSTALL = "reinstall: `sparkinstall run environment fp8 --force`"
_SHOWN = 4


def gate(node: Node, pins: Sequence[Pin], on: Reader) -> Finding:
    """Check the wheels of a stack, which counts as installed only if they pass; `pins` is its lock."""
    if isinstance(site := _site(node, on), Finding):
        return site
    if not pins:
        return failed("there is no lock for these wheels yet", "run `sparkinstall all`")
    if complaint := wheels.complaint(node, pins, on):
        return failed(complaint, wheels.OTHER_STACK, "compatible wheels")
    seen = "by the lock" if node.partial else "installed"
    cuda = f"CUDA {wheels.torch_major(node, pins, on, site)} in torch ({seen}) and in vLLM's extension"
    return passed(f"{cuda}; triton and ray installed")


def _site(node: Node, on: Reader) -> str | Finding:
    """Return the environment's site-packages, or a fail if vLLM is not installed."""
    site = site_packages(node, on)
    if site is None:
        return failed("there is no environment", "run `sparkinstall all`")
    # An aborted installation has no dist-info folder.
    if any(name.startswith("vllm-") and name.endswith(".dist-info") for name in on.names(site)):
        return site
    return failed("vllm is not installed", "run `sparkinstall all`")


def reasoning_fields(node: Node, on: Reader) -> Finding:
    """Fix 8: read the names of the reasoning fields from vLLM's class."""
    if isinstance(site := _site(node, on), Finding):
        return site
    if found := vllm.reasoning_fields(node, on):
        return passed("delta." + " and delta.".join(found))
    return failed("vLLM's DeltaMessage has no field for reasoning", "report it: sparkinstall does not know this vLLM")


def files(node: Node, on: Reader) -> Finding:
    """Compare installed files with their wheels: none missing, changed, or overwritten by another wheel."""
    found = wheel_files.compare(node, on)
    if found is None:
        return failed("there is no environment", "run `sparkinstall all`")
    if not found.locked:
        return failed("the installed packages are unknown: installed.lock is missing or empty", _REINSTALL)
    if found.wrong:
        return failed(_some(found.wrong), _REINSTALL, "every file as in its wheel")
    if found.since_installed:
        again = "`sparkinstall cache verify` and `sparkinstall run environment fp8 --force`"
        hint = f"if this remains after {again}, the wheel's RECORD is wrong, and nothing needs to be done"
        return warned(_some([f"{each}, since it was installed" for each in found.since_installed]), hint)
    many = f"{found.packages} packages, as in their wheels"
    return passed(many if found.packages != 1 else "1 package, as in its wheel")


def _some(said: Sequence[str]) -> str:
    more = f" and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    return "; ".join(said[:_SHOWN]) + more
