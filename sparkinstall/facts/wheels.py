"""Check whether the installed wheels are compatible: torch, CUDA, Triton, Ray, Python.h.

Everything is read from files, so it works for wheels of another architecture too.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from sparkinstall.facts.vllm import cuda_majors
from sparkinstall.node import Node, site_packages
from sparkinstall.stacks import Pin
from sparkinstall.system import Reader

_TORCH_CUDA = re.compile(rb"^cuda\s*(?::[^=]+)?=\s*['\"](\d+)\.", re.MULTILINE)
OTHER_STACK = "choose another stack with --stack, or report it: the stack's lock is wrong for this machine"
"""Hint for incompatible wheels."""
_LOCAL_CUDA = re.compile(r"\+cu(\d+)\d")
_PACKAGES = ("triton", "ray")


def complaint(node: Node, pins: Sequence[Pin], on: Reader) -> str:
    """Return the first reason why the wheels of an environment are incompatible, or ""; `pins` is its lock.

    Where a rehearsal has installed vLLM's wheel alone, the lock answers for the rest.
    """
    site = site_packages(node, on)
    if site is None:
        return "there is no environment"
    locked = {pin.name: pin.version for pin in pins}
    torch, version, needed = torch_major(node, pins, on, site), locked.get("torch", "?"), cuda_majors(on, site)
    there = locked if node.partial else [each for each in _PACKAGES if on.entry(f"{site}/{each}/__init__.py")]
    if torch is None:
        return f"torch {version} is a build without CUDA: it cannot use the GPU"
    if not needed:
        return "vLLM's compiled extension is missing"
    if needed != {torch}:
        libraries = f"libcudart.so.{'/'.join(sorted(needed))}"
        return f"vLLM's extension needs {libraries}, but torch {version} brings CUDA {torch}"
    if "triton" not in there:
        return "triton is missing: models cannot be inspected or run"
    if "ray" not in there:
        return "ray is missing: vLLM no longer depends on it"
    if not node.partial and not node.foreign and python_header(on, node, site) is None:
        return f"Python.h is missing: Triton compiles its launcher here (package python{node.stack.python}-dev)"
    return ""


def torch_major(node: Node, pins: Sequence[Pin], on: Reader, site: str) -> str | None:
    """Return the major version of torch's CUDA; None for a build without CUDA."""
    if not node.partial:
        match = _TORCH_CUDA.search(on.read(f"{site}/torch/version.py") or b"")
        return match[1].decode() if match else None
    for pin in pins:
        if pin.name == "torch" and (local := _LOCAL_CUDA.search(pin.version)):
            return local[1]
    return next((_runtime_major(pin) for pin in pins if pin.name.startswith("nvidia-cuda-runtime")), None)


def _runtime_major(pin: Pin) -> str | None:
    """Return the CUDA major version: in the name of `nvidia-cuda-runtime-cu12`, else in the version."""
    named = re.search(r"-cu(\d+)$", pin.name)
    return named[1] if named else pin.version.split(".")[0]


def python_header(on: Reader, node: Node, site: str) -> Path | None:
    """Return the path of Python.h of the environment's interpreter, or None."""
    config = (on.read(f"{node.venv}/pyvenv.cfg") or b"").decode(errors="replace")
    home = re.search(r"^home\s*=\s*(.+)$", config, re.MULTILINE)
    minor = Path(site).parent.name
    candidates = [Path(home[1].strip()).parent / "include" / minor / "Python.h"] if home else []
    candidates.append(Path("/usr/include", minor, "Python.h"))
    return next((path for path in candidates if path.is_file()), None)
