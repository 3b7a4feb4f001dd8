"""Run vLLM on a worker without Ray, and end it when the head's vLLM ends: HEAD PORT PROGRAM...

vLLM (0.18) does not notice that its head has ended or restarted: it keeps running, and the head waits for it.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

# A unit has some twenty processes.
_LINES = 100


def main() -> None:
    head, port, program = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    vllm = os.getpid()
    if os.fork() == 0:
        attend(head, port)
        print(f"sparkinstall: vLLM on the head {head} has ended; this one restarts too", flush=True)
        for line in islice(states(), _LINES):
            print(f"sparkinstall: {line}", flush=True)
        if os.getppid() == vllm:
            # systemd would count SIGTERM as a clean exit and not restart the unit.
            os.kill(vllm, signal.SIGKILL)
        os._exit(0)
    os.execv(program[0], program)


def attend(head: str, port: int) -> None:
    """Return when the process that listens at the head has ended. A briefly unplugged cable does not count."""
    while True:
        try:
            link = socket.create_connection((head, port), timeout=10)
            break
        except OSError:
            time.sleep(1)
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Keepalive each minute: a head that was off and is back resets the unknown connection.
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 60), (socket.TCP_KEEPCNT, 127)):
        link.setsockopt(socket.IPPROTO_TCP, option, value)
    try:
        while link.recv(4096):
            pass
    except OSError:
        pass


def states() -> Iterator[str]:
    """Yield what each process of this control group does: a rank that hangs may be why the head was restarted."""
    own = Path("/proc/self/cgroup").read_text()
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda each: int(each.name), reverse=True):
        with suppress(OSError):
            if (folder / "cgroup").read_text() == own:
                status = (folder / "status").read_text().splitlines()
                has = dict(line.partition(":\t")[::2] for line in status)
                waits = (folder / "wchan").read_text().strip()
                yield f"until then {has['Name']} (pid {folder.name}) was {has['State']}, in the kernel at {waits}"


if __name__ == "__main__":
    main()
