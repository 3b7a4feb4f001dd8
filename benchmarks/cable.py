"""Two network namespaces with a cable at MTU 9000 between them, and what a copy over it takes."""

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import table
from tests.lab.commands import run

HEAD, WORKER = "192.168.177.1", "192.168.177.2"
HEAD_SPACE, WORKER_SPACE = "bench-head", "bench-worker"
SSH_PORT = "2222"
_CABLE = "cable"


@dataclass(frozen=True)
class Copied:
    """Seconds, CPU seconds of both sides, and bytes that left the head's interface."""

    seconds: float
    cpu: float
    sent: int


@contextmanager
def cable() -> Iterator[None]:
    """The namespaces, with their addresses."""
    for space in (HEAD_SPACE, WORKER_SPACE):
        run("ip", "netns", "add", space)
    try:
        end = ("type", "veth", "peer", "name", _CABLE, "netns", WORKER_SPACE)
        run("ip", "-n", HEAD_SPACE, "link", "add", _CABLE, *end)
        for space, address in ((HEAD_SPACE, HEAD), (WORKER_SPACE, WORKER)):
            run("ip", "-n", space, "address", "add", f"{address}/24", "dev", _CABLE)
            run("ip", "-n", space, "link", "set", _CABLE, "mtu", "9000", "up")
        yield
    finally:
        for space in (HEAD_SPACE, WORKER_SPACE):
            run("ip", "netns", "del", space)


def measured(way: Callable[[], None]) -> Copied:
    """What a copy takes."""
    began, cpu, sent = time.perf_counter(), _cpu(), _sent()
    way()
    return Copied(time.perf_counter() - began, _cpu() - cpu, _sent() - sent)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _sent() -> int:
    counter = f"/sys/class/net/{_CABLE}/statistics/tx_bytes"
    return int(run("ip", "netns", "exec", HEAD_SPACE, "cat", counter).stdout)


@contextmanager
def sshd(key: Path) -> Iterator[tuple[str, ...]]:
    """An ssh server at the head, with this key for both sides; the options of a client at the worker."""
    if not key.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    Path("/run/sshd").mkdir(exist_ok=True)
    options = ("-o", f"HostKey={key}", "-o", f"AuthorizedKeysFile={key}.pub", "-o", "StrictModes=no")
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") or "/usr/sbin/sshd"
    server = (program, "-D", "-f", "/dev/null", "-p", SSH_PORT, "-o", "UsePAM=no", *options)
    subsystem = ("-o", "Subsystem=sftp internal-sftp", "-o", "PermitRootLogin=yes")
    with subprocess.Popen(("ip", "netns", "exec", HEAD_SPACE, *server, *subsystem)) as running:
        time.sleep(0.5)
        quiet = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR")
        try:
            yield ("-i", str(key), *quiet)
        finally:
            running.terminate()


def copied_table(title: str, found: Mapping[str, list[Copied]], size: int) -> str:
    """The best run of each way to copy `size` bytes."""
    best = {name: min(rounds, key=lambda each: each.seconds) for name, rounds in found.items()}
    rows = [
        (name, f"{each.seconds:.1f} s", f"{size / each.seconds / 1e6:.0f} MB/s", f"{each.cpu:.1f} s",
         f"{each.sent / 1e9:.2f} GB")
        for name, each in best.items()
    ]  # fmt: skip
    return table(title, ("", "time", "speed", "CPU time of both sides", "sent by the head"), rows)


def machine() -> str:
    """What both sides and the cable share."""
    return f"{os.cpu_count()} cores, {os.uname().machine} for both sides and the cable"
