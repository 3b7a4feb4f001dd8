"""Keep the GPU busy with matrix products; after three seconds run the program in argv and print its output."""

# These imports exist in the node's environment only.
# mypy: disable-error-code="import-not-found"

import subprocess
import sys
import time

import torch


def main() -> None:
    numbers, began = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16), time.monotonic()
    asked = None
    while asked is None or asked.poll() is None:
        for _ in range(20):
            numbers @ numbers
        torch.cuda.synchronize()
        if asked is None and time.monotonic() - began > 3:
            asked = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
    sys.stdout.buffer.write(asked.communicate()[0])


if __name__ == "__main__":
    main()
