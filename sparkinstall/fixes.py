"""The numbered fixes of a DGX Spark. Steps and probes name the one they belong to; `core/fixes.py` has its state."""

from msgspec import Struct


class Fix(Struct, frozen=True):
    """A fix: the steps that name it apply it, the probes that name it verify it. `between`: needed only on several
    nodes."""

    number: int
    title: str
    between: bool = False


NCCL = Fix(1, "NCCL for this GPU, loaded by every process")
MTU = Fix(2, "MTU 9000 on the QSFP links", between=True)
HOST_IP = Fix(3, "VLLM_HOST_IP is the node's QSFP address", between=True)
TRANSPORT = Fix(4, "NCCL, Gloo and UCX take the QSFP link", between=True)
FP8 = Fix(5, "FP8 without CUTLASS kernels of another chip")
PACKAGES = Fix(6, "the same packages on every node")
MEMORY_MONITOR = Fix(7, "Ray's memory monitor off")
REASONING = Fix(8, "the reasoning field of a stream")
