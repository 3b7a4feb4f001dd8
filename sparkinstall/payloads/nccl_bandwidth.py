"""Measure all_gather between two nodes: RANK ADDRESS PORT BYTES SECONDS.

Both ends run it: rank 0 listens at ADDRESS, rank 1 connects. The smaller BYTES is gathered for SECONDS. Both ranks
print JSON: `bus` (GB/s), `size` (bytes), `right` (whether the received data is correct).
"""

# These imports exist in the node's environment only; torch is imported late.
# mypy: disable-error-code="import-not-found"

import datetime
import json
import socket
import sys
import time
from collections.abc import Callable

LIMIT = datetime.timedelta(seconds=60)


def main() -> None:
    rank, address, (port, most, seconds) = int(sys.argv[1]), sys.argv[2], map(int, sys.argv[3:])
    # Listen at this address only, and before torch is loaded: the other end may connect at once.
    listening = socket.create_server((address, port)).detach() if rank == 0 else None
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    store = dist.TCPStore(address, port, 2, rank == 0, LIMIT, master_listen_fd=listening, use_libuv=False)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=2, timeout=LIMIT)
    store.set(f"most-{rank}", str(most))
    size = min(int(store.get("most-0")), int(store.get("most-1")))
    part = torch.full((size // 2,), rank + 1, dtype=torch.uint8, device="cuda")
    whole = torch.zeros(size, dtype=torch.uint8, device="cuda")

    def gather() -> None:
        dist.all_gather_into_tensor(whole, part)

    timed(gather, 3, torch.cuda.synchronize)
    once = timed(gather, 5, torch.cuda.synchronize)
    if rank == 0:
        store.set("count", str(max(1, int(seconds / once))))
    took = timed(gather, int(store.get("count")), torch.cuda.synchronize)
    right = whole[: size // 2].eq(1).all() and whole[size // 2 :].eq(2).all()
    # Each of the two nodes sends half: bus bandwidth as defined by nccl-tests.
    print(json.dumps({"bus": size / 2 / took / 1e9, "size": size, "right": bool(right)}), flush=True)
    dist.barrier(device_ids=[0])
    dist.destroy_process_group()


def timed(do: Callable[[], None], count: int, synchronize: Callable[[], None]) -> float:
    """Return the mean seconds per call over `count` calls; `synchronize` waits for the GPU."""
    synchronize()
    began = time.perf_counter()
    for _ in range(count):
        do()
    synchronize()
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    main()
