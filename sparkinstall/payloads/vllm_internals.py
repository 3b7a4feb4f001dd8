"""Call vLLM's internals in a process of the node's environment: its address, its FP8 kernels, a product with each.

tests/fast/test_vllm_internals.py compares every name used here with the wheels of the shipped stacks. facts/vllm.py
has what is read from files.
"""

# These imports exist in the node's environment only.
# mypy: disable-error-code="import-not-found, misc"

import inspect
from dataclasses import fields
from typing import Any

WAYS = ("block", "per-tensor", "per-channel")
"""Kinds of scaling of weights and activations."""
_BLOCK = 128
_ROWS, _WIDE = 32, 256
# As in vLLM's CUDA platform, which cannot be imported without a driver.
_FIRST_WITH_FP8 = 89


def own_address() -> str:
    """Return the address that vLLM uses for this node; "" if vLLM finds none."""
    try:
        try:
            from vllm.utils.network_utils import get_ip
        except ImportError:
            from vllm.utils import get_ip
        return str(get_ip())
    except BaseException:
        return ""


def pretend_to_be(arch: int) -> None:
    """Set the GPU capability that vLLM selects kernels for, if there is no GPU.

    This is what a platform plugin does: the base class, with a given capability. The selection remains vLLM's own.
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


def configured() -> Any:
    """Return vLLM's config with `--enforce-eager`: some kernels read it, and compilation would take a minute."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    eager = CompilationConfig(mode=0, custom_ops=["all"])
    return set_current_vllm_config(VllmConfig(compilation_config=eager))


class Fp8Kernels:
    """The kernels of FP8 products that vLLM picks. Imports torch and vLLM's kernels once."""

    def __init__(self) -> None:
        import torch
        from vllm.model_executor.kernels import linear

        self.torch, self.linear = torch, linear

    def picked(self, name: str) -> str:
        """Return the name of the kernel for one kind of scaling, or of vLLM's function up to 0.19."""
        if name == "block" and not hasattr(self.linear, "_POSSIBLE_FP8_BLOCK_KERNELS"):
            return f"W8A8BlockFp8LinearOp.{_old_block().w8a8_blockscale_op.__name__}"
        kernels = self.linear._POSSIBLE_FP8_BLOCK_KERNELS if name == "block" else self.linear._POSSIBLE_FP8_KERNELS
        takes = inspect.signature(self.linear.choose_scaled_mm_linear_kernel).parameters
        scheme = {"quantization": "fp8_block_w8a8" if name == "block" else "fp8_w8a8"}
        more = scheme if "quantization" in takes else {}
        return str(self.linear.choose_scaled_mm_linear_kernel(self._layer_config(name), kernels, **more).__name__)

    def _layer_config(self, name: str) -> Any:
        config = self.linear.FP8ScaledMMLinearLayerConfig
        known = {each.name for each in fields(config)}
        return config(**{key: value for key, value in self._scheme(name).items() if key in known})

    def _scheme(self, name: str) -> dict[str, Any]:
        activation, weight = _scaling(name)
        both = {"activation_quant_key": activation, "weight_quant_key": weight}
        types = {"input_dtype": self.torch.bfloat16, "out_dtype": self.torch.bfloat16}
        return {**both, **types, "weight_shape": (_WIDE, _WIDE)}

    def product_error(self, name: str) -> float:
        """Return the relative error of a product with the kernel that vLLM picks."""
        torch = self.torch
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        x = torch.randn(_ROWS, _WIDE, device=device, dtype=torch.bfloat16)
        exact, weight, scale = self._weights(name, torch.randn(_WIDE, _WIDE, device=device) * 0.05)
        wanted = x.float() @ exact.t()
        found = self._multiplied(name, x, weight, scale).float()
        return float((found - wanted).norm() / wanted.norm())

    def _weights(self, name: str, real: Any) -> tuple[Any, Any, Any]:
        """Return the dequantized weights, the FP8 weights, and their scales."""
        parts, fp8 = _WIDE // _BLOCK, self.torch.float8_e4m3fn
        if name == "block":
            largest = real.abs().reshape(parts, _BLOCK, parts, _BLOCK).amax(dim=(1, 3))
        else:
            largest = real.abs().max() if name == "per-tensor" else real.abs().amax(dim=1, keepdim=True)
        scale = largest / self.torch.finfo(fp8).max
        spread = scale.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1) if name == "block" else scale
        short = (real / spread).to(fp8)
        return short.float() * spread, short, scale

    def _multiplied(self, name: str, x: Any, weight: Any, scale: Any) -> Any:
        nn = self.torch.nn
        if name == "block" and not hasattr(self.linear, "_POSSIBLE_FP8_BLOCK_KERNELS"):
            return _old_block().apply(input=x, weight=weight, weight_scale=scale)
        takes = inspect.signature(self.linear.init_fp8_linear_kernel).parameters
        scheme = {key: value for key, value in self._scheme(name).items() if key in takes}
        kernel, layer = self.linear.init_fp8_linear_kernel(**scheme), nn.Module()
        # Block-scaled kernels take the weights as (outputs, inputs), the others as (inputs, outputs).
        layer.weight = nn.Parameter(weight if name == "block" else weight.t(), requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)
        layer.input_scale = layer.input_scale_ub = None
        kernel.process_weights_after_loading(layer)
        return kernel.apply_weights(layer, x)


def _scaling(name: str) -> tuple[Any, Any]:
    """Return the scaling of activations and weights as vLLM's quantization keys."""
    from vllm.model_executor.layers.quantization.utils import quant_utils as q

    return {
        "block": lambda: (q.kFp8Dynamic128Sym, q.kFp8Static128BlockSym),
        "per-tensor": lambda: (q.kFp8DynamicTensorSym, q.kFp8StaticTensorSym),
        "per-channel": lambda: (q.kFp8DynamicTokenSym, q.kFp8StaticChannelSym),
    }[name]()


def _old_block() -> Any:
    from vllm.model_executor.layers.quantization.utils import fp8_utils, w8a8_utils
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    shapes = {"weight_group_shape": GroupShape(_BLOCK, _BLOCK), "act_quant_group_shape": GroupShape(1, _BLOCK)}
    supported = w8a8_utils.cutlass_block_fp8_supported()
    return fp8_utils.W8A8BlockFp8LinearOp(**shapes, cutlass_block_fp8_supported=supported)
