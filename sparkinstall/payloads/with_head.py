"""Run vLLM on a worker without Ray, and end it when the head's has ended: HEAD PORT PROGRAM...

vLLM (0.18) notices neither that its head has ended nor that it was started again: it stays, and the head waits.
"""

import os
import signal
import socket
import sys
import time


def main() -> None:
    head, port, program = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    vllm = os.getpid()
    if os.fork() == 0:
        attend(head, port)
        print(f"sparkinstall: vLLM on the head, {head}, has ended; this one is started again too", flush=True)
        if os.getppid() == vllm:
            # For systemd a TERM would be an orderly end, after which nothing is started again.
            os.kill(vllm, signal.SIGKILL)
        os._exit(0)
    os.execv(program[0], program)


def attend(head: str, port: int) -> None:
    """Return when what listens at the head has ended. A cable that is out for a while does not end it."""
    while True:
        try:
            link = socket.create_connection((head, port), timeout=10)
            break
        except OSError:
            time.sleep(1)
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Asked each minute: a head that was switched off and is back answers that it knows of no connection.
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 60), (socket.TCP_KEEPCNT, 127)):
        link.setsockopt(socket.IPPROTO_TCP, option, value)
    try:
        while link.recv(4096):
            pass
    except OSError:
        pass


if __name__ == "__main__":
    main()
