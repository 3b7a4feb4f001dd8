"""The speed and memory of `sparkinstall diagnose` on a large log, in its own process.

Three logs of the same size: a good one of vLLM, of which no line needs a closer look; one with a few failures; and the
worst case, in which every line is a failure.
"""

import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import Environment, plain_environ

GOOD, SOME, BAD = "a good log", "one failure in 10,000 lines", "a failure in every line"
SIZE = 1_000_000_000
"""Bytes of each log."""
_LINES = 50_000

_TALK = (
    "(APIServer pid={0}) INFO 11-21 16:{1:02}:{2:02} [loggers.py:259] Engine 000: Avg prompt throughput: {0}.3 "
    "tokens/s, Avg generation throughput: 42.1 tokens/s, Running: 3 reqs, Waiting: 0 reqs, GPU KV cache usage: 12.{1}%"
    ", Prefix cache hit rate: 88.1%",
    '(APIServer pid={0}) INFO:     127.0.0.1:{0} - "POST /v1/chat/completions HTTP/1.1" 200 OK',
    "spark-1:{0}:{0} [0] NCCL INFO Channel {1:02}/0 : 0[0] -> 1[0] [send] via NET/IB/0",
)
_FAILURE = (
    "(EngineCore pid={0}) ERROR 03-29 12:{1:02}:{2:02} [core.py:1099] torch.OutOfMemoryError: CUDA out of memory. "
    "Tried to allocate {0}.16 GiB. GPU 0 has a total capacity of 121.69 GiB of which 1.17 GiB is free."
)


@dataclass(frozen=True)
class Read:
    """One run: bytes, seconds of wall time, and the maximum memory of the process in MiB."""

    size: int
    seconds: float
    memory: float

    @property
    def rate(self) -> float:
        """MB/s."""
        return self.size / self.seconds / 1e6


def measure(tool: Environment, work: Path, size: int = SIZE) -> dict[str, Read]:
    """Read each kind of log, which is in the page cache and is removed afterwards."""
    return {kind: _read(tool, work, lines, size) for kind, lines in _KINDS.items()}


def _read(tool: Environment, work: Path, line: Callable[[int, random.Random], str], size: int) -> Read:
    log = work / "large.log"
    work.mkdir(parents=True, exist_ok=True)
    _write(log, line, size)
    try:
        return _run((tool.program("sparkinstall"), "diagnose", "--json", str(log)), log.stat().st_size)
    finally:
        log.unlink()


def _write(log: Path, line: Callable[[int, random.Random], str], size: int) -> None:
    """Repeat one block of different lines: generating a gigabyte must not take longer than reading it."""
    drawn = random.Random(0)
    block = "".join(f"{line(number, drawn)}\n" for number in range(_LINES)).encode()
    with log.open("wb") as out:
        while out.tell() < size:
            out.write(block)


def _good(_: int, drawn: random.Random) -> str:
    return drawn.choice(_TALK).format(drawn.randint(1, 9999), drawn.randint(0, 59), drawn.randint(0, 59))


def _some(number: int, drawn: random.Random) -> str:
    return _bad(number, drawn) if number % 10_000 == 0 else _good(number, drawn)


def _bad(_: int, drawn: random.Random) -> str:
    return _FAILURE.format(drawn.randint(1, 9999), drawn.randint(0, 59), drawn.randint(0, 59))


_KINDS: Mapping[str, Callable[[int, random.Random], str]] = {GOOD: _good, SOME: _some, BAD: _bad}


def _run(argv: tuple[str, ...], size: int) -> Read:
    """Run it, and ask the kernel for its memory; exit code 3 is a diagnosis, not an error."""
    started = time.perf_counter()
    pid = os.posix_spawn(
        argv[0], argv, plain_environ(), file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    _, status, used = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) not in (0, 3):
        raise RuntimeError(f"{argv[0]} diagnose ended with {os.waitstatus_to_exitcode(status)}")
    return Read(size, seconds, used.ru_maxrss / 1024)
