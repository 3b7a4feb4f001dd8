"""What it means for the person at the machine when a check or a probe is not good: one sentence each."""

from collections.abc import Mapping

from sparkinstall.core import catalogue

PREFLIGHT: Mapping[str, str] = {
    "machine": "This tool's fixes are for a GB10. Nothing else is set up without `--ignore machine`.",
    "arch": "The wheels and the NCCL for a DGX Spark are for 64-bit Arm; they do not run here.",
    "os": "The packages of another system have other names and versions; the field has run none of them.",
    "driver": "Without a driver that answers there is no CUDA: vLLM ends at its start.",
    "cuda": "NCCL cannot be built for this GPU.",
    "sudo": "Parts that only root can see or change are left out.",
    "memory": "The models that a DGX Spark is bought for do not fit.",
    "python": "vLLM's environment cannot be made.",
    "disk": "The environment or a model's download will break off in the middle.",
    "clock": "Every download fails, for no certificate is valid at this time.",
    "prefix": "sparkinstall will not touch what others have put there, so it cannot set the node up.",
    "qsfp": "The nodes cannot talk over the fast link.",
}
"""By the name of a preflight check."""

STEPS: Mapping[str, str] = {
    "packages": "Triton compiles on this node, and fails without the headers and the compiler.",
    "network": "The nodes talk slowly, or not at all.",
    "environment": "vLLM may not start, or behave otherwise than on the other nodes.",
    "nccl": "Several nodes cannot start together: `Message truncated`, or a refused connection.",
    "firewall": "Ray and the API can be reached by everybody in the LAN.",
    "nccl-fit": "Processes may end with `undefined symbol` as soon as torch is imported.",
    "fp8": "FP8 models may end with `Error Internal`, or run slower than they could.",
    "env-files": "What is started with the env files does not have all of the fixes.",
    "ray": "vLLM cannot be spread over the nodes.",
    "serving": "The model is not served as it was asked for.",
}
"""By the name of a step: for its files, packages and services, and for those of its probes that have no sentence."""

PROBES: Mapping[str, str] = {
    "journal": "`sparkinstall all` stops before it starts, and `sparkinstall uninstall` restores nothing.",
    "link": "The nodes talk at half the speed, or not at all.",
    "peers": "Large packets are lost between the nodes: collectives hang or time out.",
    "link-health": "The link loses packets or runs below its rate: slow collectives, or ones that hang.",
    "gids": "NCCL falls back to sockets, or does not start: RoCE has no address to go by.",
    "tcp-bandwidth": "Collectives over sockets, and the loading of models, take longer than they need to.",
    "rdma-bandwidth": "A model on several nodes answers more slowly than it could.",
    "nccl-bandwidth": "A model on several nodes answers more slowly than it could.",
    "wheel-gate": "vLLM cannot load a model with these packages, whatever its settings are.",
    "reasoning-field": "A client may show no thinking, or show it as raw text.",
    "fp8-path": "FP8 models may end with `Error Internal`.",
    "imports": "vLLM does not start.",
    "triton-compiles": "vLLM ends at its first kernel, or at the first one of another shape.",
    "fp8-kernels": "FP8 models may end with `Error Internal`, or run slower than they could.",
    "fp8-product": "FP8 models answer wrongly, or end with `Error Internal`.",
    "nccl-loaded": "Nodes with different NCCLs end at the first collective: `Message truncated`.",
    "host-ip": "Ray and vLLM name this node differently: `Expected 2 unique IPs but got 3`.",
    "ray-nodes": "vLLM waits for GPUs that never come, and gives up.",
    "serving": "Requests get no answer, though the service may run and call itself healthy.",
    "serving-stream": "A client may show no thinking, or show it as raw text.",
    "serving-metrics": "Nobody sees how busy the model is, or how long it lets its users wait.",
    "wheel-files": "vLLM may run code that nobody has released, and behave like no other node.",
    "nccl-preload": "NCCL is another one than the node was set up with, or it is not loaded at all.",
    "running-env": "What runs has not got the variables that were set since: it needs a restart.",
    "running-nccl": "Nodes with different NCCLs end at the first collective: `Message truncated`.",
    "stranded-memory": "Memory is missing that no program uses: large models do not fit.",
    "gpu-xid": "The GPU or its link has failed: what runs on it ends, or hangs.",
    "pcie-fatal": "A card has been lost from its bus, or will be.",
    "driver-no-memory": "A model came close to the end of the memory, or beyond it.",
    "oom-killer": "The kernel has ended processes: perhaps the model, perhaps your ssh session.",
    "gpu-low-power": "The GPU runs at a fraction of its speed.",
    "gpu-driver": "Few have run this driver on this machine.",
    "connectx-pcie": "The link is slow though it looks healthy.",
    "memory-guard": "A model that grows too large freezes the whole machine.",
}
"""By the name of a probe."""

_HOSTS = "The machine itself stands in the way: no setting of vLLM or NCCL helps against it."


def of_probe(name: str, step: str) -> str:
    """What a bad probe means. `step`: the one that it belongs to; empty for one of the machine itself."""
    return PROBES.get(name) or STEPS.get(step) or _HOSTS


def stepless() -> set[str]:
    """Names that no step has any more."""
    return set(STEPS) - {step.name for step in catalogue.STEPS}
