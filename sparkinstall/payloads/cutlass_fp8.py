"""Try vLLM's CUTLASS FP8 product on the GPU: print `ready`, then JSON with `works` and `said`.

A kernel for another GPU may crash the process: then `ready` is the last line.
"""

# These imports exist in the node's environment only.
# mypy: disable-error-code="import-not-found"

import json

import torch
from vllm import _custom_ops as ops


def main() -> None:
    one = torch.ones(1, device="cuda")
    a = torch.randn(64, 128, device="cuda").to(torch.float8_e4m3fn)
    b = torch.randn(128, 64, device="cuda").t().contiguous().t().to(torch.float8_e4m3fn)
    torch.cuda.synchronize()
    print("ready", flush=True)
    try:
        found = ops.cutlass_scaled_mm(a, b, one, one, torch.bfloat16)
        good = bool(torch.allclose(found.float(), a.float() @ b.float(), rtol=0.05, atol=0.5))
        print(json.dumps({"works": good, "said": "" if good else "the product is wrong"}))
    except RuntimeError as error:
        print(json.dumps({"works": False, "said": str(error).splitlines()[0]}))


if __name__ == "__main__":
    main()
