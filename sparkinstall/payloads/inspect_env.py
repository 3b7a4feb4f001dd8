"""Inspect the node's environment from inside, for all probes of level gpu at once.

The environment's Python runs this text as a service would run it; sparkinstall cannot be imported there. torch and
vLLM are imported once. Whatever may crash the process (a kernel for another GPU) runs in a child, so that the other
answers still arrive.
"""

# These imports exist in the node's environment only.
# mypy: disable-error-code="import-not-found, misc"

import contextlib
import importlib
import inspect
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from sparkinstall.payloads.loaded_nccl import loaded_nccl
from sparkinstall.payloads.vllm_internals import WAYS, Fp8Kernels, configured, own_address, pretend_to_be

Target = dict[str, Any]
Facts = dict[str, Any]

# Time limit of a child in seconds: a first Triton kernel takes 2, the first use of a GPU up to 10.
_LIMIT = 120.0
# Free memory needed, in kB: twice what a CUDA context takes from the memory that all programs share.
_ROOM = 2 * 1024 * 1024


def main() -> None:
    """Answer the questions in argv[1] (JSON: modules, arch) with one line of JSON."""
    asked, out = json.loads(sys.argv[1]), os.dup(1)
    # Output of libraries must not mix with the answer.
    os.dup2(2, 1)
    answer: Facts = {"modules": {name: _imported(name) for name in asked["modules"]}}
    with tempfile.TemporaryDirectory() as folder:
        asked["folder"] = folder
        children = {part.__name__: start_child(part, asked) for part in (triton_kernel, fp8)}
        answer |= {
            "nccl": loaded_nccl(),
            "address": own_address(),
            "wanted_address": os.environ.get("VLLM_HOST_IP", ""),
        }
        answer |= {name: end_child(*child) for name, child in children.items()}
    os.write(out, json.dumps(answer).encode() + b"\n")


def _imported(name: str) -> Facts:
    try:
        return {"version": getattr(importlib.import_module(name), "__version__", "?")}
    except BaseException as error:
        return {"error": _in_words(error)}


def _in_words(error: BaseException) -> str:
    said = str(error).strip().splitlines() or [""]
    # The message of a compiler follows that of its caller.
    why = next((line for line in said if "fatal" in line and line != said[0]), "")
    return ": ".join(each.strip()[:300] for each in (type(error).__name__, said[0], why) if each)


# --- children


def start_child(part: Callable[[Target], Iterator[Facts]], asked: Target) -> tuple[int, int, float]:
    """Fork a child that runs `part`; return its process, the pipe with its facts (one line each), and its deadline."""
    reads, writes = os.pipe()
    if child := os.fork():
        os.close(writes)
        return child, reads, time.monotonic() + _LIMIT
    try:
        for facts in part(asked):
            os.write(writes, json.dumps(facts).encode() + b"\n")
    except BaseException as error:
        os.write(writes, json.dumps({"error": _in_words(error)}).encode() + b"\n")
    finally:
        os._exit(0)


def end_child(child: int, reads: int, until: float) -> Facts:
    """Return all facts of a child, with `ended` if it was killed or timed out."""
    said, late = _all_of(reads, until)
    if late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    facts: Facts = {}
    for line in said.splitlines():
        with contextlib.suppress(ValueError):
            facts |= json.loads(line)
    if late or os.WIFSIGNALED(status):
        facts["ended"] = f"no answer within {_LIMIT:g} s" if late else signal.Signals(os.WTERMSIG(status)).name
    return facts


def _all_of(reads: int, until: float) -> tuple[bytes, bool]:
    """Read a pipe to its end; return the bytes and whether the deadline passed first."""
    said = b""
    while select.select([reads], [], [], max(0.0, until - time.monotonic()))[0]:
        more = os.read(reads, 65536)
        if not more:
            return said, False
        said += more
    return said, True


def _without_gpu() -> str:
    """Return why nothing can run on a GPU here, or ""."""
    import torch

    if torch.cuda.is_available():
        with open("/proc/meminfo") as lines:
            free = int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
        return "" if free >= _ROOM else f"only {free // 1024} MiB of memory are available"
    if os.path.exists("/proc/driver/nvidia/version"):
        raise RuntimeError("the NVIDIA driver is loaded, but torch sees no GPU")
    return "no GPU"


# --- Triton

# Written to a file, because Triton reads the source of its kernels.
_KERNEL = """
import triton
import triton.language as tl

@triton.jit
def product(a, b, out, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = row * SIZE + column
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))
"""
_SIZE = 32


def triton_kernel(asked: Target) -> Iterator[Facts]:
    """Compile a matrix product in Triton; on a GPU, run it and compare the result."""
    os.environ["TRITON_CACHE_DIR"] = asked["folder"]
    with open(os.path.join(asked["folder"], "sparkinstall_kernel.py"), "w") as file:
        file.write(_KERNEL)
    sys.path.insert(0, asked["folder"])
    import triton

    kernel = importlib.import_module("sparkinstall_kernel").product
    why = _without_gpu()
    arch = int(asked["arch"]) if why else _capability()
    yield {"triton": triton.__version__, "arch": arch, "not_run": why, **_ptxas(arch)}
    yield {"target": _compiled(kernel, arch) if why else _ran(kernel)}


def _capability() -> int:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return int(major * 10 + minor)


def _ptxas(arch: int) -> Facts:
    """Return the assembler that Triton itself selects for `arch`."""
    from triton.backends.nvidia import compiler

    takes_arch = bool(inspect.signature(compiler.get_ptxas).parameters)
    tool = compiler.get_ptxas(arch) if takes_arch else compiler.get_ptxas()
    # A pair up to Triton 3.2, an object since.
    path, version = tool if isinstance(tool, tuple) else (tool.path, tool.version)
    return {"ptxas": os.path.realpath(path), "ptxas_version": version}


def _compiled(kernel: Any, arch: int) -> str:
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    types = {"a": "*fp16", "b": "*fp16", "out": "*fp32", "SIZE": "constexpr"}
    source = compiler.ASTSource(kernel, types, constexprs={"SIZE": _SIZE})
    return _target(compiler.compile(source, target=GPUTarget("cuda", arch, 32)))


def _ran(kernel: Any) -> str:
    import torch

    a, b = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.float16) for _ in range(2))
    out = torch.empty(_SIZE, _SIZE, device="cuda", dtype=torch.float32)
    compiled = kernel[(1,)](a, b, out, SIZE=_SIZE)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-2, atol=1e-2)
    return _target(compiled)


def _target(compiled: Any) -> str:
    """Return the target of the kernel's machine code. Raises KeyError if there is none."""
    found = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
    return found[1] if found and compiled.asm["cubin"] else ""


# --- FP8


def fp8(asked: Target) -> Iterator[Facts]:
    """Report the FP8 kernels that vLLM's own selection picks; on a GPU, also the error of a product with each."""
    if "vllm" not in sys.modules:
        yield {"not_asked": "vLLM cannot be imported"}
        return
    why = _without_gpu()
    if why == "no GPU":
        pretend_to_be(int(asked["arch"]))
    yield {"not_run": why, "given_arch": asked["arch"] if why == "no GPU" else ""}
    with configured():
        kernels = Fp8Kernels()
        yield {"picked": {name: kernels.picked(name) for name in WAYS}}
        off_by: dict[str, float] = {}
        for name in () if why else ("per-tensor", "per-channel", "block"):
            yield {"trying": name}
            off_by[name] = kernels.product_error(name)
            yield {"off_by": off_by}
        yield {"trying": ""}


if __name__ == "__main__":
    main()
