"""Fix 5: decide once per build of vLLM whether it must avoid its CUTLASS FP8 kernels, and patch it."""

import mmap
import re
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from sparkinstall import elf, patches, payloads
from sparkinstall.errors import CommandFailed
from sparkinstall.facts.decisions import Fp8Fallback, as_text, recorded
from sparkinstall.facts.gpu import DRIVER_FILE
from sparkinstall.facts.vllm import FP8_OPERATOR, extensions
from sparkinstall.node import Node, site_packages
from sparkinstall.patches import PatchSet, UnknownContent
from sparkinstall.resources import Conflict, Drift, Ok, State, Unknown
from sparkinstall.system import Reader, Result, System


class Fp8Decision(Struct, frozen=True):
    """The file `node.fp8_decision`: whether the fallback is on, why, and for which build of vLLM."""

    key: ClassVar[str] = "fp8-decision"
    node: Node
    kernels: tuple[str, ...]

    def check(self, on: Reader) -> State:
        about = self.about(on)
        if about is None:
            return Unknown("environment")
        known = recorded(on, self.node.fp8_decision, Fp8Fallback)
        if known and known.about == about:
            return Ok(f"fallback {'on' if known.fallback else 'off'}: {known.why}")
        return Drift(
            "determine whether vLLM's CUTLASS FP8 kernels run here", as_text(known and known.about), as_text(about)
        )

    def about(self, on: Reader) -> dict[str, Any] | None:
        """Return what the decision depends on; None before vLLM is installed."""
        site = site_packages(self.node, on)
        built = [(path.name, path.stat().st_size) for path in extensions(on, site)] if site else []
        if not built:
            return None
        return {
            "vllm": self.node.stack.vllm,
            "extensions": [f"{name} {size}" for name, size in built],
            "arch": self.node.config.nccl.arch,
            "driver": _driver(on),
            "asked": self.node.config.fp8.fallback,
        }

    def apply(self, on: System) -> None:
        fallback, why, how = self._decide(on)
        decision = Fp8Fallback(fallback, why, how, self.kernels if fallback else (), self.about(on) or {})
        on.write(self.node.fp8_decision, as_text(decision).encode())

    def _decide(self, on: System) -> tuple[bool, str, str]:
        asked = self.node.config.fp8.fallback
        if asked != "auto":
            return asked == "on", f"`fp8.fallback: {asked}`", "config"
        if _driver(on):
            return self._try_on_gpu(on)
        return self._read_code(on)

    def _try_on_gpu(self, on: System) -> tuple[bool, str, str]:
        command = (on.real(self.node.python), "-c", payloads.source("cutlass_fp8"))
        answer = on.ask(*command, timeout=300, env=self.node.bare_environment)
        lines = answer.out.splitlines()
        if "ready" not in lines or answer.code == 124:
            raise CommandFailed(
                "vLLM's CUTLASS FP8 kernels could not be tried on the GPU",
                cause=answer.last_line or f"exit code {answer.code}",
                hint="check that `nvidia-smi` works and the GPU is free, or set `fp8.fallback` to `on` or `off`",
            )
        return _verdict(lines[-1], answer)

    def _read_code(self, on: System) -> tuple[bool, str, str]:
        site = site_packages(self.node, on) or ""
        carriers = [path for path in extensions(on, site) if _mentions(path, FP8_OPERATOR)]
        found = {code.arch for path in carriers for code in elf.gpu_code(path) if code.kind == "cubin"}
        arch = self.node.config.nccl.arch
        usable = sorted(found & loadable(arch))
        if usable:
            return False, f"vLLM's extension contains {', '.join(usable)}, which loads on sm_{arch}", "code"
        near = ", ".join(sorted(each for each in found if each.startswith(f"sm_{arch[:-1]}"))) or "no code"
        return True, f"vLLM's extension contains {near} only, which does not run on sm_{arch}", "code"


def _driver(on: Reader) -> str:
    """Return the kernel's line about its NVIDIA driver; "" if there is none, as in a rehearsal."""
    said = b"" if on.rehearsal else on.read(DRIVER_FILE) or b""
    return said.decode(errors="replace").split("\n")[0]


def loadable(arch: str) -> set[str]:
    """Return the architecture-specific code that runs on `arch` ("121"): its own and its family's.

    Plain `sm_120` code would load too, but CUTLASS's FP8 kernels are never built for it.
    """
    number = re.match(r"\d+", arch)
    digits = number[0] if number else arch
    family = {f"sm_{digits[:-1]}{minor}f" for minor in range(int(digits[-1]) + 1)}
    return family | {f"sm_{digits}a"}


class _Tried(Struct, frozen=True):
    """The reply of payloads/cutlass_fp8.py."""

    works: bool
    said: str


def _verdict(last: str, answer: Result) -> tuple[bool, str, str]:
    if last == "ready":
        return True, f"cutlass_scaled_mm crashed its process: {answer.last_line or f'exit code {answer.code}'}", "gpu"
    tried = msgspec.json.decode(last, type=_Tried)
    if tried.works:
        return False, "cutlass_scaled_mm returned the right product on this GPU", "gpu"
    return True, f"cutlass_scaled_mm failed on this GPU: {tried.said}", "gpu"


def _mentions(path: Path, name: bytes) -> bool:
    with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name) >= 0


class PatchedFile(Struct, frozen=True):
    """One file of the environment, patched or original, according to `node.fp8_decision`."""

    node: Node
    patch: PatchSet

    @property
    def key(self) -> str:
        return f"patch:{self.patch.target}"

    def check(self, on: Reader) -> State:
        path = self._path(on)
        decision = recorded(on, self.node.fp8_decision, Fp8Fallback)
        if path is None or decision is None:
            return Unknown("environment" if path is None else "fp8-decision")
        now = on.read(path) or b""
        try:
            wanted = self._wanted(now, decision.fallback)
        except UnknownContent as problem:
            return Conflict(str(problem), hint="reinstall the stack: `sparkinstall run environment --force`")
        if now == wanted:
            return Ok("patched" if decision.fallback else "original: CUTLASS runs here")
        verb = "patch" if decision.fallback else "revert the patch of"
        return Drift(f"{verb} {self.patch.target}", now.decode(), wanted.decode())

    def _path(self, on: Reader) -> str | None:
        site = site_packages(self.node, on)
        path = f"{site}/{self.patch.target}"
        return path if site and on.entry(path) else None

    def _wanted(self, now: bytes, fallback: bool) -> bytes:
        variant = self.patch.known(now)
        if fallback == (patches.digest(now) == variant.patched):
            return now
        return patches.apply(now, variant) if fallback else patches.revert(now, variant)

    def apply(self, on: System) -> None:
        path, decision = self._path(on), recorded(on, self.node.fp8_decision, Fp8Fallback)
        assert path and decision, "the engine applies no Unknown"
        on.write(path, self._wanted(on.read(path) or b"", decision.fallback))
