"""Run sparkinstall on an emulated processor: its limits of time are longer, all else is as on a node."""

import os
from collections.abc import Mapping
from typing import Any

from sparkinstall import payloads
from sparkinstall.__main__ import main
from sparkinstall.system import processes

FACTOR = 20
# The children of payloads/inspect_env.py have their own limit.
LIMIT = "_LIMIT = 120.0\n"

_answer, _start, _source = processes.answer, processes.start, payloads.source


def answer(
    argv: tuple[str, ...], env: Mapping[str, str], timeout: float, stdin: bytes = b""
) -> tuple[int, bytes, bytes]:
    return _answer(argv, env, timeout * FACTOR, stdin)


def start(argv: tuple[str, ...], env: Mapping[str, str], **popen: Any) -> Any:
    # Probes replace the environment, where qemu finds the processor to emulate.
    return _start(argv, {**env, "QEMU_CPU": os.environ["QEMU_CPU"]}, **popen)


def source(name: str) -> str:
    return _source(name).replace(LIMIT, f"_LIMIT = 120.0 * {FACTOR}\n")


if __name__ == "__main__":
    processes.answer, processes.start, payloads.source = answer, start, source
    main()
