"""What a process of the node's environment says of itself, for all probes of level gpu at once.

The environment's own Python is given this text (processes.py), started as a service would be: nothing of
sparkinstall is to be had there. torch and vLLM are imported once. What may take its process with it (a kernel
for another chip) is asked in a child of this one, so that the other answers come through all the same.
"""

# What is imported here is the environment's, not ours.
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

Target = dict[str, Any]
Facts = dict[str, Any]

# Seconds for a child: a first Triton kernel takes 2, the first use of a GPU up to 10.
_LIMIT = 120.0
# A context on the GPU takes half of this from a memory that all programs share; in kB.
_ROOM = 2 * 1024 * 1024


def main() -> None:
    """Answer the questions in argv[1] (JSON: modules, arch) with one line of JSON."""
    asked, out = json.loads(sys.argv[1]), os.dup(1)
    # What libraries print must not get between the lines of the answer.
    os.dup2(2, 1)
    answer: Facts = {"modules": {name: _imported(name) for name in asked["modules"]}}
    with tempfile.TemporaryDirectory() as folder:
        asked["folder"] = folder
        children = {part.__name__: start_child(part, asked) for part in (triton_kernel, fp8)}
        answer |= {"nccl": loaded_nccl(), "address": _address(), "wanted_address": os.environ.get("VLLM_HOST_IP", "")}
        answer |= {name: end_child(*child) for name, child in children.items()}
    os.write(out, json.dumps(answer).encode() + b"\n")


def _imported(name: str) -> Facts:
    try:
        return {"version": getattr(importlib.import_module(name), "__version__", "?")}
    except BaseException as error:
        return {"error": _in_words(error)}


def _in_words(error: BaseException) -> str:
    said = str(error).strip().splitlines() or [""]
    # A compiler's own complaint stands behind that of whoever called it.
    why = next((line for line in said if "fatal" in line and line != said[0]), "")
    return ": ".join(each.strip()[:300] for each in (type(error).__name__, said[0], why) if each)


def _address() -> str:
    try:
        try:
            from vllm.utils.network_utils import get_ip
        except ImportError:
            from vllm.utils import get_ip
        return str(get_ip())
    except BaseException:
        return ""


# --- children


def start_child(part: Callable[[Target], Iterator[Facts]], asked: Target) -> tuple[int, int, float]:
    """A child that answers `part`: its process, where it says what it finds (one line each), and until when."""
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
    """All that a child found; with `ended` where something else than its last line was its end."""
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
    """What was written to a pipe up to its end, and whether that was waited for in vain."""
    said = b""
    while select.select([reads], [], [], max(0.0, until - time.monotonic()))[0]:
        more = os.read(reads, 65536)
        if not more:
            return said, False
        said += more
    return said, True


def _without_gpu() -> str:
    """Why nothing can run on a GPU here, or nothing."""
    import torch

    if torch.cuda.is_available():
        with open("/proc/meminfo") as lines:
            free = int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
        return "" if free >= _ROOM else f"only {free // 1024} MiB of memory are available"
    if os.path.exists("/proc/driver/nvidia/version"):
        raise RuntimeError("the NVIDIA driver is loaded, but torch sees no GPU")
    return "no GPU"


# --- Triton

# In a file of its own: Triton reads the source of its kernels.
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
    """A matrix product in Triton: compiled now, and on a GPU run and compared."""
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
    """The assembler that Triton's own code takes for `arch`."""
    from triton.backends.nvidia import compiler

    takes_arch = bool(inspect.signature(compiler.get_ptxas).parameters)
    tool = compiler.get_ptxas(arch) if takes_arch else compiler.get_ptxas()
    # Up to 3.2 a pair, later an object.
    path, version = tool if isinstance(tool, tuple) else (tool.path, tool.version)
    return {"ptxas": os.path.realpath(path), "ptxas_version": version}


def _compiled(kernel: Any, arch: int) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"a": "*fp16", "b": "*fp16", "out": "*fp32", "SIZE": "constexpr"}
    source = ASTSource(kernel, types, constexprs={"SIZE": _SIZE})
    return _target(triton.compile(source, target=GPUTarget("cuda", arch, 32)))


def _ran(kernel: Any) -> str:
    import torch

    a, b = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.float16) for _ in range(2))
    out = torch.empty(_SIZE, _SIZE, device="cuda", dtype=torch.float32)
    compiled = kernel[(1,)](a, b, out, SIZE=_SIZE)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-2, atol=1e-2)
    return _target(compiled)


def _target(compiled: Any) -> str:
    """What the kernel was assembled for; raises KeyError where there is no machine code."""
    found = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
    return found[1] if found and compiled.asm["cubin"] else ""


# --- FP8

_BLOCK = 128
_ROWS, _WIDE = 32, 256
# As vLLM's own platform for CUDA has it, which cannot be had where there is no driver.
_FIRST_WITH_FP8 = 89


def fp8(asked: Target) -> Iterator[Facts]:
    """The kernels that vLLM picks for FP8, by its own selection; on a GPU, a product of each with them."""
    if "vllm" not in sys.modules:
        yield {"not_asked": "vLLM cannot be imported"}
        return
    why = _without_gpu()
    if why == "no GPU":
        _pretend_to_be(int(asked["arch"]))
    yield {"not_run": why, "given_arch": asked["arch"] if why == "no GPU" else ""}
    with _configured():
        yield {"picked": {name: _picked(name) for name in ("block", "per-tensor", "per-channel")}}
        for name in () if why else ("per-tensor", "per-channel", "block"):
            yield {"trying": name}
            yield {f"off_by {name}": _product(name)}
        yield {"trying": ""}


def _pretend_to_be(arch: int) -> None:
    """Tell vLLM which GPU to choose for, where there is none that it could ask.

    As a platform plugin does (its entry point for hardware that it does not know): the base class, with the
    capability given. All that chooses is vLLM's own.
    """
    from vllm import platforms
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class Given(Platform):
        _enum = PlatformEnum.CUDA
        device_name = device_type = "cuda"
        dispatch_key = "CUDA"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            del device_id
            return DeviceCapability(*divmod(arch, 10))

        @classmethod
        def supports_fp8(cls) -> bool:
            return arch >= _FIRST_WITH_FP8

    platforms.current_platform = Given()


def _configured() -> Any:
    """vLLM's settings as `--enforce-eager` makes them: some kernels look there before they agree, and none is to be
    compiled here for a minute first."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    eager = CompilationConfig(mode=0, custom_ops=["all"])
    return set_current_vllm_config(VllmConfig(compilation_config=eager))


def _picked(name: str) -> str:
    """The name of the kernel for one way of scaling, or of vLLM's own function up to 0.19."""
    from vllm.model_executor.kernels import linear

    if name == "block" and not hasattr(linear, "_POSSIBLE_FP8_BLOCK_KERNELS"):
        return f"W8A8BlockFp8LinearOp.{_old_block().w8a8_blockscale_op.__name__}"
    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS if name == "block" else linear._POSSIBLE_FP8_KERNELS
    takes = inspect.signature(linear.choose_scaled_mm_linear_kernel).parameters
    scheme = {"quantization": "fp8_block_w8a8" if name == "block" else "fp8_w8a8"}
    more = scheme if "quantization" in takes else {}
    return str(linear.choose_scaled_mm_linear_kernel(_layer_config(name), kernels, **more).__name__)


def _keys(name: str) -> tuple[Any, Any]:
    """How activations and weights are scaled, in vLLM's words."""
    from vllm.model_executor.layers.quantization.utils import quant_utils as q

    return {
        "block": lambda: (q.kFp8Dynamic128Sym, q.kFp8Static128BlockSym),
        "per-tensor": lambda: (q.kFp8DynamicTensorSym, q.kFp8StaticTensorSym),
        "per-channel": lambda: (q.kFp8DynamicTokenSym, q.kFp8StaticChannelSym),
    }[name]()


def _layer_config(name: str) -> Any:
    from dataclasses import fields

    from vllm.model_executor.kernels.linear import FP8ScaledMMLinearLayerConfig

    known = {each.name for each in fields(FP8ScaledMMLinearLayerConfig)}
    return FP8ScaledMMLinearLayerConfig(**{key: value for key, value in _said(name).items() if key in known})


def _said(name: str) -> Facts:
    import torch

    activation, weight = _keys(name)
    both = {"activation_quant_key": activation, "weight_quant_key": weight}
    return {**both, "input_dtype": torch.bfloat16, "out_dtype": torch.bfloat16, "weight_shape": (_WIDE, _WIDE)}


def _old_block() -> Any:
    from vllm.model_executor.layers.quantization.utils import fp8_utils, w8a8_utils
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    shapes = {"weight_group_shape": GroupShape(_BLOCK, _BLOCK), "act_quant_group_shape": GroupShape(1, _BLOCK)}
    supported = w8a8_utils.cutlass_block_fp8_supported()
    return fp8_utils.W8A8BlockFp8LinearOp(**shapes, cutlass_block_fp8_supported=supported)


def _product(name: str) -> float:
    """How far a product with the kernel that vLLM picks is from the exact one, relative to it."""
    import torch

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(_ROWS, _WIDE, device=device, dtype=torch.bfloat16)
    exact, weight, scale = _weights(name, torch.randn(_WIDE, _WIDE, device=device) * 0.05)
    wanted = x.float() @ exact.t()
    found = _multiplied(name, x, weight, scale).float()
    return float((found - wanted).norm() / wanted.norm())


def _weights(name: str, real: Any) -> tuple[Any, Any, Any]:
    """Weights as FP8 stands for them, the FP8 numbers, and their scales."""
    import torch

    parts = _WIDE // _BLOCK
    if name == "block":
        largest = real.abs().reshape(parts, _BLOCK, parts, _BLOCK).amax(dim=(1, 3))
    else:
        largest = real.abs().max() if name == "per-tensor" else real.abs().amax(dim=1, keepdim=True)
    scale = largest / torch.finfo(torch.float8_e4m3fn).max
    spread = scale.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1) if name == "block" else scale
    short = (real / spread).to(torch.float8_e4m3fn)
    return short.float() * spread, short, scale


def _multiplied(name: str, x: Any, weight: Any, scale: Any) -> Any:
    import torch
    from vllm.model_executor.kernels import linear

    if name == "block" and not hasattr(linear, "_POSSIBLE_FP8_BLOCK_KERNELS"):
        return _old_block().apply(input=x, weight=weight, weight_scale=scale)
    takes = inspect.signature(linear.init_fp8_linear_kernel).parameters
    kernel = linear.init_fp8_linear_kernel(**{key: value for key, value in _said(name).items() if key in takes})
    layer = torch.nn.Module()
    # Only block scales come with the weights in rows of outputs; the others want the inputs first.
    layer.weight = torch.nn.Parameter(weight if name == "block" else weight.t(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    layer.input_scale = layer.input_scale_ub = None
    kernel.process_weights_after_loading(layer)
    return kernel.apply_weights(layer, x)


if __name__ == "__main__":
    main()
