"""Check whether the installed wheels are compatible: torch, CUDA, Triton, Ray, Python.h.

Everything is read from files, so it works for wheels of another architecture too.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from msgspec import Struct

from sparkinstall.facts.vllm import cuda_majors
from sparkinstall.node import Node, site_packages
from sparkinstall.stacks import Pin
from sparkinstall.system import Reader

_TORCH_CUDA = re.compile(rb"^cuda\s*(?::[^=]+)?=\s*['\"](\d+)\.", re.MULTILINE)
OTHER_STACK = "choose another stack with --stack, or report it: the stack's lock is wrong for this machine"
"""Hint for incompatible wheels."""
_LOCAL_CUDA = re.compile(r"\+cu(\d+)\d")


class Gate(Struct, frozen=True):
    """The checks for one environment; `pins` is its lock. `seen`: where the answers come from, in words."""

    node: Node
    pins: Sequence[Pin]
    seen: ClassVar[str] = "installed"

    def complaint(self, on: Reader) -> str:
        """Return the first reason why these wheels are incompatible, or ""."""
        site = site_packages(self.node, on)
        if site is None:
            return "there is no environment"
        questions: tuple[Callable[[Reader, str], str], ...] = (
            self._torch_is_cuda, self._cuda_is_one, self._triton, self._ray, self._headers,
        )  # fmt: skip
        return next((complaint for ask in questions if (complaint := ask(on, site))), "")

    def torch_major(self, on: Reader, site: str) -> str | None:
        """Return the major version of torch's CUDA; None for a build without CUDA."""
        match = _TORCH_CUDA.search(on.read(f"{site}/torch/version.py") or b"")
        return match[1].decode() if match else None

    def _torch_is_cuda(self, on: Reader, site: str) -> str:
        if self.torch_major(on, site):
            return ""
        return f"torch {self._version('torch')} is a build without CUDA: it cannot use the GPU"

    def _cuda_is_one(self, on: Reader, site: str) -> str:
        torch, needed = self.torch_major(on, site), cuda_majors(on, site)
        if not needed:
            return "vLLM's compiled extension is missing"
        if needed != {torch}:
            return (
                f"vLLM's extension needs libcudart.so.{'/'.join(sorted(needed))}, "
                f"but torch {self._version('torch')} brings CUDA {torch}"
            )
        return ""

    def _triton(self, on: Reader, site: str) -> str:
        return "" if self._has(on, site, "triton") else "triton is missing: models cannot be inspected or run"

    def _ray(self, on: Reader, site: str) -> str:
        return "" if self._has(on, site, "ray") else "ray is missing: vLLM no longer depends on it"

    def _has(self, on: Reader, site: str, name: str) -> bool:
        return on.entry(f"{site}/{name}/__init__.py") is not None

    def _headers(self, on: Reader, site: str) -> str:
        if self.node.foreign or python_header(on, self.node, site):
            return ""
        return f"Python.h is missing: Triton compiles its launcher here (package python{self.node.stack.python}-dev)"

    def _version(self, name: str) -> str:
        return next((pin.version for pin in self.pins if pin.name == name), "?")


class GateByLock(Gate, frozen=True):
    """The same where a rehearsal has installed vLLM's wheel alone: the lock answers for the rest."""

    seen: ClassVar[str] = "by the lock"

    def torch_major(self, on: Reader, site: str) -> str | None:
        del on, site
        for pin in self.pins:
            if pin.name == "torch" and (local := _LOCAL_CUDA.search(pin.version)):
                return local[1]
        return next((_runtime_major(pin) for pin in self.pins if pin.name.startswith("nvidia-cuda-runtime")), None)

    def _has(self, on: Reader, site: str, name: str) -> bool:
        del on, site
        return any(pin.name == name for pin in self.pins)

    def _headers(self, on: Reader, site: str) -> str:
        del on, site
        return ""


def gate_of(node: Node, pins: Sequence[Pin]) -> Gate:
    """The gate of this node's environment, whose lock is `pins`."""
    return GateByLock(node, pins) if node.partial else Gate(node, pins)


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
