"""The wheel gate: what every stack must pass before it is called installed (spec: torch, CUDA, triton, ray, Python.h).

Everything is read from files, so that it also tells of wheels for another architecture.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from sparkinstall import elf
from sparkinstall.node import Node, site_packages
from sparkinstall.probes import Finding, failed, passed
from sparkinstall.stacks import Pin
from sparkinstall.system import Reader

_TORCH_CUDA = re.compile(rb"^cuda\s*(?::[^=]+)?=\s*['\"](\d+)\.", re.MULTILINE)
_CUDART = re.compile(r"libcudart\.so\.(\d+)")
_LOCAL_CUDA = re.compile(r"\+cu(\d+)\d")
_REMAKE = "choose another stack with --stack, or report it: the stack's lock is wrong for this machine"


class Gate(Struct, frozen=True):
    """The questions for one environment; `pins` is its lock, asked where a rehearsal has not installed it all."""

    node: Node
    pins: Sequence[Pin]

    def look(self, on: Reader) -> Finding:
        """Pass with a summary, or fail with the first reason in words."""
        site = site_packages(self.node, on)
        if site is None:
            return failed("there is no environment", "run `sparkinstall all`")
        if not has_vllm(on, site):
            return failed("vllm is not installed", "run `sparkinstall all`")
        if not self.pins:
            return failed("there is no lock yet for these wheels", "run `sparkinstall all`")
        questions: tuple[Callable[[Reader, str], str | None], ...] = (
            self._torch_is_cuda, self._cuda_is_one, self._triton, self._ray, self._headers,
        )  # fmt: skip
        for ask in questions:
            complaint = ask(on, site)
            if complaint:
                return failed(complaint, _REMAKE, "a stack that fits together")
        return passed(self._summary(on, site))

    def _summary(self, on: Reader, site: str) -> str:
        where = "by the lock" if self.node.partial else "installed"
        return f"CUDA {self._torch_major(on, site)} in torch ({where}) and in vLLM's extension; triton, ray there"

    def _torch_major(self, on: Reader, site: str) -> str | None:
        if not self.node.partial:
            match = _TORCH_CUDA.search(on.read(f"{site}/torch/version.py") or b"")
            return match[1].decode() if match else None
        for pin in self.pins:
            if pin.name == "torch" and (local := _LOCAL_CUDA.search(pin.version)):
                return local[1]
        return next((_runtime_major(pin) for pin in self.pins if pin.name.startswith("nvidia-cuda-runtime")), None)

    def _torch_is_cuda(self, on: Reader, site: str) -> str | None:
        if self._torch_major(on, site):
            return None
        return f"torch {self._version('torch')} is a build without CUDA: it cannot use the GPU"

    def _cuda_is_one(self, on: Reader, site: str) -> str | None:
        torch, needed = self._torch_major(on, site), cudart_of_vllm(on, site)
        if not needed:
            return "vLLM's compiled extension is missing"
        if needed != {torch}:
            return (
                f"vLLM's extension needs libcudart.so.{'/'.join(sorted(needed))}, "
                f"but torch {self._version('torch')} brings CUDA {torch}"
            )
        return None

    def _triton(self, on: Reader, site: str) -> str | None:
        return None if self._has(on, site, "triton") else "triton is missing: models cannot be inspected or run"

    def _ray(self, on: Reader, site: str) -> str | None:
        return None if self._has(on, site, "ray") else "ray is missing: vLLM no longer brings it along"

    def _has(self, on: Reader, site: str, name: str) -> bool:
        if self.node.partial:
            return any(pin.name == name for pin in self.pins)
        return on.entry(f"{site}/{name}/__init__.py") is not None

    def _headers(self, on: Reader, site: str) -> str | None:
        if self.node.partial or self.node.foreign:
            return None
        header = python_header(on, self.node, site)
        if header:
            return None
        return f"Python.h is missing: Triton compiles its launcher here (package python{self.node.stack.python}-dev)"

    def _version(self, name: str) -> str:
        return next((pin.version for pin in self.pins if pin.name == name), "?")


def _runtime_major(pin: Pin) -> str | None:
    """`nvidia-cuda-runtime-cu12` carries the major in its name, `nvidia-cuda-runtime` in its version."""
    named = re.search(r"-cu(\d+)$", pin.name)
    return named[1] if named else pin.version.split(".")[0]


def has_vllm(on: Reader, site: str) -> bool:
    """Whether vLLM is installed there, as its dist-info says: an installation that broke off has none."""
    return any(name.startswith("vllm-") and name.endswith(".dist-info") for name in on.names(site))


def extensions(on: Reader, site: str) -> tuple[Path, ...]:
    """vLLM's compiled extensions, as real paths."""
    names = on.names(f"{site}/vllm")
    return tuple(Path(on.real(f"{site}/vllm/{n}")) for n in names if n.startswith("_C") and n.endswith(".so"))


def cudart_of_vllm(on: Reader, site: str) -> set[str]:
    """The majors N of the libcudart.so.N that vLLM's extensions need; empty where there is none."""
    needed = {name for path in extensions(on, site) for name in elf.needed(path)}
    return {match[1] for name in needed if (match := _CUDART.match(name))}


def python_header(on: Reader, node: Node, site: str) -> Path | None:
    """Python.h of the interpreter that the environment was made with."""
    config = (on.read(f"{node.venv}/pyvenv.cfg") or b"").decode(errors="replace")
    home = re.search(r"^home\s*=\s*(.+)$", config, re.MULTILINE)
    minor = Path(site).parent.name
    candidates = [Path(home[1].strip()).parent / "include" / minor / "Python.h"] if home else []
    candidates.append(Path("/usr/include", minor, "Python.h"))
    return next((path for path in candidates if path.is_file()), None)
